"""The rows of the cache benchmark, as data: what is compiled, and how it is sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from effuse import schedule as schedules
from effuse.passes import Cache, Hoist, Pass, Quantize

Kind = Literal["effuse", "steps", "package", "full"]  # ours, fewer steps, a peer, full sampling
STANDARD = 50  # steps that the counts below are of; other totals scale them
DDIM_COUNTS = (33, 25, 20, 17, 15, 12, 10)
DPM_COUNTS = (50, 25, 20, 15, 12, 10)  # the first is what it is also compared with
PACKAGE_INTERVALS = (2, 3, 5)


@dataclass(frozen=True)
class Row:
    """One configuration: a point of a family in the plot, a line of the table."""

    name: str
    family: str
    label: str  # beside the point
    kind: Kind = "effuse"
    passes: tuple[Pass, ...] = (Hoist(),)
    steps: int | None = None  # of kind `steps`
    solver: Literal["ddim", "dpm"] = "ddim"
    interval: int = 1  # of kind `package`


def cached(family: str, label: str, *more: Pass, **options: Any) -> Row:
    """A row of the Cache pass with these options."""
    return Row(f"{family}, {label}", family, label, passes=(Hoist(), Cache(**options), *more))


def intervals(family: str, values: Sequence[int], **options: Any) -> list[Row]:
    """A family of one row an interval."""
    return [cached(family, f"N={n}", interval=n, **options) for n in values]


def fitted(family: str, order: int, warmup: int, steps: int, **options: Any) -> Row:
    """A fitted schedule with as many full steps as uniform N=3 has."""
    count = len(schedules.uniform(steps, 3, warmup))
    return cached(
        f"{family} fitted, order {order}",
        f"{count} full",
        schedule="fitted",
        full_steps=count,
        order=order,
        warmup=warmup,
        **options,
    )


def unet_rows(steps: int) -> list[Row]:
    """The UNet's rows."""
    held, forecast = {"order": 0, "warmup": 1}, {"order": 1, "warmup": 4}
    return [
        *intervals("deep, order 0", (2, 3, 5), **held),
        *intervals("deep, order 1", (2, 3, 4, 5), **forecast),
        *intervals("deep, order 1, warm-up 6", (4, 5), order=1, warmup=6),
        *intervals("deep, order 2", (3, 4), order=2, warmup=4),
        *(
            cached("deep, other branches", f"branch {n}", branch=n, interval=3, **forecast)
            for n in (1, 2)
        ),
        cached("encoder", "propagation", mode="encoder", schedule="propagation", order=0),
        cached("encoder", "N=3, order 1", mode="encoder", interval=3, **forecast),
        *(
            cached("block, layer, unit, order 1", f"{mode} N=3", mode=mode, interval=3, **forecast)
            for mode in ("block", "layer", "unit")
        ),
        fitted("deep", 0, 1, steps),
        fitted("deep", 1, 4, steps),
        Row("w8a8", "8 bits", "w8a8", passes=(Hoist(), Quantize("w8a8"))),
        cached("8 bits", "deep N=3 + w8a8", Quantize("w8a8"), interval=3, **forecast),
    ]


def dit_rows(steps: int) -> list[Row]:
    """The transformer's rows."""
    forecast = {"order": 1, "warmup": 4}
    decided = {"mode": "residual", "warmup": 4}
    bounds = (0.05, 0.1, 0.2)
    return [
        *(
            row
            for mode in ("block", "unit", "layer", "residual")
            for row in intervals(f"{mode}, order 1", (2, 3, 4), mode=mode, **forecast)
        ),
        *intervals("unit, order 0 (FORA)", (2, 3), mode="unit", order=0, warmup=1),
        *(cached("residual, threshold", f"{t:g}", threshold=t, **decided) for t in bounds),
        *(
            cached("residual, accumulated", f"{t:g}", threshold=t, accumulate=True, **decided)
            for t in bounds
        ),
        fitted("unit", 1, 4, steps, mode="unit"),
    ]


def step_rows(steps: int) -> list[Row]:
    """Fewer steps of the exact network, by two solvers."""
    return [
        Row(f"{title}, {n} steps", title, str(n), "steps", steps=n, solver=solver)
        for title, solver, counts in (
            ("DDIM", "ddim", DDIM_COUNTS),
            ("DPM-Solver++ 2M", "dpm", DPM_COUNTS),
        )
        for n in dict.fromkeys(max(2, round(count * steps / STANDARD)) for count in counts)
    ]


def package_rows() -> list[Row]:
    """The PyPI package DeepCache on the eager network."""
    family = "DeepCache package (over eager)"
    return [
        Row(f"{family}, N={n}", family, f"N={n}", "package", interval=n) for n in PACKAGE_INTERVALS
    ]


EXACT = Row("exact", "exact", "exact", "full")
EAGER = Row("eager torch", "eager torch", "eager", "full")  # what the package is compared with
ROWS = {"unet": unet_rows, "dit": dit_rows}
MEMORY = {"unet": "deep, order 1, N=3", "dit": "unit, order 1, N=3"}  # compared with exact
ERRORS = ("deep, order 1, N=3", "w8a8", "8 bits, deep N=3 + w8a8")  # cache, bits, both
SMOKE = {  # a row of each kind of work
    "unet": ("deep, order 1, N=3", "deep fitted, order 0", "w8a8", "8 bits, deep N=3 + w8a8"),
    "dit": ("unit, order 1, N=3", "residual, threshold, 0.1", "unit, order 0 (FORA), N=2"),
}


def chosen(network: str, steps: int, smoke: bool) -> list[Row]:
    """The rows of a network, without the package's."""
    rows = ROWS[network](steps)
    fewer = step_rows(steps)
    if smoke:
        rows = [row for row in rows if row.name.startswith(SMOKE[network])]
        fewer = [row for row in fewer if row.solver == "dpm" or row.steps == steps // 2]
    return [*fewer, *rows]
