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
    """A tensor kept between steps: filled by one variant, read by another."""

    name: str
    shape: tuple[Dim, ...]
    dtype: str


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
    """One step: the variant that runs, the slots that it fills and those that it reads."""

    variant: str
    fills: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Which variant runs at each step; `default` serves any step that the plan does not list."""

    default: str = "full"
    steps: tuple[PlanStep, ...] = ()
    slots: tuple[Slot, ...] = ()

    def at(self, index: int | None) -> PlanStep:
        """The entry of step `index` (None: a timestep outside any schedule)."""
        if index is None or not 0 <= index < len(self.steps):
            return PlanStep(self.default)
        return self.steps[index]

    def lines(self, timesteps: Sequence[float] = ()) -> list[str]:
        """The plan for people: one line a step."""
        if not self.steps:
            return [f"every step: {self.default}"]
        lines = []
        for index, step in enumerate(self.steps):
            when = f" t={timesteps[index]:g}" if index < len(timesteps) else ""
            fills = f"  fills {', '.join(step.fills)}" if step.fills else ""
            reads = f"  reads {', '.join(step.reads)}" if step.reads else ""
            lines.append(f"step {index:3d}{when}: {step.variant}{fills}{reads}")
        return lines


@dataclass(frozen=True)
class ProgramSpec:
    """All that a Session has to know of a program; graphs and weights are beside it."""

    inputs: tuple[Input, ...]
    parameters: tuple[str, ...]  # forward's parameters, in order, for positional calls
    constants: Mapping[str, Any]  # arguments that are not tensors, as captured
    result: Any  # how the outputs are nested: {"tuple": [0, 1]}, {"dict": {...}}, or 0
    outputs: tuple[str, ...]
    parts: tuple[PartSpec, ...]
    plan: Plan = Plan()
    timesteps: tuple[float, ...] | None = None
    bounds: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    steps: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of an open size

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
            PlanStep(step["variant"], tuple(step["fills"]), tuple(step["reads"]))
            for step in data["steps"]
        ),
        slots=tuple(
            Slot(slot["name"], tuple(slot["shape"]), slot["dtype"]) for slot in data["slots"]
        ),
    )


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
    )
