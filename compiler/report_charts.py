"""Charts: drawn in stand-in colours, which become the page's own, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.errors import require
from effuse.metrics import CEILING_DB
from effuse.report_tables import worst_first

if TYPE_CHECKING:
    from effuse.evaluate import Evaluation

Manifest = Mapping[str, Any]
Pixels = np.ndarray[Any, Any]


CHARTED_LAYERS = 24
INK, FAINT, PAPER = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0b1{number}" for number in range(6))
COLORS = {INK: "var(--soft)", FAINT: "var(--line)", PAPER: "var(--paper)"}
COLORS |= {color: f"var(--series-{number})" for number, color in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "effuse",
    "font.size": 10,
    "text.color": INK,
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


def step_chart(evaluation: Evaluation) -> Any:
    """SQNR by step, one line a run, as inline SVG."""

    def draw(axes: Any) -> None:
        for number, run in enumerate(evaluation.runs):
            points = [(i, v) for i, v in enumerate(run.step_sqnr_db) if drawn(v)]
            label = run.name if points else f"{run.name} (equal to the bit)"
            steps, ratios = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, ratios, "-o", color=SERIES[number % 6], ms=3.5, lw=1.6, label=label)
        axes.set(xlabel="step", ylabel="SQNR, dB (higher is better)")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.margins(x=0.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)

    return chart(draw, 3.2) if evaluation.timesteps and evaluation.runs else ""


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


def chart(draw: Any, height: float) -> Any:
    """A matplotlib chart, `height` inches high, as markup in the page's colours and font."""
    matplotlib, figures = require("matplotlib"), require("matplotlib.figure")
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(10.4, height), layout="constrained")
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
