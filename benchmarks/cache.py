"""Sweep the Cache pass over modes and intervals: speed-up of a whole run against picture error.

Compiles every configuration of the two example networks to ONNX, samples the same prompts from the
same noise with each, and compares with full sampling by the exact artifact. Beside them stand fewer
steps of the exact network (DDIM, DPM-Solver++ 2M) and the PyPI package DeepCache on eager torch.

Writes cache-NETWORK.json, .md and .png for each network. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import inspect
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from cache_bench import CALIBRATION_SEED, NETWORKS, NOISE_SEED, Bench, Sampler
from cache_measure import Subject, keep, measure, named
from cache_rows import EAGER, ERRORS, EXACT, MEMORY, Row, chosen, package_rows
from cache_show import COLUMNS, TITLES, markdown, plot, table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import effuse
from effuse.evaluate import machine
from effuse.passes import Hoist
from effuse.tape import Trace

HERE = Path(__file__).resolve().parent
VERSIONS = ("torch", "onnxruntime", "diffusers", "effuse", "DeepCache")
GROUP = 6  # configurations between two runs of the baseline
MEMORY_STEPS = 12  # enough for both variants
INSTALL = "pip install --no-deps DeepCache==0.1.1"
TABLE_WIDTH = 140
MOST_PROMPTS = 80  # of the names that the networks know, a half
CONSOLE = Console()


def main() -> int:
    """Read the arguments and run; 1 if a configuration failed."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"The rows of the package DeepCache need: {INSTALL}",
    )
    add = parser.add_argument
    add("--network", choices=("unet", "dit", "both"), default="both", help="default: both")
    add("--prompts", type=int, default=8, help="pictures of a run; a batch is twice that")
    add("--steps", type=int, default=50, help="DDIM steps of full sampling (default: 50)")
    add("--rounds", type=int, default=3, help="timed runs of each configuration (default: 3)")
    add("--threads", type=int, default=0, help="of onnxruntime; default: it chooses")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    add("--only", default="", metavar="REGEX", help="only the configurations with such names")
    add("--smoke", action="store_true", help="2 prompts, 10 steps, 1 round, few configurations")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.prompts, arguments.steps, arguments.rounds = 2, 10, 1
    if not 1 <= arguments.prompts <= MOST_PROMPTS:
        parser.error(f"1 to {MOST_PROMPTS} prompts: calibration takes as many others")
    if arguments.rounds < 1 or arguments.steps < 10:
        parser.error("at least 1 round and 10 steps are needed")
    arguments.out.mkdir(parents=True, exist_ok=True)
    networks = list(NETWORKS) if arguments.network == "both" else [arguments.network]
    return max(int(run(name, arguments)) for name in networks)


# ---- one network ---------------------------------------------------------------------------------


def run(network: str, arguments: argparse.Namespace) -> bool:
    """Sweep one network, write its results; whether a configuration failed."""
    start, remarks = time.perf_counter(), []
    rows = [row for row in chosen(network, arguments.steps, arguments.smoke)
            if re.search(arguments.only, row.name)]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="effuse-") as folder, bars(network) as progress:
        bench = Bench(network, arguments, Path(folder))
        exact, seconds = bench.compile("exact", (Hoist(),))
        more = {"megabytes": exact.size / 1e6, "compile_s": seconds}
        base = Subject(EXACT, exact, bench.sampler("ddim", arguments.steps), more)
        bench.reference = Trace(exact).sample(base.sample).pictures
        peers = package_subjects(bench, remarks)
        eager = Subject(EAGER, bench.original, base.sample)
        progress.start(len(rows))
        keep(bench, measure(bench, base, [base, eager] if peers else [base]))
        sweep(bench, base, rows, progress)
        progress.say("the package")
        keep(bench, measure(bench, eager, peers))
        remarks += [*memory_remarks(bench), *error_remarks(bench)]
        write(bench, {**facts(bench, start), "rows": ordered(bench, rows)}, remarks)
    return any("error" in row for row in bench.results.values())


