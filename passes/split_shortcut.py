"""SplitShortcut: a layer that reads a concatenation becomes a sum of layers, one per operand.

    W · cat(h, skip) + b  =  (W_h · h + b) + W_skip · skip

The halves of a long skip differ in range; apart, each one has scales of its own for its activations
and its weights (Q-Diffusion, METHODS 1.2). Found by dataflow: a concatenation along the channels in
front of a convolution or a linear layer. The pieces read the operands themselves, so that nothing
is left of the concatenation; behind a norm, whose groups may cross the border, they read slices.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import fx

from effuse.graph import (
    calls,
    clone,
    eliminate,
    emit,
    emit_weight,
    module_path,
    substitute,
    unused_name,
    value_of,
)
from effuse.log import Log
from effuse.passes.base import Pass, Work
from effuse.passes.canonicalize import identity
from effuse.program import Program, prune_weights
from effuse.weights import WeightStore, copied

aten = torch.ops.aten

RULE = "split"
CHANNELS = {  # the layers, and the axis of their input's channels, from the end
    aten.conv2d.default: -3,
    aten.conv2d.padding: -3,
    aten.conv3d.default: -4,
    aten.linear.default: -1,
}
PLACED = (  # each channel stays where it is
    aten.group_norm.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.mish.default,
    aten.hardswish.default,
    aten.sigmoid.default,
    aten.tanh.default,
)


@dataclass(frozen=True)
class SplitShortcut(Pass):
    """Layers that read a concatenation: one layer per operand, summed; exact.

    Args:
        through_norm: whether layers behind norms and activations of a concatenation are split too.
    """

    name: ClassVar[str] = "split_shortcut"

    through_norm: bool = False

    def run(self, program: Program, work: Work) -> Program:
        """Split the layers of every part; parts that share a weight share its pieces."""
        weights = copied(program.weights)
        known: Pieces = {}
        parts = []
        for part in program.parts:
            graph, _ = clone(part.graph)
            self._split(Writer(graph, weights, known), work.log)
            eliminate(graph)
            parts.append(replace(part, graph=graph))
        return prune_weights(replace(program, parts=tuple(parts), weights=weights))

    def _split(self, writer: Writer, log: Log) -> None:
        queue = calls(writer.graph, *CHANNELS)
        while queue:
            site = queue.pop(0)
            join = self.find(site)
            if isinstance(join, str):
                log.reject(RULE, join)
            elif log.spend(RULE):  # behind an operand's norm there may be another concatenation
                layers = writer.split(site, join)
                queue = [*(each for each in layers if isinstance(self.find(each), Join)), *queue]

    def find(self, site: fx.Node) -> Join | str:
        """The concatenation that a layer reads, or why the layer stays whole."""
        if unwanted := self.unwanted(module_path(site)):
            return unwanted
        join = joined(site)
        if isinstance(join, Join) and not (join.direct or self.through_norm):
            return "behind a norm or an activation, which takes through_norm=True"
        return join

    def ensures(self, program: Program) -> str | None:
        """No layer is left that the options let split."""
        for part in program.parts:
            for site in calls(part.graph, *CHANNELS):
                if isinstance(self.find(site), Join):
                    return f"{site} in {part.name} still reads a concatenation"
        return None


@dataclass(frozen=True)
class Join:
    """What a layer's input is joined from, in order; direct if nothing lies between."""

    operands: tuple[fx.Node, ...]
    axis: int  # the channels', from the end
    direct: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """The operands' channels."""
        return tuple(value_of(each).shape[self.axis] for each in self.operands)


def joined(site: fx.Node) -> Join | str:
    """The concatenation behind a layer's input, or why the layer cannot be split."""
    axis = CHANNELS[site.target]  # type: ignore[index]
    source = behind(site.args[0])
    cat = behind(source, PLACED)
    if cat.target is not aten.cat.default:
        return "its input is no concatenation"
    if not joins_channels(cat, axis):
        return "the concatenation is along another axis than the channels"
    join = Join(tuple(operands(cat, axis)), axis, direct=source is cat)
    return refused(site, join) or join


