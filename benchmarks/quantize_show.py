"""The table and the chart of the quantization benchmark, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from cache_show import TITLES
from matplotlib import pyplot as plt
from quantize_rows import PLAIN, WINNERS

Result = Mapping[str, Any]

COLORS = {"w8a8": "#0072B2", "w4a8": "#E69F00", "w4a4": "#CC79A7"}  # Okabe and Ito's
GAINS = {"sqnr_db": "SQNR of a step, median", "psnr_db": "PSNR of the pictures"}
COLUMNS = (
    "configuration", "SQNR, dB", "gain", "worst step", "PSNR, dB", "gain", "layers, dB", "MB",
    "build, s", "",
)  # fmt: skip
BAR = 0.26  # inches of height; a label needs 0.12
LINE = 1 / (len(COLORS) + 0.6)  # of a method's place, for one bar


def measured(results: Sequence[Result]) -> list[Result]:
    """The rows that ran."""
    return [row for row in results if "sqnr_db" in row]


def gain(results: Sequence[Result], row: Result, key: str) -> float | None:
    """What a row has over its format's plain one, dB; None where that did not run."""
    base = [each for each in measured(results)
            if each["format"] == row["format"] and each["method"] == PLAIN]  # fmt: skip
    return row[key] - base[0][key] if base and key in row and row["method"] != PLAIN else None


def cells(results: Sequence[Result], row: Result) -> tuple[str, ...]:
    """A line of the table, by COLUMNS."""
    if "sqnr_db" not in row:
        return (row["name"], *("",) * (len(COLUMNS) - 2), row["remark"])
    layers = "" if row["layers_db"] is None else f"{row['layers_db']:.2f}"
    return (
        row["name"],
        f"{row['sqnr_db']:.2f}",
        signed(gain(results, row, "sqnr_db")),
        f"{row['sqnr_worst_db']:.2f}",
        f"{row['psnr_db']:.2f}",
        signed(gain(results, row, "psnr_db")),
        layers,
        f"{row['megabytes']:.2f}",
        f"{row['build_s']:.1f}",
        row["remark"],
    )


def signed(value: float | None) -> str:
    """A difference in dB with its sign; nothing for None."""
    return "" if value is None else f"{value:+.2f}"


def table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's lines."""
    return [cells(results, row) for row in results]


def markdown(network: str, report: Mapping[str, Any]) -> str:
    """One network's results as Markdown."""
    lines = [f"## {TITLES[network]}: what methods of quantization gain", ""]
    lines += [f"| {' | '.join(COLUMNS)} |", "|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    lines += [f"| {' | '.join(line)} |" for line in table(report["rows"])]
    return "\n".join([*lines, "", *(f"- {remark}" for remark in report["remarks"]), ""])


def plot(path: Path, network: str, results: Sequence[Result]) -> Path | None:
    """Gains over plain by method, a bar a format; None where there are none."""
    found = [row for row in measured(results) if gain(results, row, "sqnr_db") is not None]
    methods = sorted(
        dict.fromkeys(row["method"] for row in found), key=lambda each: each == WINNERS
    )
    if not methods:
        return None
    height = 1.6 + BAR * len(methods) * (len(COLORS) + 0.6)
    figure, panels = plt.subplots(
        1, len(GAINS), figsize=(12, height), sharey=True, layout="constrained"
    )
    for axes, (key, title) in zip(panels, GAINS.items(), strict=True):
        draw(axes, results, found, methods, key)
        axes.set_xlabel(f"{title}: gain over plain (dB)")
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].set_ylim(len(methods) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), frameon=False)
    figure.suptitle(TITLES[network], x=0.01, ha="left")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw(
    axes: Any, results: Sequence[Result], found: Sequence[Result], methods: Sequence[str], key: str
) -> None:
    """One panel: bars side by side at each method's place, labelled at their ends."""
    for number, (format, color) in enumerate(COLORS.items()):
        rows = [row for row in found if row["format"] == format]
        if not rows:
            continue
        gains = [gain(results, row, key) or 0.0 for row in rows]
        places = [methods.index(row["method"]) + LINE * (number - 1) for row in rows]
        bars = axes.barh(places, gains, height=LINE, color=color, label=format)
        axes.bar_label(bars, [f"{each:+.1f}" for each in gains], padding=2, fontsize=7)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(alpha=0.25, axis="x")
    axes.margins(x=0.12)
