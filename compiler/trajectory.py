"""Which picture a call belongs to, and the values kept for it between steps (imports no torch).

A denoiser is called with a latent and a timestep, and nobody says which picture that is. A call
fits a trajectory when its prompt is the same to the bit, its step is the next one, and its latent
is close to the last one: two steps of one trajectory share most of their noise, two pictures share
none, and no step moves much farther than those before. A second call at a step is taken for a
sampler's second evaluation (Heun). What fits nothing, or two pictures, starts a trajectory with
nothing kept: the worst that an unusual sampler meets is a full step.

What remains an assumption: that a picture which is unknown does not fit another's next step, or its
last one again. It has to start in the middle of the schedule just there, with the same prompt and
almost the same latent (one initial image, little noise), to be taken for the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from effuse.arrays import Arrays
from effuse.decision import Memory
from effuse.guidance import Guided
from effuse.plan import FORECAST_INPUT, Plan, PlanStep, ProgramSpec, Role, Slot

KEPT_TRAJECTORIES = 4  # with their slots: guidance as two calls, for two pictures in turns
KNOWN_TRAJECTORIES = 16  # without: none of these is taken for one whose slots are kept
LEAST_LIKENESS = 0.6  # ancestral sampling in 20 steps stays above, other noise is near 0
FARTHER = 9.0  # no step has this times the 1 - likeness of those before: thrice the angle
LEAST_MOVE = 1e-4  # of 1 - likeness: below is rounding


@dataclass(frozen=True)
class Kept:
    """One value of a slot, and the step that filled it."""

    step: int
    value: Any


@dataclass(frozen=True)
class Trajectory:
    """One picture (or batch of them) on its way: where it is, and what its slots hold."""

    prompt: Mapping[str, Any]
    latent: Any
    began: int
    step: int
    moved: float = math.inf  # the most of 1 - likeness over a step
    slots: Mapping[str, tuple[Kept, ...]] = field(default_factory=dict)  # latest first
    rows: tuple[int, ...] | None = None  # which of the call's the slots hold; None: all
    guided: Guided | None = None
    memory: Memory | None = None  # of a plan that decides at run time
    origin: object = field(default_factory=object)  # one for all evaluations of one picture

    def on(self, rows: tuple[int, ...] | None) -> Trajectory:
        """With slots of those rows of the call only; with none, if they do not hold them all."""
        if rows == self.rows:
            return self
        count = len(self.latent)
        held, wanted = (range(count) if each is None else each for each in (self.rows, rows))
        if not set(wanted) <= set(held):
            return replace(self, slots={}, memory=None, rows=rows)
        places = [held.index(row) for row in wanted]
        slots = {name: tuple(replace(each, value=each.value[places]) for each in kept)
                 for name, kept in self.slots.items()}  # fmt: skip
        memory = self.memory and self.memory.on(places)
        return replace(self, slots=slots, memory=memory, rows=rows)

    def past(self, slot: Slot, step: PlanStep) -> list[Any] | None:
        """The slot's values that the step reads, latest first, or None if they are not there.

        Values of weight 0 are not needed; the oldest that is stands in for them.
        """
        kept = self.slots.get(slot.name, ())
        if step.sources and tuple(each.step for each in kept[: len(step.sources)]) != step.sources:
            return None
        values = [each.value for each in kept[: len(step.sources) or 1]]
        return values + values[-1:] * (slot.depth - len(values)) if values else None

    def filled(self, slot: Slot, value: Any) -> Trajectory:
        """With `value` as what the present step filled the slot with."""
        kept = [each for each in self.slots.get(slot.name, ()) if each.step != self.step]
        latest = (Kept(self.step, value), *kept)[: slot.depth]
        return replace(self, slots={**self.slots, slot.name: latest})

    def before(self, step: int) -> Trajectory:
        """With what was filled before `step` only."""
        slots = {name: tuple(each for each in kept if each.step < step)
                 for name, kept in self.slots.items()}  # fmt: skip
        return replace(self, slots=slots)

    def reaches(self, alike: float) -> bool:
        """Whether the next latent may be as little like the last one as that."""
        return alike >= max(LEAST_LIKENESS, 1 - FARTHER * max(self.moved, LEAST_MOVE))

    def emptied(self) -> Trajectory:
        """With nothing kept: still known, so that its calls are not taken for another's."""
        return replace(self, slots={}, guided=None, memory=None)


