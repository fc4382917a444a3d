"""Guidance: classifier-free guidance without the rows that tell nothing new (METHODS 2.9; lossy).

For pipelines that call the network on one batch of two halves, [unconditional; conditional]; the
batch has to be open, so that fewer rows can run. Guidance as two calls runs as it is.

- adaptive (Adaptive Guidance): a picture's unconditional row runs until γ = cos(ε_c, ε_∅) of the
  network's raw outputs has reached the threshold; from the next step on ε_c stands in for it, so
  the guided sum is ε_c. Where both halves give back the noise at the first steps, γ is near 1
  there already, and tells nothing: see `start`.
- affine (LinearAG, with two steps of memory): from step `start` on no unconditional row runs, and
  ε̂_∅(t) = a_t ε_c(t) + b_t ε_c(t-1) + c_t ε̂_∅(t-1) + d_t, by ordinary least squares on the
  calibration's trajectories with the true ε_∅(t-1).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import fx

from effuse.arrays import NumpyArrays
from effuse.errors import CalibrationError, ConfigError, PassError
from effuse.graph import outputs, value_of
from effuse.guidance import Guided, estimate, halves, places
from effuse.passes.base import Pass, Work
from effuse.passes.options import check_choice
from effuse.plan import Guide, Input, Role
from effuse.program import Part, Program, run_program
from effuse.trajectory import Trajectories, Trajectory
from effuse.verify import exact_bound, relative_error
from effuse.watch import Watch

Mode = Literal["adaptive", "affine"]
Order = Literal["uncond-first", "cond-first"]
Array = np.ndarray[Any, Any]

SAMPLED = 4096  # elements kept of each picture at each step: 1.6 MB a picture over 50 steps


@dataclass(frozen=True)
class Guidance(Pass):
    """Leave unconditional rows of guided calls out; lossy.

    Args:
        mode: `adaptive` or `affine`: see the module's text.
        threshold: of `adaptive`: the cosine from which on ε_c stands in; above 1: never.
        start: the first step without unconditional rows; None: half of the schedule (affine). Of
            `adaptive` the first that may be without, if γ counts from the step before on; None: 1.
        order: which half of the batch comes first, `uncond-first` (diffusers) or `cond-first`.
    """

    name: ClassVar[str] = "guidance"
    exact: ClassVar[bool] = False

    mode: Mode = "adaptive"
    threshold: float = 0.991
    start: int | None = None
    order: Order = "uncond-first"

    def __post_init__(self) -> None:
        for option, known in (("mode", Mode), ("order", Order)):
            check_choice("guidance", option, getattr(self, option), get_args(known))
        number = isinstance(self.threshold, (int, float)) and not isinstance(self.threshold, bool)
        if not (number and 0 < self.threshold < math.inf):
            raise ConfigError(
                f"guidance: threshold={self.threshold!r}: expected a cosine above 0; "
                "above 1 keeps every row"
            )
        whole = isinstance(self.start, int) and not isinstance(self.start, bool)
        if self.start is not None and not (whole and self.start >= 1):
            raise ConfigError(
                f"guidance: start={self.start!r}: expected a step from 1 on; an estimate needs "
                "the step before"
            )

    def requires(self, program: Program) -> str | None:
        """A known schedule, guidance in one batch, and a batch that can be halved."""
        return (
            self._no_schedule(program)
            or unguided(program)
            or closed_batch(program)
            or next(misplaced(program), None)
            or mixed(program)
        )

    def run(self, program: Program, work: Work) -> Program:
        """Add the guide to the plan; of mode `affine` with fitted coefficients."""
        if not work.log.spend("guidance"):
            return program
        guide = Guide(str(latent(program).shape[0]), self.order == "cond-first")
        if self.mode == "adaptive":
            guide = replace(guide, threshold=self.threshold, start=self.start or 0)
        else:
            guide = self.fit(program, guide, work)
        return replace(program, plan=replace(program.plan, guidance=guide))

    def fit(self, program: Program, guide: Guide, work: Work) -> Guide:
        """The guide with coefficients from step `start` on, and notes on how well they do."""
        if work.drive is None:
            raise PassError("guidance: mode='affine' needs calibration")
        steps = len(program.timesteps or ())
        start = max(1, steps // 2) if self.start is None else self.start
        watch = Outputs(program, guide)
        work.drive(program, watch)
        fits = [fit_step(watch.seen, index) for index in range(start, steps)]
        guide = replace(guide, start=start, affine=tuple(fit.coefficients for fit in fits))
        errors = estimated_errors(watch.seen, guide)
        for index, fit in enumerate(fits, start):
            work.log.note(
                f"step {index}: R² {fit.r2:.6f}; the estimate is off by {errors[index]:.2%}"
            )
        return guide

    def _no_schedule(self, program: Program) -> str | None:
        if program.timesteps is None:
            return "the steps have to be known: compile with schedule=scheduler, timesteps set"
        if program.plan.guidance is not None:
            return "the plan leaves out rows of guidance already"
        steps = len(program.timesteps)
        if self.mode == "affine" and program.plan.decision is not None:
            return "mode='affine' is fitted to a fixed plan, and this one is decided at run time"
        least = 1 if self.mode == "affine" else 0
        if not (self.start or least) < steps:
            return f"start={self.start}: the schedule has the steps 0 to {steps - 1}"
        return None


# ---- what has to hold ----------------------------------------------------------------------------


def latent(program: Program) -> Input:
    """The input that changes every step."""
    return next(item for item in program.inputs if item.role is Role.LATENT)


def unguided(program: Program) -> str | None:
    """Why there is no guidance to save, or None."""
    if not any(item.role is Role.PROMPT for item in program.inputs):
        return "the network takes no prompt, so there is no guidance to save"
    if len(latent(program).shape) < 2:
        return "the latent has no axis beside the batch"
    return None


def closed_batch(program: Program) -> str | None:
    """Why the conditional half of the example batch cannot run alone, or None."""
    batch = latent(program).shape[0]
    if not isinstance(batch, str):
        way = f'dynamic={{"batch": (1, {max(2, batch)})}}'
        return f"fewer rows can run only if the batch is open: compile with Config({way})"
    if not any(i.role is Role.PROMPT and i.shape and i.shape[0] == batch for i in program.inputs):
        return "no prompt has the batch on axis 0, so there is no guidance in one batch to save"
    rows = len(program.examples[latent(program).name]) if program.examples else 2
    low, high = program.bounds[batch]
    unit = program.steps.get(batch, 1)
    if low > rows // 2 or (rows // 2 - low) % unit:
        return (
            f"the conditional half of {rows} rows has {rows // 2}, and the batch is {low} to "
            f"{high}{f' in steps of {unit}' if unit > 1 else ''}: open it from {rows // 2} or "
            f'below: dynamic={{"batch": (1, {high})}}'
        )
    return None


def misplaced(program: Program) -> Iterator[str]:
    """Which outputs and slots have not the batch on axis 0."""
    full = program.part(program.plan.default)
    open_inputs = {str(n.target): n for n in full.graph.nodes if n.op == "placeholder"}
    batch = str(value_of(open_inputs[latent(program).name]).shape[0])
    for name, node in zip(full.outputs, outputs(full.graph), strict=True):
        shape = tuple(value_of(node).shape)
        if name in program.outputs and (len(shape) < 2 or str(shape[0]) != batch):
            yield f"the output {name}, {shape}, has not the batch on axis 0"
    for slot in program.plan.slots:
        if not slot.shape or slot.shape[0] != batch:
            yield (
                "Guidance with Cache needs slots with the batch on axis 0, and "
                f"{slot.name} is {slot.shape}; choose another mode of Cache"
            )


def mixed(program: Program) -> str | None:
    """Why the rows of a batch cannot run apart, or None: on the examples they are compared.

    A quantized network's may differ as far as it does from the captured one: a rounding that falls
    otherwise moves a whole step.
    """
    if not program.examples:
        return None
    moved = max((record.error or 0.0 for record in program.records), default=0.0)
    batch = latent(program).shape[0]
    count = len(program.examples[latent(program).name])
    rowed = [item.name for item in program.inputs if item.shape and item.shape[0] == batch]
    half = {name: program.examples[name][count - count // 2 :] for name in rowed}
    with torch.no_grad():
        whole = run_program(program, program.examples)
        alone = run_program(program, {**program.examples, **half})
    error = relative_error(alone, [value[count - count // 2 :] for value in whole])
    if error > exact_bound(getattr(torch, program.model["dtype"])) + moved:
        return f"rows of a batch depend on each other: half of them alone differ by {error:.1e}"
    return None


# ---- the affine estimate -------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen(Guided):
    """The two halves' outputs at one step, (n, elements) float32, and those of the step before."""

    before: Seen | None = None


