"""The plot and the table of the cache benchmark, from its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import patheffects
from matplotlib import pyplot as plt

Result = Mapping[str, Any]

# Okabe and Ito's colours, told apart without red or green, each with a marker of its own.
OURS = (
    ("#0072B2", "o"), ("#D55E00", "s"), ("#E69F00", "D"), ("#CC79A7", "^"), ("#56B4E9", "v"),
    ("#009E73", "P"), ("#7A5195", "X"), ("#0072B2", "*"), ("#D55E00", "h"), ("#009E73", "<"),
)  # fmt: skip
HALO = [patheffects.withStroke(linewidth=2, foreground="white")]  # labels stay readable on lines
BASELINES = (("#777777", "o"), ("#000000", "s"), ("#777777", "^"))  # hollow, dashed
TITLES = {"unet": "the text-to-emoji UNet", "dit": "the class-to-emoji transformer"}
COLUMNS = ("configuration", "speed-up", "PSNR, dB", "worst, dB", "full steps", "ms a run", "")


def measured(results: Sequence[Result]) -> list[Result]:
    """The rows beside full sampling that ran and gave pictures that can be compared."""
    ran = [row for row in results if "error" not in row and row["kind"] != "full"]
    return [row for row in ran if -200 < row["psnr_db"] < 200]


def pareto(results: Sequence[Result]) -> list[Result]:
    """The rows that no other of them beats in both speed-up and PSNR, by speed-up."""
    front: list[Result] = []
    for row in sorted(results, key=lambda row: (-row["speedup"], -row["psnr_db"])):
        if not front or row["psnr_db"] > front[-1]["psnr_db"]:
            front.append(row)
    return front[::-1]


def plot(path: Path, network: str, results: Sequence[Result], setting: Mapping[str, Any]) -> Path:
    """Speed-up against PSNR, a line a family, and the front of effuse's points."""
    figure, axes = plt.subplots(figsize=(11, 7), layout="constrained")
    found = measured(results)
    ours = [row for row in found if row["kind"] == "effuse"]
    draw_families(axes, ours, OURS, {"markersize": 8})
    others = [row for row in found if row["kind"] != "effuse"]
    hollow = {"linestyle": "--", "markersize": 6, "markerfacecolor": "white"}
    draw_families(axes, others, BASELINES, hollow)
    front = pareto(ours)
    x, y = [row["speedup"] for row in front], [row["psnr_db"] for row in front]
    axes.plot(x, y, color="black", linewidth=5, alpha=0.2, zorder=1, label="effuse's Pareto front")
    axes.set_xlabel("speed-up of the whole run over the exact artifact")
    axes.set_ylabel("PSNR of the final pictures against full sampling (dB)")
    axes.set_title(
        f"{TITLES[network]}: {setting['steps']} steps, {setting['prompts']} prompts, "
        f"guidance {setting['guidance']}"
    )
    axes.grid(alpha=0.25)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def draw_families(
    axes: Any, rows: Sequence[Result], styles: Sequence[tuple[str, str]], more: Mapping[str, Any]
) -> None:
    """One marker a family, a line where its labels count up; the label beside each point."""
    for index, family in enumerate(dict.fromkeys(row["family"] for row in rows)):
        color, marker = styles[index % len(styles)]
        of = [row for row in rows if row["family"] == family]
        x, y = [row["speedup"] for row in of], [row["psnr_db"] for row in of]
        counts = all(row["label"].removeprefix("N=").replace(".", "").isdigit() for row in of)
        line = {"linewidth": 1.2} if counts else {"linestyle": ""}
        axes.plot(x, y, color=color, marker=marker, label=family, **{**more, **line})
        for row in of:
            point = (row["speedup"], row["psnr_db"])
            axes.annotate(
                row["label"],
                point,
                (5, 5),
                textcoords="offset points",
                fontsize=7,
                color=color,
                path_effects=HALO,
            )


def cells(row: Result) -> tuple[str, ...]:
    """A row of the table, by COLUMNS."""
    if "error" in row:
        return (row["name"], *("",) * (len(COLUMNS) - 2), f"failed: {row['error']}")
    psnr, worst = ("equal" if row[key] >= 200 else f"{row[key]:.2f}" for key in PSNRS)
    remark = [f"{row['psnr_own_db']:.2f} dB to its own full run"] if "psnr_own_db" in row else []
    if row["kind"] == "package":
        remark.append(f"over eager; {row['speedup_exact']:.2f}× over exact")
    if not row["repeats"]:
        remark.append("other pictures in another round")
    return (
        row["name"],
        f"{row['speedup']:.2f}×",
        psnr,
        worst,
        row["full_steps"],
        f"{row['ms_per_run']:.0f}",
        "; ".join(remark),
    )


PSNRS = ("psnr_db", "psnr_worst_db")


def table(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's rows, those of the Pareto front marked."""
    front = {row["name"] for row in pareto([r for r in measured(results) if r["kind"] == "effuse"])}
    found = []
    for row in results:
        *rest, remark = cells(row)
        marked = [remark] if remark else []
        found.append((*rest, "; ".join(marked + ["front"] * (row["name"] in front))))
    return found


def markdown(network: str, report: Mapping[str, Any]) -> str:
    """One network's results as Markdown."""
    lines = [f"## {TITLES[network]}", "", f"| {' | '.join(COLUMNS)} |"]
    lines += ["|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    lines += [f"| {' | '.join(row)} |" for row in table(report["rows"])]
    lines += ["", *(f"- {remark}" for remark in report["remarks"]), ""]
    return "\n".join(lines)
