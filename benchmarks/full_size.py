"""Compile a network of full size layer by layer, with random weights: seconds, memory and bytes.

Writes the weights to shards of safetensors first (bfloat16, normal, 1 / sqrt(inputs)), compiles
them in a process of its own with --stream, and keeps what each phase took. Memory is what the
kernel counted at most (VmHWM), of which the base is what imports alone take; disk is the most that
the process's files took at once, looked at every second, the weights not counted.

    python benchmarks/full_size.py examples/configs/sdxl.json
    python benchmarks/full_size.py examples/configs/flux-dev.json \\
        --config examples/configs/w4a16-plain.toml --batch 1 --work /big
    python benchmarks/full_size.py examples/configs/flux-dev.json --plan    # without weights

With --kill, builds are killed (SIGKILL) at random moments first, and the last one goes on from what
they have left; the artifact's checksums are compared with those of the folder's last one.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from full_size_network import drawn as drawn  # prune_sweep.py draws like this
from full_size_network import write_network
from rich.console import Console

from effuse.evaluate import machine
from effuse.inspect_model import resolve
from effuse.progress import Phases, phases
from effuse.weights import FILE

STATUS = Path("/proc/self/status")
STEPS = 30
GIB = 2**30
KEPT = {"network", "out", "found.json", "last"}
GOAL = 1 / 3  # of the weights' bytes, at most, for the peak of memory


def inputs_of(network: torch.nn.Module, arguments: argparse.Namespace) -> dict[str, Any]:
    """Example inputs: derived from the config, or of the shapes given."""
    from effuse.examples import derive_inputs

    if not arguments.input:
        asked = {"batch": arguments.batch, "size": arguments.size}
        return derive_inputs(network, **asked, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for text in arguments.input:
        name, sizes = text.split("=")
        shape = [int(size) for size in sizes.split("x")]
        times = name == "timestep"
        found[name] = torch.full(shape, 500) if times else torch.randn(shape, generator=generator)
    return {**found, "return_dict": False}


def schedule_of(inputs: dict[str, Any]) -> torch.Tensor:
    """STEPS timesteps: of 1 to 0 where the network's example is, else whole ones of 980 to 0."""
    example = float(inputs["timestep"].flatten()[0])
    if 0 < example <= 1:
        return torch.linspace(1, 1 / STEPS, STEPS)
    return torch.linspace(980, 0, STEPS).round().long()


def compile_streamed(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `effuse compile --stream` does, and what it took; for a process of its own."""
    import effuse
    from effuse import api as api  # the base: what is imported before any work
    from effuse.config import resolve as settings_of

    folder, output = arguments.work / "network", arguments.work / "out"
    settings = settings_of(arguments.config).model_copy(update={"stream": True})
    inputs = inputs_of(resolve(str(folder)), arguments)
    base, start, used = peak(), time.perf_counter(), time.process_time()
    compiled = effuse.compile(
        folder, settings, inputs=inputs, schedule=schedule_of(inputs),
        resume=arguments.work / "out.part",
    )  # fmt: skip
    compiled.save(output)
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time() - used,
        "phases": compiled.seconds,
        "base_bytes": base,
        "peak_bytes": peak(),
        "artifact_bytes": compiled.size,
        "notes": [note for each in compiled.manifest["passes"] for note in each["notes"]],
        "float_layers": sum(1 for each in compiled.manifest["layers"] if each["reason"]),
        "layers": len(compiled.manifest["layers"]),
    }


def plan_only(arguments: argparse.Namespace) -> dict[str, Any]:
    """Capture, hoist and plan, without weights: seconds of each, and the peak of memory."""
    from effuse import build, stream
    from effuse.capture import capture
    from effuse.config import Config
    from effuse.pass_manager import run_passes
    from effuse.passes import Cache, Canonicalize, Hoist

    base, used = peak(), time.process_time()
    with phases(True) as show:
        with show.phase("capture"):
            network = resolve(str(arguments.network))
            inputs = inputs_of(network, arguments)
            times = schedule_of(inputs)
            given = build.on_schedule(inputs, times, Config())
            known = build.as_given(times, given, Config())
            program = capture(network, stream.on_meta(given), timesteps=known)
        with show.phase("hoist"):
            program = run_passes(program, (Canonicalize(), Hoist()))
        with show.phase("plan"):
            program = run_passes(program, (Cache(mode=arguments.cache),))
    nodes = {part.name: len(part.graph.nodes) for part in program.parts}
    return {
        "phases": show.seconds,
        "seconds": sum(show.seconds.values()),
        "cpu_seconds": time.process_time() - used,
        "base_bytes": base,
        "peak_bytes": peak(),
        "nodes": nodes,
        "steps": len(program.plan.steps),
    }


def peak() -> int:
    """The most that this process has held, in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def disk_of(process: int, folder: Path) -> int:
    """Bytes on disk of a folder but its network, and of files without a name that a process has."""
    named = (path for path in folder.rglob("*") if "network" not in path.parts)
    nameless = Path(f"/proc/{process}/fd").iterdir()
    return sum(taken(path) for path in named) + sum(taken(path, True) for path in nameless)


def taken(path: Path, nameless: bool = False) -> int:
    """Bytes on disk of a file; 0 for one that is gone, or (`nameless`) that has a name."""
    with contextlib.suppress(OSError):
        found = path.stat()
        return 0 if nameless and found.st_nlink else found.st_blocks * 512
    return 0


def watched(command: list[str], work: Path, seconds: float = math.inf) -> tuple[int, int]:
    """Run a command, killed after `seconds`: its return code, and the most that its files took."""
    child = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(work)})
    most, start = 0, time.perf_counter()
    while child.poll() is None:
        with contextlib.suppress(OSError):  # it may end meanwhile
            most = max(most, disk_of(child.pid, work))
        if time.perf_counter() - start > seconds:
            child.send_signal(signal.SIGKILL)
            child.wait()
            break
        time.sleep(1)
    return child.returncode, most


