"""Groups of timesteps: equal stretches of the schedule that share activation parameters."""

from __future__ import annotations

from effuse.plan import Rate
from effuse.program import Program


def group_of(index: int, steps: int, groups: int) -> int:
    """The group of timesteps that step `index` of the schedule is in."""
    return index * groups // steps


def planned_groups(program: Program, part: str, groups: int) -> frozenset[int]:
    """The groups of timesteps in which the plan runs a part.

    What `check_groups` has to find: a group without a step, or with steps of other variants only,
    needs no parameters of its own.
    """
    steps = len(program.timesteps or ())
    if not steps or program.part(part).rate < Rate.STEP:
        return frozenset(range(groups))
    at = [index for index in range(steps) if program.plan.at(index).variant == part]
    return frozenset(group_of(index, steps, groups) for index in at)
