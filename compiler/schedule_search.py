"""What a schedule's forecasts cost, and the search for the cheapest, by dynamic programming.

The public side is `effuse.schedule`. Imports numpy only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from effuse.errors import CalibrationError, ConfigError

Schedule = tuple[int, ...]
Array = npt.NDArray[np.float64]

HIGHEST_ORDER = 2  # the search keeps order + 1 refreshes as state


# A table holds, for each n, the costs of the group that the next refresh n (or the end) closes:
# table[n][a, b, ...] with the refreshes a > b > ... before n, latest first. Entries of other orders
# are arbitrary; the states that would reach them cost infinity.

Table = list[Array]


class Problem:
    """Checked Gram matrix, weights and clock: what a forecast from given refreshes costs."""

    def __init__(
        self, gram: npt.ArrayLike, weights: npt.ArrayLike | None, clock: npt.ArrayLike | None
    ) -> None:
        self.gram = square_matrix("gram", gram)
        self.steps = len(self.gram)
        if not np.allclose(self.gram, self.gram.T, atol=1e-6 * float(np.abs(self.gram).max())):
            raise CalibrationError(
                "gram: expected a symmetric matrix of inner products; compute it as F @ F.T"
            )
        self.weights = vector_of("weights", weights, np.ones(self.steps))
        if (self.weights < 0).any():
            raise ConfigError(f"weights: expected 0 or more, got {self.weights.min()}; clip them")
        self.clock = vector_of("clock", clock, np.arange(self.steps, dtype=np.float64))
        check_distinct("clock", self.clock)

    def residuals(self, sources: tuple[Any, ...], step: int) -> Array:
        """weights_step |F_step - forecast|^2; the sources are indices, or arrays that broadcast."""
        forecast = [-weight for weight in basis(self.clock, sources, step)]
        terms = list(zip((1.0, *forecast), (step, *sources), strict=True))
        square = sum(u * v * self.gram[i, j] for u, i in terms for v, j in terms)
        cost: Array = self.weights[step] * np.maximum(square, 0.0)  # below 0 by rounding only
        return cost

    def table(self, width: int) -> Table:
        """The costs of groups by their last `width` refreshes."""
        table = [np.zeros((0,) * width)]
        for step in range(self.steps):
            grown = np.zeros((step + 1,) * width)  # a group of the refresh alone costs nothing
            past = np.indices((step,) * width, sparse=True)
            grown[(slice(step),) * width] = table[-1] + self.residuals(past, step)
            table.append(grown)
        return table

    def search(self, order: int, warmup: int, longest: int) -> Iterator[tuple[float, Schedule]]:
        """The best schedule of each count from `warmup` on."""
        check_order(order)
        return cheapest(
            lambda width: bounded(self.table(width), 1, longest), self.steps, warmup, order + 1
        )


def cheapest(
    tables: Callable[[int], Table], steps: int, warmup: int, depth: int
) -> Iterator[tuple[float, Schedule]]:
    """Least cost and its schedule for each count from `warmup` to `steps`.

    The state is the last `depth` refreshes: best[a, b, ...] is the least cost of the steps before a
    over all schedules whose last refreshes are a, b, ...
    """
    width = min(warmup, depth)
    best = np.full((steps,) * width, np.inf)
    best[tuple(range(warmup - 1, warmup - 1 - width, -1))] = 0.0
    table = tables(width)
    parents: list[npt.NDArray[np.int32]] = []
    for count in range(warmup, steps + 1):
        yield _backtrack(best + table[steps], parents, warmup)
        if count == steps:
            return
        if width < depth:
            best, width = _widen(best, table), width + 1
            table = tables(width)
        else:
            best, parent = _shift(best, table)
            parents.append(parent)


def _widen(best: Array, table: Table) -> Array:
    """One refresh more, while the state still holds all of them."""
    steps, width = len(best), best.ndim
    wider = np.full((steps,) * (width + 1), np.inf)
    for n in range(1, steps):
        past = (slice(n),) * width
        wider[n][past] = best[past] + table[n]
    return wider


def _shift(best: Array, table: Table) -> tuple[Array, npt.NDArray[np.int32]]:
    """One refresh more, and the oldest that each state forgets, by its least cost."""
    shifted = np.full(best.shape, np.inf)
    parent = np.zeros(best.shape, dtype=np.int32)
    for n in range(1, len(best)):
        past = (slice(n),) * best.ndim
        total = best[past] + table[n]
        parent[n, ...][past[1:]] = total.argmin(axis=-1)
        shifted[n, ...][past[1:]] = total.min(axis=-1)
    return shifted, parent


def _backtrack(
    total: Array, parents: list[npt.NDArray[np.int32]], warmup: int
) -> tuple[float, Schedule]:
    """The least of the final costs (infinity: there is none) and the refreshes that lead to it."""
    keys = [int(key) for key in np.unravel_index(total.argmin(), total.shape)]  # latest first
    for parent in reversed(parents):
        keys.append(int(parent[tuple(keys[-total.ndim :])]))
    return float(total.min()), tuple(sorted({*range(warmup), *keys}))


def bounded(table: Table, shortest: int, longest: int) -> Table:
    """The table with infinite costs for groups of lengths outside the bounds."""
    for n, costs in enumerate(table):
        length = n - np.arange(n)
        costs[(length < shortest) | (length > longest)] = np.inf
    return table


def feasible(
    found: Iterator[tuple[float, Schedule]],
    count: int,
    warmup: int,
    steps: int,
    bounds: tuple[int, int],
) -> Schedule:
    """The schedule of `count`, unless its cost says that there is none."""
    cost, keys = next(islice(found, count - warmup, None))
    if math.isinf(cost):
        raise ConfigError(
            f"count={count}: expected groups of {bounds[0]} to {bounds[1]} steps, which {count} "
            f"full steps of {steps}, the first {warmup} among them, cannot make; "
            "change the count or widen the groups"
        )
    return keys


# ---- polynomials and checks ----------------------------------------------------------------------


def basis(clock: Array, sources: tuple[Any, ...], at: int) -> list[Any]:
    """Lagrange's basis at clock[at]; the sources are indices, or arrays that broadcast."""
    points = [clock[source] for source in sources]
    weights: list[Any] = []
    for j, point in enumerate(points):
        weight: Any = 1.0
        for other in points[:j] + points[j + 1 :]:
            gap = point - other
            weight = weight * (clock[at] - other) / np.where(gap == 0, 1.0, gap)  # 0: see Table
        weights.append(weight)
    return weights


