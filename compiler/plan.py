"""Programs by rate and the plan by step, as plain data that a device reads (imports no torch)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, Flag, IntEnum, StrEnum, auto
from typing import Any


class Role(StrEnum):
    """What an input of the network is for; it decides how often its value changes."""

    LATENT = "latent"  # changes every step
    TIMESTEP = "timestep"  # takes values from the schedule
    PROMPT = "prompt"  # fixed for one picture
    STATIC = "static"  # fixed for the artifact's life: its example value is part of the program


class Rate(IntEnum):
    """How often a value changes (its binding time): const < schedule < prompt < step."""

    CONST = 0
    SCHEDULE = 1
    PROMPT = 2
    STEP = 3


class Depends(Flag):
    """Which kinds of input a value is computed from."""

    NOTHING = 0
    TIMESTEP = auto()
    PROMPT = auto()
    LATENT = auto()

    @property
    def rate(self) -> Rate:
        """The slowest rate at which a value of this dependence stays right."""
        if self & Depends.LATENT:
            return Rate.STEP
        if self & Depends.PROMPT:
            return Rate.PROMPT
        return Rate.SCHEDULE if self & Depends.TIMESTEP else Rate.CONST


ROLE_DEPENDS = {
    Role.LATENT: Depends.LATENT,
    Role.TIMESTEP: Depends.TIMESTEP,
    Role.PROMPT: Depends.PROMPT,
    Role.STATIC: Depends.NOTHING,
}

STEP_INPUT = "step_index"  # int64 scalar: the position in the schedule, for graphs that hold tables
FORECAST_INPUT = "forecast"  # float32, (depth,): weights of the slots' past values, latest first

Dim = int | str  # a size, or the name of a symbolic one


@dataclass(frozen=True)
class Input:
    """A tensor that the caller hands over, found at `path` in the arguments of forward."""

    name: str  # an identifier; what graphs call it
    role: Role
    shape: tuple[Dim, ...]
    dtype: str
    path: tuple[str, ...]
    digest: str = ""  # of a static input's value: SHA-256

    @property
    def label(self) -> str:
        """The name as a person writes it: `added_cond_kwargs.text_embeds`."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Slot:
    """A tensor kept between steps: an output of one variant, an input of another."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str
    depth: int = 1  # how many of its last values are kept

    @property
    def past(self) -> tuple[str, ...]:
        """The inputs by which a variant reads the kept values, latest first."""
        return tuple(f"{self.name}_{age}" for age in range(self.depth))


@dataclass(frozen=True)
class PartSpec:
    """A compiled graph: a pure function from named values to named values."""

    name: str
    depends: Depends
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def rate(self) -> Rate:
        """How often the part has to run."""
        return self.depends.rate


@dataclass(frozen=True)
class PlanStep:
    """One step: the variant that runs, the slots that it fills and those that it reads.

    What is read are the values that the steps `sources` filled, latest first, and no others;
    `weights` combine them into a forecast. Empty: the plan's decision is made at run time, on the
    latest value.
    """

    variant: str
    fills: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Decision:
    """When a step that reads slots may do so, decided at run time for each picture.

    `signal` is an output of every variant; its change is mean|s - s'| / mean|s'|, s' from the last
    refresh (First-Block Cache), or from the step before, added up since the last refresh, after
    the polynomial (TeaCache). The picture is computed in full once that reaches the threshold.
    """

    signal: str
    threshold: float
    accumulate: bool = False
    polynomial: tuple[float, ...] = ()  # highest power first; negative values count as 0


@dataclass(frozen=True)
class Guide:
    """Which rows of a guided call, [unconditional; conditional] halves of a batch, are left out.

    From step `start` on: with a `threshold` the unconditional rows of pictures that have reached
    it, γ = cos(ε_c, ε_∅), at step start - 1 or later and before this one; ε_c stands in. Otherwise
    all unconditional rows; ε̂_∅(t) = a ε_c(t) + b ε_c(t-1) + c ε̂_∅(t-1) + d stands in, with
    (a, b, c, d) = `affine[t - start]`.
    """

    batch: str  # the open size that counts rows
    conditional_first: bool = False
    threshold: float | None = None
    start: int = 0
    affine: tuple[tuple[float, ...], ...] = ()

    @property
    def line(self) -> str:
        """What is left out, for people."""
        when = f", from step {self.start} on" if self.start else ""
        if self.threshold is None:
            return f"guidance: conditional rows only{when}; the others estimated"
        reached = f"once cos(ε_c, ε_∅) reached {self.threshold:g}"
        return f"guidance: conditional rows only{when}, {reached}"


@dataclass(frozen=True)
class Plan:
    """Which variant runs at each step; `default` serves any step that the plan does not list."""

    default: str = "full"
    steps: tuple[PlanStep, ...] = ()
    slots: tuple[Slot, ...] = ()
    decision: Decision | None = None
    guidance: Guide | None = None

    def at(self, index: int | None) -> PlanStep:
        """The entry of step `index` (None: a timestep outside any schedule)."""
        if index is None or not 0 <= index < len(self.steps):
            return PlanStep(self.default)
        return self.steps[index]

    def lines(self, timesteps: Sequence[float] = ()) -> list[str]:
        """The plan for people: one line a step, above them one for guidance with fewer rows."""
        lines = [self.guidance.line] if self.guidance else []
        if not self.steps:
            return [*lines, f"every step: {self.default}"]
        for index, step in enumerate(self.steps):
            when = f" t={timesteps[index]:g}" if index < len(timesteps) else ""
            fills = f"  fills {', '.join(step.fills)}" if step.fills else ""
            reads = f"  reads {', '.join(step.reads)}" if step.reads else ""
            if step.sources:
                reads += f" of {'step' if len(step.sources) == 1 else 'steps'} "
                reads += ", ".join(str(source) for source in step.sources)
            elif step.reads and self.decision is not None:
                reads += f", unless {self.decision.signal} changed by {self.decision.threshold:g}"
            lines.append(f"step {index:3d}{when}: {step.variant}{fills}{reads}")
        return lines


@dataclass(frozen=True)
class Adapter:
    """A layer W x + U (D x) whose factors a run may replace: where a LoRA goes.

    Layers that read one x may share D, and then all of them are listed. With a `reason` the layer
    takes no LoRA; its factors, if it has any, only keep to the rank of the D that they share.
    """

    path: str  # of the module
    shape: tuple[int, ...]  # of the layer's weight
    down: str = ""  # the weight that holds D, (r, in) or (r, in, kh, kw)
    up: str = ""  # and U, (out, r) or (out, r, 1, 1)
    rows: str = ""  # the vectors that a pass has multiplied W with, (out,) and (in,), or none
    columns: str = ""
    reason: str = ""


def factor_axes(adapters: Sequence[Adapter]) -> dict[str, tuple[int, str]]:
    """The factors' names, with the axis of each that is its rank, and the D that ranks with it."""
    found: dict[str, tuple[int, str]] = {}
    for each in adapters:
        if each.down:
            found |= {each.down: (0, each.down), each.up: (1, each.down)}
    return found


