"""Which picture a call belongs to, and the values kept for it between steps (imports no torch).

A denoiser is called with a latent and a timestep, and nobody says which picture that is. A call
continues a trajectory when its prompt is the same to the bit, its step is the next one (or the same
one again: a second-order sampler), and its latent is close to the last one: two steps of one
trajectory share most of their noise, two pictures share none. Anything else starts a trajectory
with nothing kept, so the worst that an unusual sampler meets is a full step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from effuse.arrays import Arrays
from effuse.guidance import Guided
from effuse.plan import FORECAST_INPUT, Plan, PlanStep, ProgramSpec, Role, Slot

KEPT_TRAJECTORIES = 4  # guidance as two calls, for two pictures in turns
LEAST_LIKENESS = 0.6  # ancestral sampling in 20 steps stays above, other noise is near 0


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
    step: int
    slots: Mapping[str, tuple[Kept, ...]] = field(default_factory=dict)  # latest first
    rows: tuple[int, ...] | None = None  # which of the call's the slots hold; None: all
    guided: Guided | None = None

    def on(self, rows: tuple[int, ...] | None) -> Trajectory:
        """With slots of those rows of the call only; with none, if they do not hold them all."""
        if rows == self.rows:
            return self
        count = len(self.latent)
        held, wanted = (range(count) if each is None else each for each in (self.rows, rows))
        if not set(wanted) <= set(held):
            return replace(self, slots={}, rows=rows)
        places = [held.index(row) for row in wanted]
        slots = {name: tuple(replace(each, value=each.value[places]) for each in kept)
                 for name, kept in self.slots.items()}  # fmt: skip
        return replace(self, slots=slots, rows=rows)

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

    def clear(self) -> None:
        """Forget all of them."""
        self._under_way.clear()

    def follow(self, index: int, values: Mapping[str, Any]) -> Trajectory:
        """The trajectory that the call at step `index` continues, at that step; else a new one.

        A second call at one step leaves the first one's trajectory as it is: it may be the second
        of two pictures as well as a sampler's second evaluation.
        """
        latent = values[self._latent]
        likeness = [self._likeness(each, index, values) for each in self._under_way]
        best = max(range(len(likeness)), key=likeness.__getitem__, default=None)
        if best is None or likeness[best] < LEAST_LIKENESS:
            prompt = {name: self._arrays.keep(values[name]) for name in self._prompt}
            return Trajectory(prompt, self._arrays.keep(latent), index)
        known = self._under_way[best]
        if known.step != index or likeness[best] == 1.0:
            del self._under_way[best]
        return replace(known, latent=self._arrays.keep(latent), step=index)

    def keep(self, trajectory: Trajectory, fills: Sequence[str], found: Mapping[str, Any]) -> None:
        """Fill the slots, and expect the trajectory's next step, if there is one."""
        for name in fills:
            trajectory = trajectory.filled(self._slots[name], found[name])
        if trajectory.step < self._last:
            self._under_way = [*self._under_way, trajectory][-KEPT_TRAJECTORIES:]

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
        return min(0.999, likeness(self._arrays.floats(known.latent), self._arrays.floats(latent)))


def likeness(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """The least correlation between two latents over the pictures of a batch (axis 0)."""
    pairs = (each.reshape(len(each) or 1, -1) if each.ndim > 1 else each.reshape(1, -1)
             for each in (one, other))  # fmt: skip
    a, b = (rows - rows.mean(axis=1, keepdims=True) for rows in pairs)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    products = np.einsum("ij,ij->i", a, b)
    return float(np.min(products / np.maximum(norms, np.finfo(np.float32).tiny), initial=1.0))


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
