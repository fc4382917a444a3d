"""What gpu.py prints and writes: the asked figures, tables and the plot, all from its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpu_rows import BARS, JUDGED, SECTIONS

Report = Mapping[str, Any]
Row = Mapping[str, Any]
Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
RANK = 32
LONG = "linear layers"


# ---- the asked figures ---------------------------------------------------------------------------


def reached(report: Report) -> list[dict[str, Any]]:
    """Each asked figure: what it is by layer or block, the median, and in how many it is met."""
    by = judged(report.get("kernels", ()))
    values = {
        "fp8": [row["share"] for row in by.get("effuse fp8", ()) if "share" in row],
        "int8": [row["over_bf16"] for row in by.get("effuse int8", ()) if "over_bf16" in row],
        "branch": [-row["added"] for row in report.get("branches", ())
                   if (row["how"], row["rank"]) == ("fused", RANK) and "added" in row],
        "w4a8": [-ratio for ratio in pairs(by, "effuse w4a8", "effuse int8", "ms")],
        "bytes": [-ratio for ratio in pairs(by, "effuse w4a8", "effuse int8", "weight_bytes")],
        "block": best_blocks(report.get("blocks", ())),
    }  # fmt: skip
    return [met(key, values[key]) for key in BARS]


def judged(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """FLUX's layers at the judged number of rows, by what multiplies them."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["network"] == "FLUX" and row["m"] == JUDGED:
            found.setdefault(row["by"], []).append(row)
    return found


def pairs(by: Mapping[str, list[Row]], one: str, other: str, key: str) -> list[float]:
    """one / other, layer by layer."""
    known = {(row["n"], row["k"]): row for row in by.get(other, ()) if key in row}
    return [row[key] / known[row["n"], row["k"]][key] for row in by.get(one, ())
            if key in row and (row["n"], row["k"]) in known]  # fmt: skip


def best_blocks(rows: Iterable[Row]) -> list[float]:
    """Each FLUX block by the fastest of ours, over torch.compile."""
    found: dict[str, float] = {}
    for row in rows:
        if "block" in row["network"] and row["by"].startswith("effuse") and "over_compile" in row:
            network = row["network"]
            found[network] = max(found.get(network, 0.0), row["over_compile"])
    return list(found.values())


def met(key: str, values: Sequence[float]) -> dict[str, Any]:
    """One asked figure; a bar below 0 is an upper bound of what stands behind the minus."""
    bar = BARS[key]
    good = sum(value >= bar.least for value in values)
    verdict = "unmeasured" if not values else "yes" if good == len(values) else (
        f"in {good} of {len(values)}" if good else "no"
    )  # fmt: skip
    shown = sorted(abs(value) if key != "branch" else -value for value in values)
    return {
        "name": bar.name, "asked": bar.asked, "met": verdict, "values": shown,
        "median": statistics.median(shown) if shown else None,
    }  # fmt: skip


# ---- tables --------------------------------------------------------------------------------------


def number(row: Row, key: str, text: str = "{:.2f}", times: float = 1.0) -> str:
    """A figure, or nothing."""
    return text.format(row[key] * times) if row.get(key) is not None else ""


def tables(report: Report) -> dict[str, Table]:
    """Columns and lines of every table, by its title; the asked figures first."""
    made: dict[str, Table] = {"asked and reached": bars(report)}
    for section, (title, make) in TABLES.items():
        if report.get(section):
            if section == "kernels":
                made["linear layers: medians over a network's layers"] = _medians(report[section])
            made[title] = make(report[section])
    return made


def printed(report: Report) -> dict[str, Table]:
    """The tables for a terminal: without the one of all linear layers, which has hundreds."""
    return {title: each for title, each in tables(report).items() if title != LONG}


