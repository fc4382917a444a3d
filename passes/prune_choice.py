"""Which candidates go: those that may, and among them the least costly that save enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effuse.passes.base import Work
from effuse.passes.prune_candidates import Candidate
from effuse.passes.prune_knapsack import lightest

Array = np.ndarray[Any, Any]
Removed = Callable[[Sequence[int]], int]


def offer(candidates: Sequence[Candidate], scores: Array, work: Work) -> list[int]:
    """The candidates with a finite score, but for the costliest atom of each site: it stays."""
    best: dict[int, int] = {}
    for number, each in enumerate(candidates):
        if each.site is not None:
            key = id(each.site)
            rivals = (number, best.get(key, number))
            best[key] = max(rivals, key=lambda one: (not np.isfinite(scores[one]), scores[one]))
    broken = [number for number in range(len(candidates)) if not np.isfinite(scores[number])]
    for number in broken:
        work.log.reject("prune", f"{candidates[number].name}: the output is not finite without it")
    stay = {*broken, *best.values()}
    return [number for number in range(len(candidates)) if number not in stay]


def choose(values: Sequence[float], sizes: Sequence[int], need: int, removed: Removed) -> list[int]:
    """The items of the least sum of values that remove `need`, which all of them do.

    `sizes` are of each item alone. Together they may remove more (what only they shared) or less
    (a weight that two of them cut): `removed` tells.
    """
    demand = need
    picked: Sequence[int] = range(len(sizes))
    while demand <= sum(sizes):
        picked = lightest(values, sizes, demand) or ()
        short = need - removed(picked)
        if short <= 0:
            break
        demand += short
    else:
        picked = range(len(sizes))
    return given_back(list(picked), values, sizes, need, removed)


def given_back(
    picked: list[int], values: Sequence[float], sizes: Sequence[int], need: int, removed: Removed
) -> list[int]:
    """Without those, the costliest first, that the others do without."""
    slack = removed(picked) - need
    for item in sorted(picked, key=lambda item: -values[item]):
        if sizes[item] > slack:  # to be given back it would have to be smaller than what is over
            continue
        rest = [each for each in picked if each != item]
        over = removed(rest) - need
        if over >= 0:
            picked, slack = rest, over
    return picked
