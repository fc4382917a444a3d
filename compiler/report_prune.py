"""What was pruned, and what training has won back: tables, sentences and charts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from effuse.errors import require
from effuse.naming import block_names
from effuse.report_charts import INK, PAPER, SERIES, chart
from effuse.report_text import Table, gigaflops, percent, quantity

Manifest = Mapping[str, Any]
Candidate = Mapping[str, Any]

COLUMNS = ("candidate", "kind", "parameters", "GFLOPs", "score")
LISTED = 12  # of what went, in the table
MOST_ROWS = 32  # of the chart; more candidates share rows, by block
LONGEST = 56  # letters of a name on the chart
MEASURES = {"parameters": "parameters", "flops": "arithmetic", "milliseconds": "time"}
SCORES = {  # a criterion's axis, and what it means to be further left
    "loss": "relative squared error of the output without it",
    "latent": "shift of the final latent's mean and deviation without it",
    "magnitude": "sum of its squared weights",
    "random": "random number times its size",
    "masks": "learned gate: 1 keeps it, 0 leaves it out",
}
SMALL = 1e-12  # of the highest score: what is less stands at the chart's edge
HALF = 5.0  # inches: the width of a chart that stands beside another


def pass_data(manifest: Manifest, name: str) -> Mapping[str, Any]:
    """The figures of the last pass of that name that has any."""
    found = [each.get("data") for each in manifest.get("passes", ()) if each["name"] == name]
    return next(filter(None, reversed(found)), {})


# ---- tables and sentences ------------------------------------------------------------------------


def pruned_table(manifest: Manifest) -> Table:
    """The largest of what went."""
    gone = [each for each in pass_data(manifest, "prune").get("candidates", ()) if each["gone"]]
    largest = sorted(gone, key=lambda each: -each["parameters"])[:LISTED]
    title = f"Pruned: the largest {LISTED} of {len(gone)}" if len(gone) > LISTED else "Pruned"
    return Table(title, COLUMNS, candidate_rows(largest))


def every_table(manifest: Manifest) -> Table:
    """Every candidate in the graph's order."""
    every = pass_data(manifest, "prune").get("candidates", ())
    verdicts = ["went" if each["gone"] else "stays" for each in every]
    rows = [(*row, verdict) for row, verdict in zip(candidate_rows(every), verdicts, strict=True)]
    return Table("All candidates, in the graph's order", (*COLUMNS, ""), rows)


def candidate_rows(candidates: Iterable[Candidate]) -> list[tuple[str, ...]]:
    """Candidates as rows of text."""
    return [
        (each["name"], each["kind"], quantity(each["parameters"]), gigaflops(each["flops"]),
         score_text(each["score"]))
        for each in candidates
    ]  # fmt: skip


def score_text(score: float | None) -> str:
    """A score in three digits; None is that of an output that is not finite."""
    return "not finite" if score is None else f"{score:.3g}"


def prune_line(manifest: Manifest) -> str:
    """What went, in a sentence; empty where nothing was pruned."""
    data = pass_data(manifest, "prune")
    every = data.get("candidates", ())
    if not every:
        return ""
    count = sum(each["gone"] for each in every)
    found = data.get("removed", {})
    shares = [f"{percent(found[each], 1)} of the {word}" for each, word in MEASURES.items()
              if each in found]  # fmt: skip
    removed = f", and with them {' and '.join(shares)}" if shares else ""
    return f"{count} of {len(every)} candidates went{removed}."


def sums_line(manifest: Manifest) -> str:
    """How well single losses predicted what is lost without all; empty where not measured."""
    found = pass_data(manifest, "prune").get("additivity")
    if not found:
        return ""
    predicted, measured = found["chosen"]
    told = (
        f"Relative squared error of the output without all that went: {measured:.2g}, where single "
        f"losses add up to {predicted:.2g}."
    )
    if found["correlation"] is None:
        return told
    sets = len(found["measured"])
    return f"{told} Over {sets} random sets the correlation is {found['correlation']:.2f}."


