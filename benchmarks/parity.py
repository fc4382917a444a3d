"""Every back end that runs here × presets × networks: does it compute the same, and how fast?

    python benchmarks/parity.py                    # everything
    python benchmarks/parity.py --only "tiny-.* (exact|w8a8) "  # cells by name; others stay
    python benchmarks/parity.py --add              # goes on where it was stopped
    python benchmarks/parity.py --list             # or --dry-run: name the cells, run none
    python benchmarks/parity.py --readme           # the short table into the README, no run

Each cell is compiled, saved, loaded as a device loads it, and run along a trajectory of the network
itself. Writes parity.json and .md after every cell. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity_measure import Study, named
from parity_rows import NOT_RUN, Cell, cells
from parity_show import END, START, db, markdown, refresh, short, speed
from rich.console import Console

from effuse.build import versions
from effuse.evaluate import machine

ROOT = Path(__file__).resolve().parent
LIBRARIES = ("effuse", "torch", "onnxruntime", "openvino", "diffusers")
SMOKE_OUT = Path(tempfile.gettempdir()) / "effuse-parity-smoke"
KEYS = ("network", "preset", "backend")
CONSOLE = Console()


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 1 if a cell failed."""
    options = parsed(given)
    if options.readme is not None:
        return tell(options)
    chosen = cells(options.only, options.smoke)
    if options.list:
        lines = [cell.name for cell in chosen]
        lines += [f"{name}: not run, {reason}" for name, reason in NOT_RUN.items()]
        CONSOLE.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    document = opened(options)
    for network in dict.fromkeys(cell.network for cell in chosen):
        study(network, [cell for cell in chosen if cell.network == network], document, options)
    return int(any("error" in each for each in document["cells"]))


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", metavar="REGEX", help="cells with such names, and their references")
    add("--add", action="store_true", help="keep the cells that an earlier run has finished")
    add("--list", "--dry-run", action="store_true", help="name the cells, run none")
    add("--smoke", action="store_true", help=f"two tiny networks, 2 presets; into {SMOKE_OUT.name}")
    add("--steps", type=int, default=20, help="of the trajectory (default: 20)")
    add("--rounds", type=int, default=5, help="timed runs along it (default: 5)")
    add("--threads", type=int, default=0, help="of ONNX Runtime and OpenVINO; 0: they choose")
    add("--out", type=Path, help="folder of the results; default: benchmarks/results")
    add("--readme", type=Path, nargs="?", const=ROOT.parent / "README.md", metavar="FILE",
        help=f"print the short table, and write it between {START} and {END}")  # fmt: skip
    options = parser.parse_args(given)
    if options.smoke:
        options.steps, options.rounds = 6, 1
    if options.steps < 2 or options.rounds < 1:
        parser.error("at least 2 steps and 1 round are needed")
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only: no regular expression: {error}")
    options.out = options.out or (SMOKE_OUT if options.smoke else ROOT / "results")
    return options


# ---- measuring -----------------------------------------------------------------------------------


def study(
    network: str, chosen: Sequence[Cell], document: dict[str, Any], options: argparse.Namespace
) -> None:
    """Measure a network's cells, writing what there is after each."""
    known = {tuple(each[key] for key in KEYS) for each in document["cells"]}
    todo = [each for each in chosen if not options.add or key_of(named(each)) not in known]
    with tempfile.TemporaryDirectory(prefix="effuse-") as folder:
        own = Study(network, options.steps, options.rounds, options.threads, Path(folder))
        for number, cell in enumerate(todo, start=1):
            begun = time.perf_counter()
            found = {**own.measure(cell), "seconds": time.perf_counter() - begun}
            CONSOLE.print(f"{number}/{len(todo)} {cell.name}: {told(found)}",
                          markup=False, highlight=False)  # fmt: skip
            document["cells"] = merged(document["cells"], found)
            write(options.out, document)


def key_of(result: dict[str, Any]) -> tuple[str, ...]:
    """What a cell is known by."""
    return tuple(result[key] for key in KEYS)


def told(result: dict[str, Any]) -> str:
    """A cell's figures in a line."""
    if "reason" in result:
        return str(result["reason"])
    figures = (f"reference {db(result['reference_db']) or '-'}",
               f"original {db(result['original_db'])} dB", speed(result),
               f"{result['megabytes']:.2f} MB", f"{result['seconds']:.0f} s")  # fmt: skip
    return ", ".join(filter(None, figures))


# ---- results -------------------------------------------------------------------------------------


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """The document, with the cells of an earlier run of the same setting, machine and versions."""
    fresh = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": {key: machine()[key] for key in ("processor", "cores", "torch threads")},
        "versions": versions(LIBRARIES),
        "setting": {key: getattr(options, key) for key in ("steps", "rounds", "threads", "smoke")},
        "not_run": NOT_RUN,
    }
    path = options.out / "parity.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(before.get(key) == fresh[key] for key in ("machine", "versions", "setting"))
    return {**fresh, "cells": before["cells"] if same else []}


def merged(known: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells with one more, in the order of all cells."""
    places = {(cell.network, cell.preset, cell.backend): n for n, cell in enumerate(cells())}
    rest = [each for each in known if key_of(each) != key_of(found)]
    return sorted([*rest, found], key=lambda each: places[key_of(each)])


def write(folder: Path, document: dict[str, Any]) -> None:
    """The JSON and the tables."""
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    (folder / "parity.json").write_text(text, encoding="utf-8")
    (folder / "parity.md").write_text(markdown(document), encoding="utf-8")


def tell(options: argparse.Namespace) -> int:
    """Print the short table; write it into the README, where that has the markers."""
    path = options.out / "parity.json"
    if not path.exists():
        CONSOLE.print(f"no {path.name} in {options.out}: measure first", highlight=False)
        return 1
    found = short(json.loads(path.read_text(encoding="utf-8"))["cells"])
    print(found, end="")
    if refresh(options.readme, found):
        return 0
    CONSOLE.print(f"not written: {options.readme} has no lines {START} and {END}", highlight=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
