"""Cutting a variant: some of its values come from slots, and what only they needed goes.

`fill` and `reuse` are the two halves of every cache (DESIGN 2): the variant that computes a value
also returns it, and another one reads its past instead. A residual slot holds what a stretch of the
network adds to its stream; the stream itself stays fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import fx

from effuse.graph import (
    cast,
    clone,
    drop_unused_inputs,
    eliminate,
    emit,
    emit_input,
    fake_mode,
    outputs,
    set_outputs,
    substitute,
    value_of,
)
from effuse.log import Log
from effuse.passes import canonicalize
from effuse.plan import FORECAST_INPUT, Depends, Dim, Slot
from effuse.program import Part

aten = torch.ops.aten


@dataclass(frozen=True)
class Target:
    """A value that a slot stands for: `value` itself, or value - start where `start` is given."""

    name: str  # for people: where in the network it is
    value: fx.Node
    start: fx.Node | None = None

    @property
    def slot(self) -> str:
        """The slot's name."""
        return f"{'cached' if self.start is None else 'residual'}_{self.value.name}"


def slots(targets: Sequence[Target], depth: int) -> tuple[Slot, ...]:
    """The slots of `targets`, each with its last `depth` values."""
    return tuple(_slot(target, depth) for target in targets)


def _slot(target: Target, depth: int) -> Slot:
    value = value_of(target.value)
    shape: tuple[Dim, ...] = tuple(n if isinstance(n, int) else str(n) for n in value.shape)
    return Slot(target.slot, shape, str(value.dtype).removeprefix("torch."), depth)


def fill(part: Part, targets: Sequence[Target]) -> Part:
    """The variant, giving the targets' values as well."""
    graph, mapping = clone(part.graph)
    found = []
    for target in targets:
        value = mapping[target.value]
        if target.start is not None:
            with graph.inserting_after(value):
                value = emit(graph, aten.sub.Tensor, value, mapping[target.start], like=value)
        found.append(value)
    set_outputs(graph, (*outputs(graph), *found))
    return replace(part, graph=graph, outputs=(*part.outputs, *(t.slot for t in targets)))


def as_it_is(graph: fx.Graph, slot: Slot, value: fx.Node) -> fx.Node:
    """A forecast without a correction."""
    return value


def reuse(
    part: Part,
    name: str,
    targets: Sequence[Target],
    depth: int,
    adjust: Callable[[fx.Graph, Slot, fx.Node], fx.Node] = as_it_is,
) -> Part:
    """The variant that reads the targets' past, without what only they needed.

    `adjust(graph, slot, forecast)` may write a correction behind each forecast.
    """
    graph, mapping = clone(part.graph)
    weights = _weights(graph, depth)
    kept = zip(targets, slots(targets, depth), strict=True)
    pasts = [(target, slot, [emit_input(graph, name, value_of(mapping[target.value]))
                             for name in slot.past]) for target, slot in kept]  # fmt: skip
    for target, slot, past in reversed(
        pasts
    ):  # the last first: a stream may start at a value cut next
        value = mapping[target.value]
        with graph.inserting_before(value):
            new = adjust(graph, slot, forecast(graph, past, weights, like=value))
            if target.start is not None:
                new = emit(graph, aten.add.Tensor, mapping[target.start], new, like=value)
        substitute(value, new)
    sizes_from_inputs(graph)
    eliminate(graph)
    drop_unused_inputs(graph)
    by_step = weights or adjust is not as_it_is
    depends = part.depends | (Depends.TIMESTEP if by_step else Depends.NOTHING)
    return replace(part, name=name, depends=depends, graph=graph)


def read(part: Part, targets: Sequence[Target]) -> list[Target]:
    """Those of `targets` that are read once all are cached; others only feed what is cached."""
    found = reuse(part, "read", targets, 1).inputs
    return [target for target in targets if _slot(target, 1).past[0] in found]


def _weights(graph: fx.Graph, depth: int) -> list[fx.Node]:
    """The forecast's weights as scalars, latest first; none for a plain reuse."""
    if depth == 1:
        return []
    one = fake_mode(graph).from_tensor(torch.zeros(depth), static_shapes=True)
    given = emit_input(graph, FORECAST_INPUT, one)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        return [emit(graph, aten.select.int, given, 0, age) for age in range(depth)]


def forecast(
    graph: fx.Graph, past: Sequence[fx.Node], weights: Sequence[fx.Node], like: fx.Node
) -> fx.Node:
    """Σ weight · past value, accumulated in float32 at least; the one value without weights."""
    if not weights:
        return past[0]
    given = value_of(past[0]).dtype
    wide = torch.promote_types(given, torch.float32)
    terms = [
        emit(graph, aten.mul.Tensor, cast(value, wide, like), cast(weight, wide, like), like=like)
        for value, weight in zip(past, weights, strict=True)
    ]
    total = reduce(lambda sum, term: emit(graph, aten.add.Tensor, sum, term, like=like), terms)
    return cast(total, given, like)


def sizes_from_inputs(graph: fx.Graph) -> None:
    """An open size -> read from an input that has it, so that no computed value lives for it."""
    canonicalize.sizes_from_inputs(graph, Log())
