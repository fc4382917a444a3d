"""Convolution and linear in integers, on activations quantized before.

    y = Σ_k (q_k - z) · w_ck + b_c        sums exact in integers (float64 holds them here)
    conv:    clamp(round(y · s · t_c / s') + z', 0, 255)        uint8, as ONNX's QLinearConv
    linear:  y · s · t_c + b_c                                  float32, as its MatMulInteger

Activations uint8 under one scale s, which may be a graph's value (looked up by step); weights int8
with a scale t per output channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.cost import FORMULAS, conv_flops, matmul_flops
from effuse.kernels.quantize import along, convolve


def conv_integer_reference(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """q uint8 (n, in, h, w), weight int8 (out, in/groups, kh, kw), bias int32 (out,) at the scale
    of the products -> uint8 (n, out, h', w'); of a video, three sizes for two.
    """
    centred = q.double() - zero.double()
    sums = convolve(centred, weight.double(), stride, padding, dilation, groups)
    axis = sums.dim() + 1 - weight.dim()
    if bias is not None:
        sums = sums + along(bias.double(), sums.dim(), axis)
    factor = scale.float() * weight_scale.float() / out_scale.float()
    steps = torch.round(sums.float() * along(factor, sums.dim(), axis)) + out_zero.float()
    return steps.clamp(0, 255).to(torch.uint8)


def linear_integer_reference(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """q uint8 (…, in), weight int8 (out, in), bias float (out,) -> float32 (…, out)."""
    sums = torch.nn.functional.linear(q.double() - zero.double(), weight.double())
    y = sums.float() * (scale.float() * weight_scale.float())
    return y if bias is None else y + bias.float()


def conv_integer(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`conv_integer_reference` as a graph op."""
    return conv_integer_reference(
        q, scale, zero, weight, weight_scale, bias, out_scale, out_zero, stride, padding, dilation,
        groups,
    ).contiguous()  # fmt: skip


def _conv_shape(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    out_scale: Tensor,
    out_zero: Tensor,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    y = convolve(q.float(), weight.float(), stride, padding, dilation, groups)
    return torch.empty_like(y, dtype=torch.uint8, memory_format=torch.contiguous_format)


@torch.library.custom_op("effuse::linear_integer", mutates_args=())
def linear_integer(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`linear_integer_reference` as a graph op."""
    return linear_integer_reference(q, scale, zero, weight, weight_scale, bias)


@linear_integer.register_fake
def _(
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return q.new_empty((*q.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _conv_flops(q: torch.Size, scale: object, zero: object, weight: torch.Size, *_: object,
                out_val: torch.Size, **__: object) -> int:  # fmt: skip
    return conv_flops(tuple(q), tuple(weight), out_val=tuple(out_val))


FORMULAS[linear_integer._opoverload.overloadpacket] = matmul_flops
for _name in ("conv2d_integer", "conv3d_integer"):
    _op = torch.library.custom_op(f"effuse::{_name}", conv_integer, mutates_args=())
    _op.register_fake(_conv_shape)
    FORMULAS[_op._opoverload.overloadpacket] = _conv_flops
