"""Units of reconstruction: disjoint pieces of a graph that hold all layers, in execution order.

A unit is a block as the dataflow shows it (a transformer's block, a residual block), a span within
one that would be too large, or a single layer that is in neither (BRECQ, METHODS 0.3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from effuse.graph import module_path, set_outputs, value_of
from effuse.program import Part, Program
from effuse.structure import Structure

MOST = 16  # layers in a unit: a transformer block has 4 to 12


@dataclass(frozen=True)
class Unit:
    """Nodes of a graph, in its order, and the layers among them."""

    nodes: tuple[fx.Node, ...]
    layers: tuple[fx.Node, ...]

    @property
    def name(self) -> str:
        """Where its last layer is in the user's network."""
        return module_path(self.layers[-1]) or self.layers[-1].name

    @cached_property
    def givens(self) -> tuple[fx.Node, ...]:
        """The values that it reads, weights excepted."""
        return sources(self.nodes)

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The floating-point values that others read of it."""
        inside = set(self.nodes)
        read = (node for node in self.nodes if not inside.issuperset(node.users))
        return tuple(node for node in read if _real(node))


def _real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value_of(node).is_floating_point()


def units(part: Part, program: Program, layers: Collection[fx.Node]) -> list[Unit]:
    """Disjoint units that hold each of `layers` once; what a unit reads is computed before it."""
    structure = Structure(part, program)
    taken: set[fx.Node] = set()
    found = []
    for unit in _candidates(structure, set(layers)):
        if taken.isdisjoint(unit.nodes):
            found.append(unit)
            taken.update(unit.nodes)
    found += [Unit((layer,), (layer,)) for layer in layers if layer not in taken]
    return sorted(found, key=lambda unit: structure.order[unit.nodes[-1]])


def _candidates(structure: Structure, layers: Collection[fx.Node]) -> list[Unit]:
    """Blocks and spans with some layers, but not too many; the largest first."""
    ends = [(block.entry, block.exit) for block in structure.blocks]
    ends += [(span.entry, span.join) for span in structure.spans]
    pieces = (structure.between(entry, end) for entry, end in dict.fromkeys(ends))
    found = (Unit(tuple(piece), tuple(n for n in piece if n in layers)) for piece in pieces)
    fitting = [unit for unit in found if 0 < len(unit.layers) <= MOST]
    return sorted(fitting, key=lambda unit: (-len(unit.layers), -len(unit.nodes)))


def sources(nodes: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The values that `nodes` read of others, weights excepted."""
    inside = set(nodes)
    read = (source for node in nodes for source in node.all_input_nodes)
    return tuple(dict.fromkeys(n for n in read if n not in inside and n.op != "get_attr"))


def piece(nodes: Sequence[fx.Node], outputs: Iterable[fx.Node]) -> fx.Graph:
    """`nodes` as a graph of their own, whose inputs have the names of the nodes they were."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in sources(nodes):
        copies[source] = graph.placeholder(source.name)
        copies[source].meta = dict(source.meta)
    inside = set(nodes)
    read = (source for node in nodes for source in node.all_input_nodes if source not in inside)
    for weight in dict.fromkeys(source for source in read if source.op == "get_attr"):
        copies[weight] = graph.node_copy(weight)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    set_outputs(graph, [copies[node] for node in outputs])
    return graph


class Frontier:
    """How far a graph has been computed: which values are at hand, and which are still needed.

    Args:
        graph: the whole graph; its inputs are at hand.
        coming: what each unit to come reads, in order.
    """

    def __init__(self, graph: fx.Graph, coming: Sequence[Collection[fx.Node]]) -> None:
        self._order = {node: index for index, node in enumerate(graph.nodes)}
        self._coming = [set(each) for each in coming]
        self._passed = 0
        self.at_hand = {node for node in graph.nodes if node.op == "placeholder"}
        self._done = set(self.at_hand)

    def advance(self) -> fx.Graph:
        """What has to be computed for the next unit, from values at hand; then these are at hand.

        Its outputs have the names in `names`.
        """
        missing = sorted(self._missing(self._coming[self._passed]), key=self._order.__getitem__)
        self._done.update(missing)
        needed = [node for node in (*self.at_hand, *missing) if self._needed(node)]
        new = [node for node in missing if node in set(needed)]
        self.at_hand = set(needed)
        self._passed += 1
        self.names = tuple(node.name for node in new)
        return piece(missing, new)

    def _missing(self, wanted: Iterable[fx.Node]) -> Iterator[fx.Node]:
        seen: set[fx.Node] = set()
        todo = list(wanted)
        while todo:
            node = todo.pop()
            if node in seen or node in self.at_hand or node.op == "get_attr":
                continue
            seen.add(node)
            todo += node.all_input_nodes
            yield node

    def _needed(self, node: fx.Node) -> bool:
        """Whether anything to come reads the value."""
        coming = any(node in each for each in self._coming[self._passed :])
        return coming or not self._done.issuperset(node.users)