class Trajectories:
    """The trajectories that are under way, the most recently called last."""

    def __init__(self, spec: ProgramSpec, arrays: Arrays) -> None:
        self._arrays = arrays
        self._slots = {slot.name: slot for slot in spec.plan.slots}
        self._last = max(len(spec.plan.steps), len(spec.timesteps or ())) - 1
        self._latent = next((item.name for item in spec.inputs if item.role is Role.LATENT), "")
        self._prompt = [item.name for item in spec.inputs if item.role is Role.PROMPT]
        self._under_way: list[Trajectory] = []

    def __len__(self) -> int:
        return len(self._under_way)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self._under_way)

    def clear(self) -> None:
        """Forget all of them."""
        self._under_way.clear()

    def follow(self, index: int, values: Mapping[str, Any]) -> Trajectory:
        """The trajectory that the call at step `index` continues, at that step; else a new one.

        A second evaluation at one step leaves the first one's trajectory as it is, and starts from
        what had been filled before that step.
        """
        latent = self._arrays.keep(values[self._latent])
        known, alike = self._clearest(index, values)
        again = known is not None and known.step == index
        if known is None or (again and known.began == index):
            prompt = {name: self._arrays.keep(values[name]) for name in self._prompt}
            return Trajectory(prompt, latent, index, index)
        if again and alike < 1.0:
            return replace(known.before(index), latent=latent)
        self._under_way = [each for each in self._under_way if each is not known]
        moved = max(1 - alike, known.moved if math.isfinite(known.moved) else 0.0)
        return replace(known, latent=latent, step=index, moved=known.moved if again else moved)

    def keep(self, trajectory: Trajectory, fills: Sequence[str], found: Mapping[str, Any]) -> None:
        """Fill the slots, and expect the trajectory's next step, if there is one."""
        for name in fills:  # copies: what is found may be the caller's latent, or its output
            trajectory = trajectory.filled(self._slots[name], self._arrays.keep(found[name]))
        if trajectory.step < self._last:
            known = [*self._under_way, trajectory][-KNOWN_TRAJECTORIES:]
            lost = [each.emptied() for each in known[:-KEPT_TRAJECTORIES]]
            self._under_way = [*lost, *known[-KEPT_TRAJECTORIES:]]
        else:
            self._under_way = [each for each in self._under_way
                               if each.origin is not trajectory.origin
                               or each.step == self._last - 1]  # fmt: skip

    def _clearest(self, index: int, values: Mapping[str, Any]) -> tuple[Trajectory | None, float]:
        """The trajectory that the call must mean, with its likeness; None if that is not clear."""
        known = self._under_way
        alike = [self._likeness(each, index, values) for each in known]
        near = [place for place, each in enumerate(known) if each.reaches(alike[place])]
        if not near:
            return None, 0.0
        best = max(near, key=lambda place: (known[place].step < index, alike[place], place))
        others = (known[place] for place in near if alike[place] < 1.0)
        clear = not any(self._differ(each, known[best]) for each in others)
        return (known[best], alike[best]) if clear else (None, 0.0)

    def _differ(self, one: Trajectory, other: Trajectory) -> bool:
        """Whether it matters which of the two a call is taken for."""
        return one.origin is not other.origin and not (
            one.step == other.step and self._arrays.same(one.latent, other.latent)
        )

    def _likeness(self, known: Trajectory, index: int, values: Mapping[str, Any]) -> float:
        """How well a call at step `index` continues `known`: 1 for the same latent again."""
        latent = values[self._latent]
        same_prompt = known.step in (index - 1, index) and all(
            self._arrays.same(known.prompt[name], values[name]) for name in self._prompt
        )
        if not same_prompt or known.latent.shape != latent.shape:
            return -1.0
        if self._arrays.same(known.latent, latent):
            return 1.0
        return min(
            0.999999, likeness(self._arrays.floats(known.latent), self._arrays.floats(latent))
        )


def likeness(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The least correlation between two latents over the pictures of a batch (axis 0).

    0 where it is not a number, so that a picture that has become NaN is like no other.
    """
    pairs = (each.reshape(len(each) or 1, -1) if each.ndim > 1 else each.reshape(1, -1)
             for each in (one, other))  # fmt: skip
    with np.errstate(all="ignore"):
        a, b = (rows - rows.mean(axis=1, keepdims=True) for rows in pairs)
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        products = np.einsum("ij,ij->i", a, b)
        least = np.min(products / np.maximum(norms, np.finfo(np.float32).tiny), initial=1.0)
    return float(least) if math.isfinite(least) else 0.0


def read(trajectory: Trajectory, plan: Plan, step: PlanStep) -> dict[str, Any] | None:
    """What the step's variant reads, by its inputs' names; None if the slots do not hold it."""
    found: dict[str, Any] = {}
    for slot in plan.slots:
        if slot.name in step.reads:
            values = trajectory.past(slot, step)
            if values is None:
                return None
            found |= zip(slot.past, values, strict=True)
    if step.weights:
        found[FORECAST_INPUT] = np.asarray(step.weights, dtype=np.float32)
    return found