def recovery_line(manifest: Manifest) -> str:
    """What training won back, in a sentence; empty where there was none."""
    data = pass_data(manifest, "distill")
    if not data:
        return ""
    before, after = (
        "one that is not finite" if each is None else percent(each, 1)
        for each in (data["before"], data["after"])
    )
    return (
        f"{data['updates_total']} updates took the output's relative error from {before} to "
        f"{after}, measured on a few calls."
    )


def prune_lines(manifest: Manifest) -> list[str]:
    """What the terminal says: sentences, some of them empty."""
    return [prune_line(manifest), sums_line(manifest), recovery_line(manifest)]


# ---- the page ------------------------------------------------------------------------------------


def prune_view(manifest: Manifest) -> dict[str, Any]:
    """What the page says of pruning and recovery."""
    sums = ("Do single losses add up?", additivity_chart(manifest), sums_line(manifest))
    recovery = ("Recovery by training", recovery_chart(manifest), recovery_line(manifest))
    beside = [
        {"title": title, "chart": drawn, "caption": caption}
        for title, drawn, caption in (sums, recovery)
        if caption
    ]
    return {
        "line": prune_line(manifest),
        "chart": importance_chart(manifest),
        "caption": importance_caption(manifest),
        "table": pruned_table(manifest),
        "every": every_table(manifest),
        "beside": beside,
    }


def importance_caption(manifest: Manifest) -> str:
    """How to read the chart."""
    every = pass_data(manifest, "prune").get("candidates", ())
    kinds = "each kind " if len({each["kind"] for each in every}) > 1 else ""
    told = [
        f"One mark a candidate, {kinds}from the network's input at the top down to its output; the "
        "larger, the more parameters go with it. Further left is less important."
    ]
    if len(every) > MOST_ROWS:
        told.append("Several marks in a row are in the graph's order, from above.")
    if any(each["score"] is None for each in every):
        told.append("Crosses at the right: without it the output is not finite.")
    return " ".join(told)


# ---- charts --------------------------------------------------------------------------------------


def importance_chart(manifest: Manifest) -> Any:
    """Each candidate's score in the graph's order, as inline SVG."""
    data = pass_data(manifest, "prune")
    every = data.get("candidates", ())
    if not every:
        return ""
    rows = rows_of([each["name"] for each in every])
    names = list(dict.fromkeys(rows))
    scale = Scale.of(each["score"] for each in every)

    def draw(axes: Any) -> None:
        draw_candidates(axes, every, places(rows), scale, len(names))
        axes.set_yticks(range(len(names)), list(map(shortened, names)), fontsize=9)
        label = SCORES.get(data.get("by", ""), f"score by {data.get('by', '?')}")
        axes.set(xlabel=f"{label} (logarithmic)", ylim=(len(names) - 0.4, -0.6))
        decades(axes, "x", scale)
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)

    return chart(draw, 1.0 + 0.22 * len(names))


def rows_of(names: Sequence[str]) -> list[str]:
    """The row of each candidate: its own name, or its block's where there are too many."""
    if len(set(names)) <= MOST_ROWS:
        return list(names)
    paths = [name.partition("[")[0].partition(" ")[0] for name in names]
    blocks = block_names(paths, MOST_ROWS)
    return [blocks[path] for path in paths]


def places(rows: Sequence[str]) -> list[float]:
    """Where on the vertical axis each candidate is: its row's, those of one row one by one."""
    numbers = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    counts = {row: rows.count(row) for row in numbers}
    seen = dict.fromkeys(numbers, 0)
    found = []
    for row in rows:
        seen[row] += 1
        found.append(numbers[row] + 0.7 * ((seen[row] - 0.5) / counts[row] - 0.5))
    return found


