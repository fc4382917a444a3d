"""Low-bit layers for ONNX Runtime where Q/DQ pairs alone would not run in integers.

- scales looked up by step: the runtime fuses pairs with stored scales only, so that convolutions
  become QLinearConv and linears MatMulInteger here;
- layers whose weights alone are quantized, to other than 4 bits in groups: their weights are made
  float once;
- weights in groups of 4 bits: linears become MatMulNBits, with activations in float or (groups of
  the same size, dynamic) in 8-bit integers.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import fx

from effuse.graph import calls, emit, emit_weight, substitute, value_of
from effuse.kernels import integer as integer  # registers the ops
from effuse.kernels import log2_attention as log2_attention
from effuse.kernels import low_bit as low_bit
from effuse.kernels.quantizers import Quantizer, parse_quantizer
from effuse.passes.quantize_sites import CONVS, SITES
from effuse.passes.quantize_writer import options_of
from effuse.weights import WeightStore, derive

aten, ops = torch.ops.aten, torch.ops.effuse

NATIVE = ("w8a8", "w4a16", "w4a8")  # formats that ONNX Runtime computes with
STORED = ("w8a16",)  # and that it only reads from the file
INTEGER: dict[Any, Any] = {
    aten.conv2d.default: ops.conv2d_integer.default, aten.conv3d.default: ops.conv3d_integer.default
}  # fmt: skip
LEAST_GROUP = 16  # of MatMulNBits, whose groups are powers of two


def bind_integer_layers(graph: fx.Graph) -> None:
    """Every layer on a quantized value whose scale is computed, as one integer op."""
    for node in calls(graph, aten.linear.default):
        if looked_up(node.args[0]) and _stored(node.args[1]):
            _linear(graph, node)
    for node in calls(graph, *CONVS):
        if looked_up(node.args[0]) and _stored(node.args[1]) and _requantized(node):
            _conv(graph, node)


def looked_up(node: Any) -> bool:
    """Whether a value is dequantize(q, s, z) with a computed s."""
    if not isinstance(node, fx.Node) or node.target is not ops.dequantize.default:
        return False
    return node.args[1].op != "get_attr"  # type: ignore[union-attr]


def _stored(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is ops.dequantize.default


def _requantized(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].target is ops.quantize.default else None


def _arguments(node: fx.Node) -> list[Any]:
    return [*node.args, *[None] * (3 - len(node.args))]


def _linear(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias = _arguments(node)[:3]
    with graph.inserting_before(node):
        new = emit(
            graph, ops.linear_integer.default, *x.args[:3], *weight.args[:2], bias, like=node
        )
    substitute(node, new)


def _conv(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias = _arguments(node)[:3]
    steps = None if bias is None else bias.args[0]  # of dequantize(int32)
    out: Any = _requantized(node)
    with graph.inserting_before(out):
        new = emit(
            graph, INTEGER[node.target], *x.args[:3], *weight.args[:2], steps, *out.args[1:3],
            *options_of(node), like=node,
        )  # fmt: skip
    substitute(out, new)


def bind_nbits(graph: fx.Graph, weights: WeightStore) -> None:
    """linear(x, unpack(int4 groups)) and linear(fake_quantize(x), …) -> linear_nbits."""
    for node in calls(graph, aten.linear.default):
        x, weight, bias = _arguments(node)[:3]
        if not isinstance(weight, fx.Node) or weight.target is not ops.unpack.default:
            continue
        text = str(weight.args[4])
        if not groups_of_four(parse_quantizer(text)):
            continue
        rounded = x.target is ops.fake_quantize.default and by_group(x.args[3], text)
        source, activation = (x.args[0], x.args[3]) if rounded else (x, "")
        rows = weight.args[5][0]  # type: ignore[index]
        with graph.inserting_before(node):
            packed = _blocks(graph, weights, weight.args[0], parse_quantizer(text).group)
            scales = _stored_flat(graph, weights, weight.args[1])
            new = emit(
                graph, ops.linear_nbits.default, source, packed, scales, bias, text, activation,
                rows, like=node,
            )  # fmt: skip
        substitute(node, new)


def _blocks(graph: fx.Graph, weights: WeightStore, node: Any, group: int) -> fx.Node:
    """The packed codes (rows, groups, bytes of a group) with 8 for 0.

    Stored so: OpenVINO takes none from a Reshape, and the exporter folds only small ones.
    """
    name = str(node.target)
    blocks = derive(weights, [name], partial(_in_blocks, width=group // 2), f"blocks {group}")
    return emit_weight(graph, weights, f"{name}.blocks", blocks)


def _in_blocks(codes: torch.Tensor, width: int) -> torch.Tensor:
    return codes.reshape(len(codes), -1, width) ^ low_bit.OFFSET


def _stored_flat(graph: fx.Graph, weights: WeightStore, node: Any) -> fx.Node:
    name = str(node.target)
    flat = derive(weights, [name], torch.flatten, "flat")
    return emit_weight(graph, weights, f"{name}.flat", flat)


def groups_of_four(weight: Quantizer) -> bool:
    """Whether MatMulNBits holds weights of this quantizer."""
    fits = weight.group >= LEAST_GROUP and weight.group & (weight.group - 1) == 0
    return str(weight.grid) == "int4" and weight.symmetric and weight.scale == "float32" and fits


def by_group(activation: Any, weight: str) -> bool:
    """Whether MatMulNBits rounds activations like this beside weights like that."""
    wanted = Quantizer(parse_quantizer("int8").grid, "group", parse_quantizer(weight).group,
                       ranges="dynamic")  # fmt: skip
    return str(activation) == str(wanted)


def restore_weights(graph: fx.Graph) -> None:
    """Of layers in float: dequantize(q, s) -> q · s, which a session computes once, as it starts.

    A convolution is only fast on stored weights. Of a linear the runtime would make MatMulNBits,
    whose float kernel for 8 bits took 0.71 ms where float weights take 0.05 ((2, 384) x (384, 2304)
    on 2 cores), and 0.32 for 0.21 at 256 rows.
    """
    for node in calls(graph, *SITES):
        weight: Any = node.args[1]
        if not _stored(weight) or _stored(node.args[0]):
            continue
        codes, scale, _, axis = weight.args
        shape = [-1 if dim == axis else 1 for dim in range(value_of(codes).dim())]
        with graph.inserting_before(node):
            real = emit(graph, aten.to.dtype, codes, value_of(weight).dtype, like=weight)
            factor = emit(graph, aten.reshape.default, scale, shape, like=weight)
            new = emit(graph, aten.mul.Tensor, real, factor, like=weight)
        node.replace_input_with(weight, new)


def unsupported(graph: fx.Graph) -> str | None:
    """The first value that ONNX Runtime has no low-bit form for, or None."""
    for node in calls(graph, ops.unpack.default):
        return f"weights {node.args[4]}"
    for node in calls(graph, ops.fake_quantize.default):
        return f"activations {node.args[3]}"
    for node in calls(graph, ops.widen.default):
        if node.args[1] != 4:
            return f"{node.args[1]}-bit weights"
    for node in calls(graph, ops.attention_log2.default):
        return f"attention scores in powers of two of {node.args[6]} bits (Quantize(scores=…))"
    return None