@contextlib.contextmanager
def bars(network: str) -> Iterator[SimpleNamespace]:
    """A bar over the configurations; lines are printed above it."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=CONSOLE) as progress:
        task = progress.add_task(f"{network}: exact", total=None)
        yield SimpleNamespace(
            start=lambda total: progress.update(task, total=total),
            say=lambda what: progress.update(task, description=f"{network}: {what}"),
            done=lambda: progress.advance(task),
        )


# ---- the rows ------------------------------------------------------------------------------------


def sweep(bench: Bench, base: Subject, rows: Sequence[Row], progress: Any) -> None:
    """Compile and measure the rows, a group at a time."""
    fewer = [row for row in rows if row.kind == "steps"]
    shared = union_artifact(bench, fewer) if fewer else base.model
    for first in range(0, len(rows), GROUP):
        subjects = []
        for row in rows[first : first + GROUP]:
            progress.say(f"compile {row.name}")
            try:
                subjects.append(subject(bench, row, shared))
            except Exception as error:  # the other rows are worth keeping; the exit status is 1
                failure = f"{type(error).__name__}: {error}"
                bench.results[row.name] = {**named(row), "error": failure}
                CONSOLE.print(f"{row.name} failed: {failure}", markup=False, highlight=False)
            progress.done()
        progress.say("sample")
        keep(bench, measure(bench, base, subjects))


def union_artifact(bench: Bench, rows: Sequence[Row]) -> effuse.Compiled:
    """One exact artifact for the timesteps of all rows: as fast as one a row, tables are longer."""
    times: set[int] = set()
    for row in rows:
        bench.set_solver(row.solver, row.steps or 0)
        times |= set(bench.pipe.scheduler.timesteps.tolist()) | set(ddim_times(bench))
    return bench.compile("fewer", (Hoist(),), sorted(times, reverse=True))[0]


def ddim_times(bench: Bench) -> list[int]:
    """The timesteps of full sampling, which the example inputs are taken from."""
    bench.set_solver("ddim", bench.arguments.steps)
    times: list[int] = bench.pipe.scheduler.timesteps.tolist()
    return times


def subject(bench: Bench, row: Row, shared: effuse.Compiled) -> Subject:
    """The row's artifact and sampler."""
    steps = row.steps or bench.arguments.steps
    sample = bench.sampler(row.solver, steps)
    if row.kind == "steps":
        return Subject(row, shared, sample)
    place = "memory" if row.name == MEMORY[bench.network] else "row"  # loaded, files may go
    model, seconds = bench.compile(place, row.passes)
    return Subject(row, model, sample, {"megabytes": model.size / 1e6, "compile_s": seconds})


def package_subjects(bench: Bench, remarks: list[str]) -> list[Subject]:
    """The DeepCache package on the eager UNet, if it is installed."""
    if bench.network != "unet":
        return []
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        remarks.append(f"no rows of the package DeepCache ({error}); for them: {INSTALL}")
        CONSOLE.print(remarks[-1])
        return []
    return [
        Subject(row, bench.original, patched(bench, DeepCacheSDHelper, row.interval))
        for row in package_rows()
    ]


def patched(bench: Bench, helper_class: Any, interval: int) -> Sampler:
    """Sampling with the package's patches on the UNet while it lasts."""
    plain = bench.sampler("ddim", bench.arguments.steps)

    def sample(model: Any, on_step: Callable[..., None]) -> torch.Tensor:
        bench.set_solver("ddim", bench.arguments.steps)
        pipe = SimpleNamespace(unet=bench.original, scheduler=bench.pipe.scheduler)
        helper = helper_class(pipe=pipe)  # it reads the timesteps, which are the same each time
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        try:
            return plain(model, on_step)
        finally:
            helper.disable()

    return sample


# ---- results -------------------------------------------------------------------------------------