def refused(site: fx.Node, join: Join) -> str | None:
    """Why a layer over a concatenation of its channels cannot be split, or None."""
    weight: Any = site.args[1]
    if weight.op != "get_attr":
        return "its weight is computed"
    if len(site.args) > 6 and site.args[6] != 1:
        return "a grouped convolution"
    if len(join.operands) < 2:
        return "the concatenation has one operand"
    types = {value_of(each).dtype for each in (*join.operands, weight)}
    return "the operands are of different types" if len(types) > 1 else None


def behind(value: Any, through: Collection[Any] = ()) -> fx.Node:
    """What a value was computed from by identities, and by calls of `through`, alone."""
    node: fx.Node = value
    while True:
        source: Any = node.args[0] if node.target in through else identity(node)
        if source is None:
            return node
        node = source


def joins_channels(cat: fx.Node, axis: int) -> bool:
    """Whether a concatenation is along the axis of a layer's channels."""
    given: Any = cat.args[1] if len(cat.args) > 1 else 0
    dims: int = value_of(cat).dim()
    return bool(given % dims == axis % dims)


def operands(cat: fx.Node, axis: int) -> Iterator[fx.Node]:
    """The operands of a concatenation, those of operands that are concatenations included."""
    for each in cat.args[0]:  # type: ignore[union-attr]
        inner = behind(each)
        if inner.target is aten.cat.default and joins_channels(inner, axis):
            yield from operands(inner, axis)
        else:
            yield inner


Pieces = dict[tuple[str, tuple[int, ...]], list[str]]  # a weight, its borders -> its pieces' names


@dataclass
class Writer:
    """Writes the pieces of layers into one graph; what several layers read is sliced once."""

    graph: fx.Graph
    weights: WeightStore
    known: Pieces
    slices: dict[tuple[fx.Node, Join], tuple[fx.Node, ...]] = field(default_factory=dict)

    def split(self, site: fx.Node, join: Join) -> list[fx.Node]:
        """Σ layer(x_i, W_i), the bias in the first of them, instead of `site`; the new layers."""
        x, weight, *rest = site.args
        without_bias = [None, *rest[1:]] if len(rest) > 1 else []
        with self.graph.inserting_before(site):
            values = join.operands if join.direct else self._sliced(x, join)
            names = self._stored(str(weight.target), join.sizes)  # type: ignore[union-attr]
            layers: list[fx.Node] = []
            for value, name in zip(values, names, strict=True):
                piece = emit_weight(self.graph, self.weights, name, self.weights[name])
                options = without_bias if layers else rest
                layers.append(emit(self.graph, site.target, value, piece, *options, like=site))
            total = layers[0]
            for layer in layers[1:]:
                total = emit(self.graph, aten.add.Tensor, total, layer, like=site)
        substitute(site, total)
        self.graph.erase_node(site)
        return layers

    def _sliced(self, x: Any, join: Join) -> tuple[fx.Node, ...]:
        """The pieces of `x`, which has the channels of a concatenation where they were."""
        if (x, join) not in self.slices:
            axis = join.axis % value_of(x).dim()
            self.slices[x, join] = tuple(
                emit(self.graph, aten.slice.Tensor, x, axis, *border, like=x)
                for border in borders(join.sizes)
            )
        return self.slices[x, join]

    def _stored(self, name: str, sizes: tuple[int, ...]) -> list[str]:
        """The names of a weight's pieces along its input channels (axis 1)."""
        if (name, sizes) not in self.known:
            self.known[name, sizes] = found = []
            for number, (start, end) in enumerate(borders(sizes)):
                piece = unused_name(self.weights, f"{name}.split{number}")
                self.weights[piece] = self.weights[name][:, start:end].clone(
                    memory_format=torch.contiguous_format
                )
                found.append(piece)
        return self.known[name, sizes]


def borders(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """Start and end of each piece."""
    return list(pairwise(accumulate(sizes, initial=0)))
