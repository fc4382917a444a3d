"""Residual blocks that can be left out, and the variants without them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx

from effuse.cost import node_flops
from effuse.graph import (
    calls,
    clone,
    drop_unused_inputs,
    eliminate,
    emit,
    substitute,
    value_of,
)
from effuse.passes.cut import sizes_from_inputs
from effuse.program import Part, Program
from effuse.structure import Chain, Structure

What = Literal["layer", "unit", "block"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Join:
    """A node shortcut + branch, by name, and which of its arguments the shortcut is."""

    node: str
    shortcut: int


@dataclass(frozen=True)
class Block:
    """What can be left out: the joins that become their shortcuts, in the graph's order."""

    name: str
    joins: tuple[Join, ...]


def find_blocks(program: Program, what: What) -> tuple[Block, ...]:
    """The residual blocks of the default variant, in the graph's order."""
    structure = Structure(program.part(program.plan.default), program)
    if what == "block":
        return tuple(map(_block, structure.blocks))
    spans = structure.units if what == "unit" else structure.layers
    return tuple(_block(Chain((span,))) for span in spans)


def _block(chain: Chain) -> Block:
    joins = (Join(span.join.name, span.join.args.index(span.shortcut)) for span in chain.spans)
    return Block(chain.name, tuple(joins))


def without(part: Part, name: str, blocks: Iterable[Block]) -> Part:
    """The variant with its joins of `blocks` replaced by their shortcuts, and nothing unneeded."""
    graph, _ = clone(part.graph)
    places = {join.node: join.shortcut for block in blocks for join in block.joins}
    for node in reversed(calls(graph, aten.add.Tensor)):  # a shortcut may be a join itself
        if node.name in places:
            substitute(node, _typed(graph, node, node.args[places[node.name]]))
    sizes_from_inputs(graph)
    eliminate(graph)
    drop_unused_inputs(graph)
    return replace(part, name=name, graph=graph, exact=False)


def _typed(graph: fx.Graph, join: fx.Node, shortcut: Any) -> fx.Node:
    """The shortcut in the join's dtype."""
    dtype = value_of(join).dtype
    if value_of(shortcut).dtype == dtype:
        return shortcut  # type: ignore[no-any-return]
    with graph.inserting_before(join):
        return emit(graph, aten.to.dtype, shortcut, dtype, like=join)  # type: ignore[no-any-return]


def remaining(part: Part, blocks: Iterable[Block]) -> frozenset[str]:
    """The joins of `blocks` that the variant still computes, by name."""
    names = {node.name for node in calls(part.graph, aten.add.Tensor)}
    return frozenset(join.node for block in blocks for join in block.joins) & names


def part_flops(part: Part) -> int:
    """Operations of one run of a part."""
    return sum(map(node_flops, calls(part.graph)))


def plan_flops(program: Program, count: int) -> int:
    """Operations of `count` steps as planned, at the rate of steps."""
    flops = {part.name: part_flops(part) for part in program.variants}
    return sum(flops[program.plan.at(index).variant] for index in range(count))
