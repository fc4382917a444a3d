"""Charts: drawn in stand-in colours, which become the page's own, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.errors import require
from effuse.metrics import CEILING_DB
from effuse.report_plan import DECIDES, FORECASTS, HOLDS, KEEPS, PlanGrid, plan_grid
from effuse.report_tables import worst_first
from effuse.report_text import percent

if TYPE_CHECKING:
    from effuse.evaluate import Evaluation

Manifest = Mapping[str, Any]
Pixels = np.ndarray[Any, Any]


CHARTED_LAYERS = 24
CLIPPED_DB = 75.0  # under a 5,000th of error nothing is to be seen
INK, FAINT, PAPER = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0b1{number}" for number in range(6))
COLORS = {INK: "var(--soft)", FAINT: "var(--line)", PAPER: "var(--paper)"}
COLORS |= {color: f"var(--series-{number})" for number, color in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "effuse",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # names may hold dollars
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
}
MARKS = {  # what a step does with kept values: colour, filled or not, size, in words
    KEEPS: (SERIES[1], True, 4.5, "keeps what later steps read"),
    FORECASTS: (SERIES[1], False, 4.5, "forecasts it from several steps"),
    HOLDS: (SERIES[1], True, 1.5, "reads it as it was"),
    DECIDES: (SERIES[3], False, 4.5, "computes in full if a signal says so"),
}
MOST_RULED = 120  # steps that are set apart by lines


def step_chart(evaluation: Evaluation) -> Any:
    """SQNR by step, one line a run, as inline SVG."""

    def draw(axes: Any) -> None:
        top = ceiling(evaluation)
        for number, run in enumerate(evaluation.runs):
            points = [(i, min(v, top)) for i, v in enumerate(run.step_sqnr_db) if v is not None]
            points = [(i, v) for i, v in points if drawn(v)]
            equal = all(v == CEILING_DB for v in run.step_sqnr_db)
            label = f"{run.name} (equal to the bit)" if equal else run.name
            steps, ratios = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, ratios, "-o", color=SERIES[number % 6], ms=3, lw=1.3, label=label)
        axes.set(xlabel="step", ylabel="SQNR, dB (higher is better)")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        if top < CEILING_DB:
            axes.axhline(top, color=INK, lw=0.8, ls=(0, (4, 3)), zorder=0)
            axes.annotate(
                f"{top:g} dB or more", (1, top), (-2, 4), xycoords=("axes fraction", "data"),
                textcoords="offset points", fontsize=9, ha="right",
            )  # fmt: skip
        axes.margins(x=0.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)

    return chart(draw, 3.2) if evaluation.timesteps and evaluation.runs else ""


def ceiling(evaluation: Evaluation) -> float:
    """The ratio that higher ones, if any, are drawn at, so that lower ones have room, in dB."""
    found = [v for run in evaluation.runs for v in run.step_sqnr_db if v is not None] or [0.0]
    return CLIPPED_DB if min(found) < CLIPPED_DB / 1.5 and max(found) > CLIPPED_DB else CEILING_DB


def drawn(value: float | None) -> bool:
    """Whether a ratio in dB has a place on an axis."""
    return value is not None and abs(value) < CEILING_DB


def layer_chart(manifest: Manifest) -> Any:
    """SQNR of the worst layers, as inline SVG."""
    measured = [layer for layer in worst_first(manifest) if drawn(layer.get("sqnr_db"))]
    worst = measured[:CHARTED_LAYERS]
    options = [record.get("options", {}) for record in manifest.get("passes", ())]

    def draw(axes: Any) -> None:
        draw_layers(axes, worst, SERIES[0], "low-bit", kept=False)
        draw_layers(axes, worst, SERIES[1], "left in float", kept=True)
        for bound in filter(None, (each.get("min_sqnr_db") for each in options)):
            draw_bound(axes, bound, len(worst))
        axes.set_yticks(range(len(worst)), [layer["name"] for layer in worst], fontsize=9)
        axes.set(xlabel="SQNR of the layer's own output, dB (higher is better)", xlim=(0, None))
        axes.set_ylim(len(worst) - 0.3, -0.7)
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)

    return chart(draw, 0.9 + 0.21 * len(worst)) if worst else ""


def plan_chart(manifest: Manifest) -> Any:
    """The blocks that each step computes, as inline SVG."""
    grid = plan_grid(manifest)
    if grid is None:
        return ""
    blocks, steps = grid.shares.shape

    def draw(axes: Any) -> None:
        draw_cells(axes, grid)
        draw_marks(axes, grid)
        for row, weight in enumerate(grid.weights):
            axes.text(steps - 0.2, row, percent(weight, 1), va="center", fontsize=8.5)
        axes.set_yticks(range(-1, blocks), ["kept values", *grid.blocks], fontsize=8.5)
        axes.set(xlabel="step", xlim=(-0.5, steps - 0.5), ylim=(blocks - 0.5, -1.6))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)

    return chart(draw, 1.2 + 0.19 * blocks)


def draw_cells(axes: Any, grid: PlanGrid) -> None:
    """A cell for each block and step, filled from below as far as the step computes the block."""
    blocks, steps = grid.shares.shape
    outline = require("matplotlib.path").Path
    patches = require("matplotlib.patches")
    corners = np.array([(0, 0), (1, 0), (1, -1), (0, -1), (0, 0)])
    cells = [
        outline(corners * (1, grid.shares[row, step]) + (step - 0.5, row + 0.5), closed=True)
        for row in range(blocks)
        for step in range(steps)
        if grid.shares[row, step]
    ]
    filled, style = outline.make_compound_path(*cells), {"color": SERIES[0], "zorder": 1.2}
    axes.add_patch(patches.PathPatch(filled, lw=0, label="computed", **style))
    whole = patches.Rectangle((-0.5, -0.5), steps, blocks, color=FAINT, lw=0, label="not computed")
    axes.add_patch(whole)
    axes.hlines(np.arange(blocks + 1) - 0.5, -0.5, steps - 0.5, color=PAPER, lw=1.6)
    if steps <= MOST_RULED:
        axes.vlines(np.arange(steps + 1) - 0.5, -0.5, blocks - 0.5, color=PAPER, lw=1)


def draw_marks(axes: Any, grid: PlanGrid) -> None:
    """Above each step, what it does with the values that are kept between steps."""
    for name, (color, filled, size, words) in MARKS.items():
        steps = [step for step, found in enumerate(grid.marks) if found == name]
        if steps:
            fill = color if filled else "none"
            axes.plot(steps, [-1] * len(steps), "o", color=color, mfc=fill, ms=size, label=words)


def draw_layers(
    axes: Any, layers: Sequence[Mapping[str, Any]], color: str, label: str, *, kept: bool
) -> None:
    """A dot on a stem for each layer that was kept in float, or was not."""
    found = [(i, x["sqnr_db"]) for i, x in enumerate(layers) if bool(x.get("reason")) is kept]
    for place, ratio in found:
        axes.plot((0, ratio), (place, place), color=color, lw=1.2, alpha=0.45)
    if found:
        places, ratios = zip(*found, strict=True)
        axes.plot(ratios, places, "o", color=color, ms=5.5, label=label)


def draw_bound(axes: Any, bound: float, places: int) -> None:
    """The ratio under which layers stay in float."""
    axes.axvline(bound, color=INK, lw=1, ls=(0, (4, 3)))
    text, at = f"bound {bound:g} dB", (bound, places - 0.4)
    axes.annotate(text, at, (4, 0), textcoords="offset points", fontsize=9)


def layer_caption(manifest: Manifest) -> str:
    """What the chart leaves out, if anything."""
    count = sum(drawn(layer.get("sqnr_db")) for layer in manifest.get("layers", ()))
    return f"The chart shows the {CHARTED_LAYERS} worst." if count > CHARTED_LAYERS else ""


def chart(draw: Any, height: float, width: float = 10.4) -> Any:
    """A matplotlib chart, sized in inches, as markup in the page's colours and font."""
    matplotlib, figures = require("matplotlib"), require("matplotlib.figure")
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(width, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True)
    return require("markupsafe").Markup(page_svg(buffer.getvalue()))


def page_svg(text: str) -> str:
    """matplotlib's SVG without preamble, metadata and names, its stand-in colours replaced."""
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", body)  # the same in every chart
    for color, name in COLORS.items():
        body = body.replace(color, name)
    return body
