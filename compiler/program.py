"""The Program: graphs by rate, one weight store, variants and the plan that picks them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from effuse.graph import evaluate, inputs, outputs
from effuse.plan import (
    FORECAST_INPUT,
    ROLE_DEPENDS,
    STEP_INPUT,
    Adapter,
    Depends,
    Input,
    PartSpec,
    Plan,
    ProgramSpec,
    Rate,
    Role,
    to_json,
)
from effuse.weights import Weights, WeightStore, only


@dataclass(frozen=True)
class Part:
    """A graph with named inputs (its placeholders) and outputs; a variant is one at step rate."""

    name: str
    depends: Depends
    graph: fx.Graph
    outputs: tuple[str, ...]
    exact: bool = True  # of a variant: on the same step's slots it gives what the default gives

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the values that the part reads."""
        return tuple(str(node.target) for node in inputs(self.graph))

    @property
    def rate(self) -> Rate:
        """How often the part has to run."""
        return self.depends.rate

    def spec(self) -> PartSpec:
        """The part without its graph."""
        return PartSpec(self.name, self.depends, self.inputs, self.outputs)


@dataclass(frozen=True)
class Record:
    """What one pass did: figures for the report and the artifact."""

    name: str
    options: Mapping[str, Any]
    exact: bool
    rewrites: Mapping[str, int]
    reasons: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...]
    error: float | None  # relative to the captured network on the example inputs
    sqnr_db: float | None
    data: Mapping[str, Any] = field(default_factory=dict)  # JSON's types; a pass's own figures

    def to_json(self) -> dict[str, Any]:
        """The record for the manifest, without `data` where there is none."""
        return {name: value for name, value in to_json(self).items() if value or name != "data"}


@dataclass(frozen=True)
class Layer:
    """What became of one layer under a lossy pass."""

    name: str
    op: str
    format: str
    parameters: int
    sqnr_db: float | None
    reason: str  # why it stayed in float; empty where it did not


@dataclass(frozen=True)
class Program:
    """A captured network on its way to an artifact; passes return a changed copy."""

    inputs: tuple[Input, ...]
    parameters: tuple[str, ...]
    constants: Mapping[str, Any]
    result: Any
    outputs: tuple[str, ...]
    parts: tuple[Part, ...]
    weights: WeightStore
    plan: Plan = field(default_factory=Plan)
    timesteps: tuple[float, ...] | None = None
    bounds: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    steps: Mapping[str, int] = field(default_factory=dict)
    examples: Mapping[str, torch.Tensor] = field(default_factory=dict)
    expected: tuple[torch.Tensor, ...] | None = None  # eager's outputs on the examples
    shapes: tuple[Mapping[str, int], ...] = ()  # the sizes to build; none: all within bounds
    expected_at: tuple[tuple[torch.Tensor, ...], ...] = ()  # eager's outputs at each of `shapes`
    model: Mapping[str, Any] = field(default_factory=dict)  # class, config and size, for people
    records: tuple[Record, ...] = ()
    layers: tuple[Layer, ...] = ()
    adapters: tuple[Adapter, ...] = ()
    max_rank: int = 0
    factors: Mapping[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    """What Smooth has multiplied weights with: by the weight's name, then along which axis."""

    def part(self, name: str) -> Part:
        """The part of that name."""
        return next(part for part in self.parts if part.name == name)

    @property
    def variants(self) -> tuple[Part, ...]:
        """The parts that a step can run."""
        return tuple(part for part in self.parts if part.rate is Rate.STEP)

    @property
    def sources(self) -> dict[str, Depends]:
        """What every named value depends on: the inputs, the step index, and the parts' outputs."""
        found = {item.name: ROLE_DEPENDS[item.role] for item in self.inputs}
        found[STEP_INPUT] = Depends.TIMESTEP
        for part in self.parts:
            if part.rate is not Rate.STEP:
                found |= dict.fromkeys(part.outputs, part.depends)
        found[FORECAST_INPUT] = Depends.TIMESTEP
        return found | {name: Depends.LATENT for slot in self.plan.slots for name in slot.past}

    @property
    def symbolic(self) -> bool:
        """Whether any size is left open."""
        return any(isinstance(size, str) for item in self.inputs for size in item.shape)

    def with_parts(self, *parts: Part, **changes: Any) -> Program:
        """A copy with these parts, in the order of their rates."""
        return replace(self, parts=tuple(sorted(parts, key=lambda p: p.rate)), **changes)

    def spec(self) -> ProgramSpec:
        """The program as plain data, for the manifest and the Session."""
        return ProgramSpec(
            inputs=self.inputs,
            parameters=self.parameters,
            constants=self.constants,
            result=self.result,
            outputs=self.outputs,
            parts=tuple(part.spec() for part in self.parts),
            plan=self.plan,
            timesteps=self.timesteps,
            bounds=self.bounds,
            steps=self.steps,
            adapters=self.adapters,
            max_rank=self.max_rank,
            shapes=self.shapes,
        )


def used_weights(*parts: Part) -> set[str]:
    """The names of the weights that the parts read."""
    nodes = (node for part in parts for node in part.graph.nodes)
    return {str(node.target) for node in nodes if node.op == "get_attr"}


def prune_weights(program: Program) -> Program:
    """Forget the weights that no part reads any more."""
    used = used_weights(*program.parts)
    used |= {name for each in program.adapters for name in (each.rows, each.columns)}
    return replace(program, weights=only(program.weights, used))


def step_index(program: Program, values: Mapping[str, Any]) -> int:
    """Where the example timestep stands in the schedule (0 when there is none)."""
    times = [values[item.name] for item in program.inputs if item.role is Role.TIMESTEP]
    if not times or program.timesteps is None:
        return 0
    return program.timesteps.index(float(times[0].flatten()[0]))


def run_program(
    program: Program,
    values: Mapping[str, Any],
    observe: Any = None,
    weights: Weights | None = None,
    variant: str | None = None,
) -> tuple[Any, ...]:
    """One step of the program, part after part, on real tensors: by the default variant, if none
    is named. One that reads slots finds their past in `values` (see `same_step`).

    `observe(part, node, value)` sees every computed value.
    """
    env = run_parts(program, values, observe, weights, variant)
    return tuple(env[name] for name in program.outputs)


def run_parts(
    program: Program,
    values: Mapping[str, Any],
    observe: Any = None,
    weights: Weights | None = None,
    variant: str | None = None,
) -> dict[str, Any]:
    """All named values of one step: `values`, and what `run_program`'s parts give."""
    env = dict(values)
    env[STEP_INPUT] = torch.tensor([step_index(program, values)])
    for part in program.parts:
        if part.rate is Rate.STEP and part.name != (variant or program.plan.default):
            continue
        watch = None if observe is None else _bind(observe, part)
        found = evaluate(part.graph, weights or program.weights, env, watch)
        env.update(zip(part.outputs, found, strict=True))
    return env


def same_step(program: Program, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values`, with slots that the default variant has filled at this very step.

    From these a variant that reads slots has to give what the default variant gives.
    """
    env = run_parts(program, values)
    past = {name: env[slot.name] for slot in program.plan.slots for name in slot.past}
    depth = max((slot.depth for slot in program.plan.slots), default=1)
    latest = torch.tensor([1.0] + [0.0] * (depth - 1))
    return {**values, **past, FORECAST_INPUT: latest}


def _bind(observe: Any, part: Part) -> Any:
    return lambda node, value: observe(part, node, value)


def output_values(part: Part) -> dict[str, fx.Node]:
    """The part's outputs by name."""
    return dict(zip(part.outputs, outputs(part.graph), strict=True))