def bars(report: Report) -> Table:
    """The asked figures."""
    lines = []
    for row in reached(report):
        text = "{:.0%}" if "%" in row["asked"] or row["name"].startswith("rank") else "{:.2f}×"
        spread = ""
        if row["values"]:
            low, high = (text.format(row["values"][at]) for at in (0, -1))
            spread = f"{text.format(row['median'])} ({low} to {high})"
        lines.append((row["name"], row["asked"], spread or "unmeasured", row["met"]))
    return ("figure", "asked", "reached: median (range)", "met"), lines


def _ceilings(rows: Sequence[Row]) -> Table:
    return ("product M x N x K, or copy", "ms", "TFLOP/s", "GB/s", ""), [
        (row["name"], number(row, "ms", "{:.3f}"), number(row, "tflops", "{:.0f}"),
         number(row, "gbs", "{:.0f}"), row.get("error", ""))
        for row in rows
    ]  # fmt: skip


def _kernels(rows: Sequence[Row]) -> Table:
    columns = ("layer", "× bf16", "share of ceiling", "TFLOP/s", "ms", "weight, MB", "")
    return columns, [
        (row["name"], number(row, "over_bf16"), number(row, "share", "{:.0%}"),
         number(row, "tflops", "{:.0f}"), number(row, "ms", "{:.4f}"),
         number(row, "weight_bytes", "{:.1f}", 1e-6), row.get("error", ""))
        for row in rows
    ]  # fmt: skip


