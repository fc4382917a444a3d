"""A quantizer: how one tensor becomes codes of a grid under scales, and back.

    q = nearest(x / s)                     x̂ = q · s              symmetric
    q = clamp(round(x / s) + z, 0, qmax)   x̂ = (q - z) · s        asymmetric (unsigned ints)

One scale s per tensor, output channel, token or group. With the block's least and greatest value
lo ≤ 0 ≤ hi: s = max(-lo, hi) / qmax, or s = (hi - lo) / qmax and z = round(-lo / s) (METHODS 0.2).
Scales are stored as float32; as e4m3 under one float32 scale over the tensor, max(s) / 448, which
for e2m1 is amax / (6·448) (NVFP4); or as powers of two (MX): `e8m0` takes the least that reaches
amax, so that nothing saturates, `e8m0-floor` OCP's 2^(⌊log2 amax⌋ - ⌊log2 qmax⌋), which may.
Arithmetic is float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import floor, log2, prod
from typing import Any, Literal

import torch
from torch import Tensor

from effuse.errors import ConfigError
from effuse.errors import nearest as nearest_of
from effuse.kernels.grids import E4M3, FRACTION, Grid, decode, encode, nearest, parse_grid
from effuse.kernels.packing import packed_bytes

BLOCK = 1 << 18  # numbers that are rounded at once
TINY = 2.0**-126  # least normal float32: a block under it is all zeros
LEAST_OVER = 2.0**-100  # keeps its products with e4m3 values normal
WORDS: dict[str, dict[str, Any]] = {
    **{word: {"granularity": word} for word in ("tensor", "channel", "token")},
    **{word: {"symmetric": word == "symmetric"} for word in ("symmetric", "asymmetric")},
    **{word: {"ranges": word} for word in ("static", "dynamic", "step")},
    **{f"scale-{word}": {"scale": word} for word in ("float32", "e4m3", "e8m0", "e8m0-floor")},
}


@dataclass(frozen=True)
class Quantizer:
    """How one tensor is quantized; `str` gives the text that `parse_quantizer` takes.

    Args:
        grid: the values of a code.
        granularity: what shares a scale: the `tensor`, an output `channel` (dimension 0 of a
            weight), a `token` (a row of the last axis) or a `group` along the last axis.
        group: how many consecutive values (of a weight as (rows, columns)) a group has.
        symmetric: no zero point.
        ranges: of activations: `static` (calibrated), `dynamic` (found at run time), or `step`
            (static, per group of timesteps).
        scale: how scales are stored.

    Raises:
        ConfigError: the fields contradict each other.
    """

    grid: Grid
    granularity: Literal["tensor", "channel", "token", "group"] = "tensor"
    group: int = 0
    symmetric: bool = True
    ranges: Literal["static", "dynamic", "step"] = "static"
    scale: Literal["float32", "e4m3", "e8m0", "e8m0-floor"] = "float32"

    def __post_init__(self) -> None:
        if (self.granularity == "group") != (self.group > 0):
            raise ConfigError(f"quantizer {self}: a group has a size, and only a group: {self!r}")
        if not self.symmetric and (self.grid.kind == "float" or self.grid.signed):
            raise ConfigError(f"quantizer {self}: asymmetric needs an unsigned int, as uint8")

    def __str__(self) -> str:
        group = f"group{self.group}"
        words = [str(self.grid), group if self.granularity == "group" else self.granularity]
        words += [] if self.symmetric else ["asymmetric"]
        words += [] if self.ranges == "static" else [self.ranges]
        words += [] if self.scale == "float32" else [f"scale-{self.scale}"]
        return "/".join(words)


@lru_cache
def parse_quantizer(text: str) -> Quantizer:
    """The quantizer of a text such as `int4/group64` or `uint8/tensor/asymmetric/step`.

    The grid comes first; the other words in any order, and what is not said has its default.

    Raises:
        ConfigError: a word is unknown or contradicts another.
    """
    name, *words = text.split("/")
    fields: dict[str, Any] = {}
    for word in words:
        found = _fields(word, text)
        if found.keys() & fields.keys():
            raise ConfigError(f"quantizer {text!r}: {word!r} says again what was said before")
        fields |= found
    return Quantizer(parse_grid(name), **fields)


def _fields(word: str, text: str) -> dict[str, Any]:
    if match := re.fullmatch(r"group([1-9]\d*)", word):
        return {"granularity": "group", "group": int(match[1])}
    if word not in WORDS:
        hint = nearest_of(word, (*WORDS, "group64"))
        raise ConfigError(f"quantizer {text!r}: {word!r} is unknown{hint}")
    return WORDS[word]


def check_group(columns: int, quantizer: Quantizer) -> None:
    """See that groups fill the rows.

    Raises:
        ConfigError: they do not; it names the nearest sizes that do.
    """
    group = quantizer.group
    if quantizer.granularity != "group" or columns % group == 0:
        return
    divisors = [size for size in range(1, columns + 1) if columns % size == 0]
    around = [max(d for d in divisors if d < group), *[d for d in divisors if d > group][:1]]
    raise ConfigError(
        f"quantizer {quantizer}: groups of {group} do not fill rows of {columns} columns; "
        f"nearest that do: {' and '.join(f'group{size}' for size in around)}"
    )


def extent(x: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """The least and the greatest value of each block of `x`, shaped as its scales.

    `x` is a weight as (rows, columns) or an activation (…, columns); the results are scalars (per
    tensor), (rows, 1), (…, 1) (per token), (…, groups).

    Raises:
        ConfigError: groups do not fill the rows.
    """
    x = x.float()
    if quantizer.granularity == "tensor":
        low, high = x.aminmax()
    elif quantizer.granularity == "channel":
        flat = x.flatten(1)  # torch's aminmax over one axis takes ten times as long
        low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    elif quantizer.granularity == "token":
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    else:
        *lead, columns = x.shape
        check_group(columns, quantizer)
        groups = x.reshape(*lead, columns // quantizer.group, quantizer.group)
        low, high = groups.amin(-1), groups.amax(-1)
    return low, high


def scale_of_range(
    low: Tensor, high: Tensor, quantizer: Quantizer, shrink: float | Tensor = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Scales, and uint8 zero points if asymmetric, for blocks from `low` to `high`.

    The range is widened to hold 0, then multiplied by `shrink`; scales are ones that can be stored.
    """
    low, high = low.float().clamp(max=0) * shrink, high.float().clamp(min=0) * shrink
    grid = quantizer.grid
    if quantizer.symmetric:
        reach = torch.maximum(-low, high) if grid.signed else high
        return storable(reach / grid.high, quantizer), None
    scale = storable((high - low) / grid.high, quantizer)
    return scale, torch.round(-low / scale).clamp(0, grid.high).to(torch.uint8)


