"""Uniform affine quantization to 8 bits, and back.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)        x̂ = (q - zero_point) · scale

`scale` and `zero_point` are scalars (per tensor) or vectors along `axis` (per channel); the type
of `zero_point` (int8 or uint8) is the type of q. Rounding is half to even, arithmetic is float32:
the semantics of ONNX's QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def along(vector: Tensor, dims: int, axis: int) -> Tensor:
    """A vector shaped to broadcast along `axis` of a tensor of `dims` dimensions."""
    if vector.dim() == 0:
        return vector
    shape = [1] * dims
    shape[axis] = -1
    return vector.view(shape)


def quantize_reference(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """Quantize `x` (any shape, float) to zero_point's dtype."""
    limits = torch.iinfo(zero_point.dtype)
    steps = torch.round(x.float() / along(scale, x.dim(), axis).float())
    shifted = steps + along(zero_point, x.dim(), axis).float()
    return shifted.clamp(limits.min, limits.max).to(zero_point.dtype)


def dequantize_reference(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """The real values of `q`, in scale's dtype."""
    centred = q.to(torch.int32) - along(zero_point, q.dim(), axis).to(torch.int32)
    return centred.to(scale.dtype) * along(scale, q.dim(), axis)


def convolve(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """x over a weight (out, in/groups, kh, kw) or (…, kd, kh, kw), without a bias."""
    run = torch.nn.functional.conv3d if weight.dim() == 5 else torch.nn.functional.conv2d
    return run(x, weight, None, *options)


@torch.library.custom_op("effuse::quantize", mutates_args=())
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """`quantize_reference` as a graph op."""
    return quantize_reference(x, scale, zero_point, axis)


@quantize.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("effuse::dequantize", mutates_args=())
def dequantize(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """`dequantize_reference` as a graph op."""
    return dequantize_reference(q, scale, zero_point, axis)


@dequantize.register_fake
def _(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(q, dtype=scale.dtype)