def ordered(bench: Bench, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The results, full sampling first, then by the rows; the package's last."""
    names = [EXACT.name, EAGER.name, *(row.name for row in (*rows, *package_rows()))]
    return [bench.results[name] for name in names if name in bench.results]


def memory_remarks(bench: Bench) -> list[str]:
    """What the second variant costs in memory, in processes of their own, and on disk."""
    name = MEMORY[bench.network]
    if not (bench.folder / "memory").exists() or not Path("/proc/self/status").exists():
        return [f"memory was not measured: it needs Linux, and the row {name!r}"]
    inputs = bench.folder / "inputs.npz"
    given = bench.pipe.example_inputs(bench.arguments.prompts)
    np.savez(inputs, **{name: given[name].numpy() for name in given if name != "return_dict"})
    grown = {}
    for artifact in ("exact", "memory"):
        path = bench.folder / artifact
        runs = [grow(path, inputs) for _ in range(bench.arguments.rounds)]
        grown[artifact] = {key: statistics.median(each[key] for each in runs) for key in runs[0]}
        grown[artifact]["disk"] = sum(file.stat().st_size for file in path.iterdir())
    bench.results["exact"]["memory"] = grown["exact"]
    bench.results[name]["memory"] = grown["memory"]
    words = {"resident": "resident memory", "peak": "peak memory", "disk": "size on disk"}
    return [
        f"{words[key]}: exact {mine / 1e6:.1f} MB, {name} {grown['memory'][key] / 1e6:.1f} MB, "
        f"ratio {grown['memory'][key] / mine:.3f}"
        for key, mine in grown["exact"].items()
    ]


def grow(path: Path, inputs: Path) -> dict[str, int]:
    """How much a fresh process grows (bytes) by loading the artifact and running some steps."""
    command = [sys.executable, str(HERE / "memory.py"), str(path), str(inputs), str(MEMORY_STEPS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def error_remarks(bench: Bench) -> list[str]:
    """The squared errors of the cache, of 8 bits, and of both."""
    rows = [bench.results.get(name, {}) for name in ERRORS]
    if not all("psnr_db" in row for row in rows):
        return []
    cache, bits, both = (4 * 10 ** (-row["psnr_db"] / 10) for row in rows)
    return [
        f"mean squared errors (pixels in [-1, 1]): cache {cache:.2e}, 8 bits {bits:.2e}, "
        f"their sum {cache + bits:.2e}, both together {both:.2e}"
    ]


def facts(bench: Bench, start: float) -> dict[str, Any]:
    """What the results hold for: date, machine, versions, setting."""
    guidance = inspect.signature(bench.pipe.latents).parameters["guidance"].default
    used = machine()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {key: used[key] for key in ("processor", "cores", "torch threads")},
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in VERSIONS},
        },
        "setting": {
            "network": bench.network,
            "steps": bench.arguments.steps,
            "prompts": len(bench.prompts),
            "guidance": guidance,
            "rounds": bench.arguments.rounds,
            "threads": bench.arguments.threads,
            "smoke": bench.arguments.smoke,
            "seeds": {"pictures": NOISE_SEED, "calibration": CALIBRATION_SEED},
            "pictures": bench.prompts,
            "calibration": bench.unseen,
        },
        "seconds": round(time.perf_counter() - start, 1),
    }


def version(name: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write(bench: Bench, report: dict[str, Any], remarks: list[str]) -> None:
    """The JSON, the plot, the table; printed, too."""
    stem = bench.arguments.out / f"cache-{bench.network}"
    report["remarks"] = remarks
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(bench.network, report), encoding="utf-8")
    plot(stem.with_suffix(".png"), bench.network, report["rows"], report["setting"])
    shown = Table(*COLUMNS, title=TITLES[bench.network])
    wide = Console(width=max(CONSOLE.width, TABLE_WIDTH))
    for row in table(report["rows"]):
        shown.add_row(*row)
    wide.print(shown)
    for remark in remarks:
        CONSOLE.print(f"- {remark}", highlight=False)
    CONSOLE.print(f"{stem}.json, .md, .png; {report['seconds']:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
