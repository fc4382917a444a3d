"""Cache: temporal reuse of features, as variants and a plan (DESIGN 2; METHODS 2.1-2.3, 2.11-2.14).

At full steps the network computes everything and fills slots; at the others a smaller variant
reads them. What is cached is found in the graph's structure:

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

import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from torch import fx

from effuse import schedule as schedules
from effuse.errors import ConfigError, PassError, nearest
from effuse.passes.base import Pass, Work
from effuse.passes.cut import Target, fill, read, reuse, slots
from effuse.passes.features import Features, fitted_weights, gram_matrix
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
from effuse.structure import Chain, Structure, module_outputs, modules, reused_share

Mode = Literal["deep", "encoder", "block", "layer", "unit", "residual"]
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
        branch: of mode `deep`: which long skip, 0 the shallowest.
        at: module paths whose outputs are cached instead of what `mode` finds.
        full_steps: of `fitted`: how many steps are full; None: as many as uniform has.
        error: of `fitted`: the relative error of the features to stay under; sets full_steps.
        forecast: weights from a `polynomial`, or `fitted` to the calibration's features.
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
    mode: Mode = "deep"
    schedule: Named | tuple[int, ...] = "uniform"
    branch: int = 0
    at: tuple[str, ...] = ()
    full_steps: int | None = None
    error: float | None = None
    forecast: Literal["polynomial", "fitted"] = "polynomial"
    center: int = 15
    power: float = 1.4
    released: bool = False
    threshold: float | None = None
    accumulate: bool = False
    polynomial: Literal["fitted"] | tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, get_args(Mode))
        check_sequence("at", self.at, "module paths")
        check_choice("forecast", self.forecast, ("polynomial", "fitted"))
        if isinstance(self.schedule, str):
            check_choice("schedule", self.schedule, get_args(Named))
        else:
            check_sequence("schedule", self.schedule, "full steps")
        check_whole("interval", self.interval, 1)
        check_whole("order", self.order, 0, 2)
        check_whole("warmup", self.warmup, 1)
        check_whole("branch", self.branch, 0)
        if self.full_steps is not None:
            check_whole("full_steps", self.full_steps, 1)
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
        gram = self._gram(program, filling, targets, work)
        if gram is not None and self.schedule == "fitted":
            keys = self.fit(gram, step_weights(program, full, targets, work))
        steps = self.plan(keys, len(program.timesteps or ()), gram)
        depth = max((len(step.sources) for step in steps), default=0)
        if not depth:
            work.log.note("every step is full: nothing is reused")
            return program
        if not work.log.spend("cache"):
            return program
        reading = reuse(full, "reuse", targets, depth)
        share = reused_share(full, reading)
        work.log.note(
            f"{len(keys)} of {len(steps)} steps in full; the others leave out {share:.1%} of the "
            f"arithmetic ({', '.join(summary(targets))})"
        )
        parts = [filling if part is full else part for part in program.parts]
        plan = Plan(full.name, completed(steps, targets, depth), slots(targets, depth))
        return program.with_parts(*parts, reading, plan=plan)

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
        self, gram: np.ndarray[Any, Any], weights: np.ndarray[Any, Any] | None = None
    ) -> tuple[int, ...]:
        """The full steps with the least error of the forecast features, weighted by step."""
        warmup = min(self.warmup, len(gram))
        if self.error is not None:
            return schedules.fitted_to(gram, self.error, self.order, warmup, weights)
        count = self.full_steps or len(schedules.uniform(len(gram), self.interval, warmup))
        return schedules.fitted(gram, count, self.order, warmup, weights)

    def plan(
        self, keys: Sequence[int], steps: int, gram: np.ndarray[Any, Any] | None
    ) -> list[PlanStep]:
        """What each step reads, by the step's sources and their weights in the forecast."""
        found = []
        for index in range(steps):
            if index in keys:
                found.append(PlanStep("full"))
                continue
            sources = schedules.sources(keys, index, self.order)
            if gram is not None and self.forecast == "fitted":
                weights = fitted_weights(gram, sources, index)
            else:
                weights = schedules.lagrange(range(steps), sources, index)
            found.append(PlanStep("reuse", sources=sources, weights=weights))
        return found

    def _gram(
        self, program: Program, filling: Part, targets: Sequence[Target], work: Work
    ) -> np.ndarray[Any, Any] | None:
        """Inner products of the cached features of each two steps, if anything is fitted."""
        if "fitted" not in (self.schedule, self.forecast):
            return None
        if work.drive is None:
            raise PassError("cache: a fitted schedule or forecast needs calibration")
        parts = [filling if part.name == filling.name else part for part in program.parts]
        features = Features(filling, [target.slot for target in targets])
        work.drive(program.with_parts(*parts), features)
        return gram_matrix(features, len(program.timesteps or ()))


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