@dataclass(frozen=True)
class ProgramSpec:
    """All that a Session has to know of a program; graphs and weights are beside it."""

    inputs: tuple[Input, ...]
    parameters: tuple[str, ...]  # forward's parameters, in order, for positional calls
    constants: Mapping[str, Any]  # arguments that are not tensors, as captured
    result: Any  # how the outputs are nested: {"tuple": [0, 1]}, or 0; capture.nest
    outputs: tuple[str, ...]
    parts: tuple[PartSpec, ...]
    plan: Plan = Plan()
    timesteps: tuple[float, ...] | None = None
    bounds: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of an open size
    adapters: tuple[Adapter, ...] = ()
    max_rank: int = 0  # of all LoRAs on one layer together
    shapes: tuple[Mapping[str, int], ...] = ()  # sizes that were built; none: any within bounds

    def part(self, name: str) -> PartSpec:
        """The part of that name."""
        return next(part for part in self.parts if part.name == name)


def to_json(value: Any) -> Any:
    """Dataclasses, enums and tuples as JSON's own types."""
    if isinstance(value, Flag):
        return [flag.name.lower() for flag in type(value) if flag in value and flag.name]
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return {field.name: to_json(getattr(value, field.name)) for field in fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def _depends(names: Sequence[str]) -> Depends:
    result = Depends.NOTHING
    for name in names:
        result |= Depends[name.upper()]
    return result


def _plan(data: Mapping[str, Any]) -> Plan:
    return Plan(
        default=data["default"],
        steps=tuple(
            PlanStep(
                step["variant"],
                tuple(step["fills"]),
                tuple(step["reads"]),
                tuple(int(source) for source in step["sources"]),
                tuple(float(weight) for weight in step["weights"]),
            )
            for step in data["steps"]
        ),
        slots=tuple(
            Slot(slot["name"], tuple(slot["shape"]), slot["dtype"], int(slot["depth"]))
            for slot in data["slots"]
        ),
        decision=_decision(data["decision"]),
        guidance=_guide(data["guidance"]),
    )


def _decision(data: Mapping[str, Any] | None) -> Decision | None:
    if data is None:
        return None
    polynomial = tuple(float(each) for each in data["polynomial"])
    return Decision(
        str(data["signal"]), float(data["threshold"]), bool(data["accumulate"]), polynomial
    )


def _guide(data: Mapping[str, Any] | None) -> Guide | None:
    if data is None:
        return None
    threshold = None if data["threshold"] is None else float(data["threshold"])
    affine = tuple(tuple(float(each) for each in step) for step in data["affine"])
    first = bool(data["conditional_first"])
    return Guide(str(data["batch"]), first, threshold, int(data["start"]), affine)


def spec_from_json(data: Mapping[str, Any]) -> ProgramSpec:
    """The inverse of `to_json` for a ProgramSpec.

    Raises:
        KeyError, TypeError, ValueError: the data are not a ProgramSpec.
    """
    times = data["timesteps"]
    return ProgramSpec(
        inputs=tuple(
            Input(
                item["name"],
                Role(item["role"]),
                tuple(item["shape"]),
                item["dtype"],
                tuple(item["path"]),
                str(item["digest"]),
            )
            for item in data["inputs"]
        ),
        parameters=tuple(data["parameters"]),
        constants=dict(data["constants"]),
        result=data["result"],
        outputs=tuple(data["outputs"]),
        parts=tuple(
            PartSpec(
                part["name"],
                _depends(part["depends"]),
                tuple(part["inputs"]),
                tuple(part["outputs"]),
            )
            for part in data["parts"]
        ),
        plan=_plan(data["plan"]),
        timesteps=None if times is None else tuple(float(time) for time in times),
        bounds={name: (int(low), int(high)) for name, (low, high) in data["bounds"].items()},
        steps={name: int(step) for name, step in data["steps"].items()},
        adapters=tuple(
            Adapter(**{**item, "shape": tuple(item["shape"])}) for item in data.get("adapters", ())
        ),
        max_rank=int(data.get("max_rank", 0)),
        shapes=tuple(
            {str(name): int(size) for name, size in sizes.items()}
            for sizes in data.get("shapes", ())
        ),
    )