def _medians(rows: Sequence[Row]) -> Table:
    """Linear layers by network, number of rows, and what multiplies them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['network']} M={row['m']}: {row['by']}", []).append(row)
    return ("network", "× bf16: median (range)", "share of ceiling", "failed"), [
        (name, _spread(found, "over_bf16", "{:.2f}"), _spread(found, "share", "{:.0%}"),
         str(sum("error" in row for row in found) or ""))
        for name, found in groups.items()
    ]  # fmt: skip


def _spread(rows: Sequence[Row], key: str, text: str) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    found = (statistics.median(values), min(values), max(values))
    middle, low, high = (text.format(each) for each in found)
    return f"{middle} ({low} to {high})"


def _branches(rows: Sequence[Row]) -> Table:
    return ("layer, format and branch", "added", "ms", ""), [
        (row["name"], number(row, "added", "{:+.1%}"), number(row, "ms", "{:.4f}"),
         row.get("error", ""))
        for row in rows
    ]  # fmt: skip


def _fused(rows: Sequence[Row]) -> Table:
    columns = ("operation", "× unfused, or × bf16", "share of ceiling", "GB/s", "TFLOP/s", "ms", "")
    return columns, [
        (row["name"], number(row, "over_unfused") or number(row, "over_bf16"),
         number(row, "share", "{:.0%}"), number(row, "gbs", "{:.0f}"),
         number(row, "tflops", "{:.0f}"), number(row, "ms", "{:.4f}"), row.get("error", ""))
        for row in rows
    ]  # fmt: skip


def _tune(rows: Sequence[Row]) -> Table:
    columns = ("layer and format", "gain", "ms", "best ms", "best tile", "failed", "")
    return columns, [
        (row["name"], number(row, "gain"), number(row, "ms", "{:.4f}"),
         number(row, "best_ms", "{:.4f}"), _tile(row), f"{row['failed']} of {row['tried']}",
         row.get("error", ""))
        for row in rows
    ]  # fmt: skip


def _tile(row: Row) -> str:
    found = row.get("best")
    return " ".join(f"{key} {value}" for key, value in found.items()) if found else ""


def _blocks(rows: Sequence[Row]) -> Table:
    columns = ("network", "× torch.compile", "× eager", "ms", "peak, MB", "weights, MB",
               "SQNR, dB", "build, s", "")  # fmt: skip
    return columns, [
        (row["name"], number(row, "over_compile"), number(row, "over_eager"),
         number(row, "ms", "{:.3f}"), number(row, "peak_bytes", "{:.0f}", 1e-6),
         number(row, "weight_bytes", "{:.0f}", 1e-6), number(row, "sqnr_db", "{:.1f}"),
         number(row, "build_s", "{:.0f}"), row.get("error") or row.get("remark", ""))
        for row in rows
    ]  # fmt: skip


def _correct(rows: Sequence[Row]) -> Table:
    worst = max((max(row["errors"], default=0.0) for row in rows), default=0.0)
    exact = sum(not any(row["errors"]) for row in rows)
    return ("kernels agree with their references", "cases", "exact", "largest relative error"), [
        ("yes", str(len(rows)), str(exact), f"{worst:.1e}")
    ]


TABLES: Mapping[str, tuple[str, Callable[[Sequence[Row]], Table]]] = {
    "blocks": ("networks, end to end", _blocks),
    "kernels": (LONG, _kernels),
    "branches": ("low-rank branches beside {quantize, linear}", _branches),
    "fused": ("fused operations and convolutions", _fused),
    "tune": ("tiles", _tune),
    "ceilings": ("ceilings of this GPU", _ceilings),
    "correct": ("correctness", _correct),
}


def markdown(report: Report) -> str:
    """A report: ratios first, then everything else, then what it holds for."""
    lines = [f"# effuse on {report['machine'].get('gpu', 'a GPU')}", ""]
    for title, (columns, rows) in tables(report).items():
        lines += [f"## {title}", "", _row(columns), "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += [*(_row(row) for row in rows), ""]
    return "\n".join([*lines, *(f"- {each}" for each in remarks(report)), ""])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def remarks(report: Report) -> list[str]:
    """Machine and versions, and how to read the figures."""
    skipped = [name for name in SECTIONS if name not in report]
    names = (f"{name} {each}" for name, each in report["versions"].items() if each)
    return [
        f"{report['date']}; " + ", ".join(f"{k}: {v}" for k, v in report["machine"].items()),
        ", ".join(names),
        f"inputs of the checks: seed {report['seed']}; {report['seconds']:.0f} s in all",
        "times: medians over rounds in turns, CUDA graphs, cold L2; ratios: medians of the rounds'",
        "share of ceiling: of the best rate measured in `ceilings` for the same numbers (w4a16 and "
        "nvfp4: bf16; w4a8: int8), or of a copy's bytes a second",
        *(["not run: " + ", ".join(skipped)] if skipped else []),
        *report["notes"],
    ]


# ---- the plot ------------------------------------------------------------------------------------


def plot(report: Report, path: Path) -> str | None:
    """FLUX's layers over cuBLAS bf16, and networks over torch.compile; why there is none, or None.

    Each bar is a ratio; right of 1 is faster.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed"
    groups = [each for each in (_layers(report), _networks(report)) if each[1]]
    if not groups:
        return "no plot: neither `kernels` nor `blocks` was run"
    height = 1.5 + 0.28 * max(len(rows) for _, rows in groups)
    figure, axes = pyplot.subplots(1, len(groups), figsize=(7 * len(groups), height), squeeze=False)
    for axis, (title, rows) in zip(axes[0], groups, strict=True):
        names, values = zip(*reversed(rows), strict=True)
        colours = ["tab:blue" if "effuse" in name else "tab:gray" for name in names]
        axis.barh(names, values, color=colours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.set_title(title)
        axis.set_xlabel("times as fast (right of 1 is faster)")
    figure.suptitle(f"effuse on {report['machine'].get('gpu', 'a GPU')}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return None


def _layers(report: Report) -> tuple[str, list[tuple[str, float]]]:
    by = judged(report.get("kernels", ()))
    rows = [(name, statistics.median(found)) for name, each in by.items()
            if (found := [row["over_bf16"] for row in each if "over_bf16" in row])]  # fmt: skip
    return f"FLUX's linear layers, M={JUDGED}, over cuBLAS bf16 (median)", rows


def _networks(report: Report) -> tuple[str, list[tuple[str, float]]]:
    rows = [(row["name"], row["over_compile"]) for row in report.get("blocks", ())
            if "over_compile" in row]  # fmt: skip
    return "networks, over torch.compile bf16", rows
