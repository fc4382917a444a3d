"""What smoothing, low-rank branches and GPTQ give in 4 bits, on wide layers with outliers.

Every row is one layer, compiled for the reference back end by the product's own passes with
calibration, and compared with the float layer on inputs that calibration has not seen. How layers
and inputs are made: low_rank_layers.py. Writes low-rank-layers.json and .md, anew after each row;
with --add, rows that are there already are kept, and not measured again.

With --time it measures something else: what a branch costs in ONNX Runtime beside the same layer
in float32 and in the format alone, in turns. Let nothing else run meanwhile. Writes low-rank-time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cache import CONSOLE, TABLE_WIDTH, bars, version
from low_rank_layers import CALLS, DECAY, LEAST, MOST, SHARE, SMALL, WIDE
from low_rank_rows import Row, rows
from low_rank_show import markdown, tables
from low_rank_time import Timing, table, timed, timings
from rich.console import Console
from rich.table import Table

import effuse
from effuse.evaluate import machine
from effuse.metrics import sqnr_db

VERSIONS = ("torch", "onnxruntime", "effuse")
REMARKS = (
    f"weights: singular values fall with i^-{DECAY:g}; mean square 1 / inputs; no bias",
    f"inputs: correlated N(0, 1); {SHARE:.0%} of the channels times {LEAST:g} to {MOST:g} "
    "(log-uniform), the weight's columns there as all others",
    f"calibration: {CALLS} calls of other inputs; layers are compiled by effuse.compile, reference",
    "kB: all stored tensors",
)
TIME_REMARKS = (
    "milliseconds: the median of the rounds; ratios: the median of the rounds' own",
    "× fp32: the time in float32 over the model's; branch, %: what it adds to the format's time",
)


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 1 if a row failed."""
    arguments = parsed(given)
    todo: Sequence[Row | Timing] = (
        timings(arguments.smoke, arguments.only)
        if arguments.time
        else rows(SMALL if arguments.smoke else WIDE, arguments.only)
    )
    if arguments.list or arguments.dry_run:
        for each in todo:
            what = f"  {each.described}" if arguments.dry_run else ""
            CONSOLE.print(f"{each.name}{what}", markup=False, highlight=False)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    return int(run(arguments, todo))


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples: --only 'linear 1152->1152: w4a4'   --only 'conv.*rank'   --time --smoke",
    )  # fmt: skip
    add = parser.add_argument
    add("--only", default="", metavar="REGEX", help="only rows with such names, and their plain")
    add("--time", action="store_true", help="the time of branches in ONNX Runtime instead")
    add("--rounds", type=int, default=9, help="of --time: turns of each model (default: 9)")
    add("--seconds", type=float, default=0.3, help="of --time: of a turn (default: 0.3)")
    add("--threads", type=int, default=0, help="of --time; default: onnxruntime chooses")
    add("--smoke", action="store_true", help="tiny layers, short turns: does everything run?")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    add("--add", action="store_true", help="keep the rows in --out; measure the others")
    add("--list", action="store_true", help="name the rows")
    add("--dry-run", action="store_true", help="name the rows, and say what each compiles")
    arguments = parser.parse_args(given)
    if arguments.smoke:
        arguments.rounds, arguments.seconds = 1, 0.0
    for name, least in (("rounds", 1), ("threads", 0), ("seconds", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: at least {least}")
    try:
        re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only: no regular expression: {error}")
    return arguments


def run(arguments: argparse.Namespace, todo: Sequence[Row | Timing]) -> bool:
    """Measure the rows and write the results after each; whether one failed."""
    results = earlier(arguments) if arguments.add else []
    known = {each["name"] for each in results}
    todo = [row for row in todo if row.name not in known]
    report = reported(arguments, results, len(todo)) if results else {}
    with bars("time" if arguments.time else "layers") as progress:
        progress.start(len(todo))
        for number, row in enumerate(todo, start=1):
            progress.say(row.name)
            results.append(result(row, arguments))
            report = reported(arguments, results, len(todo) - number)
            write(arguments, report)
            progress.done()
    if report:
        show(report)
    return any("error" in each for each in results)


def earlier(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of an earlier run that did not fail."""
    path = stem(arguments).with_suffix(".json")
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [row for row in rows if "error" not in row]


def result(row: Row | Timing, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row's figures, or why there are none."""
    try:
        return timed(row, arguments) if isinstance(row, Timing) else measured(row)
    except Exception as error:  # the other rows are worth keeping; the exit status is 1
        failure = f"{type(error).__name__}: {error}"
        CONSOLE.print(f"{row.name} failed: {failure}", markup=False, highlight=False)
        return {**row.named, "error": failure}


def measured(row: Row) -> dict[str, Any]:
    """A row's SQNR (dB) on inputs that calibration has not seen, its bytes and its seconds."""
    start = time.perf_counter()
    compiled = effuse.compile(
        row.layer.module,
        effuse.Config(passes=row.passes, backend="reference"),
        inputs={"x": row.layer.judged},
        calibration=row.layer.calibration(),
        progress=False,
    )
    seconds = time.perf_counter() - start
    with torch.no_grad():
        found = compiled(row.layer.judged)
    return {
        **row.named,
        "sqnr_db": sqnr_db(row.layer.truth.numpy(), found.numpy()),
        "bytes": (compiled.folder / "weights.safetensors").stat().st_size,
        "seconds": round(seconds, 1),
        "loud_share": row.layer.loud_share,
        "notes": [note for each in compiled.manifest["passes"] for note in each["notes"]],
    }


def reported(
    arguments: argparse.Namespace, results: Sequence[dict[str, Any]], left: int
) -> dict[str, Any]:
    """The results with their tables, and what they hold for."""
    used = machine()
    title = "What a branch costs in ONNX Runtime" if arguments.time else "4 bits on wide layers"
    remarks = TIME_REMARKS if arguments.time else (*REMARKS, *loudest(results))
    return {
        "title": f"{title} (smoke test)" if arguments.smoke else title,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {key: used[key] for key in ("processor", "cores", "torch threads")},
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in VERSIONS},
        },
        "remarks": [*([f"unfinished: {left} rows are left"] if left else []), *remarks],
        "rows": list(results),
        "tables": {"one layer": table(results)} if arguments.time else tables(results),
    }


def loudest(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What share of the layers' output the loud channels make up."""
    shares = {row["layer"]: row["loud_share"] for row in results if "loud_share" in row}
    found = ", ".join(f"{share:.1%} ({name})" for name, share in shares.items())
    return [f"of the output's power, the loud channels bring in {found}"]


def stem(arguments: argparse.Namespace) -> Path:
    """Where results go, without the ending."""
    found: Path = arguments.out / f"low-rank-{'time' if arguments.time else 'layers'}"
    return found


def write(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """The JSON, and the tables."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    stem(arguments).with_suffix(".json").write_text(text, encoding="utf-8")
    stem(arguments).with_suffix(".md").write_text(markdown(report), encoding="utf-8")


def show(report: Mapping[str, Any]) -> None:
    """Print the tables."""
    for title, (columns, lines) in report["tables"].items():
        shown = Table(*columns, title=title)
        for line in lines:
            shown.add_row(*line)
        Console(width=max(CONSOLE.width, TABLE_WIDTH)).print(shown)
    for remark in report["remarks"]:
        CONSOLE.print(f"- {remark}", markup=False, highlight=False)


if __name__ == "__main__":
    sys.exit(main())
