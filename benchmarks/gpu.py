"""Measure effuse's Triton kernels and compiled networks on the NVIDIA GPU that is here.

Sections run in this order; each has its share of --seconds, and what it does not use goes to the
next. Correctness comes before anything of ours is timed: if a kernel disagrees with its reference,
the run ends there. gpu.json (everything), gpu.md (the tables) and gpu.png are written anew after
each section, so a run that is cut keeps what it has. Let nothing else run on the GPU meanwhile.

Exit status: 0; 1 if a kernel is wrong or a section failed; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_rows import LAYERS, ROWS, SECTIONS

VERSIONS = ("torch", "triton", "effuse", "torchao", "diffusers", "numpy")
NO_GPU = (
    "gpu.py: no NVIDIA GPU can be used here (torch.cuda.is_available() is False); run it on a "
    "machine that has one, with a CUDA build of PyTorch and Triton"
)
QUICK_LAYERS, QUICK_NETWORKS = 4, 2
RESERVE = 5.0  # seconds at the end, for tables and plot


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments and run."""
    arguments = parsed(given)
    if arguments.list:
        for name in arguments.sections:
            print(f"{name:10} {SECTIONS[name][0]}")
        return 0
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    return run(arguments, start(arguments))


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked; `sections` are those to run."""
    text = "\n".join(f"  {name:10} {what}" for name, (what, _) in SECTIONS.items())
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"sections:\n{text}",
    )  # fmt: skip
    add = parser.add_argument
    add("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help="run only these")
    add("--skip", nargs="+", choices=SECTIONS, metavar="SECTION", default=[], help="leave out")
    add("--seconds", type=float, default=450.0, help="for all of it (default: 450)")
    add("--quick", action="store_true", help="FLUX's first layers at M=4096, the two blocks")
    add("--tune", action="store_true", help="try other tiles, too")
    add("--seed", type=int, help="of the checks' inputs (default: another one each time)")
    add("--add", action="store_true", help="keep the sections in --out that are not run now")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    add("--list", action="store_true", help="name the sections that would run")
    arguments = parser.parse_args(given)
    if arguments.seconds <= 0:
        parser.error("--seconds: more than 0")
    wanted = set(arguments.only or SECTIONS) - set(arguments.skip)
    if not arguments.tune and "tune" not in (arguments.only or ()):
        wanted.discard("tune")
    arguments.sections = [name for name in SECTIONS if name in wanted]
    arguments.seed = secrets.randbelow(1 << 31) if arguments.seed is None else arguments.seed
    return arguments


# ---- the run -------------------------------------------------------------------------------------


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """A report without sections, or with those of an earlier run."""
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {"python": sys.version.split()[0], **{n: version(n) for n in VERSIONS}},
        "seed": arguments.seed, "quick": arguments.quick, "seconds": 0.0, "notes": [],
    }  # fmt: skip
    path = arguments.out / "gpu.json"
    if arguments.add and path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))
        kept = [name for name in SECTIONS if name in earlier and name not in arguments.sections]
        report |= {name: earlier[name] for name in kept}
        if kept:
            report["notes"].append(f"measured earlier ({earlier['date']}): {', '.join(kept)}")
    return report


def run(arguments: argparse.Namespace, report: dict[str, Any]) -> int:
    """Run the sections, writing after each."""
    began = time.perf_counter()
    end, failed = began + arguments.seconds - RESERVE, []
    for number, name in enumerate(arguments.sections):
        print(f"{name}: {SECTIONS[name][0]}", flush=True)
        before, now = len(report["notes"]), time.perf_counter()
        until = now + share(arguments.sections[number:]) * max(0.0, end - now)
        try:
            report[name] = section(name, arguments, report, until)
        except Exception as error:
            failed.append(name)
            report["notes"].append(f"{name} failed: {type(error).__name__}: {error}")
        report["seconds"] = time.perf_counter() - began
        print(f"  {time.perf_counter() - now:.0f} s", flush=True)
        for note in report["notes"][before:]:
            print(f"  {note}", flush=True)
        write(arguments.out, report)
        if "correct" in failed:
            break  # times of a wrong kernel are worth nothing
    show(report)
    print(f"written: {arguments.out}/gpu.json, gpu.md, gpu.png")
    return int(bool(failed))


def share(sections: Sequence[str]) -> float:
    """What the first of the sections may take of the time that is left for all of them."""
    return SECTIONS[sections[0]][1] / sum(SECTIONS[name][1] for name in sections)


def section(
    name: str, arguments: argparse.Namespace, report: Mapping[str, Any], until: float
) -> list[Any]:
    """The rows of one section.

    Raises:
        Exception: it cannot run; `correct` raises at the first wrong kernel.
    """
    import gpu_fused
    import gpu_kernels
    from gpu_time import Bench, CudaClock

    bench = Bench(torch.device("cuda"), CudaClock(), until, graphs=True, notes=report["notes"])
    known = gpu_kernels.best(report.get("ceilings", []))
    layers = LAYERS[:QUICK_LAYERS] if arguments.quick else LAYERS
    if name == "ceilings":
        return gpu_kernels.ceilings(bench)
    if name == "correct":
        from gpu_check import correct

        torch.manual_seed(arguments.seed)
        return correct(bench)
    if name == "kernels":
        return gpu_kernels.kernels(bench, known, layers, ROWS[:1] if arguments.quick else ROWS)
    if name == "branches":
        return gpu_kernels.branches(bench)
    if name == "fused":
        torch.backends.cudnn.benchmark = True
        return gpu_fused.fused(bench, known)
    if name == "tune":
        from gpu_tune import FEW, tune

        bench.times = FEW
        return tune(bench)
    return blocks(bench, arguments.quick)


def blocks(bench: Any, quick: bool) -> list[Any]:
    """The section of whole networks, timed warm."""
    from gpu_ends import ends, networks
    from gpu_time import WarmClock

    bench.clock, bench.graphs = WarmClock(), False
    chosen = networks()
    return ends(bench, chosen[:QUICK_NETWORKS] if quick else chosen)


# ---- what is told --------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The GPU, its driver, and the computer around it."""
    told: dict[str, Any] = {"platform": platform.platform(), "python": platform.python_version()}
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        told = {
            "gpu": facts.name,
            "capability": f"{facts.major}.{facts.minor}",
            "multiprocessors": facts.multi_processor_count,
            "memory": f"{facts.total_memory / 2**30:.0f} GiB",
            "driver": driver(),
            "cuda": torch.version.cuda,
            **told,
        }
    return told


def driver() -> str:
    """The driver's version, as nvidia-smi tells it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.splitlines()[0].strip() if found.stdout else "unknown"


def version(name: str) -> str:
    """The version of a package, or nothing where it is absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(folder: Path, report: Mapping[str, Any]) -> None:
    """The JSON, the tables and the plot."""
    import gpu_show

    text = json.dumps({**report, "bars": gpu_show.reached(report)}, indent=1, ensure_ascii=False)
    (folder / "gpu.json").write_text(text + "\n", encoding="utf-8")
    (folder / "gpu.md").write_text(gpu_show.markdown(report), encoding="utf-8")
    gpu_show.plot(report, folder / "gpu.png")


def show(report: Mapping[str, Any]) -> None:
    """Print the tables, the asked figures first, and what they hold for."""
    import gpu_show

    for title, (columns, rows) in gpu_show.printed(report).items():
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        print(f"\n{title}")
        for row in (columns, *rows):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    print()
    for remark in gpu_show.remarks(report):
        print(f"- {remark}")


if __name__ == "__main__":
    sys.exit(main())
