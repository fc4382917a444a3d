"""Where a kernel's operand does not lie in memory as the kernel reads it: a copy, made once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from effuse.backends.triton_match import aten, ops
from effuse.graph import emit, emit_weight, outputs, set_outputs, value_of
from effuse.weights import WeightStore

DENSE, IMAGE = torch.contiguous_format, torch.channels_last
ROWS = "rows"  # dense in the last axis; the others are as one
READS: dict[Any, dict[str, Any]] = {  # operands that have to lie in a certain way
    ops.quantize_rows.default: {"x": ROWS},
    ops.row_norm.default: dict.fromkeys(("x", "scale", "shift"), ROWS),
    ops.gated.default: {"x": ROWS},
    ops.linear_scaled.default: dict.fromkeys(("codes", "bias", "low", "gate", "residual"), DENSE),
    ops.linear_packed.default: dict.fromkeys(("x", "bias", "low", "gate", "residual"), DENSE),
    ops.conv2d_scaled.default: dict.fromkeys(("x", "x2", "residual"), IMAGE),
    ops.group_stats.default: {"x": IMAGE},
    ops.group_norm_act.default: {"x": IMAGE},
}


def laid_out(graph: fx.Graph, weights: WeightStore) -> tuple[fx.Graph, int]:
    """A copy of the graph with recorded values made anew, and how many copies it now makes.

    Weights are stored dense, as files keep them; outputs that were contiguous stay so.
    """
    new = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    copies: dict[tuple[fx.Node, Any], fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            args = [mapping_of(each, mapping) for each in node.args]
            for place, layout in _wanted(node):
                args[place] = _as(new, args[place], layout, copies)
            kwargs = mapping_of(node.kwargs, mapping)
            mapping[node] = emit(new, node.target, *args, like=node, **kwargs)
        elif node.op == "get_attr" and not _contiguous(node):
            name = str(node.target)
            mapping[node] = emit_weight(new, weights, name, weights[name].contiguous())
        elif node.op != "output":
            mapping[node] = new.node_copy(node)
    results = [
        _as(new, mapping[each], DENSE, copies) if _contiguous(each) else mapping[each]
        for each in outputs(graph)
    ]
    set_outputs(new, results)
    return new, len(copies)


def mapping_of(args: Any, mapping: dict[fx.Node, fx.Node]) -> Any:
    """`args` with every node replaced."""
    return fx.map_arg(args, mapping.__getitem__)


def _wanted(node: fx.Node) -> list[tuple[int, Any]]:
    """The places of a call's operands that have to lie in a certain way."""
    wanted = READS.get(node.target, {})
    names = [each.name for each in node.target._schema.arguments] if wanted else []  # type: ignore[union-attr]
    return [(place, wanted[name]) for place, name in enumerate(names) if name in wanted]


def _contiguous(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_contiguous()


def _as(graph: fx.Graph, node: Any, layout: Any, copies: dict[tuple[fx.Node, Any], fx.Node]) -> Any:
    """The value as it has to lie: itself where it does."""
    if node is None or lies(value_of(node), layout):
        return node
    format = IMAGE if layout is IMAGE else DENSE
    key = (node, format)
    if key not in copies:
        copies[key] = emit(graph, aten.clone.default, node, like=node, memory_format=format)
    return copies[key]


def lies(value: Tensor, layout: Any) -> bool:
    """Whether a tensor lies as `layout` says."""
    if layout is not ROWS:
        return value.is_contiguous(memory_format=layout)
    sizes = [(size, step) for size, step in zip(value.shape, value.stride(), strict=True)]
    *lead, (columns, step) = sizes
    lead = [pair for pair in lead if pair[0] != 1]
    merge = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(lead))
    return (step == 1 or columns == 1) and merge
