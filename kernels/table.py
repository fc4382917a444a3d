"""The op table: every effuse op, its reference, its samples, and what runs it natively where.

Op tests, the documentation of back ends, cost and fallback all read this one table.
"""

from __future__ import annotations

from functools import partial

import torch

from effuse.kernels import (
    attention,
    conv_scaled,
    dynamic,
    gated,
    group_norm_act,
    integer,
    linear_packed,
    linear_scaled,
    log2_attention,
    low_bit,
    low_rank,
    quantize,
    quantize_rows,
    quantize_static,
    rotary,
    row_norm,
)
from effuse.kernels.op import Op, Sample
from effuse.kernels.quantizers import find_scale, parse_quantizer

SIZES = (4, 6, 5)  # of what is convolved: frames, height, width


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def _int8(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


def _quantize_samples(g: torch.Generator) -> list[Sample]:
    scalar = (torch.tensor(0.02), torch.tensor(117, dtype=torch.uint8))
    vector = (torch.rand(5, generator=g) + 0.01, torch.zeros(5, dtype=torch.int8))
    return [
        (_uniform(g, 2, 5, 3), *scalar, 0),
        (_uniform(g, 5, 4), *vector, 0),
        (_uniform(g, 2, 5, 3, 3), *vector, 1),
        (_uniform(g, 0, 5), *scalar, 0),
    ]


def _dequantize_samples(g: torch.Generator) -> list[Sample]:
    return [
        (quantize.quantize_reference(x, scale, zero, axis), scale, zero, axis)
        for x, scale, zero, axis in _quantize_samples(g)
    ]


def _linear_samples(g: torch.Generator) -> list[Sample]:
    scale = torch.rand(6, generator=g) * 0.01 + 0.001
    return [
        (_uniform(g, 3, 7), _int8(g, 6, 7), scale, _uniform(g, 6)),
        (_uniform(g, 2, 5, 7), _int8(g, 6, 7), scale, None),
        (_uniform(g, 1, 7).abs(), _int8(g, 6, 7), scale, None),
    ]


def _conv_samples(g: torch.Generator, dims: int = 2) -> list[Sample]:
    scale = torch.rand(4, generator=g) * 0.01 + 0.001
    bias, ones, zeros = _uniform(g, 4), [1] * dims, [0] * dims
    return [
        (_uniform(g, 2, 3, *SIZES[-dims:]), _int8(g, 4, 3, *[3] * dims), scale, bias, ones, ones,
         ones, 1),
        (_uniform(g, 1, 4, *[7] * dims), _int8(g, 4, 2, *[3] * dims), scale, None, [2] * dims,
         zeros, ones, 2),
        (_uniform(g, 1, 3, *[4] * dims), _int8(g, 4, 3, *ones), scale, bias, ones, zeros, ones, 1),
    ]  # fmt: skip


def _unpack_samples(g: torch.Generator) -> list[Sample]:
    stored = {
        "int4/group4": [3, 8],
        "uint3/channel/asymmetric": [4, 5],
        "e2m1/group6/scale-e4m3": [2, 3, 2, 2],
        "e3m2/group2/scale-e8m0": [3, 6],
        "int8/tensor": [2, 3],
    }
    return [
        (*low_bit.pack_weight(_uniform(g, *shape), parse_quantizer(text)), text, shape)
        for text, shape in stored.items()
    ]


def _fake_quantize_samples(g: torch.Generator) -> list[Sample]:
    image, rows = _uniform(g, 2, 3, 4, 4), _uniform(g, 2, 5, 8)
    fixed = "uint8/tensor/asymmetric"
    return [
        (image, *find_scale(image, parse_quantizer(fixed)), fixed),
        (image.to(memory_format=torch.channels_last), None, None, "e4m3/tensor/dynamic"),
        (rows, None, None, "e4m3/token/dynamic"),
        (rows, None, None, "int8/group4/dynamic"),
        (rows, None, None, "e2m1/group4/dynamic/scale-e8m0"),
    ]


def _widen_samples(g: torch.Generator) -> list[Sample]:
    return [
        (_packed(g, "int4/channel", 6, 8).packed, 4, [6, 8]),
        (_packed(g, "int4/channel", 3, 5, 3, 3).packed, 4, [3, 5, 3, 3]),
    ]


def _packed(g: torch.Generator, quantizer: str, *shape: int) -> low_bit.Packed:
    return low_bit.pack_weight(_uniform(g, *shape), parse_quantizer(quantizer))


def _nbits_samples(g: torch.Generator) -> list[Sample]:
    how = "int4/group32"
    packed = _packed(g, how, 6, 64)
    weight = (packed.packed.reshape(6, 2, 16) ^ low_bit.OFFSET, packed.scale.flatten())
    return [
        (_uniform(g, 3, 64), *weight, _uniform(g, 6), how, "", 6),
        (_uniform(g, 2, 5, 64), *weight, None, how, "", 6),
        (_uniform(g, 2, 5, 64), *weight, _uniform(g, 6), how, "int8/group32/dynamic", 6),
    ]


def _attention_samples(g: torch.Generator) -> list[Sample]:
    q, k, v = _uniform(g, 2, 5, 12), _uniform(g, 2, 7, 12), _uniform(g, 2, 7, 12)
    return [
        (q, k, v, None, 3, 0.5, False),
        (q, k, v, _uniform(g, 1, 1, 5, 7), 3, 0.5, False),
        (q, q, q, None, 2, 0.4, True),
    ]


def _attention_log2_samples(g: torch.Generator) -> list[Sample]:
    q, k, v = _uniform(g, 2, 3, 5, 4), _uniform(g, 2, 3, 7, 4), _uniform(g, 2, 3, 7, 6)
    some = torch.arange(7) < torch.tensor([7, 3]).view(2, 1, 1, 1)
    return [
        (q, k, v, None, False, 0.5, 4, 1),
        (q, k, v, _uniform(g, 1, 1, 5, 7), False, 2.0, 3, 0),
        (q, k, v, some.expand(2, 1, 5, 7), False, 0.5, 8, 1),
        (q, q, q, None, True, 0.5, 2, 0),
    ]


def _project_samples(g: torch.Generator) -> list[Sample]:
    return [
        (_uniform(g, 3, 7), _uniform(g, 2, 7)),
        (_uniform(g, 2, 5, 2), _uniform(g, 6, 2)),
        (_uniform(g, 0, 7), _uniform(g, 2, 7)),
    ]


def _project_conv_samples(g: torch.Generator) -> list[Sample]:
    return [
        (_uniform(g, 2, 3, 6, 5), _uniform(g, 2, 3, 3, 3), [1, 1], [1, 1], [1, 1]),
        (_uniform(g, 2, 3, 7, 7), _uniform(g, 2, 3, 3, 3), [2, 2], [0, 0], [1, 1]),
        (_uniform(g, 1, 2, 4, 4), _uniform(g, 6, 2, 1, 1), [1, 1], [0, 0], [1, 1]),
    ]


def _steps(g: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8)


def _integer_scales(g: torch.Generator, rows: int) -> tuple[torch.Tensor, ...]:
    at = (torch.tensor(0.02), torch.tensor(117, dtype=torch.uint8))
    return (*at, torch.rand(rows, generator=g) * 0.01 + 0.001)


def _linear_integer_samples(g: torch.Generator) -> list[Sample]:
    scale, zero, channels = _integer_scales(g, 6)
    weight = _int8(g, 6, 7)
    return [
        (_steps(g, 3, 7), scale, zero, weight, channels, _uniform(g, 6)),
        (_steps(g, 2, 5, 7), scale, zero, weight, channels, None),
    ]


def _conv_integer_samples(g: torch.Generator, dims: int = 2) -> list[Sample]:
    scale, zero, channels = _integer_scales(g, 4)
    out = (torch.tensor(0.3), torch.tensor(101, dtype=torch.uint8))
    bias, ones = torch.randint(-9999, 9999, (4,), generator=g, dtype=torch.int32), [1] * dims
    return [
        (_steps(g, 2, 3, *SIZES[-dims:]), scale, zero, _int8(g, 4, 3, *[3] * dims), channels, bias,
         *out, ones, ones, ones, 1),
        (_steps(g, 1, 4, *[7] * dims), scale, zero, _int8(g, 4, 2, *[3] * dims), channels, None,
         *out, [2] * dims, [0] * dims, ones, 2),
    ]  # fmt: skip


GRAPH_OPS = (  # what passes write
    Op(
        "quantize",
        torch.ops.effuse.quantize.default,
        quantize.quantize_reference,
        _quantize_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native", "triton": "native"},
        "QuantizeLinear; with its DequantizeLinear fused into QLinearConv and MatMulIntegerToFloat",
        quantize_static.NATIVE,
    ),
    Op(
        "dequantize",
        torch.ops.effuse.dequantize.default,
        quantize.dequantize_reference,
        _dequantize_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native", "triton": "native"},
        "DequantizeLinear",
        quantize_static.VALUES,
    ),
    Op(
        "linear_dynamic",
        torch.ops.effuse.linear_dynamic.default,
        dynamic.linear_reference,
        _linear_samples,
        {"reference": "simulated", "onnx": "native"},
        "DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime fuses",
    ),
    Op(
        "conv2d_dynamic",
        torch.ops.effuse.conv2d_dynamic.default,
        dynamic.conv_reference,
        _conv_samples,
        {"reference": "simulated", "onnx": "native"},
        "DynamicQuantizeLinear and ConvInteger",
    ),
    Op(
        "conv3d_dynamic",
        torch.ops.effuse.conv3d_dynamic.default,
        dynamic.conv_reference,
        partial(_conv_samples, dims=3),
        {"reference": "simulated", "onnx": "native"},
        "DynamicQuantizeLinear and ConvInteger",
    ),
    Op(
        "unpack",
        torch.ops.effuse.unpack.default,
        low_bit.unpack_reference,
        _unpack_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native"},
        "weights of 2 to 8 bits, stored packed; in ONNX Runtime of 4 bits, as linear_nbits",
    ),
    Op(
        "fake_quantize",
        torch.ops.effuse.fake_quantize.default,
        low_bit.fake_quantize_reference,
        _fake_quantize_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native"},
        "activations on any grid; in ONNX Runtime of 8 bits, as linear_nbits",
    ),
    Op(
        "widen",
        torch.ops.effuse.widen.default,
        low_bit.widen_reference,
        _widen_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native"},
        "4-bit codes stored packed, made int8 when a session starts",
    ),
    Op(
        "linear_nbits",
        torch.ops.effuse.linear_nbits.default,
        low_bit.linear_nbits_reference,
        _nbits_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native"},
        "MatMulNBits, which takes 4-bit weights and 8-bit or float activations",
    ),
    Op(
        "linear_integer",
        torch.ops.effuse.linear_integer.default,
        integer.linear_integer_reference,
        _linear_integer_samples,
        {"reference": "simulated", "onnx": "native"},
        "MatMulInteger, for scales that are looked up by step",
    ),
    Op(
        "conv2d_integer",
        torch.ops.effuse.conv2d_integer.default,
        integer.conv_integer_reference,
        _conv_integer_samples,
        {"reference": "simulated", "onnx": "native"},
        "QLinearConv, for scales that are looked up by step",
    ),
    Op(
        "conv3d_integer",
        torch.ops.effuse.conv3d_integer.default,
        integer.conv_integer_reference,
        partial(_conv_integer_samples, dims=3),
        {"reference": "simulated", "onnx": "native"},
        "QLinearConv, for scales that are looked up by step",
    ),
    Op(
        "project",
        torch.ops.effuse.project.default,
        low_rank.project_reference,
        _project_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native"},
        "one half of a low-rank branch beside a linear layer; MatMul in float",
    ),
    Op(
        "project_conv",
        torch.ops.effuse.project_conv.default,
        low_rank.project_conv_reference,
        _project_conv_samples,
        {"reference": "simulated", "onnx": "native", "openvino": "native"},
        "one half of a low-rank branch beside a convolution; Conv in float",
    ),
    Op(
        "attention",
        torch.ops.effuse.attention.default,
        attention.attention_reference,
        _attention_samples,
        {"reference": "simulated", "onnx": "native"},
        "MultiHeadAttention in float32",
    ),
    Op(
        "attention_log2",
        torch.ops.effuse.attention_log2.default,
        log2_attention.attention_log2_reference,
        _attention_log2_samples,
        {"reference": "simulated"},
        "scores in powers of two; no back end has them, they are for study",
    ),
)

FUSED_OPS = (  # what the Triton back end lowers to
    quantize_rows.ROW,
    row_norm.ROW,
    gated.ROW,
    rotary.ROW,
    linear_scaled.ROW,
    linear_packed.ROW,
    conv_scaled.ROW,
    group_norm_act.STATS_ROW,
    group_norm_act.ROW,
)

TABLE = (*GRAPH_OPS, *FUSED_OPS)
BY_TARGET = {op.target: op for op in TABLE}
