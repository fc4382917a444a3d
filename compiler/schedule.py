"""Schedules of feature caches: which steps compute the whole network, which reuse its features.

A schedule is a sorted tuple of the full steps' indices, always with 0. A full step refreshes the
cache; any other forecasts its features as the polynomial of degree `order` through the latest
order + 1 refreshes (0: the cached value itself). Imports numpy only.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from effuse.errors import CalibrationError, ConfigError
from effuse.schedule_search import (
    Array,
    Problem,
    Schedule,
    basis,
    bounded,
    cheapest,
    check_distinct,
    check_order,
    feasible,
    signed_power,
    square_matrix,
    whole_number,
)

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


# ---- schedules by rule ---------------------------------------------------------------------------


def uniform(steps: int, interval: int, warmup: int = 1) -> Schedule:
    """The first `warmup` steps, then every `interval`-th counted from the last of them.

    Source: DeepCache (warmup 1); TaylorSeer starts FLUX with 3.

    >>> uniform(10, 3, warmup=4)
    (0, 1, 2, 3, 6, 9)

    Raises:
        ConfigError: an argument is not a whole number in its range.
    """
    whole_number("steps", steps, 1)
    whole_number("interval", interval, 1)
    whole_number("warmup", warmup, 1, steps)
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
    whole_number("steps", steps, 1)
    whole_number("count", count, 1, steps)
    whole_number("center", center, 0, steps - 1)
    if not 1 < power <= 10:
        raise ConfigError(f"power={power!r}: expected a number above 1, at most 10, such as 1.4")
    raised = operator.pow if released else signed_power
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
    whole_number("steps", steps, 1)
    listed = [whole_number("keys", key, 0, steps - 1) for key in keys]
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
    whole_number("steps", steps, 1)
    return tuple(sorted({key * steps // FASTER_DIFFUSION_STEPS for key in FASTER_DIFFUSION_KEYS}))


# ---- forecasts -----------------------------------------------------------------------------------


def sources(keys: Sequence[int], step: int, order: int) -> Schedule:
    """The last order + 1 refreshes before `step`, or as many as there are; latest first.

    >>> sources((0, 4, 8, 12), 10, order=1)
    (8, 4)

    Raises:
        ConfigError: `order` is negative, or no refresh comes before `step`.
    """
    whole_number("order", order, 0)
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
    whole_number("at", at, 0, len(x) - 1)
    for source in sources:
        whole_number("sources", source, 0, len(x) - 1)
    if not sources:
        raise ConfigError("sources=(): expected at least one refresh; step 0 always is")
    check_distinct("sources", x[list(sources)])
    return tuple(float(weight) for weight in basis(x, tuple(sources), at))


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
    problem = Problem(gram, weights, clock)
    whole_number("warmup", warmup, 1, problem.steps)
    whole_number("count", count, warmup, problem.steps)
    longest = whole_number("longest", problem.steps if longest is None else longest, 1)
    found = problem.search(order, warmup, longest)
    return feasible(found, count, warmup, problem.steps, (1, longest))


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
    problem = Problem(gram, weights, clock)
    if not 0 <= error < math.inf:
        raise ConfigError(f"error={error!r}: expected a relative error of 0 or more, such as 0.05")
    whole_number("warmup", warmup, 1, problem.steps)
    longest = whole_number("longest", problem.steps if longest is None else longest, 1)
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
    problem = Problem(gram, weights, clock)
    check_order(order)
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
    whole_number("interval", interval, 1)
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
    matrix = square_matrix("costs", costs)
    steps = len(matrix)
    whole_number("count", count, 1, steps)
    low, high = bounds or (1, steps)
    whole_number("bounds", low, 1)
    whole_number("bounds", high, low)
    table = [matrix[:n, n - 1].copy() if n else matrix[:0, 0] for n in range(steps + 1)]
    found = cheapest(lambda _: bounded(table, low, high), steps, 1, 1)
    return feasible(found, count, 1, steps, (low, high))
