"""What smoothing, branches and GPTQ give on the trained networks, as one table.

Reads what quantize.py wrote, quantize-NETWORK.json in --out, and writes low-rank-networks.md. Rows
that are not there leave their cells empty; quantize.py --only "LowRank|nvfp4" measures them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cache_show import TITLES
from low_rank_rows import FORMATS
from low_rank_show import row_of
from quantize_rows import LABELS, PLAIN

METHODS = {  # of quantize_rows
    PLAIN: "plain",
    "Smooth()": "smoothed",
    'rounding="gptq"': "GPTQ",
    "LowRank(8)": "low-rank, rank 8",
    "LowRank, one round": "low-rank, one round",
    "LowRank()": "low-rank",
    "LowRank(), gptq": "low-rank + GPTQ",
    "Smooth(), LowRank(), gptq": "smoothed + low-rank + GPTQ",
    "Smooth(rank=32), LowRank(), gptq": "smoothed for the branch + low-rank + GPTQ",
}
FIGURES = {"sqnr_db": "SQNR of a step, median, dB (gain)", "psnr_db": "PSNR of pictures, dB (gain)"}


def main(given: Sequence[str] | None = None) -> int:
    """Write the table; 1 if no network has results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="the folder")
    out = parser.parse_args(given).out
    found = {name: read(out / f"quantize-{name}.json") for name in TITLES}
    known = {name: report for name, report in found.items() if report is not None}
    if not known:
        print(f"{out}: no quantize-NETWORK.json; run quantize.py first")
        return 1
    path = out / "low-rank-networks.md"
    path.write_text(markdown(known), encoding="utf-8")
    print(path)
    return 0


def read(path: Path) -> dict[str, Any] | None:
    """A network's results, or None."""
    if not path.exists():
        return None
    report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return report


def markdown(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """All networks' tables."""
    lines = ["# Smoothing, low-rank branches (rank 32) and GPTQ in 4 bits, on trained networks", ""]
    columns = ("method", *(LABELS.get(format, format) for format in FORMATS))
    rule = "|---" + "|---:" * (len(columns) - 1) + "|"
    for network, report in reports.items():
        for key, title in (*FIGURES.items(), ("megabytes", "weights, MB")):
            lines += [f"## {TITLES[network]}: {title}", "", row_of(columns), rule]
            lines += [*map(row_of, table(report["rows"], key)), ""]
        lines += [*(f"- {remark}" for remark in report["remarks"]), ""]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[str, ...]]:
    """A line for each method: a figure in every format."""
    known = {(row["format"], row["method"]): row for row in rows if key in row}
    lines = []
    for method, name in METHODS.items():
        cells = [cell(known.get((format, method)), known.get((format, PLAIN)), key)
                 for format in FORMATS]  # fmt: skip
        if any(cells):
            lines.append((name, *cells))
    return lines


def cell(row: Mapping[str, Any] | None, plain: Mapping[str, Any] | None, key: str) -> str:
    """A figure, and in dB what it has over plain."""
    if row is None:
        return ""
    if row is plain or plain is None or key not in FIGURES:
        return f"{row[key]:.2f}"
    return f"{row[key]:.2f} ({row[key] - plain[key]:+.1f})"


if __name__ == "__main__":
    raise SystemExit(main())
