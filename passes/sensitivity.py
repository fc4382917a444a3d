"""What an error at each step does to the final picture: the weights of a fitted schedule.

An error early in a trajectory moves everything after it; measured on a trained UNet, it costs some
hundred times what the same error costs late. So pictures are sampled again, each with one step's
cached features replaced by their forecast, and the weight of a step is |Δx|² / |ΔF|²: what that
does to the last latent, over the error put in (HarmoniCa's λ(t), METHODS 2.4, per unit of error).
Pictures share a run: each row of a batch has a step of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.passes.base import Work
from effuse.passes.cut import Target
from effuse.plan import Role
from effuse.program import Part, Program
from effuse.watch import Watch

Array = np.ndarray[Any, Any]

POINTS = 24  # steps that are measured, spread over the schedule; the others lie between
MOST_RUNS = 4  # of the calibration's sampling
LEAST_STEPS = 4  # of a schedule with something to weigh
DEGREE = 3  # of the polynomial in the step that log weights are smoothed by


def step_weights(program: Program, full: Part, targets: Sequence[Target], work: Work) -> Array:
    """(steps,) what a unit of error at each step does to the last latent, 1 at the most.

    Ones where that cannot be measured; the log says why.
    """
    assert work.drive is not None  # the features have been sampled with it
    latent = next(item.name for item in program.inputs if item.role is Role.LATENT)
    steps = len(program.timesteps or ())
    if steps < LEAST_STEPS:
        return np.ones(steps)
    chosen = measured_steps(steps)
    plain = Finals(latent, steps)
    work.drive(program, plain)
    runs: list[Disturbed] = []
    while len(runs) < MOST_RUNS and sum(run.pictures for run in runs) < len(chosen):
        offset = sum(run.pictures for run in runs)
        turned = [*chosen[offset:], *chosen[:offset]]
        runs.append(Disturbed(full, targets, latent, steps, turned))
        work.drive(program, runs[-1])
        if not repeatable(plain, runs[-1]):
            work.log.note("calibration starts from other noise each time: seed its generator; the "
                          "schedule is fitted to features alone")  # fmt: skip
            return np.ones(steps)
    where, found = measured(plain, runs)
    if not found:
        work.log.note("calibration does not sample with what the network gives: the schedule is "
                      "fitted to features alone")  # fmt: skip
    weights = smoothed(where, found, steps)
    if found:
        work.log.note(f"an error at the first step costs {weights[0] / weights[-1]:.3g} times what "
                      f"it costs at the last ({len(found)} measurements)")  # fmt: skip
    return weights


class Finals(Watch):
    """Keeps the first and the last latent of every trajectory."""

    def __init__(self, latent: str, steps: int) -> None:
        self._latent = latent
        self._last = steps - 1
        self.first: list[torch.Tensor] = []
        self.last: list[torch.Tensor] = []

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """A call at step `index`."""
        if index == 0:
            self.first.append(values[self._latent].clone())
        if index == self._last:
            self.last.append(values[self._latent].clone())


def pictures(latents: torch.Tensor) -> list[int]:
    """For each row the number of its picture: guidance calls with every picture twice."""
    known: dict[bytes, int] = {}
    return [known.setdefault(row.float().numpy().tobytes(), len(known)) for row in latents]


class Disturbed(Finals):
    """Replaces, for each picture at one step of its own, the cached features by their forecast.

    The forecast is the plain one (order 1, or 0 after a single step) from the steps just before.
    """

    def __init__(
        self, part: Part, targets: Sequence[Target], latent: str, steps: int, chosen: Sequence[int]
    ) -> None:
        super().__init__(latent, steps)
        self._part = part.name
        self._starts = {t.start.name for t in targets if t.start is not None}
        self._targets = {t.value.name: t.start and t.start.name for t in targets}
        self._chosen = chosen
        self.pictures = 0  # of the trajectories so far
        self._streams: dict[str, torch.Tensor] = {}
        self._past: dict[str, list[torch.Tensor]] = {}
        self._index: int | None = None
        self.steps: list[list[int]] = []  # by trajectory, by row
        self.errors: list[Array] = []  # by trajectory: Σ |F̂ - F|² of each row

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """A call at step `index`; the first of a trajectory gives its pictures their steps."""
        super().begin(values, index)
        self._index = index
        if index == 0:
            numbers = pictures(self.first[-1])
            mine = [self._chosen[(self.pictures + n) % len(self._chosen)] for n in numbers]
            self.pictures += len(set(numbers))
            self.steps.append(mine)
            self.errors.append(np.zeros(len(mine)))
            self._past.clear()

    def observe(self, part: Part, node: fx.Node, value: Any) -> Any:
        """The value with some rows forecast, at a target; nothing elsewhere."""
        if part.name != self._part or not self.steps:
            return None
        if node.name in self._starts:
            self._streams[node.name] = value
        if node.name not in self._targets:
            return None
        start = self._targets[node.name]
        stream = self._streams[start] if start else None
        feature = value if stream is None else value - stream
        past = self._past.setdefault(node.name, [])
        rows = self._rows(len(value)) if past else []
        self._past[node.name] = [feature, *past[:1]]
        if not rows:
            return None
        forecast = past[0] if len(past) == 1 else 2 * past[0] - past[1]
        return self._replaced(value, feature, forecast, rows)

    def _rows(self, length: int) -> list[int]:
        """The rows of a value whose step it is; a value may hold several for each of the batch."""
        mine = self.steps[-1]
        if length % len(mine):
            return []
        each = length // len(mine)
        return [place for row, step in enumerate(mine) if step == self._index
                for place in range(row * each, (row + 1) * each)]  # fmt: skip

    def _replaced(
        self, value: torch.Tensor, feature: torch.Tensor, forecast: torch.Tensor, rows: list[int]
    ) -> torch.Tensor:
        delta = (forecast - feature)[rows]
        each = len(value) // len(self.steps[-1])
        squares = delta.double().flatten(1).square().sum(1).numpy()
        np.add.at(self.errors[-1], [row // each for row in rows], squares)
        moved = value.clone()
        moved[rows] += delta
        return moved


def measured(plain: Finals, disturbed: Sequence[Disturbed]) -> tuple[list[int], list[float]]:
    """Steps and their |Δx|² / |ΔF|², of every row where both are more than nothing."""
    steps: list[int] = []
    found: list[float] = []
    for run in disturbed:
        for number, last in enumerate(run.last[: len(plain.last)]):
            moved = (last - plain.last[number]).double().flatten(1).square().sum(1).numpy()
            for step, error, change in zip(
                run.steps[number], run.errors[number], moved, strict=True
            ):
                if error > 0 and change > 0:
                    steps.append(step)
                    found.append(change / error)
    return steps, found


def smoothed(steps: Sequence[int], found: Sequence[float], count: int) -> Array:
    """A weight for each of `count` steps: the logarithms' polynomial; ones without measurements."""
    different = len(set(steps))
    if not different:
        return np.ones(count)
    degree = min(DEGREE, (different - 1) // 2)
    curve = np.polyfit(steps, np.log(found), degree)
    places = np.clip(np.arange(count), min(steps), max(steps))
    logs: Array = np.polyval(curve, places)
    return np.asarray(np.exp(logs - logs.max()))


def repeatable(plain: Finals, other: Finals) -> bool:
    """Whether two runs of the calibration started from the same latents."""
    pairs = zip(plain.first, other.first, strict=False)
    return len(plain.first) == len(other.first) and all(map(torch.equal, *zip(*pairs, strict=True)))


def measured_steps(count: int) -> list[int]:
    """The steps to measure, the second to the last but one, spread evenly and dealt by turns.

    Neighbours in the list lie far apart, so that a few pictures already span the schedule.
    """
    spread = np.unique(
        np.linspace(1, count - 2, min(POINTS, max(1, count - 2))).round().astype(int)
    )
    stride = max(1, len(spread) // 4)
    return [int(step) for start in range(stride) for step in spread[start::stride]]