def find_scale(
    x: Tensor, quantizer: Quantizer, shrink: float | Tensor = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Scales (float32) and zero points of `x` from each block's least and greatest value.

    Shapes are those of `extent`; `shrink` < 1 cuts the range, for searches.

    Raises:
        ConfigError: groups do not fill the rows.
    """
    return scale_of_range(*extent(x, quantizer), quantizer, shrink)


def storable(scale: Tensor, quantizer: Quantizer) -> Tensor:
    """The scales that can be stored for `scale` (float32, ≥ 0): all of them positive, float32."""
    return join_scale(*split_scale(scale, quantizer), quantizer)


def split_scale(scale: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor | None]:
    """Scales as they are stored, and the scale over them: `join_scale` gives them back.

    Float32 as it is; e4m3 and e8m0 as their bit patterns (uint8). Exact for scales of `find_scale`.
    """
    if quantizer.scale == "e4m3":
        over = _over(scale)
        return encode(nearest(scale / over, E4M3).clamp(min=2.0**-9), E4M3), over
    scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
    if quantizer.scale == "float32":
        return scale, None
    if quantizer.scale == "e8m0-floor":
        exponent = _exponent_below(scale * quantizer.grid.high)
        exponent = exponent - floor(log2(quantizer.grid.high))
    else:
        exponent = -_exponent_below(1 / scale)
    return (exponent + 127).to(torch.uint8), None


def join_scale(stored: Tensor, over: Tensor | None, quantizer: Quantizer) -> Tensor:
    """The scales (float32) that `split_scale` took apart."""
    if quantizer.scale == "float32":
        return stored
    if quantizer.scale == "e4m3":
        return decode(stored, E4M3) * (1.0 if over is None else over)
    return (stored.to(torch.int32) << FRACTION).view(torch.float32)


def _over(scale: Tensor) -> Tensor:
    """The scale over e4m3 scales, which is found again from the scales that it gives."""
    # with 448 = 7·64, x / 448 · 448 / 448 is x / 448 in float32 for every x
    return (scale.amax() / E4M3.high).clamp(min=LEAST_OVER)


def _exponent_below(x: Tensor) -> Tensor:
    """⌊log2 x⌋ of normal float32 numbers, exactly."""
    return (x.contiguous().view(torch.int32) >> FRACTION) - 127


def spread(scale: Tensor, x: Tensor, quantizer: Quantizer) -> Tensor:
    """Scales or zero points, broadcast to the shape of `x`."""
    if scale.dim() and quantizer.granularity == "group":
        scale = scale.repeat_interleave(quantizer.group, -1)
    elif scale.dim() and quantizer.granularity == "channel":
        scale = scale.reshape(-1, *[1] * (x.dim() - 1))
    return scale.expand(x.shape)


def _on_grid(x: Tensor, scale: Tensor, zero: Tensor | None, quantizer: Quantizer) -> Tensor:
    """The grid's values for `x`, zero points added."""
    ratio = x.float() / spread(scale, x, quantizer)
    if zero is not None:  # rounded before, so that ties do not depend on the zero point
        ratio = torch.round(ratio) + spread(zero, x, quantizer)
    return nearest(ratio, quantizer.grid)


def to_codes(x: Tensor, scale: Tensor, zero: Tensor | None, quantizer: Quantizer) -> Tensor:
    """Codes of finite `x`, in its shape.

    int8 for signed ints, uint8 for unsigned ones, uint8 bit patterns for floats.
    """

    def encoded(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return encode(_on_grid(x, scale, zero, quantizer), quantizer.grid)

    return _by_blocks(encoded, x, scale, zero)


def from_codes(codes: Tensor, scale: Tensor, zero: Tensor | None, quantizer: Quantizer) -> Tensor:
    """The values (float32) of codes, as `to_codes` gives them or as `unpack` does."""
    return _restored(decode(codes, quantizer.grid), scale, zero, quantizer)


def _restored(values: Tensor, scale: Tensor, zero: Tensor | None, quantizer: Quantizer) -> Tensor:
    if zero is not None:
        values = values - spread(zero, values, quantizer)
    return values * spread(scale, values, quantizer)


def round_trip(
    x: Tensor, quantizer: Quantizer, scale: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """`x` quantized and back, float32; equal to `from_codes` of `to_codes`.

    Without `scale`, scales and zero points are those of `find_scale`.

    Raises:
        ConfigError: groups do not fill the rows.
    """
    if scale is None:
        scale, zero = find_scale(x, quantizer)

    def rounded(x: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        return _restored(_on_grid(x, scale, zero, quantizer), scale, zero, quantizer)

    return _by_blocks(rounded, x, scale, zero)


def _by_blocks(
    compute: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    x: Tensor, scale: Tensor, zero: Tensor | None,
) -> Tensor:  # fmt: skip
    """`compute` on blocks of rows, where rows have scales of their own: a block fits the cache."""
    if not x.dim() == scale.dim() == 2 or x.numel() <= BLOCK:
        return compute(x, scale, zero)
    rows = max(1, BLOCK // x.shape[-1])
    zeros = [None] * len(x) if zero is None else torch.split(zero, rows)
    cuts = zip(torch.split(x, rows), torch.split(scale, rows), zeros, strict=False)
    return torch.cat([compute(*cut) for cut in cuts])


def stored_bits(quantizer: Quantizer, shape: tuple[int, ...]) -> int:
    """Bits that a weight of `shape` takes: packed codes, scales, and a byte for each zero point.

    Raises:
        ConfigError: groups do not fill the rows.
    """
    rows, columns = shape[0], prod(shape[1:])
    check_group(columns, quantizer)
    blocks = {"tensor": 1, "group": rows * columns // max(1, quantizer.group)}
    count = blocks.get(quantizer.granularity, rows)
    codes = 8 * rows * packed_bytes(columns, quantizer.grid.bits)
    return codes + count * block_bits(quantizer) + (32 if quantizer.scale == "e4m3" else 0)


def block_bits(quantizer: Quantizer) -> int:
    """Bits of the scale and the zero point that each block has."""
    return (32 if quantizer.scale == "float32" else 8) + (0 if quantizer.symmetric else 8)