def draw_candidates(
    axes: Any, every: Sequence[Candidate], heights: Sequence[float], scale: Scale, rows: int
) -> None:
    """What stays as rings, what went as filled diamonds, what has no score as crosses."""
    largest = max(each["parameters"] for each in every) or 1
    room = 130 * math.sqrt(rows / len(every))  # square points
    areas = [12 + room * each["parameters"] / largest for each in every]
    points = list(zip(map(scale.place, (x["score"] for x in every)), heights, areas, strict=True))
    for label, style, chosen in (
        ("stays", {"marker": "o", "facecolors": "none", "edgecolors": SERIES[0]},
         [not x["gone"] and x["score"] is not None for x in every]),
        ("went", {"marker": "D", "facecolors": SERIES[1], "edgecolors": PAPER, "linewidths": 0.6},
         [x["gone"] for x in every]),
        ("stays: no finite output without it", {"marker": "x", "color": SERIES[0]},
         [not x["gone"] and x["score"] is None for x in every]),
    ):  # fmt: skip
        found = [point for point, wanted in zip(points, chosen, strict=True) if wanted]
        if found:
            x, y, s = zip(*found, strict=True)
            axes.scatter(x, y, s, label=label, **style)


def shortened(name: str) -> str:
    """A name without its middle, if it is long."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[:half]}…{name[-half:]}"


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis on which every figure has a place: zero at its start, None at its end."""

    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Scale:
        """An axis for these, with some room on both sides; very small ones are as zero."""
        found = [min(each, 1e100) for each in values if each is not None and each > 0] or [1.0]
        highest = max(found)
        lowest = max(min(found), highest * SMALL)
        room = max(1.6, (highest / lowest) ** 0.05)
        return cls(lowest / room, highest * room)

    def place(self, value: float | None) -> float:
        """Where a figure is."""
        return self.highest if value is None else min(max(value, self.lowest), self.highest)


def decades(axes: Any, which: str, scale: Scale) -> None:
    """Make the axis `x` or `y` logarithmic, with few plain numbers on it."""
    ticker = require("matplotlib.ticker")
    spread = math.log10(scale.highest / scale.lowest)
    edge = 10 ** (0.03 * spread)
    ends = (scale.lowest / edge, scale.highest * edge)
    axes.set(**{f"{which}scale": "log", f"{which}lim": ends})
    axis = getattr(axes, f"{which}axis")
    steps = (1,) if spread > 3 else (1, 3) if spread > 1.2 else (1, 2, 5)
    axis.set_major_locator(ticker.LogLocator(subs=steps))
    axis.set_major_formatter(lambda value, place: f"{value:g}")
    axis.set_minor_locator(ticker.NullLocator())


def additivity_chart(manifest: Manifest) -> Any:
    """Sums of single losses against what was measured, as inline SVG."""
    found = pass_data(manifest, "prune").get("additivity")
    if not found:
        return ""
    x, y = found["predicted"], found["measured"]
    scale = Scale.of([*x, *y, *found["chosen"]])

    def draw(axes: Any) -> None:
        ends = (scale.lowest, scale.highest)
        axes.plot(ends, ends, color=INK, lw=0.8, ls=(0, (4, 3)), label="equal")
        placed = [list(map(scale.place, each)) for each in (x, y)]
        axes.plot(*placed, "o", color=SERIES[0], mfc="none", ms=5, label="random sets")
        chosen = [[scale.place(each)] for each in found["chosen"]]
        axes.plot(*chosen, "D", color=SERIES[1], ms=7, label="what went")
        axes.set(xlabel="sum of single losses", ylabel="measured together")
        decades(axes, "x", scale)
        decades(axes, "y", scale)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False)

    return chart(draw, 3.2, HALF)


def recovery_chart(manifest: Manifest) -> Any:
    """The loss over the updates, as inline SVG."""
    data = pass_data(manifest, "distill")
    if len(data.get("updates", ())) < 2:
        return ""

    def draw(axes: Any) -> None:
        scale = Scale.of(data["loss"])
        losses = [math.nan if each is None else scale.place(each) for each in data["loss"]]
        axes.plot(data["updates"], losses, color=SERIES[2], lw=1.6)
        axes.set(xlabel="updates", ylabel="loss, smoothed")
        decades(axes, "y", scale)
        axes.xaxis.get_major_locator().set_params(integer=True)

    return chart(draw, 3.2, HALF)
