"""Compile a network of full size layer by layer, with random weights: seconds, memory and bytes.

Writes the weights to safetensors first (bfloat16, normal, 1 / sqrt(inputs)), compiles them in a
process of its own with --stream, and keeps what each phase took. Memory is what the kernel counted
at most (VmHWM), of which the base is what imports alone take.

    python benchmarks/full_size.py examples/configs/sdxl.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from effuse.evaluate import machine
from effuse.inspect_model import resolve

FILE = "diffusion_pytorch_model.safetensors"
STATUS = Path("/proc/self/status")
STEPS = 30


def write_network(config: Path, folder: Path, seed: int = 0) -> int:
    """config.json and random bfloat16 weights, one tensor at a time; the weights' bytes."""
    network = resolve(str(config))
    network.save_config(str(folder))  # type: ignore[operator]
    tensors = {name: tuple(each.shape) for name, each in network.state_dict().items()}
    header, position = {}, 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        span = [position, position + size]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": span}
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(seed)
    with (folder / FILE).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors.items():
            values = drawn(name, shape, generator).bfloat16()
            file.write(values.flatten().view(torch.uint8).numpy().data)
    return position


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A weight by its shape: matrices and filters that keep a signal's power; norms are one."""
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    values = torch.randn(shape, generator=generator)
    return values / math.sqrt(math.prod(shape[1:]))


def compile_streamed(folder: Path, config: str, output: Path) -> dict[str, Any]:
    """What `effuse compile --stream` does, and what it took; for a process of its own."""
    import effuse
    from effuse import api as api  # the base: what is imported before any work
    from effuse.config import resolve as settings_of

    settings = settings_of(config)
    given = {name: getattr(settings, name) for name in type(settings).model_fields}
    base, start = peak(), time.perf_counter()
    times = torch.linspace(980, 0, STEPS).round().long()
    compiled = effuse.compile(folder, effuse.Config(**{**given, "stream": True}), schedule=times)
    compiled.save(output)
    return {
        "seconds": time.perf_counter() - start,
        "phases": compiled.seconds,
        "base_bytes": base,
        "peak_bytes": peak(),
        "artifact_bytes": compiled.size,
        "notes": [note for each in compiled.manifest["passes"] for note in each["notes"]],
        "float_layers": sum(1 for each in compiled.manifest["layers"] if each["reason"]),
        "layers": len(compiled.manifest["layers"]),
    }


def peak() -> int:
    """The most that this process has held, in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("network", type=Path, help="a JSON file of examples/configs")
    add("--config", default="w4a16", help="a preset or TOML file (default: w4a16)")
    add("--work", type=Path, help="folder for weights and artifact (default: a temporary one)")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        found = compile_streamed(
            arguments.work / "network", arguments.config, arguments.work / "out"
        )
        (arguments.work / "found.json").write_text(json.dumps(found))
        return 0
    with tempfile.TemporaryDirectory(dir=arguments.work) as holder:
        return measured(arguments, Path(holder))


def measured(arguments: argparse.Namespace, work: Path) -> int:
    """Write the network, compile it in a child, and tell."""
    console, name = Console(), arguments.network.stem
    (work / "network").mkdir()
    console.print(f"writing {name} to {work}: {shutil.disk_usage(work).free / 1e9:.0f} GB free")
    size = write_network(arguments.network, work / "network")
    command = [sys.executable, "-P", __file__, str(arguments.network), "--child"]
    command += ["--config", arguments.config, "--work", str(work)]
    child = subprocess.run(command, check=False)
    if child.returncode:
        return child.returncode
    found = json.loads((work / "found.json").read_text())
    bound = 0.35 * size + 1.5 * 2**30
    found |= {
        "network": name, "config": arguments.config, "weight_bytes": size,
        "bound_bytes": bound, "within_bound": found["peak_bytes"] <= bound,
        "artifact_share": found["artifact_bytes"] / size,
        "machine": machine(), "date": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
    }  # fmt: skip
    console.print_json(json.dumps(found))
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"full-size-{name}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