@dataclass(frozen=True)
class Fit:
    """(a, b, c, d) of one step, and the share of ε_∅'s variance that they explain."""

    coefficients: tuple[float, ...]
    r2: float


class Outputs(Watch):
    """Keeps a fixed random choice of the outputs' elements, trajectory by trajectory."""

    def __init__(self, program: Program, guide: Guide, seed: int = 0) -> None:
        first = program.outputs[0]
        self._nodes = {
            part.name: outputs(part.graph)[part.outputs.index(first)].name
            for part in program.variants
        }
        self._latent, self._guide = latent(program).name, guide
        self._trajectories = Trajectories(program.spec(), NumpyArrays())
        self._trajectory: Trajectory | None = None
        self._random = torch.Generator().manual_seed(seed)
        self._chosen: torch.Tensor | None = None
        self.seen: list[Seen] = []  # in the order of the calls

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """A call at step `index`."""
        plain = {name: np.asarray(value.float()) for name, value in values.items()}
        self._pictures = halves(plain[self._latent], NumpyArrays())
        follows = index is not None and self._pictures > 0
        self._trajectory = self._trajectories.follow(index or 0, plain) if follows else None

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Keep some elements, if it is the output of a call of two halves."""
        if self._trajectory is None or node.name != self._nodes.get(part.name):
            return
        sample = self._sample(value[:, : self._trajectory.latent.shape[1]])
        free, told = (sample[place] for place in places(self._guide, self._pictures))
        last = self._trajectory.guided
        before = last if isinstance(last, Seen) and last.step == self._trajectory.step - 1 else None
        seen = Seen(self._trajectory.step, None, told, free, before)
        self.seen.append(seen)
        self._trajectories.keep(replace(self._trajectory, guided=seen), (), {})

    def _sample(self, noise: torch.Tensor) -> Array:
        rows = noise.flatten(1).float()
        if self._chosen is None:
            order = torch.randperm(rows.shape[1], generator=self._random)
            self._chosen = order[:SAMPLED].sort().values
        return np.asarray(rows[:, self._chosen % rows.shape[1]])


def fit_step(seen: Sequence[Seen], index: int) -> Fit:
    """The coefficients of step `index` on all that was seen of it.

    Raises:
        CalibrationError: no trajectory went through it and the step before, or one is not finite.
    """
    found = [(each, each.before) for each in seen if each.step == index and each.before]
    if not found:
        raise CalibrationError(
            f"guidance: calibration never ran step {index} after step {index - 1} on two halves "
            "of one batch; hand compile a calibration run that samples with guidance, "
            "[unconditional; conditional] in one call"
        )
    columns = [
        np.concatenate([column.ravel() for column in each]).astype(np.float64)
        for each in zip(*((s.told, b.told, b.free, s.free) for s, b in found), strict=True)
    ]
    if not all(np.isfinite(column).all() for column in columns):
        raise CalibrationError(f"guidance: an output at step {index} is not finite")
    return fit_affine(*columns)


def fit_affine(told: Array, told_before: Array, free_before: Array, free: Array) -> Fit:
    """The least |free - (a told + b told_before + c free_before + d)|², all (samples,)."""
    system = np.stack([told, told_before, free_before, np.ones_like(told)], axis=1)
    solution = np.linalg.lstsq(system, free, rcond=None)[0]
    rest = float(np.sum((free - system @ solution) ** 2))
    spread = float(np.sum((free - free.mean()) ** 2))
    r2 = 1.0 - rest / spread if spread else 1.0
    return Fit(tuple(float(each) for each in solution), r2)


def estimated_errors(seen: Sequence[Seen], guide: Guide) -> dict[int, float]:
    """By step: the estimates' error relative to ε_∅ where each is fed with the one before."""
    known: dict[int, Array] = {}  # by the identity of what was seen
    wrong, whole = defaultdict[int, float](float), defaultdict[int, float](float)
    for each in seen:
        known[id(each)] = each.free
        if each.before is None or each.step < guide.start:
            continue
        before = replace(each.before, free=known[id(each.before)])
        known[id(each)] = estimate(guide, each.step, each.told, before)
        wrong[each.step] += float(np.sum((known[id(each)] - each.free) ** 2))
        whole[each.step] += float(np.sum(each.free**2))
    return {step: math.sqrt(wrong[step] / (whole[step] or 1.0)) for step in whole}
