"""Tensors of a few bits in graphs: stored weights made float, and activations rounded to a grid.

    unpack:         w = (decode(codes) - z) · s      codes packed, scales as they are stored
    widen:          q                                as int8, for integer arithmetic
    fake_quantize:  x̂ = (q - z) · s                  q = clamp(round(x / s) + z) or nearest(x / s)
    linear_nbits:   y = Σ_k x̂_k · w_ck + b_c         w unpacked, x̂ = x or fake_quantize(x)

Quantizers are handed over as their text (kernels/quantizers.py). Arithmetic is float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from effuse.cost import FORMULAS, matmul_flops
from effuse.errors import ConfigError
from effuse.kernels import packing
from effuse.kernels.grids import Grid, decode
from effuse.kernels.quantizers import (
    Quantizer,
    find_scale,
    from_codes,
    join_scale,
    parse_quantizer,
    round_trip,
    split_scale,
    to_codes,
)

OFFSET = 0x88  # turns two codes from two's complement into offset binary, and back


class Packed(NamedTuple):
    """A weight as it is stored: the tensors that `effuse::unpack` takes, in its order.

    Attributes:
        packed: uint8 (rows, bytes).
        scale: (rows, 1), (rows, groups) or a scalar; float32, or uint8 patterns of e4m3 or e8m0.
        zero: uint8 in scale's shape, or None.
        over: the float32 scale over e4m3 scales, or None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    over: Tensor | None


def pack_weight(
    weight: Tensor, quantizer: Quantizer, scale: Tensor | None = None, zero: Tensor | None = None
) -> Packed:
    """Quantize `weight` (rows, …) and pack it; unpacked, it is `round_trip` of it, to the bit.

    `scale` and `zero` are of the weight as (rows, columns); without, those of `find_scale`.

    Raises:
        ConfigError: groups do not fill the rows.
    """
    rows = weight.flatten(1)
    if scale is None:
        scale, zero = find_scale(rows, quantizer)
    codes = to_codes(rows, scale, zero, quantizer)
    stored, over = split_scale(scale, quantizer)
    return Packed(packing.pack(codes, quantizer.grid.bits), stored, zero, over)


def unpack_reference(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    over: Tensor | None,
    quantizer: str,
    shape: list[int],
) -> Tensor:
    """What `pack_weight` stored, as a float32 weight of `shape`."""
    how = parse_quantizer(quantizer)
    columns = torch.Size(shape[1:]).numel()
    codes = packing.unpack(packed, how.grid.bits, columns)
    return from_codes(codes, join_scale(scale, over, how), zero, how).reshape(shape)


def widen_reference(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    """The codes of a signed integer grid of `bits` bits, as int8 of `shape`."""
    columns = torch.Size(shape[1:]).numel()
    codes = packing.unpack(packed, bits, columns)
    return decode(codes, Grid("int", bits)).to(torch.int8).reshape(shape)


def linear_nbits_reference(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight: str,
    activation: str,
    rows: int,
) -> Tensor:
    """x (…, in), a packed weight of quantizer `weight` -> (…, rows) in x's dtype.

    The weight is stored as the runtime's kernel wants it: (rows, groups, bytes of a group), codes
    of 4 bits with 8 for 0, scales (rows · groups). `activation` is the quantizer of x, or empty.
    """
    given = fake_quantize_reference(x, None, None, activation) if activation else x
    codes, scales = packed.flatten(1) ^ OFFSET, scale.reshape(rows, -1)
    real = unpack_reference(codes, scales, None, None, weight, [rows, x.shape[-1]])
    y = torch.nn.functional.linear(given.float(), real, None if bias is None else bias.float())
    return y.to(x.dtype)


def fake_quantize_reference(
    x: Tensor, scale: Tensor | None, zero: Tensor | None, quantizer: str
) -> Tensor:
    """`x` (any float) rounded to the quantizer's values, in its dtype, contiguous.

    Raises:
        ConfigError: no scale is given and ranges are not dynamic; or groups do not fill the rows.
    """
    how = parse_quantizer(quantizer)
    if scale is None and how.ranges != "dynamic":
        raise ConfigError(f"fake_quantize: {quantizer} needs a scale; only /dynamic finds its own")
    return round_trip(x, how, scale, zero).to(x.dtype).contiguous()


@torch.library.custom_op("effuse::unpack", mutates_args=())
def unpack(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    over: Tensor | None,
    quantizer: str,
    shape: list[int],
) -> Tensor:
    """`unpack_reference` as a graph op."""
    return unpack_reference(packed, scale, zero, over, quantizer, shape)


@unpack.register_fake
def _(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    over: Tensor | None,
    quantizer: str,
    shape: list[int],
) -> Tensor:
    return packed.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("effuse::fake_quantize", mutates_args=())
def fake_quantize(x: Tensor, scale: Tensor | None, zero: Tensor | None, quantizer: str) -> Tensor:
    """`fake_quantize_reference` as a graph op."""
    return fake_quantize_reference(x, scale, zero, quantizer)


@fake_quantize.register_fake
def _(x: Tensor, scale: Tensor | None, zero: Tensor | None, quantizer: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("effuse::widen", mutates_args=())
def widen(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    """`widen_reference` as a graph op."""
    return widen_reference(packed, bits, shape)


@widen.register_fake
def _(packed: Tensor, bits: int, shape: list[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.int8)


@torch.library.custom_op("effuse::linear_nbits", mutates_args=())
def linear_nbits(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight: str,
    activation: str,
    rows: int,
) -> Tensor:
    """`linear_nbits_reference` as a graph op."""
    return linear_nbits_reference(x, packed, scale, bias, weight, activation, rows)


@linear_nbits.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    weight: str,
    activation: str,
    rows: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], rows))


FORMULAS[linear_nbits._opoverload.overloadpacket] = matmul_flops
