"""Cutting a variant: some of its values come from slots, and what only they needed goes.

`fill` and `reuse` are the two halves of every cache (DESIGN 2): the variant that computes a value
also returns it, and another one reads its past instead. A residual slot holds what a stretch of the
network adds to its stream; the stream itself stays fresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from effuse.graph import (
    calls,
    clone,
    drop_unused_inputs,
    eliminate,
    emit,
    emit_input,
    fake_mode,
    inputs,
    outputs,
    set_outputs,
    substitute,
    value_of,
)
from effuse.plan import FORECAST_INPUT, Dim, Slot
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
                anchor = graph.call_function(_nothing)
            with graph.inserting_before(anchor):
                value = emit(graph, aten.sub.Tensor, value, mapping[target.start], like=value)
            graph.erase_node(anchor)
        found.append(value)
    set_outputs(graph, (*outputs(graph), *found))
    return replace(part, graph=graph, outputs=(*part.outputs, *(t.slot for t in targets)))


def reuse(part: Part, name: str, targets: Sequence[Target], depth: int) -> Part:
    """The variant that reads the targets' past, without what only they needed."""
    graph, mapping = clone(part.graph)
    weights = _weights(graph, depth)
    for target, slot in zip(targets, slots(targets, depth), strict=True):
        value = mapping[target.value]
        past = [emit_input(graph, each, value_of(value)) for each in slot.past]
        after = value if target.start is None else mapping[target.start]
        with graph.inserting_before(after if target.start is None else _next(after)):
            new = forecast(graph, past, weights, like=value)
            if target.start is not None:
                new = emit(graph, aten.add.Tensor, after, new, like=value)
        substitute(value, new)
    sizes_from_inputs(graph)
    eliminate(graph)
    drop_unused_inputs(graph)
    return replace(part, name=name, graph=graph)


def _next(node: fx.Node) -> fx.Node:
    """The first node behind `node` that is not an input."""
    found: fx.Node = node.next
    while found.op == "placeholder":
        found = found.next
    return found


def _weights(graph: fx.Graph, depth: int) -> list[fx.Node]:
    """The forecast's weights as scalars, latest first; none for a plain reuse."""
    if depth == 1:
        return []
    one = fake_mode(graph).from_tensor(torch.zeros(depth))
    given = emit_input(graph, FORECAST_INPUT, one)
    with graph.inserting_before(_next(inputs(graph)[-1])):
        return [emit(graph, aten.select.int, given, 0, age) for age in range(depth)]


def forecast(
    graph: fx.Graph, past: Sequence[fx.Node], weights: Sequence[fx.Node], like: fx.Node
) -> fx.Node:
    """Σ weight · past value, in the values' dtype; the one value itself without weights."""
    total: fx.Node = past[0]
    for number, (value, weight) in enumerate(zip(past, weights, strict=True) if weights else ()):
        dtype = value_of(value).dtype
        if value_of(weight).dtype != dtype:
            weight = emit(graph, aten.to.dtype, weight, dtype, like=like)
        term = emit(graph, aten.mul.Tensor, value, weight, like=like)
        total = emit(graph, aten.add.Tensor, total, term, like=like) if number else term
    return total


def sizes_from_inputs(graph: fx.Graph) -> None:
    """An open size -> read from an input that has it, so that no computed value lives for it."""
    places = {str(size): (node, axis) for node in inputs(graph)
              for axis, size in enumerate(value_of(node).shape)}  # fmt: skip
    for node in calls(graph, aten.sym_size.int):
        known = places.get(str(value_of(node)))
        if known and known[0] is not node.args[0]:
            with graph.inserting_before(node):
                substitute(node, emit(graph, aten.sym_size.int, *known, like=node))


def _nothing() -> None:
    """A place in the graph, for inserting before."""
