"""Convolution and linear with int8 weights and activations quantized as they come.

    lo = min(0, min x), hi = max(0, max x), s = (hi - lo) / 255, z = clamp(round(-lo / s), 0, 255)
    y = s · t_c · Σ_k (q(x)_k - z) · w_ck + b_c

Activations per tensor, uint8, range found at run time (ONNX's DynamicQuantizeLinear); weights int8
with a scale t per output channel; products summed exactly in integers (float64 holds them here).
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.cost import FORMULAS, conv_flops, matmul_flops
from effuse.kernels.quantize import along, convolve


def dynamic_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 scale and zero point (as float32) of DynamicQuantizeLinear for `x`."""
    x = x.float()
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale).clamp(0, 255)


def centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` as centred integers (in float64), and their scale."""
    scale, zero = dynamic_range(x)
    steps = (torch.round(x.float() / scale) + zero).clamp(0, 255) - zero
    return steps.double(), scale


def linear_reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, in), weight int8 (out, in), scale (out,), bias (out,) -> (…, out) in x's dtype."""
    steps, step = centred(x)
    sums = torch.nn.functional.linear(steps, weight.double())
    y = sums.float() * (step * scale.float())
    return (y if bias is None else y + bias.float()).to(x.dtype)


def conv_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """x (n, in, h, w), weight int8 (out, in/groups, kh, kw), scale (out,) -> (n, out, h', w').

    Of a video, x is (n, in, frames, h, w) and the weight (out, in/groups, kt, kh, kw).
    """
    steps, step = centred(x)
    sums = convolve(steps, weight.double(), stride, padding, dilation, groups)
    dims = sums.dim()
    axis = dims + 1 - weight.dim()  # 0 without a batch
    y = sums.float() * along(step * scale.float(), dims, axis)
    return (y if bias is None else y + along(bias.float(), dims, axis)).to(x.dtype)


@torch.library.custom_op("effuse::linear_dynamic", mutates_args=())
def linear_dynamic(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`linear_reference` as a graph op."""
    return linear_reference(x, weight, scale, bias)


@linear_dynamic.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def conv_dynamic(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """`conv_reference` as a graph op; its result is contiguous."""
    y = conv_reference(x, weight, scale, bias, stride, padding, dilation, groups)
    return y.contiguous()


def _conv_shape(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    float_weight = torch.empty_like(weight, dtype=x.dtype)
    y = convolve(x, float_weight, stride, padding, dilation, groups)
    return torch.empty_like(y, memory_format=torch.contiguous_format)


FORMULAS[linear_dynamic._opoverload.overloadpacket] = matmul_flops
for _name in ("conv2d_dynamic", "conv3d_dynamic"):
    _op = torch.library.custom_op(f"effuse::{_name}", conv_dynamic, mutates_args=())
    _op.register_fake(_conv_shape)
    FORMULAS[_op._opoverload.overloadpacket] = conv_flops
