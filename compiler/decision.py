"""Whether a picture may reuse what its slots hold, decided at each step (imports no torch).

The variant that reuses runs first: it holds the network's first block, whose residual is the
signal. Only if that has changed too much for some picture does the default variant run as well, and
its rows are taken for those pictures alone, so that none of a batch depends on its neighbours.

Sources: First-Block Cache (METHODS 2.13), TeaCache (2.12).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from effuse.arrays import Arrays
from effuse.plan import Decision, Plan, PlanStep

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Memory:
    """What a trajectory's next decision compares with, a row for each picture.

    `signal` is that of the row's last refresh, or with `accumulate` that of the last step; `total`
    (batch,) is the change that has added up since the refresh.
    """

    signal: Floats
    total: Floats

    def on(self, rows: Sequence[int]) -> Memory:
        """That of some rows only."""
        chosen = list(rows)
        return Memory(self.signal[chosen], self.total[chosen])


class Decided(NamedTuple):
    """A step's outputs, the slots to fill from them, and what the next decision compares with."""

    found: dict[str, Any]
    fills: tuple[str, ...]
    memory: Memory


def decide(
    plan: Plan,
    entry: PlanStep,
    memory: Memory | None,
    read: Mapping[str, Any],
    found: dict[str, Any],
    full: Callable[[], Mapping[str, Any]],
    arrays: Arrays,
) -> Decided:
    """What a step gives whose entry in the plan has given `found` from the slots' values `read`.

    `full` runs the default variant; it is called only if a picture needs it.
    """
    decision = plan.decision
    assert decision is not None
    signal = arrays.floats(found[decision.signal])
    if memory is None or not entry.reads:
        return Decided(found, entry.fills, Memory(signal, np.zeros(len(signal))))
    total = totals(decision, memory, signal)
    refresh = ~(total < decision.threshold)  # what is not a number refreshes
    fills: tuple[str, ...] = ()
    if refresh.any():
        fresh, fills = full(), entry.reads
        old = {**found, **{slot.name: read[slot.past[0]] for slot in plan.slots}}
        found = {name: arrays.where(refresh, fresh[name], old[name]) for name in old}
        signal = arrays.floats(found[decision.signal])
    kept = signal if decision.accumulate else _where(refresh, signal, memory.signal)
    return Decided(found, fills, Memory(kept, np.where(refresh, 0.0, total)))


def totals(decision: Decision, memory: Memory, signal: Floats) -> Floats:
    """(batch,): what the threshold is compared with."""
    change = changes(signal, memory.signal)
    if not decision.accumulate:
        return change
    if decision.polynomial:
        change = np.maximum(np.polyval(np.array(decision.polynomial), change), 0.0)
    return memory.total + change


def changes(now: Floats, before: Floats) -> Floats:
    """(batch,): mean|s - s'| / mean|s'| over all axes but 0; 0 where nothing has changed.

    >>> changes(np.array([[2.0, 4.0], [0.0, 0.0]]), np.array([[1.0, 3.0], [0.0, 0.0]]))
    array([0.5, 0. ])
    """
    axes = tuple(range(1, now.ndim))
    with np.errstate(all="ignore"):
        moved = np.abs(now - before).mean(axis=axes, dtype=np.float64)
        size = np.abs(before).mean(axis=axes, dtype=np.float64)
        return np.where(moved == 0, 0.0, moved / size)


def _where(rows: npt.NDArray[np.bool_], one: Floats, other: Floats) -> Floats:
    return np.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)
