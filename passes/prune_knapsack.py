"""Which candidates go: a 0-1 knapsack by dynamic programming (LAPTOP-Diff, METHODS 3.1).

minimise Σ v z    with Σ p z >= P, z ∈ {0, 1}

best[j] = min(best[j], best[max(0, j - p_i)] + v_i), j from P downwards
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

CELLS = 20_000  # of the table; a larger demand is counted in units, and what goes rounded down


def lightest(values: Sequence[float], sizes: Sequence[int], need: int) -> tuple[int, ...] | None:
    """The items of the least sum of `values` whose sizes sum to `need` at least; None if none do.

    Exact while `need`, over the sizes' common divisor, is at most `CELLS`; else the sizes are
    rounded to that many units: down, so that the sum is never too small.

    Args:
        values: of the items, 0 or more.
        sizes: of the items, 0 or more.
        need: the least sum of sizes.

    >>> lightest([1.0, 3.0, 3.5], [10, 10, 20], 20)
    (2,)
    """
    if sum(sizes) < need:
        return None
    unit = _unit(sizes, need)
    counts = [size // unit for size in sizes]
    demand = min(math.ceil(need / unit), sum(counts))
    taken = _table(values, counts, demand)
    found = _traced(taken, counts)
    short = need - sum(sizes[item] for item in found)
    return _filled(found, values, sizes, short)


def _unit(sizes: Sequence[int], need: int) -> int:
    """The common divisor of the sizes, or more where the table would be too large."""
    common = reduce(math.gcd, sizes, 0) or 1
    return common if need / common <= CELLS else math.ceil(need / CELLS)


def _table(values: Sequence[float], counts: Sequence[int], demand: int) -> Any:
    """For each item and demand, whether the item is among the best of those up to it."""
    best = np.full(demand + 1, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(counts), demand + 1), dtype=bool)
    for item, (value, count) in enumerate(zip(values, counts, strict=True)):
        rest = np.maximum(np.arange(demand + 1) - count, 0)
        with_item = best[rest] + value
        taken[item] = with_item < best
        best = np.minimum(best, with_item)
    return taken


def _traced(taken: Any, counts: Sequence[int]) -> tuple[int, ...]:
    """The items that meet the whole demand, read back from the table."""
    left, found = taken.shape[1] - 1, []
    for item in reversed(range(len(counts))):
        if left > 0 and taken[item, left]:
            found.append(item)
            left = max(0, left - counts[item])
    return tuple(sorted(found))


def _filled(
    found: tuple[int, ...], values: Sequence[float], sizes: Sequence[int], short: int
) -> tuple[int, ...]:
    """With the lightest of the others until nothing is short, which rounding may have left."""
    others = sorted(set(range(len(sizes))) - set(found), key=lambda item: values[item])
    for item in others:
        if short <= 0:
            break
        if sizes[item]:
            found, short = (*found, item), short - sizes[item]
    return tuple(sorted(found))
