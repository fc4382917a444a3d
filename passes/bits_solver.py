"""Which format each layer takes: a mixed-integer program over additive costs (METHODS 1.8, 1.9).

    minimise Σ_l Σ_o c_lo · cost_o    with Σ_o c_lo = 1, c_lo ∈ {0, 1}, and Σ c · measure ≤ limit

Errors are noise powers over the power of the output: powers of independent noises add.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from effuse.errors import PassError, require
from effuse.metrics import CEILING_DB
from effuse.passes.skip_search import quiet

Measure = Literal["error", "bytes", "milliseconds"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

ROUNDING = 1e-9  # relative: what a sum of floats may be over a limit that it equals
GAP = 1e-6  # relative: how far from the optimum the solver may stop
UNIT = 1e3  # of the costliest option, for the solver's absolute tolerances of 1e-6
SECONDS = 60  # for the solver


@dataclass(frozen=True)
class Option:
    """One format of one layer and what it costs; also a sum of such.

    Args:
        format: its name.
        error: power of the noise that it adds, over the power of the output.
        bytes: of the stored tensors.
        milliseconds: of a step.
    """

    format: str
    error: float
    bytes: int
    milliseconds: float

    def __str__(self) -> str:
        """In people's units."""
        return (
            f"{decibels(self.error):.1f} dB, {self.bytes / 1e6:.3f} MB, {self.milliseconds:.2f} ms"
        )


@dataclass(frozen=True)
class Budget:
    """What to minimise, and the greatest totals allowed.

    The first limit is what was asked for: where all cannot be met, it is the one reported.
    """

    minimise: Measure
    limits: Mapping[Measure, float]


def decibels(error: float) -> float:
    """The SQNR (dB) of a relative noise power, within ±200."""
    if error <= 0:
        return CEILING_DB
    return max(-CEILING_DB, min(CEILING_DB, -10 * math.log10(error)))


def noise(ratio: float) -> float:
    """The relative noise power of an SQNR in dB.

    >>> noise(20.0)
    0.01
    """
    return float(10 ** (-ratio / 10))


def total(options: Sequence[Sequence[Option]], chosen: Sequence[int]) -> Option:
    """The sum of the chosen options."""
    picked = [row[index] for row, index in zip(options, chosen, strict=True)]
    return Option(
        "total",
        math.fsum(each.error for each in picked),
        sum(each.bytes for each in picked),
        math.fsum(each.milliseconds for each in picked),
    )


def choose(options: Sequence[Sequence[Option]], budget: Budget) -> tuple[int, ...]:
    """For each layer the index of its option; among equal options of a layer the first.

    Raises:
        PassError: the limits cannot be met; it says the best that can be reached, and its cost.
    """
    rows = [efficient(row) for row in options]
    found = _solved(rows, budget)
    if found is None:
        raise PassError(_unreachable(rows, budget))
    return tuple(row[index][0] for row, index in zip(rows, found, strict=True))


Row = list[tuple[int, Option]]  # a layer's options with their places in the caller's list


def efficient(row: Sequence[Option]) -> Row:
    """The options of a layer that no other one equals or betters in every measure.

    Raises:
        PassError: there is none.
    """
    if not row:
        raise PassError("a layer without any option: expected at least float")
    costs = [tuple(getattr(option, measure) for measure in MEASURES) for option in row]
    return [
        (place, option)
        for place, option in enumerate(row)
        if not any(
            all(a <= b for a, b in zip(costs[other], costs[place], strict=True))
            and (costs[other] != costs[place] or other < place)
            for other in range(len(row))
        )
    ]


def excess(rows: Sequence[Row], measure: Measure) -> tuple[float, list[list[float]]]:
    """The least total of a measure, and how much more than its layer's least each option costs."""
    costs = [[float(getattr(option, measure)) for _, option in row] for row in rows]
    least = [min(row) for row in costs]
    return math.fsum(least), [[c - low for c in row] for row, low in zip(costs, least, strict=True)]


def _solved(rows: Sequence[Row], budget: Budget) -> list[int] | None:
    """The places of the best options in `rows`, or None if no choice meets the limits."""
    costs = excess(rows, budget.minimise)[1]
    allowed = [[True] * len(row) for row in rows]
    weights = []
    for measure, limit in budget.limits.items():
        least, over = excess(rows, measure)
        rounding = ROUNDING * max(abs(limit), abs(least))
        slack = limit - least
        if slack < -rounding:
            return None
        # Shares of what is left over: between 0 and 1 whatever the unit, as the solver wants them.
        room = max(slack, rounding) or 1.0
        shares = [[each / room for each in row] for row in over]
        allowed = [[a and share <= 1 + ROUNDING for a, share in zip(*pair, strict=True)]
                   for pair in zip(allowed, shares, strict=True)]  # fmt: skip
        weights.append(shares)
    if not all(any(row) for row in allowed):
        return None
    return _milp(costs, weights, allowed)


def _milp(
    costs: list[list[float]], weights: list[list[list[float]]], allowed: list[list[bool]]
) -> list[int] | None:
    """The program with weights summing to 1 at most; None if it has no solution."""
    optimize: Any = require("scipy.optimize")
    sparse: Any = require("scipy.sparse")
    open_ones = np.concatenate([np.asarray(row, dtype=float) for row in allowed])
    flat = np.concatenate(costs) * open_ones
    layers = [layer for layer, row in enumerate(costs) for _ in row]
    one_each = sparse.csr_array((np.ones(len(flat)), (layers, range(len(flat)))))
    limits = [optimize.LinearConstraint(one_each, 1, 1)]
    if weights:
        table = np.stack([np.concatenate(each) for each in weights]) * open_ones
        limits.append(optimize.LinearConstraint(table, -np.inf, 1))
    with quiet():
        found = optimize.milp(
            flat * (UNIT / (flat.max() or 1.0)),
            integrality=np.ones(len(flat)),
            bounds=optimize.Bounds(0, open_ones),
            constraints=limits,
            options={"mip_rel_gap": GAP, "time_limit": SECONDS},
        )
    if found.x is None and found.status != 2:
        raise PassError(f"the solver stopped without a choice of formats: {found.message}")
    return None if found.x is None else list(_picked(found.x, costs))


def _picked(values: Any, costs: list[list[float]]) -> Iterator[int]:
    start = 0
    for row in costs:
        yield int(np.argmax(values[start : start + len(row)]))
        start += len(row)


def _unreachable(rows: Sequence[Row], budget: Budget) -> str:
    """What cannot be had, and the best that can."""
    asked, *others = budget.limits
    rest: dict[Measure, float] = {measure: budget.limits[measure] for measure in others}
    plain = [[option for _, option in row] for row in rows]
    best = total(plain, choose(plain, Budget(asked, rest)))
    limit = _in_units(asked, budget.limits[asked])
    reached = _in_units(asked, getattr(best, asked))
    return f"a budget of {limit} cannot be met: the best is {reached} (altogether {best})"


def _in_units(measure: Measure, value: float) -> str:
    if measure == "error":
        return f"{decibels(value):.2f} dB"
    return f"{value / 1e6:.3f} MB" if measure == "bytes" else f"{value:.4g} ms"
