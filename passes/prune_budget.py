"""What has to go: a share of the weights, of a step's arithmetic, or of its time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effuse.passes.base import Work
from effuse.passes.prune_candidates import Candidate
from effuse.passes.prune_choice import choose
from effuse.passes.prune_figures import hollow, size_of
from effuse.passes.prune_surgery import pruned
from effuse.passes.prune_time import measure, measured_share
from effuse.passes.resume import Store
from effuse.program import Program

Array = np.ndarray[Any, Any]

ROUNDS = 2  # of choosing anew, where the time that the chosen save together falls short


@dataclass(frozen=True)
class Budget:
    """`need` of `total` has to go.

    Args:
        total: weights, operations or microseconds of the network.
        need: how many of them.
        sizes: that go with each candidate alone.
        removed: that go with several together, by their numbers.
        measured: the share of the total that several save together, where that is known only from
            measuring.
    """

    total: int
    need: int
    sizes: Sequence[int]
    removed: Callable[[Sequence[int]], int]
    measured: Callable[[Sequence[int]], float] | None = None


def met(budget: Budget, costs: Array, offered: Sequence[int]) -> tuple[list[int], float | None]:
    """Of the candidates `offered` those of the least sum of costs that meet the budget.

    Where what they save is measured, more of them go as long as that falls short, a few times.

    Returns:
        the candidates' numbers, and the share that they save as measured.
    """
    picked = cheapest(costs, offered, budget)
    if budget.measured is None:
        return picked, None
    share, demand = budget.measured(picked), budget.need
    for _ in range(ROUNDS):
        short = budget.need - round(share * budget.total)
        if short <= 0 or len(picked) == len(offered):
            break
        demand = min(demand + short, budget.removed(offered))
        picked = cheapest(costs, offered, replace(budget, need=demand))
        share = budget.measured(picked)
    return picked, share


def cheapest(costs: Array, offered: Sequence[int], budget: Budget) -> list[int]:
    """Those of the least sum of costs that save enough, by what is known of each."""
    sizes = [budget.sizes[number] for number in offered]

    def removed(places: Sequence[int]) -> int:
        return budget.removed([offered[place] for place in places])

    return [
        offered[place] for place in choose(costs[offered].tolist(), sizes, budget.need, removed)
    ]


def counted_budget(
    program: Program, candidates: Sequence[Candidate], name: str, share: float
) -> Budget:
    """A share of the `parameters` or `flops`; what goes together is counted on a hollow network."""
    total, ghost = size_of(program, name), hollow(program)

    def removed(numbers: Sequence[int]) -> int:
        return total - size_of(pruned(ghost, [candidates[each] for each in numbers]), name)

    sizes = [getattr(each, name) for each in candidates]
    return Budget(total, math.ceil(share * total), sizes, removed)


def timed_budget(
    program: Program, candidates: Sequence[Candidate], share: float, work: Work,
    store: Store | None,
) -> Budget:  # fmt: skip
    """A share of a step's time, which what goes together saves as the sum of what each does."""
    found = measure(program, candidates, work, store)

    def removed(numbers: Sequence[int]) -> int:
        return sum(found.each[number] for number in numbers)

    def measured(numbers: Sequence[int]) -> float:
        return measured_share(program, pruned(program, [candidates[n] for n in numbers]), work)

    return Budget(found.step, math.ceil(share * found.step), found.each, removed, measured)
