"""The tables of the low-rank benchmark, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from low_rank_rows import FORMATS, METHODS, RANK, RANKED, RANKS, WITHOUT
from quantize_rows import LABELS

Result = Mapping[str, Any]
Lines = list[tuple[str, ...]]


def by_method(results: Sequence[Result], layer: str) -> Lines:
    """A line for each method: dB in every format, and the gain over plain."""
    known = {(row["format"], row["method"]): row for row in results
             if row["layer"] == layer and row["rank"] == RANK}  # fmt: skip
    lines = []
    for method in METHODS:
        found = [known.get((format, method.name)) for format in FORMATS]
        plain = [known.get((format, METHODS[0].name)) for format in FORMATS]
        if any(found):
            lines.append((method.name, *map(gained, found, plain)))
    return lines


def gained(row: Result | None, plain: Result | None) -> str:
    """SQNR in dB, and what it has over plain; or why there is none."""
    if row is None:
        return ""
    if "sqnr_db" not in row:
        return "failed"
    less = "" if row is plain or plain is None or "sqnr_db" not in plain else (
        f" ({row['sqnr_db'] - plain['sqnr_db']:+.1f})"
    )  # fmt: skip
    return f"{row['sqnr_db']:.1f}{less}"


def by_rank(results: Sequence[Result], layer: str) -> Lines:
    """A line for each format and method: dB and kilobytes at every rank."""
    known = {(row["format"], row["method"], row["rank"]): row
             for row in results if row["layer"] == layer and "sqnr_db" in row}  # fmt: skip
    lines = []
    for format in RANKED:
        for method, without in WITHOUT.items():
            found = [known.get((format, method.name, rank)) for rank in RANKS]
            if sum(row is not None for row in found) > 1:
                none = known.get((format, without.name, RANK))
                lines.append((f"{format} {method.name}", *map(sized, (none, *found))))
    return lines


def sized(row: Result | None) -> str:
    """SQNR and size."""
    return "" if row is None else f"{row['sqnr_db']:.1f} dB, {row['bytes'] / 1000:.0f} kB"


def tables(results: Sequence[Result]) -> dict[str, tuple[tuple[str, ...], Lines]]:
    """Columns and lines of every table, by its title."""
    layers = list(dict.fromkeys(row["layer"] for row in results))
    names = tuple(LABELS.get(format, format) for format in FORMATS)
    found = {f"{each}: SQNR in dB (gain over plain), rank {RANK}":
             (("method", *names), by_method(results, each)) for each in layers}  # fmt: skip
    ranks = ("", *(f"rank {rank}" for rank in (0, *RANKS)))
    found |= {f"{each}: by rank": (ranks, by_rank(results, each)) for each in layers}
    return {title: table for title, table in found.items() if table[1]}


def markdown(report: Mapping[str, Any]) -> str:
    """A report's tables and what they hold for."""
    lines = [f"# {report['title']}", ""]
    for name, (columns, rows) in report["tables"].items():
        lines += [f"## {name}", "", row_of(columns), "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += [*(row_of(row) for row in rows), ""]
    used, versions = report["machine"], report["versions"]
    lines += [*(f"- {remark}" for remark in report["remarks"]), ""]
    lines += [f"{report['date']}; {used['processor']}, {used['cores']} cores; "
              + "; ".join(f"{name} {number}" for name, number in versions.items()), ""]  # fmt: skip
    return "\n".join(lines)


def row_of(cells: Sequence[str]) -> str:
    """A line of Markdown."""
    return f"| {' | '.join(cells)} |"