def signed_power(base: Any, exponent: float) -> Any:
    """sign(base) · |base|^exponent."""
    return np.sign(base) * np.abs(base) ** exponent


def whole_number(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int, if it is one in low..high."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{name}={value!r}: expected a whole number {span}; give one of those")
    return number


def check_order(order: int) -> int:
    """A degree that the search can keep the refreshes of."""
    return whole_number("order", order, 0, HIGHEST_ORDER)


def square_matrix(name: str, matrix: npt.ArrayLike) -> Array:
    """`matrix` in float64, if it is one of (steps, steps)."""
    array = np.asarray(matrix, dtype=np.float64)
    shape = array.shape
    if len(shape) != 2 or shape[0] != shape[1] or not array.size or not np.isfinite(array).all():
        raise CalibrationError(
            f"{name} of shape {shape}: expected finite numbers of shape (steps, steps); "
            "record the features again"
        )
    return array


def vector_of(name: str, values: npt.ArrayLike | None, default: Array) -> Array:
    """`values` in float64, if they are one per step; or the default."""
    array = default if values is None else np.asarray(values, dtype=np.float64)
    if array.shape != default.shape or not np.isfinite(array).all():
        raise ConfigError(
            f"{name} of shape {array.shape}: expected {len(default)} finite numbers, "
            f"one per step; leave {name} out for the default"
        )
    return array


def check_distinct(name: str, points: Array) -> None:
    """Refuse places on the clock that repeat."""
    if len(np.unique(points)) < len(points):
        raise ConfigError(
            f"{name}: expected distinct places on the clock, but some repeat in {points.tolist()}; "
            "use the step's index as the clock"
        )
