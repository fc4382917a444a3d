"""The plan by step: which blocks each step computes, what it keeps and reads, and what it costs."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effuse.plan import Guide
from effuse.report_text import Table, counted, gigaflops, percent, without_empty

Manifest = Mapping[str, Any]

KEEPS, FORECASTS, HOLDS, DECIDES = "keeps", "forecasts", "holds", "decides"  # what a step may do
FULL_CELL, PART_CELL, EMPTY_CELL = "▓", "▒", "░"
LEGEND = f"{FULL_CELL} computed  {PART_CELL} in part  {EMPTY_CELL} not computed, by step"
NARROWEST = 24  # columns for the blocks' names, or there is no picture on the terminal
LISTED = 3  # slots, or variants, that are named


@dataclass(frozen=True, eq=False)
class PlanGrid:
    """Blocks by steps: how much of each block's arithmetic each step runs."""

    blocks: tuple[str, ...]  # from input to output
    weights: tuple[float, ...]  # each block's share of a full step's arithmetic
    shares: np.ndarray[Any, Any]  # (blocks, steps), 0 to 1
    marks: tuple[str, ...]  # one a step: KEEPS, FORECASTS, HOLDS, DECIDES or empty


def plan_grid(manifest: Manifest) -> PlanGrid | None:
    """The plan as a grid; None where every step runs the same."""
    cost, plan = manifest.get("plan") or {}, manifest["program"].get("plan", {})
    steps = plan.get("steps", ())
    if not cost or len({step["variant"] for step in steps}) < 2:
        return None
    flops = {name: np.array(counts, dtype=float) for name, counts in cost["variants"].items()}
    full = flops[plan["default"]]
    whole = np.maximum(full, 1)
    columns = [np.clip(flops[step["variant"]] / whole, 0, 1) for step in steps]
    return PlanGrid(
        tuple(name or "outside of modules" for name in cost["blocks"]),
        tuple(full / max(full.sum(), 1)),
        np.stack(columns, axis=1),
        tuple(mark(step) for step in steps),
    )


def mark(step: Mapping[str, Any]) -> str:
    """What a step does with the values that are kept between steps."""
    if step.get("fills"):
        return KEEPS
    if not step.get("reads"):
        return ""
    if not step.get("sources"):
        return DECIDES
    return FORECASTS if len(step["sources"]) > 1 else HOLDS


def variant_steps(manifest: Manifest) -> dict[str, str]:
    """Each variant that only some steps run: `19 of 50 steps`."""
    steps = manifest["program"].get("plan", {}).get("steps", ())
    counts = Counter(step["variant"] for step in steps)
    return {name: f"{count} of {len(steps)} steps" for name, count in counts.items()
            if count < len(steps)}  # fmt: skip


def plan_line(manifest: Manifest) -> str:
    """What the plan runs in a sentence; empty where every step runs the same."""
    cost, plan = manifest.get("plan") or {}, manifest["program"].get("plan", {})
    counts = Counter(step["variant"] for step in plan.get("steps", ()))
    if not cost or len(counts) < 2:
        return ""
    default, total = plan["default"], counts.total()
    whole = sum(cost["variants"][default]) or 1
    sizes = {name: sum(cost["variants"][name]) / whole for name in counts if name != default}
    if len(sizes) <= LISTED:
        others = ", ".join(
            f"{counts[name]} run {name!r} ({percent(size, int(size < 0.01))} of a full step)"
            for name, size in sizes.items()
        )
    else:
        ends = [percent(end(sizes.values())) for end in (min, max)]
        rest = total - counts[default]
        others = f"{rest} run {len(sizes)} smaller variants ({' to '.join(ends)} of a full step)"
    share = percent(cost["flops"] / (cost["full_flops"] or 1))
    line = (
        f"{counts[default]} of {total} steps in full, {others}: the plan runs "
        f"{share} of the arithmetic of {total} full steps "
        f"({gigaflops(cost['flops'])} of {gigaflops(cost['full_flops'])} GFLOPs)"
    )
    decided = "; more where the run decides for a full step" if plan.get("decision") else ""
    return line + decided


def guidance_line(manifest: Manifest) -> str:
    """Which rows of guided calls are left out, if any; the plan's arithmetic counts them all."""
    guide = manifest["program"].get("plan", {}).get("guidance")
    return Guide(**guide).line if guide else ""


def plan_picture(manifest: Manifest, width: int) -> list[str]:
    """The grid as lines of text, equal neighbours in one; none where it does not fit."""
    grid = plan_grid(manifest)
    if grid is None:
        return []
    room = width - grid.shares.shape[1] - 2
    rows = [
        (run_name(grid.blocks, list(run)), "".join(map(cell, shares)))
        for shares, run in itertools.groupby(
            range(len(grid.blocks)), lambda block: tuple(grid.shares[block].round(2))
        )
    ]
    longest = max(len(name) for name, _ in rows)
    if room < min(longest, NARROWEST):
        return []
    room = min(room, longest)
    names = [name if len(name) <= room else f"{name[: room - 1]}…" for name, _ in rows]
    return [
        *(f"{name:<{room}}  {cells}" for name, (_, cells) in zip(names, rows, strict=True)),
        LEGEND,
    ]


def run_name(blocks: Sequence[str], run: Sequence[int]) -> str:
    """The name of a block, or of the first and the last of several."""
    if len(run) == 1:
        return blocks[run[0]]
    return f"{blocks[run[0]]} … {blocks[run[-1]]} ({len(run)})"


def cell(share: float) -> str:
    """A block at a step, as a character."""
    if share >= 0.99:
        return FULL_CELL
    return PART_CELL if share >= 0.01 else EMPTY_CELL


def plan_table(manifest: Manifest) -> Table:
    """The plan; equal steps in a row are one row."""
    program = manifest["program"]
    plan, times = program.get("plan", {}), program.get("timesteps") or ()
    default = plan.get("default", "full")
    steps = plan.get("steps") or [{"variant": default}] * len(times)
    rows, start = [], 0
    for key, group in itertools.groupby(steps, key=plan_key):
        end = start + len(list(group))
        rows.append((span(range(start, end)), span(times[start:end]), str(end - start), *key))
        start = end
    columns = ("step", "timestep", "steps", "runs", "fills", "reads", "of steps")
    whole = [("every step", "any", "–", default, "", "", "")]
    return without_empty(Table("Plan, step by step", columns, rows or whole))


def plan_key(step: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """What makes two steps equal."""
    sources = ", ".join(str(source) for source in step.get("sources", ()))
    return step["variant"], slots_text(step, "fills"), slots_text(step, "reads"), sources


def slots_text(step: Mapping[str, Any], key: str) -> str:
    """The slots' names, or how many they are."""
    names = step.get(key, ())
    return ", ".join(names) if len(names) <= LISTED else f"{len(names)} slots"


def span(values: Sequence[float]) -> str:
    """First and last: `3`, or `3 – 7`."""
    ends = [f"{values[index]:g}" for index in (0, -1)] if values else ["–"]
    return " – ".join(dict.fromkeys(ends))


def variants_text(variants: Mapping[str, int]) -> str:
    """`31 × reuse, 19 × full`, or nothing where there is one variant only."""
    return counted(variants).replace("\n", ", ") if len(variants) > 1 else ""
