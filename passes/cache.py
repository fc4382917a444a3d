"""Cache: temporal reuse of features, as variants and a plan (DESIGN 2; METHODS 2.1-2.3, 2.11-2.14).

At full steps the network computes everything and fills slots; at the others a smaller variant
reads them. What is cached is found in the graph's structure:

- auto: deep where there are long skips, block elsewhere.
- deep: what enters the n-th long skip from below (DeepCache); everything deeper is reused.
- encoder: every long skip and the middle's output (Faster Diffusion); the decoder stays fresh.
- unit: each innermost residual branch before its gate, gates fresh (FORA; A-SDM's units).
- layer: each outermost residual branch; block: what each repeated block adds to its stream.
- residual: what all blocks but the first add to the stream (First-Block Cache, TeaCache); with a
  `threshold` the Session decides at each step, for each picture.

Between full steps a cached value is not held but forecast: F̂ = Σ_j w_j F_kj over its last `order`
+ 1 refreshes, w from the polynomial through them (TaylorSeer, 2.14), or fitted to the calibration's
features by least squares. Order 0 holds the last value, as the papers' codes do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from effuse import schedule as schedules
from effuse.errors import ConfigError, PassError
from effuse.passes.base import Pass, Work
from effuse.passes.correction import corrections, corrector
from effuse.passes.cut import Target, fill, read, reuse, slots
from effuse.passes.features import Features, fitted_weights, gram_matrix, whole_runs
from effuse.passes.options import check_choice, check_sequence, check_whole
from effuse.passes.places import MODE_TARGETS, named, summary
from effuse.passes.sensitivity import step_weights
from effuse.passes.signals import (
    LEAST_R2,
    Signals,
    check_rows,
    decided_steps,
    fitted_polynomial,
    moved,
    signal_of,
)
from effuse.plan import Decision, Plan, PlanStep
from effuse.program import Part, Program
from effuse.structure import Structure, reused_share
from effuse.weights import copied

Mode = Literal["auto", "deep", "encoder", "block", "layer", "unit", "residual"]
Named = Literal["uniform", "nonuniform", "propagation", "fitted"]
CHOSEN = ("unit", "layer", "block")  # modes with places that include and exclude choose from


@dataclass(frozen=True)
class Cache(Pass):
    """Reuse features between steps; lossy.

    Args:
        interval: a full step every so many (uniform, nonuniform: on average); 1 reuses nothing.
        order: degree of the forecast, 0 (hold the last value) to 2.
        warmup: so many full steps at the start, for the forecast to start from.
        mode: what is cached: see the module's text.
        schedule: which steps are full: `uniform`, `nonuniform` (DeepCache's 1:N around `center`),
            `propagation` (Faster Diffusion's key steps), `fitted` (the best for the calibration's
            features), or the steps themselves.
        branch: of modes `deep` and `auto`: which long skip, 0 the shallowest.
        at: module paths whose outputs are cached instead of what `mode` finds.
        full_steps: of `fitted`: how many steps are full; None: as many as uniform has.
        error: of `fitted`: the relative error of the features to stay under; sets full_steps.
        clock: what the forecast's polynomial is in: the `step` number, or the `timestep`, which is
            the sampler's own time where its steps are uneven.
        forecast: weights from a `polynomial`, or `fitted` to the calibration's features.
        correct: scale and shift what is forecast, per channel and step, as fits the calibration's
            features best (CacheQuant's DEC).
        center, power, released: of `nonuniform`; released takes the schedule that DeepCache's code
            gives instead of the intended one.
        threshold: of mode `residual`, instead of a schedule: reuse the latest value (order 0) while
            the relative change of the first block's residual is less, picture by picture; after
            `warmup` steps and up to the last. 0 reuses nothing. FLUX: 0.08 to 0.12.
        accumulate: with a threshold: add the changes from step to step up (TeaCache) instead of
            comparing with the last refresh (First-Block Cache).
        polynomial: with accumulate: coefficients, highest power first, that a change goes through
            before it is added; `fitted`: to the calibration's changes of the output.
    """

    name: ClassVar[str] = "cache"
    exact: ClassVar[bool] = False

    interval: int = 3
    order: int = 1
    warmup: int = 4
    mode: Mode = "auto"
    schedule: Named | tuple[int, ...] = "uniform"
    branch: int = 0
    at: tuple[str, ...] = ()
    full_steps: int | None = None
    error: float | None = None
    clock: Literal["step", "timestep"] = "step"
    forecast: Literal["polynomial", "fitted"] = "polynomial"
    correct: bool = False
    center: int = 15
    power: float = 1.4
    released: bool = False
    threshold: float | None = None
    accumulate: bool = False
    polynomial: Literal["fitted"] | tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("cache", "mode", self.mode, get_args(Mode))
        check_sequence("cache", "at", self.at, "module paths")
        check_choice("cache", "clock", self.clock, ("step", "timestep"))
        check_choice("cache", "forecast", self.forecast, ("polynomial", "fitted"))
        if isinstance(self.schedule, str):
            check_choice("cache", "schedule", self.schedule, get_args(Named))
        else:
            check_sequence("cache", "schedule", self.schedule, "full steps")
        check_whole("cache", "interval", self.interval, 1)
        check_whole("cache", "order", self.order, 0, 2)
        check_whole("cache", "warmup", self.warmup, 1)
        check_whole("cache", "branch", self.branch, 0)
        if self.full_steps is not None:
            check_whole("cache", "full_steps", self.full_steps, 1)
        if (self.include or self.exclude) and (self.at or self.mode not in CHOSEN):
            raise ConfigError(
                f"cache: include and exclude choose among the places of mode {', '.join(CHOSEN)}"
            )
        if self.schedule != "fitted" and (self.full_steps, self.error) != (None, None):
            raise ConfigError('cache: full_steps and error belong to schedule="fitted"')
        if self.error is not None and not 0 <= self.error < math.inf:
            raise ConfigError(f"cache: error={self.error!r}: expected a number, at least 0")
        check_threshold(self)

    def requires(self, program: Program) -> str | None:
        """A known schedule, and a plan without slots."""
        if program.timesteps is None:
            return "the steps have to be known: compile with schedule=scheduler, timesteps set"
        if program.plan.slots:
            return "the plan has a cache already"
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Cut the default variant, and plan when which half runs."""
        full = program.part(program.plan.default)
        targets = self.targets(full, program)
        if self.threshold is not None:
            return self._decided(program, full, targets, work)
        filling = fill(full, targets)
        keys = self.rule(len(program.timesteps or ()))
        features = self._features(program, filling, targets, work)
        count = len(program.timesteps or ())
        gram = None if features is None else gram_matrix(features, count)
        if gram is not None and self.schedule == "fitted":
            weights = step_weights(program, full, targets, work)
            keys = self.fit(gram, weights, self.times(program))
        steps = self.plan(keys, self.times(program), gram)
        depth = max((len(step.sources) for step in steps), default=0)
        if not depth:
            work.log.note("every step is full: nothing is reused")
            return program
        if not work.log.spend("cache"):
            return program
        stored = copied(program.weights)
        if self.correct and features is not None:
            runs = whole_runs(features, len(steps))
            adjust = corrector(corrections(features, steps, runs), stored)
            reading = replace(reuse(full, "reuse", targets, depth, adjust), exact=False)
        else:
            reading = reuse(full, "reuse", targets, depth)
        share = reused_share(full, reading)
        work.log.note(
            f"{len(keys)} of {len(steps)} steps in full; the others leave out {share:.1%} of the "
            f"arithmetic ({', '.join(summary(targets))})"
        )
        parts = [filling if part is full else part for part in program.parts]
        plan = Plan(full.name, completed(steps, targets, depth), slots(targets, depth))
        return program.with_parts(*parts, reading, plan=plan, weights=stored)

    def _decided(
        self, program: Program, full: Part, targets: Sequence[Target], work: Work
    ) -> Program:
        """With a plan whose steps the Session decides on, from a signal that both variants give."""
        names = tuple(target.slot for target in targets)
        steps = decided_steps(len(program.timesteps or ()), self.warmup, names)
        if not any(step.reads for step in steps):
            work.log.note("warm-up and the last step are all there is: nothing is reused")
            return program
        signal = signal_of(full, program)
        check_rows(full, [*targets, signal], program)
        if not work.log.spend("cache"):
            return program
        watched = fill(full, [signal])
        cut = moved(targets, watched)
        polynomial = self._polynomial(program, watched, signal, work)
        decision = Decision(signal.slot, float(self.threshold or 0), self.accumulate, polynomial)
        reading = reuse(watched, "reuse", cut, 1)
        work.log.note(
            f"{sum(bool(step.reads) for step in steps)} of {len(steps)} steps are decided on at "
            f"run time; reuse leaves out {reused_share(full, reading):.1%} of the arithmetic "
            f"({', '.join(summary(targets))})"
        )
        parts = [fill(watched, cut) if part is full else part for part in program.parts]
        plan = replace(program.plan, steps=steps, slots=slots(cut, 1), decision=decision)
        return program.with_parts(*parts, reading, plan=plan)

    def _polynomial(
        self, program: Program, watched: Part, signal: Target, work: Work
    ) -> tuple[float, ...]:
        """The coefficients given, or fitted; none where the fit explains too little."""
        if self.polynomial != "fitted":
            return tuple(float(each) for each in self.polynomial)
        if work.drive is None:
            raise PassError("cache: a fitted polynomial needs calibration")
        parts = [watched if part.name == watched.name else part for part in program.parts]
        seen = Signals(watched, signal.slot, program.outputs[0], after=self.warmup)
        work.drive(program.with_parts(*parts), seen)
        found, explained = fitted_polynomial(seen.pairs)
        count = f"{len(seen.pairs[0])} changes, R² {explained:.2f}"
        if explained < LEAST_R2:
            work.log.note(f"polynomial: too little is explained, so changes count as are ({count})")
            return ()
        work.log.note(f"polynomial fitted to {count}: {', '.join(f'{each:.4g}' for each in found)}")
        return found

    def targets(self, full: Part, program: Program) -> list[Target]:
        """What is cached, in the graph's order.

        Raises:
            PassError: the network has no such place; the message says which it has.
        """
        places = (
            named(full, program, self.at)
            if self.at
            else MODE_TARGETS[self.mode](self, full, program)
        )
        places = [target for target in places if target.value.op == "call_function"]
        found = [target for target in places if self.at or self.unwanted(target.name) is None]
        if not found:
            raise PassError(f"cache: {self._nothing(full, program, [t.name for t in places])}")
        order = {node: index for index, node in enumerate(full.graph.nodes)}
        unique = {target.slot: target for target in found}
        return read(full, sorted(unique.values(), key=lambda target: order[target.value]))

    def _nothing(self, full: Part, program: Program, places: Sequence[str]) -> str:
        if places:
            return f"include and exclude leave none of {', '.join(places)}"
        structure = Structure(full, program)
        has = {
            "deep, encoder": len(structure.skips),
            "unit": len(structure.units),
            "layer": len(structure.layers),
            "block": len(structure.blocks),
            "residual": int(structure.stack() is not None),
        }
        other = ", ".join(f"mode={name!r} ({count})" for name, count in has.items() if count)
        left = f"this network has places for {other}" if other else "no mode finds a place in it"
        return f"mode={self.mode!r} finds nothing to cache; {left}; or name modules with at=(…)"

    def times(self, program: Program) -> Sequence[float]:
        """Each step's place on the clock of the forecast."""
        known = program.timesteps or ()
        return known if self.clock == "timestep" else range(len(known))

    def rule(self, steps: int) -> tuple[int, ...]:
        """The full steps by the schedule's rule; what `fitted` has to beat, by uniform's."""
        warmup = min(self.warmup, steps)
        if self.schedule == "nonuniform":
            count = -(-steps // self.interval)
            return schedules.nonuniform(steps, count, self.center, self.power, self.released)
        if self.schedule == "propagation":
            return schedules.propagation_keys(steps)
        if isinstance(self.schedule, str):
            return schedules.uniform(steps, self.interval, warmup)
        return schedules.explicit(steps, self.schedule)

    def fit(
        self,
        gram: np.ndarray[Any, Any],
        weights: np.ndarray[Any, Any] | None = None,
        times: Sequence[float] | None = None,
    ) -> tuple[int, ...]:
        """The full steps with the least error of the forecast features, weighted by step."""
        warmup = min(self.warmup, len(gram))
        if self.error is not None:
            return schedules.fitted_to(gram, self.error, self.order, warmup, weights, clock=times)
        count = self.full_steps or len(schedules.uniform(len(gram), self.interval, warmup))
        return schedules.fitted(gram, count, self.order, warmup, weights, clock=times)

    def plan(
        self, keys: Sequence[int], times: Sequence[float], gram: np.ndarray[Any, Any] | None
    ) -> list[PlanStep]:
        """What each step reads, by the step's sources and their weights in the forecast."""
        found = []
        for index in range(len(times)):
            if index in keys:
                found.append(PlanStep("full"))
                continue
            sources = schedules.sources(keys, index, self.order)
            if gram is not None and self.forecast == "fitted":
                weights = fitted_weights(gram, sources, index)
            else:
                weights = schedules.lagrange(times, sources, index)
            found.append(PlanStep("reuse", sources=sources, weights=weights))
        return found

    def _features(
        self, program: Program, filling: Part, targets: Sequence[Target], work: Work
    ) -> Features | None:
        """The cached features along the calibration's trajectories, if anything is fitted."""
        if not self.correct and "fitted" not in (self.schedule, self.forecast):
            return None
        if work.drive is None:
            raise PassError("cache: a fitted schedule, forecast or correction needs calibration")
        parts = [filling if part.name == filling.name else part for part in program.parts]
        features = Features(filling, [target.slot for target in targets])
        work.drive(program.with_parts(*parts), features)
        return features


def completed(
    steps: Sequence[PlanStep], targets: Sequence[Target], depth: int
) -> tuple[PlanStep, ...]:
    """The steps with the slots that they fill and read, and weights for `depth` values.

    A full step fills only if a later one reads what it filled.
    """
    names = tuple(target.slot for target in targets)
    wanted = {source for step in steps for source in step.sources}
    found = []
    for index, step in enumerate(steps):
        if not step.sources:
            found.append(replace(step, fills=names if index in wanted else ()))
            continue
        weights = (*step.weights, *(0.0,) * depth)[:depth] if depth > 1 else ()
        found.append(replace(step, reads=names, weights=weights))
    return tuple(found)


def check_threshold(options: Cache) -> None:
    """Raise ConfigError for a threshold that is none, or options that need one."""
    if options.threshold is None:
        if options.accumulate or options.polynomial:
            raise ConfigError("cache: accumulate and polynomial belong to a threshold")
        return
    if not 0 <= options.threshold < math.inf:
        raise ConfigError(
            f"cache: threshold={options.threshold!r}: expected a number, at least 0, such as 0.1"
        )
    if options.correct:
        raise ConfigError("cache: correct belongs to a schedule; a threshold has no fixed sources")
    if options.mode != "residual" or options.at:
        raise ConfigError(
            'cache: a threshold belongs to mode="residual", whose first block tells what changed'
        )
    if isinstance(options.polynomial, str):
        check_choice("cache", "polynomial", options.polynomial, ("fitted",))
    else:
        check_sequence("cache", "polynomial", options.polynomial, "coefficients")
    if options.polynomial and not options.accumulate:
        raise ConfigError("cache: a polynomial needs accumulate=True: it is of changes in a step")
