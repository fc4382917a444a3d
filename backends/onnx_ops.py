"""How effuse's ops are written in ONNX, and rewrites that fit a graph to ONNX Runtime's fusions."""

from __future__ import annotations

import math
from typing import Any

import torch
from onnxscript import opset21 as op
from onnxscript.ir import DataType
from torch import fx

from effuse.backends.onnx_attention import fuse_attention, give_one_head
from effuse.backends.onnx_brain import widen_brain
from effuse.backends.onnx_complex import pair_ends, widen_pairs
from effuse.backends.onnx_integer import bind_integer_layers, bind_nbits, restore_weights
from effuse.backends.onnx_resize import gather_uneven
from effuse.backends.onnx_runtime_ops import MATMUL_NBITS, MULTI_HEAD_ATTENTION
from effuse.backends.onnx_truths import choose_truths
from effuse.graph import (
    calls,
    eliminate,
    emit,
    emit_weight,
    outputs,
    set_outputs,
    substitute,
    value_of,
)
from effuse.kernels import dynamic as dynamic  # registers the ops
from effuse.kernels.quantizers import parse_quantizer
from effuse.weights import WeightStore, derive

aten, ops = torch.ops.aten, torch.ops.effuse

FLOAT, INT8, INT32 = int(DataType.FLOAT), int(DataType.INT8), int(DataType.INT32)