def killed(command: list[str], work: Path, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Builds that end at random moments: after how many seconds, and what they left on disk."""
    drawn_at, found = random.Random(arguments.seed), []
    for number in range(1, arguments.kill + 1):
        seconds = drawn_at.uniform(0, arguments.within)
        Console().print(f"build {number} of {arguments.kill} is killed after {seconds:.0f} s")
        code, _ = watched(command, work, seconds)
        if code != -signal.SIGKILL:
            raise SystemExit(f"the build had ended before: --within is over {seconds:.0f} s")
        found.append({"seconds": round(seconds), "left_bytes": left(work)})
    return found


def left(work: Path) -> int:
    """Bytes on disk of what an interrupted build has finished."""
    return sum(taken(path) for path in (work / "out.part").rglob("*"))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("network", type=Path, help="a JSON file of examples/configs")
    add("--config", default="w4a16", help="a preset or TOML file (default: w4a16)")
    add("--batch", type=int, default=2, help="of the example inputs (default: 2)")
    add("--input", action="append", metavar="NAME=2x3", help="a shape, where none can be derived")
    add("--size", type=int, help="of the example latents (default: the network's own)")
    add("--kill", type=int, default=0, metavar="N", help="kill N builds at random moments first")
    add("--within", type=float, default=600, help="seconds among which moments are drawn")
    add("--seed", type=int, default=0, help="of the moments")
    add("--cache", default="residual", help="with --plan: the Cache's mode (default: residual)")
    add("--work", type=Path, help="folder that keeps weights and artifact (default: none does)")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    add("--label", default="", help="what else to say of the machine, such as: busy")
    add("--plan", action="store_true", help="capture, hoist and plan only, without weights")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Read the arguments and run."""
    arguments = parsed()
    if arguments.child:
        found = compile_streamed(arguments)
        (arguments.work / "found.json").write_text(json.dumps(found))
        return 0
    if arguments.plan:
        return tell(plan_only(arguments), arguments, "plan")
    with place(arguments) as work:
        return measured(arguments, work)


@contextlib.contextmanager
def place(arguments: argparse.Namespace) -> Iterator[Path]:
    """Where the network and the artifact are: kept, or temporary."""
    if arguments.work is None:
        with tempfile.TemporaryDirectory() as holder:
            yield Path(holder)
        return
    kept = arguments.work / arguments.network.stem
    kept.mkdir(parents=True, exist_ok=True)
    yield kept


def written(arguments: argparse.Namespace, folder: Path, show: Phases) -> int:
    """The network's folder, written if it is not there; the weights' bytes."""
    index = folder / f"{FILE}.index.json"
    if not index.exists():
        folder.mkdir(exist_ok=True)
        with show.phase("write the network"):
            write_network(resolve(str(arguments.network)), folder, show)
    return int(json.loads(index.read_text())["metadata"]["total_size"])


def measured(arguments: argparse.Namespace, work: Path) -> int:
    """Write the network, compile it in a child, and tell."""
    free = shutil.disk_usage(work).free
    Console().print(f"{arguments.network.stem} in {work}: {free / 1e9:.0f} GB free")
    with phases(True) as show:
        size = written(arguments, work / "network", show)
    command = [sys.executable, *sys.argv, "--child", "--work", str(work)]
    last = work / "last"  # checksums of the artifact before, which may be gone
    before = last.read_text() if last.exists() else None
    shutil.rmtree(work / "out", ignore_errors=True)
    kills = killed(command, work, arguments)
    resumed = left(work)  # of these, or of one that was killed by hand
    code, disk = watched(command, work)
    if code:
        return code
    found = json.loads((work / "found.json").read_text())
    found |= {
        "config": arguments.config, "weight_bytes": size, "disk_bytes": disk,
        "peak_share": found["peak_bytes"] / size,
        "within_bound": found["peak_bytes"] <= GOAL * size,
        "artifact_share": found["artifact_bytes"] / size,
        "left_behind": sorted({each.name for each in work.iterdir()} - KEPT),
        "killed": kills, "resumed_bytes": resumed,
    }  # fmt: skip
    sums = (work / "out" / "SHA256SUMS").read_text()
    found["same_as_before"] = None if before is None else before == sums
    last.write_text(sums)
    return tell(found, arguments, Path(arguments.config).stem)


def tell(found: dict[str, Any], arguments: argparse.Namespace, what: str) -> int:
    """Complete the figures, print and keep them."""
    console, name = Console(), arguments.network.stem
    found |= {
        "network": name, "batch": arguments.batch, "inputs": arguments.input or "derived",
        "label": arguments.label, "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }  # fmt: skip
    console.print_json(json.dumps(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"full-size-{name}-{what}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