def check_choice(name: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError for an option that is none of the known ones."""
    if value not in known:
        raise ConfigError(f"cache: {name}={value!r} is unknown{nearest(str(value), known)}")


def check_sequence(name: str, value: Any, what: str) -> None:
    """Raise ConfigError for an option that is no sequence, or a string."""
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"cache: {name}={value!r}: expected a sequence of {what}")


def check_whole(name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise ConfigError for a number that is not whole or out of its range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise ConfigError(f"cache: {name}={value!r}: expected a whole number, at least {low}{most}")


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
    if options.mode != "residual" or options.at:
        raise ConfigError(
            'cache: a threshold belongs to mode="residual", whose first block tells what changed'
        )
    if isinstance(options.polynomial, str):
        check_choice("polynomial", options.polynomial, ("fitted",))
    else:
        check_sequence("polynomial", options.polynomial, "coefficients")
    if options.polynomial and not options.accumulate:
        raise ConfigError("cache: a polynomial needs accumulate=True: it is of changes in a step")


def summary(targets: Sequence[Target], most: int = 3) -> list[str]:
    """The first few targets by name, and how many there are."""
    names = list(dict.fromkeys(target.name for target in targets))
    return names if len(names) <= most else [*names[:most], f"… {len(names)} in all"]


def named(full: Part, program: Program, paths: Sequence[str]) -> list[Target]:
    """The outputs of the modules that a person names; patterns may be used.

    Raises:
        PassError: the network has no such module, or nothing of it changes with the latent.
    """
    known, structure = modules(full), Structure(full, program)
    found = []
    for pattern in paths:
        matching = [path for path in known if fnmatch.fnmatch(path, pattern)]
        if not matching:
            raise PassError(f"cache: at={pattern!r} names no module{nearest(pattern, known)}")
        values = [node for path in matching for node in module_outputs(full, path)]
        fresh = [node for node in values if structure.fresh(node)]
        if not fresh:
            raise PassError(f"cache: at={pattern!r} gives nothing that changes with the latent")
        found += [Target(pattern, node) for node in fresh]
    return found


def _deep(options: Cache, full: Part, program: Program) -> list[Target]:
    skips = Structure(full, program).skips
    if skips and options.branch >= len(skips):
        raise PassError(
            f"cache: branch={options.branch}: this network has {len(skips)} long skips, "
            f"0 (the shallowest) to {len(skips) - 1}"
        )
    return [Target(_place(skip.join, options.branch), skip.deep)
            for skip in skips[options.branch : options.branch + 1]]  # fmt: skip


def _place(join: fx.Node, branch: int) -> str:
    return f"long skip {branch}, {join.name}"


def _encoder(options: Cache, full: Part, program: Program) -> list[Target]:
    skips = Structure(full, program).skips
    found = [Target(_place(skip.join, n), skip.skip) for n, skip in enumerate(skips)]
    return [*found, Target("middle", skips[-1].deep)] if skips else []


def _unit(options: Cache, full: Part, program: Program) -> list[Target]:
    return [Target(span.name, span.inner) for span in Structure(full, program).units]


def _layer(options: Cache, full: Part, program: Program) -> list[Target]:
    return [Target(span.name, span.branch) for span in Structure(full, program).layers]


def _block(options: Cache, full: Part, program: Program) -> list[Target]:
    return [_added(block) for block in Structure(full, program).blocks]


def _added(chain: Chain) -> Target:
    """What a chain adds to its stream."""
    if len(chain.spans) == 1:
        return Target(chain.name, chain.spans[0].branch)
    return Target(chain.name, chain.exit, chain.spans[0].shortcut)


def _residual(options: Cache, full: Part, program: Program) -> list[Target]:
    stack = Structure(full, program).stack()
    return [Target(stack.name, stack.exit, stack.entry)] if stack else []


MODE_TARGETS = {
    "deep": _deep,
    "encoder": _encoder,
    "unit": _unit,
    "layer": _layer,
    "block": _block,
    "residual": _residual,
}