def quantize(x: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    """effuse::quantize."""
    return op.QuantizeLinear(x, scale, zero_point, axis=axis)


def dequantize(q: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    """effuse::dequantize."""
    return op.DequantizeLinear(q, scale, zero_point, axis=axis)


def linear_dynamic(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    """effuse::linear_dynamic; the transpose of a stored weight is folded when a session starts."""
    steps, step, zero = op.DynamicQuantizeLinear(x)
    sums = op.Cast(op.MatMulInteger(steps, op.Transpose(weight, perm=[1, 0]), zero), to=FLOAT)
    y = op.Mul(sums, op.Mul(step, scale))
    return y if bias is None else op.Add(y, bias)


def conv_dynamic(
    x: Any,
    weight: Any,
    scale: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Any:
    """effuse::conv2d_dynamic and conv3d_dynamic."""
    steps, step, zero = op.DynamicQuantizeLinear(x)
    sums = op.ConvInteger(
        steps,
        weight,
        zero,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )
    axes = op.Constant(value_ints=list(range(1, len(padding) + 1)))
    y = op.Mul(op.Cast(sums, to=FLOAT), op.Unsqueeze(op.Mul(step, scale), axes))
    return y if bias is None else op.Add(y, op.Unsqueeze(bias, axes))


def conv_integer(
    q: Any,
    scale: Any,
    zero: Any,
    weight: Any,
    weight_scale: Any,
    bias: Any,
    out_scale: Any,
    out_zero: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Any:
    """effuse::conv2d_integer and conv3d_integer."""
    zeros = op.CastLike(op.Sub(weight_scale, weight_scale), weight)  # one for each channel
    return op.QLinearConv(
        q,
        scale,
        zero,
        weight,
        weight_scale,
        zeros,
        out_scale,
        out_zero,
        bias,
        strides=list(stride),
        pads=[*padding, *padding],
        dilations=list(dilation),
        group=groups,
    )


def linear_integer(
    q: Any, scale: Any, zero: Any, weight: Any, weight_scale: Any, bias: Any = None
) -> Any:
    """effuse::linear_integer."""
    sums = op.Cast(op.MatMulInteger(q, op.Transpose(weight, perm=[1, 0]), zero), to=FLOAT)
    y = op.Mul(sums, op.Mul(scale, weight_scale))
    return y if bias is None else op.Add(y, bias)


def widen(packed: Any, bits: int, shape: Any) -> Any:
    """effuse::widen at 4 bits; made of constants, and so done when a session starts."""
    low = op.BitwiseAnd(packed, op.CastLike(op.Constant(value_int=15), packed))
    high = op.BitShift(packed, op.CastLike(op.Constant(value_int=4), packed), direction="RIGHT")
    last = op.Constant(value_ints=[-1])
    pairs = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
    rows = op.Reshape(pairs, op.Constant(value_ints=[shape[0], -1]))
    columns = op.Constant(value_ints=[math.prod(shape[1:])])
    rows = op.Slice(rows, op.Constant(value_ints=[0]), columns, op.Constant(value_ints=[1]))
    flipped = op.BitwiseXor(rows, op.CastLike(op.Constant(value_int=8), rows))
    centred = op.Sub(op.Cast(flipped, to=INT32), op.Cast(op.Constant(value_int=8), to=INT32))
    return op.Reshape(op.Cast(centred, to=INT8), op.Constant(value_ints=list(shape)))


def linear_nbits(
    x: Any, packed: Any, scale: Any, bias: Any, weight: str, activation: str, rows: int
) -> Any:
    """effuse::linear_nbits."""
    return MATMUL_NBITS(
        x, packed, scale, None, None, bias, K=x.shape[-1], N=rows, bits=4,
        block_size=parse_quantizer(weight).group, accuracy_level=4 if activation else 1,
    )  # fmt: skip


def project(x: Any, matrix: Any) -> Any:
    """effuse::project."""
    return op.MatMul(x, op.Transpose(op.CastLike(matrix, x), perm=[1, 0]))


def project_conv(x: Any, matrix: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """effuse::project_conv."""
    return op.Conv(
        x, op.CastLike(matrix, x), strides=list(stride), pads=[*padding, *padding],
        dilations=list(dilation),
    )  # fmt: skip


def group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, _: bool = True
) -> Any:
    """aten::group_norm over (n, c, …) as one InstanceNormalization of (n, groups, rest).

    ONNX Runtime has no kernel for GroupNormalization on the CPU and runs it as a dozen small ops:
    measured 1.65 ms against 1.07 ms for (32, 64, 32, 32) with SiLU.
    """
    rank = len(x.shape)
    ones = op.Constant(value_floats=[1.0] * groups)
    zeros = op.Constant(value_floats=[0.0] * groups)
    if x.dtype is not DataType.FLOAT:
        ones, zeros = op.CastLike(ones, x), op.CastLike(zeros, x)
    flat = op.Reshape(x, op.Constant(value_ints=[0, groups, -1]))
    y = op.Reshape(op.InstanceNormalization(flat, ones, zeros, epsilon=eps), op.Shape(x))
    axes = op.Constant(value_ints=list(range(1, rank - 1)))
    if weight is not None:
        y = op.Mul(y, op.Unsqueeze(weight, axes))
    return y if bias is None else op.Add(y, op.Unsqueeze(bias, axes))


def attention(q: Any, k: Any, v: Any, bias: Any, heads: int, scale: float, causal: bool) -> Any:
    """effuse::attention."""
    return MULTI_HEAD_ATTENTION(
        q, k, v, None, None, bias, num_heads=heads, scale=scale, unidirectional=int(causal)
    )


def copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    """aten.copy, which spreads its source to the shape of x as the exporter's own form does not."""
    return op.Expand(op.CastLike(source, x), op.Shape(x))


TRANSLATIONS: dict[Any, Any] = {
    aten.copy.default: copy,
    aten.group_norm.default: group_norm,
    ops.attention.default: attention,
    ops.quantize.default: quantize,
    ops.dequantize.default: dequantize,
    ops.conv2d_integer.default: conv_integer,
    ops.conv3d_integer.default: conv_integer,
    ops.linear_integer.default: linear_integer,
    ops.linear_nbits.default: linear_nbits,
    ops.widen.default: widen,
    ops.project.default: project,
    ops.project_conv.default: project_conv,
    ops.linear_dynamic.default: linear_dynamic,
    ops.conv2d_dynamic.default: conv_dynamic,
    ops.conv3d_dynamic.default: conv_dynamic,
}


def prepare(graph: fx.Graph, weights: WeightStore, contrib: bool = True) -> None:
    """Rewrite a copy of a part for ONNX Runtime, with its own operators or without; exact."""
    idle_squeezes(graph)
    gather_uneven(graph, weights)
    give_one_head(graph)
    pair_ends(graph)
    widen_pairs(graph)
    choose_truths(graph)
    widen_brain(graph)
    if contrib:
        fuse_attention(graph)
        bind_integer_layers(graph)
        bind_nbits(graph, weights)
    restore_weights(graph)
    transpose_quantized(graph, weights)
    own_outputs(graph)
    eliminate(graph)


def own_outputs(graph: fx.Graph) -> None:
    """An output that is an input, a weight or another output becomes an Identity of it.

    The exporter names each value once: it would give the input the output's name.
    """
    found: list[fx.Node] = []
    for node in outputs(graph):
        if node.op == "call_function" and node not in found:
            found.append(node)
            continue
        with graph.inserting_before(graph.output_node()):
            found.append(emit(graph, aten.clone.default, node, like=node))
    set_outputs(graph, found)


def idle_squeezes(graph: fx.Graph) -> None:
    """squeeze(x, d) -> x where d is not of size 1: nothing in PyTorch, an error in ONNX."""
    for node in calls(graph, aten.squeeze.dim):
        source: Any = node.args[0]
        if value_of(source).dim() == value_of(node).dim():
            substitute(node, source)


def _transposed(graph: fx.Graph, weights: WeightStore, node: Any) -> fx.Node:
    if node.op != "get_attr":  # made of fewer bits: when a session starts
        made: fx.Node = emit(graph, aten.permute.default, node, [1, 0], like=node)
        return made
    name = str(node.target)
    flipped = derive(weights, [name], lambda weight: weight.t().contiguous(), "transposed")
    return emit_weight(graph, weights, f"{name}.t", flipped)


def transpose_quantized(graph: fx.Graph, weights: WeightStore) -> None:
    """linear(x, dequantize(W)) -> matmul(x, dequantize(Wᵀ)) + b: integer kernels take (in, out)."""
    for node in calls(graph, aten.linear.default):
        x, stored, *rest = node.args
        if not isinstance(stored, fx.Node) or stored.target is not ops.dequantize.default:
            continue
        with graph.inserting_before(node):
            weight, scale, zeros, _ = stored.args
            flipped = _transposed(graph, weights, weight)
            real = emit(graph, ops.dequantize.default, flipped, scale, zeros, 1, like=node)
            new = emit(graph, aten.matmul.default, x, real, like=node)
            if rest and rest[0] is not None:
                new = emit(graph, aten.add.Tensor, new, rest[0], like=node)
        substitute(node, new)
