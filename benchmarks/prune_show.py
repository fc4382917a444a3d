"""The table and the plot of the pruning benchmark, from its results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from cache_show import TITLES
from matplotlib import pyplot as plt

COLUMNS = (
    "removed by", "budget", "parameters", "FLOPs", "PSNR, dB", "recovered", "speed-up", "MB", "",
)  # fmt: skip
COLORS = {  # Okabe and Ito's
    "loss": "#0072B2", "latent": "#009E73", "magnitude": "#E69F00", "random": "#999999",
    "hand-picked": "#CC79A7",
}  # fmt: skip


def markdown(network: str, document: Mapping[str, Any]) -> str:
    """One line for each criterion and budget; another table of pictures compared by features."""
    steps = short(document["rows"])
    head = [
        f"# {TITLES[network]}: pruned",
        "",
        f"{document['steps']} DDIM steps, {document['prompts']} prompts; recovered: {steps} "
        "updates on the network's own sampling of other prompts. Speed-up and PSNR are against "
        f"the exact artifact of {document['megabytes']:.2f} MB.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    lines = [*head, *(line(pair) for pair in pairs(document["rows"]))]
    return "\n".join([*lines, *compared(document)]) + "\n"


def short(rows: list[dict[str, Any]]) -> int:
    """The updates of the short recovery."""
    return min((row["steps"] for row in rows if row["steps"]), default=0)


def pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each row without recovery, and the one with the short recovery."""
    steps = short(rows)
    recovered = {(row["by"], row["share"]): row for row in rows if steps and row["steps"] == steps}
    plain = {(row["by"], row["share"]): row for row in rows if not row["steps"]}
    every = {**recovered, **plain}
    order = sorted(every, key=lambda key: (key[1], list(COLORS).index(key[0])))
    return [(plain.get(key, every[key]), recovered.get(key)) for key in order]


def compared(document: Mapping[str, Any]) -> list[str]:
    """The rows whose pictures were compared by features."""
    rows = [row for row in document["rows"] if "kid" in row]
    own = document.get("samples")
    if not rows or not own:
        return []
    return [
        "",
        f"{own['count']} pictures against the network's own, by the features of a classifier: "
        "1 - cos of the features of pairs from the same noise, and 1000 × KID against the "
        f"network's pictures from other noise; its own pictures are at 0 and {own['kid']:.1f}.",
        "",
        "| removed by | budget | updates | build, min | PSNR, dB | 1 - cos | KID |",
        "|---|--:|--:|--:|--:|--:|--:|",
        *(
            f"| {row['by']} | {100 * row['share']:.0f} % | {row['steps']} | "
            f"{row['build_s'] / 60:.1f} | {row['psnr_db']:.1f} | {row['feature_distance']:.3f} | "
            f"{row['kid']:.1f} |"
            for row in rows
        ),
    ]


def line(pair: tuple[dict[str, Any], dict[str, Any] | None]) -> str:
    """A line of the table, by COLUMNS."""
    row, recovered = pair
    budget = f"{100 * row['share']:.0f} %"
    if row["remark"]:
        return f"| {row['by']} | {budget} | | | | | | | {row['remark']} |"
    shares = [f"{100 * row['removed'][word]:.1f} %" for word in ("parameters", "flops")]
    done = recovered is not None and not recovered["remark"]
    after = f"{recovered['psnr_db']:.1f}" if recovered and done else ""
    cells = (row["by"], budget, *shares, f"{row['psnr_db']:.1f}", after, f"{row['speedup']:.2f}×",
             f"{row['megabytes']:.2f}", "")  # fmt: skip
    return f"| {' | '.join(cells)} |"


def plot(path: Path, network: str, document: Mapping[str, Any]) -> None:
    """PSNR over what went; hollow and dashed before recovery, filled after."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    steps = short(document["rows"])
    for by, color in COLORS.items():
        for recovered in (False, True):
            rows = [
                row
                for row in sorted(document["rows"], key=lambda row: row["share"])
                if row["by"] == by
                and row["steps"] == (steps if recovered else 0)
                and not row["remark"]
            ]
            axes.plot(
                [100 * row["removed"]["parameters"] for row in rows],
                [row["psnr_db"] for row in rows],
                "o-" if recovered else "o--", color=color,
                markerfacecolor=color if recovered else "white",
                label=f"{by}{', recovered' if recovered else ''}" if rows else None,
            )  # fmt: skip
    axes.set_xlabel("parameters removed, %")
    axes.set_ylabel("PSNR of the pictures, dB")
    axes.set_title(TITLES[network])
    axes.grid(alpha=0.3)
    if document["rows"]:
        axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)
