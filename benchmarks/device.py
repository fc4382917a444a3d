"""What the emoji network takes on a device: disk, memory, and the time to its first step.

    python benchmarks/device.py              # compiles the presets, as ONNX and in ORT format
    python benchmarks/device.py --keep DIR   # artifacts from there where they are, else made there
    python benchmarks/device.py --smoke      # one repetition of one preset

Every repetition is a process of its own without torch: it imports numpy, onnxruntime and effuse,
loads the artifact and runs the first step, on one thread. Artifacts take turns, so that a machine
that gets busy does so for all; medians are told, with the processor's time beside the clock's.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PRESETS = ("exact", "w8a8", "cache")
REPEATS, STEPS = 5, 10
BARS = {"rss_mb": 120.0, "start_s": 0.5}
CHILD = """
import json, sys, time
sys.modules["torch"] = None
start = time.perf_counter()
import numpy, onnxruntime
libraries = time.perf_counter()
import effuse
model = effuse.load
ours = time.perf_counter()
model = effuse.load(sys.argv[1], threads=1)
spec = model.session.spec
loaded = time.perf_counter()
values = {each.name: numpy.zeros(each.shape, each.dtype) for each in spec.inputs}
values["timestep"] = numpy.full_like(values["timestep"], spec.timesteps[0])
model.session.step(values)
first, cpu = time.perf_counter(), time.process_time()  # with the interpreter's own start
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
print(json.dumps({
    "libraries_s": libraries - start, "effuse_s": ours - libraries, "load_s": loaded - ours,
    "first_s": first - loaded, "start_s": first - start, "rss_mb": peak * 1024 / 1e6,
    "cpu_s": cpu,
}))
"""
COLUMNS = ("disk_mb", "rss_mb", "libraries_s", "effuse_s", "load_s", "first_s", "start_s",
           "cpu_s")  # fmt: skip


def main() -> None:
    """Build, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="folder of the artifacts")
    parser.add_argument("--smoke", action="store_true", help="does everything run?")
    parser.add_argument("--out", type=Path, help="JSON to write")
    given = parser.parse_args()
    presets, repeats = (("exact",), 1) if given.smoke else (PRESETS, REPEATS)
    with tempfile.TemporaryDirectory() as holder:
        folder = given.keep or Path(holder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [path for preset in presets for path in artifacts(folder, preset)]
        rows = measure(paths, repeats)
    told = {"machine": machine(), "repeats": repeats, "bars": BARS, "rows": rows}
    print(text(told))
    if given.out:
        given.out.write_text(json.dumps(told, indent=1) + "\n")


def artifacts(folder: Path, preset: str) -> tuple[Path, Path]:
    """The preset's artifact as ONNX and in ORT format, made where they are not."""
    plain, small = folder / f"{preset}.effuse", folder / f"{preset}-ort.effuse"
    if not plain.is_dir():
        run("compile", str(HERE.parent / "examples" / "models" / "emoji-unet"), "-c", preset,
            "--steps", str(STEPS), "--batch", "2", "-o", str(plain), "-q")  # fmt: skip
    if not small.is_dir():
        run("export", str(plain), str(small))
    return plain, small


def run(*words: str) -> None:
    """The command line of effuse, in a process of its own."""
    subprocess.run([sys.executable, "-P", "-m", "effuse.cli", *words], check=True, stdout=2)


def measure(paths: list[Path], repeats: int) -> dict[str, dict[str, float]]:
    """Medians by artifact."""
    child(paths[0])  # the libraries' files, read once
    found: dict[Path, list[dict[str, float]]] = {path: [] for path in paths}
    for _ in range(repeats):
        for path in paths:
            found[path].append(child(path))
    return {path.stem: medians(path, rows) for path, rows in found.items()}


def medians(path: Path, rows: list[dict[str, float]]) -> dict[str, float]:
    """The middle of each figure, and the least start: what the machine does when it is idle."""
    size = sum(each.stat().st_size for each in path.iterdir() if each.suffix != ".config")
    middle = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    return {"disk_mb": size / 1e6, **middle, "least_start_s": min(row["start_s"] for row in rows)}


def child(path: Path) -> dict[str, float]:
    """One repetition."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, str(path)], check=True, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def machine() -> dict[str, Any]:
    """Where it was measured, and how busy that was."""
    import onnxruntime

    return {
        "processor": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()[0],
        "python": platform.python_version(), "onnxruntime": onnxruntime.__version__,
    }  # fmt: skip


def text(told: dict[str, Any]) -> str:
    """The table, and which bars are met."""
    lines = [
        f"| artifact | {' | '.join(COLUMNS)} | least start_s |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for name, row in told["rows"].items():
        cells = [f"{row[column]:.2f}" for column in (*COLUMNS, "least_start_s")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for figure, bar in told["bars"].items():
        met = [name for name, row in told["rows"].items() if row[figure] < bar]
        lines.append(f"{figure} under {bar:g}: {', '.join(met) or 'none'}")
    return "\n".join([*lines, f"load of the machine: {told['machine']['load']:.1f}"])


if __name__ == "__main__":
    main()
