"""Grids: the values that a code of a few bits can take, in units of a scale.

    int:    -(2^(b-1) - 1) … 2^(b-1) - 1 (signed, restricted), 0 … 2^b - 1 (unsigned)
    float:  x̂ = round(x / s) · s,  s = 2^(max(⌊log2 |x|⌋, 1 - bias) - M),  bias = 2^(E-1) - 1

A float grid has a sign, E exponent and M mantissa bits, and subnormal values; a real-valued maximum
or bias (METHODS 0.4) is the same grid under another scale. All patterns are finite, but for the
last of e4m3 (NaN, as in OCP's e4m3fn) and the last binade of e5m2 (as in IEEE 754).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from effuse.errors import ConfigError
from effuse.errors import nearest as nearest_of

PATTERN = re.compile(r"(?P<sign>u?)int(?P<bits>\d+)|e(?P<exponent>\d+)m(?P<mantissa>\d+)")
NAMED = ("e1m2", "e2m1", "e2m3", "e3m0", "e3m2", "e3m4", "e4m3", "e5m2", "int2", "int3", "int4",
         "int6", "int8", "uint2", "uint3", "uint4", "uint6", "uint8")  # fmt: skip
RESERVED = {(4, 3): 1, (5, 2): 4}  # greatest patterns that are no numbers, by (E, M)
FRACTION = 23  # bits of float32's mantissa; its bias is 127


@dataclass(frozen=True)
class Grid:
    """The values of one code, in units of the scale; `str` gives its name, `parse_grid` takes it.

    Args:
        kind: `int` or `float`.
        bits: of one code, 2 to 8.
        mantissa: bits of a float's mantissa; the exponent has `bits - 1 - mantissa`, at least 1.
        signed: of an int: the range ±(2^(bits-1) - 1), else 0 to 2^bits - 1.

    Raises:
        ConfigError: there is no such grid.
    """

    kind: Literal["int", "float"]
    bits: int
    mantissa: int = 0
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"grid {self}: expected 2 to 8 bits, got {self.bits}")
        if self.kind == "int" and self.mantissa:
            raise ConfigError(f"grid {self}: only a float has a mantissa, got {self.mantissa} bits")
        if self.kind == "float" and not (self.signed and 0 <= self.mantissa <= self.bits - 2):
            raise ConfigError(f"grid {self}: a float has a sign and at least 1 bit of exponent")

    def __str__(self) -> str:
        if self.kind == "float":
            return f"e{self.exponent}m{self.mantissa}"
        return f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def exponent(self) -> int:
        """Bits of a float's exponent; 0 of an int."""
        return self.bits - 1 - self.mantissa if self.kind == "float" else 0

    @property
    def bias(self) -> int:
        """What is subtracted from a float's stored exponent."""
        return 2 ** (self.exponent - 1) - 1 if self.kind == "float" else 0

    @property
    def high(self) -> float:
        """The greatest value."""
        return _magnitudes(self)[-1]

    @property
    def low(self) -> float:
        """The least value."""
        return -self.high if self.signed else 0.0

    def levels(self) -> Tensor:
        """All values, sorted, float32."""
        magnitudes = torch.tensor(_magnitudes(self))
        return torch.cat([-magnitudes[1:].flip(0), magnitudes]) if self.signed else magnitudes


INT8, UINT8 = Grid("int", 8), Grid("int", 8, signed=False)
INT4, UINT4 = Grid("int", 4), Grid("int", 4, signed=False)
E4M3, E5M2, E2M1 = Grid("float", 8, 3), Grid("float", 8, 2), Grid("float", 4, 1)


def parse_grid(text: str) -> Grid:
    """The grid called `int3`, `uint8`, `e4m3`, …

    Raises:
        ConfigError: there is no such grid.
    """
    match = PATTERN.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"grid {text!r}: expected intN, uintN or eXmY of 2 to 8 bits{nearest_of(text, NAMED)}"
        )
    if match["bits"]:
        return Grid("int", int(match["bits"]), signed=not match["sign"])
    mantissa = int(match["mantissa"])
    return Grid("float", 1 + int(match["exponent"]) + mantissa, mantissa)


@lru_cache
def _magnitudes(grid: Grid) -> tuple[float, ...]:
    """The values that are not negative, by their code without its sign."""
    if grid.kind == "int":
        return tuple(float(n) for n in range(2 ** (grid.bits - grid.signed)))
    finite = 2 ** (grid.bits - 1) - RESERVED.get((grid.exponent, grid.mantissa), 0)
    return tuple(_magnitude(code, grid) for code in range(finite))


def _magnitude(code: int, grid: Grid) -> float:
    exponent, fraction = divmod(code, 2**grid.mantissa)
    significand = fraction + (2**grid.mantissa if exponent else 0)
    return float(significand * 2.0 ** (max(exponent, 1) - grid.bias - grid.mantissa))


def step(x: Tensor, grid: Grid) -> Tensor:
    """The distance between the grid's values around each `x` (float32, in units of the scale).

    On a boundary between two binades, that of the outer one; 1 for ints (METHODS 0.4's s(x)).
    """
    if grid.kind == "int":
        return torch.ones_like(x)
    least = 1 - grid.bias + 127 << FRACTION  # float32's bits of the least normal value
    binade = (x.contiguous().view(torch.int32) & 0x7F800000).clamp(min=least)
    return (binade - (grid.mantissa << FRACTION)).view(torch.float32)


def nearest(x: Tensor, grid: Grid) -> Tensor:
    """The nearest values of the grid to `x` (in units of the scale), float32.

    Saturates at the grid's ends; ties go to the even code; NaN stays NaN.
    """
    x = x.float().clamp(grid.low, grid.high)
    if grid.kind == "int":
        return torch.round(x)
    steps = step(x, grid)
    ratio = x / steps
    rounded = torch.round(ratio)
    if not grid.mantissa:  # round() goes up from between powers of two, whichever code is even
        code = (steps.view(torch.int32) >> FRACTION) + grid.bias - 127
        down = (ratio.abs() == 1.5) & (code % 2 == 0)
        rounded = torch.where(down, torch.ones_like(ratio).copysign(ratio), rounded)
    return rounded * steps


def encode(values: Tensor, grid: Grid) -> Tensor:
    """The codes of `values` that are on the grid.

    Two's complement (int8) for signed ints, the number itself (uint8) for unsigned ones, sign,
    exponent and mantissa from the top bit down (uint8) for floats.
    """
    if grid.kind == "int":
        return values.to(torch.int8 if grid.signed else torch.uint8)
    steps = step(values, grid)
    binade = (steps.view(torch.int32) >> FRACTION) + grid.mantissa + grid.bias - 128
    code = (binade << grid.mantissa) + (values / steps).abs().to(torch.int32)
    negative = torch.signbit(values).to(torch.int32) << grid.bits - 1
    return (code | negative).to(torch.uint8)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """The values of `codes` (of which the low bits count), float32; NaN for reserved patterns."""
    if grid.kind == "int" and grid.signed:
        unused = 8 - grid.bits
        return (codes.view(torch.int8) << unused >> unused).float()
    if grid.kind == "int":
        return codes.float()
    half = 2 ** (grid.bits - 1)
    magnitudes = _magnitudes(grid)
    table = (*magnitudes, *[float("nan")] * (half - len(magnitudes)))
    both = torch.tensor([*table, *(-value for value in table)], device=codes.device)
    return both[codes.to(torch.int32)]
