"""Where a kernel's operand does not lie in memory as the kernel reads it: a copy, made once."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from effuse.graph import emit, emit_weight, outputs, recorded, set_outputs, value_of
from effuse.kernels import table as table  # registers the ops
from effuse.weights import WeightStore

aten, ops = torch.ops.aten, torch.ops.effuse

DENSE, IMAGE = torch.contiguous_format, torch.channels_last
ROWS = "rows"  # dense in the last axis; the others are as one
IMAGE_DIMS = 4
WHOLE = "whole"  # in any order, without gaps
READS: dict[Any, dict[str, Any]] = {  # operands that have to lie in a certain way
    ops.quantize.default: {"x": WHOLE},
    ops.quantize_rows.default: {"x": ROWS},
    ops.row_norm.default: dict.fromkeys(("x", "scale", "shift"), ROWS),
    ops.gated.default: {"x": ROWS},
    ops.linear_scaled.default: dict.fromkeys(("codes", "bias", "low", "gate", "residual"), DENSE),
    ops.linear_packed.default: dict.fromkeys(("x", "bias", "low", "gate", "residual"), DENSE),
    ops.conv2d_scaled.default: dict.fromkeys(("x", "x2", "residual"), IMAGE),
    ops.group_stats.default: {"x": IMAGE},
    ops.group_norm_act.default: {"x": IMAGE},
}


@dataclass
class Copier:
    """Copies a graph and records its values anew; counts the copies of values that it adds."""

    weights: WeightStore
    graph: fx.Graph = field(default_factory=fx.Graph)
    made: dict[fx.Node, fx.Node] = field(default_factory=dict)
    read: dict[fx.Node, fx.Node] = field(default_factory=dict)  # instead of what was made
    copies: int = 0

    def add(self, node: fx.Node) -> None:
        """The node's counterpart."""
        if node.op == "call_function":
            self._call(node)
        elif node.op == "get_attr" and not _contiguous(node):
            name = str(node.target)
            dense = self.weights[name].contiguous()
            self.made[node] = emit_weight(self.graph, self.weights, name, dense)
        else:
            self.made[node] = self.graph.node_copy(node)

    def _call(self, node: fx.Node) -> None:
        for place, layout in _wanted(node):
            if isinstance(source := node.args[place], fx.Node):
                self.lay(source, layout)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.of)
        self.made[node] = emit(self.graph, node.target, *args, like=node, **kwargs)

    def of(self, node: fx.Node) -> fx.Node:
        """What stands for a node of the old graph: a copy, once there is one."""
        return self.read.get(node) or self.made[node]

    def lay(self, node: fx.Node, layout: Any) -> None:
        """Let a value lie as `layout` says from here on."""
        if not lies(value_of(self.of(node)), layout):
            self.read[node] = emit(
                self.graph, aten.clone.default, self.made[node], like=node,
                memory_format=IMAGE if layout is IMAGE else DENSE,
            )  # fmt: skip
            self.copies += 1


def laid_out(graph: fx.Graph, weights: WeightStore, like: fx.Graph) -> tuple[fx.Graph, int]:
    """A copy of the graph with recorded values made anew, and how many copies it now makes.

    Weights are stored dense, as files keep them. Outputs are contiguous where those of the graph
    `like` are, for which it stands.
    """
    new = Copier(weights)
    for node in graph.nodes:
        if node.op != "output":
            new.add(node)
    results = outputs(graph)
    new.read.clear()
    for each, before in zip(results, outputs(like), strict=True):
        if _contiguous(before):
            new.lay(each, DENSE)
    set_outputs(new.graph, map(new.of, results))
    return new.graph, new.copies


def _wanted(node: fx.Node) -> list[tuple[int, Any]]:
    """The places of a call's operands that have to lie in a certain way."""
    wanted = READS.get(node.target, {})
    names = [each.name for each in node.target._schema.arguments] if wanted else []  # type: ignore[union-attr]
    return [(place, wanted[name]) for place, name in enumerate(names) if name in wanted]


def _contiguous(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_contiguous()


def lies(value: Tensor, layout: Any) -> bool:
    """Whether a tensor lies as `layout` says."""
    if layout == WHOLE:
        return value.stride() == torch.empty_like(value).stride()
    if layout == ROWS:
        return _rows(value)
    return (value.movedim(1, -1) if layout is IMAGE else value).is_contiguous()


def _rows(value: Tensor) -> bool:
    *lead, (columns, step) = zip(value.shape, value.stride(), strict=True)
    lead = [pair for pair in lead if pair[0] != 1]
    merge = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(lead))
    return (step == 1 or columns == 1) and merge


def as_read(node: fx.Node) -> tuple[Any, ...]:
    """The recorded arguments of a fused op as they lie once the graph is laid out."""
    wanted = dict(_wanted(node))
    values = enumerate(recorded(node.args))
    return tuple(_laid(value, wanted.get(place)) for place, value in values)


def _laid(value: Any, layout: Any) -> Any:
    if not isinstance(value, Tensor) or (layout is None and value.dim() == IMAGE_DIMS):
        return value
    return value.contiguous(memory_format=IMAGE if layout is IMAGE else DENSE)
