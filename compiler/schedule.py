"""Schedules of feature caches: which steps compute the whole network, which reuse its features.

A schedule is a sorted tuple of the full steps' indices, always with 0. A full step refreshes the
cache; any other forecasts its features as the polynomial of degree `order` through the latest
order + 1 refreshes (0: the cached value itself). Imports numpy only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from effuse.errors import CalibrationError, ConfigError

Schedule = tuple[int, ...]
Array = npt.NDArray[np.float64]

FASTER_DIFFUSION_STEPS = 50
FASTER_DIFFUSION_KEYS = (
    0,
    1,
    2,
    3,
    5,
    10,
    15,
    25,
    35,
)  # of 50 steps; Faster Diffusion, utils_sd.py
HIGHEST_ORDER = 2  # the search keeps order + 1 refreshes as state


# ---- schedules by rule ---------------------------------------------------------------------------


def uniform(steps: int, interval: int, warmup: int = 1) -> Schedule:
    """The first `warmup` steps, then every `interval`-th counted from the last of them.

    Source: DeepCache (warmup 1); TaylorSeer starts FLUX with 3.

    >>> uniform(10, 3, warmup=4)
    (0, 1, 2, 3, 6, 9)

    Raises:
        ConfigError: an argument is not a whole number in its range.
    """
    _whole("steps", steps, 1)
    _whole("interval", interval, 1)
    _whole("warmup", warmup, 1, steps)
    return (*range(warmup - 1), *range(warmup - 1, steps, interval))


def nonuniform(
    steps: int, count: int, center: int = 15, power: float = 1.4, released: bool = False
) -> Schedule:
    """`count` full steps that cluster around step `center`: DeepCache's 1:N, count = ceil(steps/N).

    x = linspace((-center)^(1/p), (steps - center)^(1/p), count + 1); full are 0 and
    center + trunc(x_k^p) for the inner k. While two of them fall together, p shrinks by 0.02.

    Powers keep the sign of their base. `released` does as the published code: the complex power of
    a negative base without its imaginary part, and the ends dropped only after merging. The
    schedule is flatter.

    Source: DeepCache, pipeline_stable_diffusion.py (`sample_from_quad_center`).

    >>> nonuniform(50, 10)
    (0, 6, 11, 14, 15, 19, 24, 29, 35, 42)

    Raises:
        ConfigError: an argument is out of range, or no power above 1 keeps `count` steps apart.
    """
    _whole("steps", steps, 1)
    _whole("count", count, 1, steps)
    _whole("center", center, 0, steps - 1)
    if not 1 < power <= 10:
        raise ConfigError(f"power={power!r}: expected a number above 1, at most 10, such as 1.4")
    raised = operator.pow if released else _signed_power
    exponent = power
    while exponent > 1:
        first, last = (raised(end, 1 / exponent) for end in (-center, steps - center))
        placed = np.trunc(raised(np.linspace(first, last, count + 1), exponent).real)
        inner = np.unique(placed)[1:-1] if released else placed[1:-1]
        keys = {0} | {center + int(x) for x in inner}
        if len(keys) == count and min(keys) == 0:
            return tuple(sorted(keys))
        exponent -= 0.02
    raise ConfigError(
        f"count={count}: no power from {power} down to 1 keeps that many of {steps} steps apart "
        f"around center={center}; ask for fewer, move the center, or use a uniform schedule"
    )


def explicit(steps: int, keys: Iterable[int]) -> Schedule:
    """The full steps that the caller lists, and step 0, which always refreshes.

    Raises:
        ConfigError: a key is no whole number, outside 0..steps-1, or listed twice.
    """
    _whole("steps", steps, 1)
    listed = [_whole("keys", key, 0, steps - 1) for key in keys]
    twice = sorted({key for key in listed if listed.count(key) > 1})
    if twice:
        raise ConfigError(f"keys={listed}: expected each step once, but {twice} repeat; drop those")
    return tuple(sorted({0, *listed}))


def propagation_keys(steps: int) -> Schedule:
    """Faster Diffusion's key steps, scaled from 50 steps to `steps` (rounded down, merged).

    >>> propagation_keys(20)
    (0, 1, 2, 4, 6, 10, 14)

    Raises:
        ConfigError: `steps` is not a whole number above 0.
    """
    _whole("steps", steps, 1)
    return tuple(sorted({key * steps // FASTER_DIFFUSION_STEPS for key in FASTER_DIFFUSION_KEYS}))


# ---- forecasts -----------------------------------------------------------------------------------


def sources(keys: Sequence[int], step: int, order: int) -> Schedule:
    """The last order + 1 refreshes before `step`, or as many as there are; latest first.

    >>> sources((0, 4, 8, 12), 10, order=1)
    (8, 4)

    Raises:
        ConfigError: `order` is negative, or no refresh comes before `step`.
    """
    _whole("order", order, 0)
    before = sorted((key for key in keys if key < step), reverse=True)
    if not before:
        raise ConfigError(
            f"step={step}: expected a step after the first refresh, but keys={tuple(keys)}; "
            "a schedule starts with step 0"
        )
    return tuple(before[: order + 1])


def lagrange(clock: Sequence[float] | Array, sources: Sequence[int], at: int) -> tuple[float, ...]:
    """Weights w with p(clock[at]) = sum_j w_j f_j, p through the points (clock[sources_j], f_j).

    They sum to 1. Newton's divided differences, as TaylorSeer's up to order 1, are the same
    polynomial. `clock` (steps,) holds the x of each step: index, timestep or log-SNR.

    >>> lagrange((0, 1, 2, 3, 4), (2, 0), 3)
    (1.5, -0.5)

    Raises:
        ConfigError: there is no source, an index is outside the clock, or two sources share an x.
    """
    x = np.asarray(clock, dtype=np.float64)
    _whole("at", at, 0, len(x) - 1)
    for source in sources:
        _whole("sources", source, 0, len(x) - 1)
    if not sources:
        raise ConfigError("sources=(): expected at least one refresh; step 0 always is")
    _distinct("sources", x[list(sources)])
    return tuple(float(weight) for weight in _basis(x, tuple(sources), at))


# ---- schedules fitted to measured features -------------------------------------------------------


def fitted(
    gram: npt.ArrayLike,
    count: int,
    order: int = 0,
    warmup: int = 1,
    weights: npt.ArrayLike | None = None,
    longest: int | None = None,
    clock: npt.ArrayLike | None = None,
) -> Schedule:
    """The schedule of `count` full steps with the least `fitted_error`, by dynamic programming.

    The state is the last order + 1 refreshes, so the optimum is exact; time is about
    count * steps^(order + 2) / (order + 2), memory steps^(order + 2) / (order + 2) float64.
    CacheQuant's dynamic programming (DPS), with squared errors and forecasts.

    Args:
        gram: (steps, steps) inner products of the features of each two steps.
        count: how many steps are full, from `warmup` to steps.
        order: degree of the forecast, 0 to 2; lower while history is short, as `sources` has it.
        warmup: the first so many steps are full.
        weights: (steps,) what an error at each step costs; default 1.
        longest: a refresh serves at most so many steps, itself included; default unbounded.
        clock: (steps,) distinct x of each step for the forecast; default its index.

    Raises:
        ConfigError: an argument is out of range, or `longest` leaves no such schedule.
        CalibrationError: `gram` is not a finite symmetric matrix.
    """
    problem = _Problem(gram, weights, clock)
    _whole("warmup", warmup, 1, problem.steps)
    _whole("count", count, warmup, problem.steps)
    longest = _whole("longest", problem.steps if longest is None else longest, 1)
    found = problem.search(order, warmup, longest)
    return _feasible(found, count, warmup, problem.steps, (1, longest))


def fitted_to(
    gram: npt.ArrayLike,
    error: float,
    order: int = 0,
    warmup: int = 1,
    weights: npt.ArrayLike | None = None,
    longest: int | None = None,
    clock: npt.ArrayLike | None = None,
) -> Schedule:
    """The best schedule with the fewest full steps whose relative error is at most `error`.

    Relative is sqrt(fitted_error / sum_i weights_i |F_i|^2), a ratio of norms; what lies under
    about 1e-7, more where a forecast reaches far, is rounding. The other arguments are those of
    `fitted`.

    Raises:
        ConfigError: an argument is out of range.
        CalibrationError: `gram` is not a finite symmetric matrix.
    """
    problem = _Problem(gram, weights, clock)
    if not 0 <= error < math.inf:
        raise ConfigError(f"error={error!r}: expected a relative error of 0 or more, such as 0.05")
    _whole("warmup", warmup, 1, problem.steps)
    longest = _whole("longest", problem.steps if longest is None else longest, 1)
    allowed = error**2 * float(problem.weights @ problem.gram.diagonal())
    found = problem.search(order, warmup, longest)
    return next(keys for cost, keys in found if cost <= allowed)  # all steps full costs 0


def fitted_error(
    gram: npt.ArrayLike,
    keys: Sequence[int],
    order: int = 0,
    weights: npt.ArrayLike | None = None,
    clock: npt.ArrayLike | None = None,
) -> float:
    """The sum over reused steps i of weights_i |F_i - forecast_i|^2; what `fitted` minimises.

    The arguments are those of `fitted`; `keys` is any schedule.

    Raises:
        ConfigError: an argument is out of range.
        CalibrationError: `gram` is not a finite symmetric matrix.
    """
    problem = _Problem(gram, weights, clock)
    _order(order)
    full = explicit(problem.steps, keys)
    reused = sorted(set(range(problem.steps)) - set(full))
    return float(sum(problem.residuals(sources(full, step, order), step) for step in reused))


def group_costs_l1(features: npt.ArrayLike) -> Array:
    """D (steps, steps): D[j, n-1] = sum_{i=j}^{n-1} |F_i - F_j|_1 of steps j..n-1 served by j.

    `features` are (steps, ...), of the full network; below the diagonal D is 0.
    Source: CacheQuant, DPS.

    Raises:
        CalibrationError: the features are empty, scalars, or not finite.
    """
    values = np.asarray(features, dtype=np.float64)
    if values.ndim < 2 or not values.size or not np.isfinite(values).all():
        raise CalibrationError(
            f"features of shape {values.shape}: expected finite numbers of shape (steps, ...), "
            "one row per step; record them again from the unquantised network"
        )
    rows = values.reshape(len(values), -1)
    costs = np.zeros((len(rows), len(rows)))
    for first, row in enumerate(rows):
        costs[first, first:] = np.abs(rows[first:] - row).sum(axis=1).cumsum()
    return costs


def group_bounds(interval: int) -> tuple[int, int]:
    """CacheQuant's shortest and longest group when every `interval`-th step is full on average.

    Raises:
        ConfigError: `interval` is not a whole number above 0.
    """
    _whole("interval", interval, 1)
    return -(-interval // 2), 2 * interval


def fitted_groups(
    costs: npt.ArrayLike, count: int, bounds: tuple[int, int] | None = None
) -> Schedule:
    """The first steps of the `count` groups with the least summed cost, by dynamic programming.

    `costs` (steps, steps) is read as costs[first, last] of each group, as `group_costs_l1` returns
    it; `bounds` are the shortest and the longest group allowed, both included (`group_bounds`).
    Source: CacheQuant, DPS: L(n, k) = min_j L(j, k-1) + D(j, n).

    Raises:
        ConfigError: an argument is out of range, or `bounds` leave no such grouping.
        CalibrationError: `costs` is not a finite square matrix.
    """
    matrix = _square("costs", costs)
    steps = len(matrix)
    _whole("count", count, 1, steps)
    low, high = bounds or (1, steps)
    _whole("bounds", low, 1)
    _whole("bounds", high, low)
    table = [matrix[:n, n - 1].copy() if n else matrix[:0, 0] for n in range(steps + 1)]
    found = _search(lambda _: _bounded(table, low, high), steps, 1, 1)
    return _feasible(found, count, 1, steps, (low, high))


# ---- dynamic programming -------------------------------------------------------------------------
#
# A table holds, for each n, the costs of the group that the next refresh n (or the end) closes:
# table[n][a, b, ...] with the refreshes a > b > ... before n, latest first. Entries of other orders
# are arbitrary; the states that would reach them cost infinity.

Table = list[Array]


class _Problem:
    """Checked Gram matrix, weights and clock: what a forecast from given refreshes costs."""

    def __init__(
        self, gram: npt.ArrayLike, weights: npt.ArrayLike | None, clock: npt.ArrayLike | None
    ) -> None:
        self.gram = _square("gram", gram)
        self.steps = len(self.gram)
        if not np.allclose(self.gram, self.gram.T, atol=1e-6 * float(np.abs(self.gram).max())):
            raise CalibrationError(
                "gram: expected a symmetric matrix of inner products; compute it as F @ F.T"
            )
        self.weights = _vector("weights", weights, np.ones(self.steps))
        if (self.weights < 0).any():
            raise ConfigError(f"weights: expected 0 or more, got {self.weights.min()}; clip them")
        self.clock = _vector("clock", clock, np.arange(self.steps, dtype=np.float64))
        _distinct("clock", self.clock)

    def residuals(self, sources: tuple[Any, ...], step: int) -> Array:
        """weights_step |F_step - forecast|^2; the sources are indices, or arrays that broadcast."""
        forecast = [-weight for weight in _basis(self.clock, sources, step)]
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
        _order(order)
        return _search(
            lambda width: _bounded(self.table(width), 1, longest), self.steps, warmup, order + 1
        )


def _search(
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


def _bounded(table: Table, shortest: int, longest: int) -> Table:
    """The table with infinite costs for groups of lengths outside the bounds."""
    for n, costs in enumerate(table):
        length = n - np.arange(n)
        costs[(length < shortest) | (length > longest)] = np.inf
    return table


def _feasible(
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


def _basis(clock: Array, sources: tuple[Any, ...], at: int) -> list[Any]:
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


def _signed_power(base: Any, exponent: float) -> Any:
    return np.sign(base) * np.abs(base) ** exponent


def _whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """`value` as an int, if it is one in low..high."""
    try:
        number = operator.index(value)
    except TypeError:
        number = low - 1
    if isinstance(value, bool) or number < low or (high is not None and number > high):
        span = f"from {low} to {high}" if high is not None else f"of at least {low}"
        raise ConfigError(f"{name}={value!r}: expected a whole number {span}; give one of those")
    return number


def _order(order: int) -> int:
    return _whole("order", order, 0, HIGHEST_ORDER)


def _square(name: str, matrix: npt.ArrayLike) -> Array:
    array = np.asarray(matrix, dtype=np.float64)
    shape = array.shape
    if len(shape) != 2 or shape[0] != shape[1] or not array.size or not np.isfinite(array).all():
        raise CalibrationError(
            f"{name} of shape {shape}: expected finite numbers of shape (steps, steps); "
            "record the features again"
        )
    return array


def _vector(name: str, values: npt.ArrayLike | None, default: Array) -> Array:
    array = default if values is None else np.asarray(values, dtype=np.float64)
    if array.shape != default.shape or not np.isfinite(array).all():
        raise ConfigError(
            f"{name} of shape {array.shape}: expected {len(default)} finite numbers, "
            f"one per step; leave {name} out for the default"
        )
    return array


def _distinct(name: str, points: Array) -> None:
    if len(np.unique(points)) < len(points):
        raise ConfigError(
            f"{name}: expected distinct places on the clock, but some repeat in {points.tolist()}; "
            "use the step's index as the clock"
        )
