"""What each method of quantization gains (dB) on the two trained networks, by format.

Every row is built in the reference back end from the pipelines' own sampling, and compared with its
format's plain row: nearest rounding, least and greatest values. The same layers are quantized in
all rows: no bound on a layer's error (min_sqnr_db=-99); the first and the last layer stay in float.

Writes quantize-NETWORK.json, .md and .png for each network, anew after every row.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache import CONSOLE, MOST_PROMPTS, TABLE_WIDTH, bars, version
from cache_bench import NETWORKS, NOISE_SEED
from cache_show import TITLES
from quantize_measure import CALIBRATION_SEED, Study, megabytes, named, skewed
from quantize_rows import NO_BOUND, PLAIN, WINNERS, Row, rows, winners
from quantize_show import COLUMNS, gain, markdown, plot, table
from rich.console import Console
from rich.table import Table

from effuse.evaluate import machine

VERSIONS = ("torch", "diffusers", "effuse")


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 1 if a row failed."""
    arguments = parsed(given)
    networks = list(NETWORKS) if arguments.network == "both" else [arguments.network]
    if arguments.list or arguments.dry_run:
        for network in networks:
            listed(network, arguments)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    return max(int(run(network, arguments)) for network in networks)


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=(*NETWORKS, "both"), default="both", help="default: both")
    add("--steps", type=int, default=20, help="DDIM steps of a run (default: 20)")
    add("--prompts", type=int, default=8, help="pictures of a run (default: 8)")
    add("--only", default="", metavar="REGEX", help="only rows with such names, and their plain")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    add("--list", action="store_true", help="name the rows")
    add("--dry-run", action="store_true", help="say what would run, and what is missing")
    arguments = parser.parse_args(given)
    if not 1 <= arguments.prompts <= MOST_PROMPTS:
        parser.error(f"--prompts: 1 to {MOST_PROMPTS}; calibration takes as many others")
    if arguments.steps < 2:
        parser.error("--steps: at least 2")
    try:
        re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only: no regular expression: {error}")
    return arguments


def chosen(network: str, pattern: str) -> list[Row]:
    """The rows that are asked for, with the plain ones that they are compared with."""
    known = rows(network)
    wanted = {row.format for row in known if re.search(pattern, row.name)}
    return [row for row in known
            if re.search(pattern, row.name)
            or (row.method == PLAIN and row.format in wanted)]  # fmt: skip


def listed(network: str, arguments: argparse.Namespace) -> None:
    """Name the rows; for a dry run, say what each of them is."""
    for row in chosen(network, arguments.only):
        what = row.missing or named(row)["passes"] if arguments.dry_run else ""
        what = "the methods that gain" if what and row.method == WINNERS else what
        CONSOLE.print(f"{network}: {row.name}  {what}".rstrip(), markup=False, highlight=False)


# ---- one network ---------------------------------------------------------------------------------


def run(network: str, arguments: argparse.Namespace) -> bool:
    """Measure one network's rows and write its results; whether a row failed."""
    start, results = time.perf_counter(), []
    todo = chosen(network, arguments.only)
    done: dict[Row, dict[str, Any]] = {}
    with bars(network) as progress:
        progress.start(len(todo))
        study = Study(network, arguments)
        for row in todo:
            progress.say(row.name)
            row = together(done, row) if row.method == WINNERS else row
            done[row] = result(study, row)
            results = list(done.values())
            write(study, {**facts(study, start, len(todo) - len(done)), "rows": results})
            progress.done()
    show(study, results)
    return any("error" in each for each in results)


def together(done: dict[Row, dict[str, Any]], row: Row) -> Row:
    """The row of all winners, from the gains so far."""
    results = list(done.values())
    gains = {each: gain(results, found, "sqnr_db") for each, found in done.items()
             if each.format == row.format}  # fmt: skip
    return winners(row.format, {each: found for each, found in gains.items() if found is not None})


def result(study: Study, row: Row) -> dict[str, Any]:
    """A row's figures, or why there are none."""
    if row.missing:
        return {**plainly(row), "remark": row.missing}
    try:
        return study.measure(row)
    except Exception as error:  # the other rows are worth keeping; the exit status is 1
        failure = f"{type(error).__name__}: {error}"
        CONSOLE.print(f"{row.name} failed: {failure}", markup=False, highlight=False)
        return {**plainly(row), "error": failure, "remark": f"failed: {failure.splitlines()[0]}"}


def plainly(row: Row) -> dict[str, Any]:
    """What a result without figures says of its row."""
    return {"name": row.name, "format": row.format, "method": row.method}


def facts(study: Study, start: float, left: int) -> dict[str, Any]:
    """What the results hold for: date, machine, versions, setting, remarks, rows left."""
    used, bench, arguments = machine(), study.bench, study.arguments
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {key: used[key] for key in ("processor", "cores", "torch threads")},
        "versions": {
            "python": sys.version.split()[0], **{name: version(name) for name in VERSIONS},
        },
        "setting": {
            "network": study.network, "steps": arguments.steps, "prompts": len(bench.prompts),
            "backend": study.config.backend, "min_sqnr_db": NO_BOUND, "edges": False,
            "seeds": {"pictures": NOISE_SEED, "calibration": CALIBRATION_SEED},
            "pictures": bench.prompts, "calibration": bench.unseen,
        },
        "seconds": round(time.perf_counter() - start, 1),
        "remarks": [*([f"unfinished: {left} rows are left"] if left else []), *remarks(study)],
    }  # fmt: skip


def remarks(study: Study) -> list[str]:
    """What the table holds for, in sentences."""
    arguments = study.arguments
    lines = [
        f"{arguments.steps} DDIM steps, {arguments.prompts} prompts, as many others in calibration",
        f"weights in float: {megabytes(study.program):.2f} MB",
        f"no bound on a layer's error (min_sqnr_db={NO_BOUND:g}): the same layers are quantized in "
        "all rows of a format; the first and the last one stay in float",
        "layers, dB: the mean of the quantized layers' own SQNR, each on float's inputs; split "
        "layers count one by one",
    ]
    return [*lines, skewed()] if study.network == "unet" else lines


def write(study: Study, report: dict[str, Any]) -> None:
    """The JSON, the table, the chart."""
    stem = study.arguments.out / f"quantize-{study.network}"
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(study.network, report), encoding="utf-8")
    plot(stem.with_suffix(".png"), study.network, report["rows"])


def show(study: Study, results: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    shown = Table(*COLUMNS, title=TITLES[study.network])
    for line in table(results):
        shown.add_row(*line)
    Console(width=max(CONSOLE.width, TABLE_WIDTH)).print(shown)
    for remark in remarks(study):
        CONSOLE.print(f"- {remark}", markup=False, highlight=False)
    CONSOLE.print(f"{study.arguments.out}/quantize-{study.network}.json, .md, .png")


if __name__ == "__main__":
    sys.exit(main())
