# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""Rotary position embedding: pairs of a head's values, turned by their position's angle.

    y = x · cos + rot(x) · sin
    interleaved   rot(x)[2i] = -x[2i+1]      rot(x)[2i+1] = x[2i]
    halves        rot(x)[i] = -x[i + d/2]    rot(x)[i + d/2] = x[i]

x (b, s, h, d) where positions are axis 1, (b, h, s, d) where they are axis 2; float, with any
strides. cos and sin float, (s, d) or (s, d/2): then one for each pair; (1, s, …) and (b, s, …) too.
y has x's shape and dtype and is contiguous. Arithmetic is float32, rounded once.
Source: Su et al., RoFormer.

A program takes a block of positions, whose angles it reads once for several heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effuse.kernels.launch import Launch, Native, cdiv, check, define, jit, power_of_two, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.rows import narrow

PAIRS = ("interleaved", "halves")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DIMS = 4  # of x
WIDEST = 8192  # values of a head
VALUES = 1024  # that a program takes of each head, or one row: 8 a thread, 16 bytes of a half type
HEADS = 4  # that a program takes one after another


def reference(x: Tensor, cos: Tensor, sin: Tensor, pairs: str, axis: int) -> Tensor:
    """x (b, s, h, d) or (b, h, s, d), cos and sin ([b,] s, d or d/2) -> y like x, contiguous.

    Raises:
        BackendError: an operand does not fit x, or `pairs` or `axis` is unknown.
    """
    _check(x, cos, sin, pairs, axis)
    wide = x.float()
    cos, sin = (_spread(each, x, pairs, axis) for each in (cos, sin))
    return (wide * cos + _rotated(wide, pairs) * sin).to(x.dtype).contiguous()


def _spread(table: Tensor, x: Tensor, pairs: str, axis: int) -> Tensor:
    """cos or sin for every value of a head, to be broadcast over x."""
    table = table.float().unsqueeze(-1 if table.shape[-1] < x.shape[-1] else -2)
    if table.shape[-1] == 1:
        both = table.expand(*table.shape[:-1], 2)
        table = (both if pairs == "interleaved" else both.mT).flatten(-2).unsqueeze(-2)
    return table if axis == 1 else table.movedim(-2, -3)


def _rotated(x: Tensor, pairs: str) -> Tensor:
    if pairs == "interleaved":
        first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-second, first), -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


@jit
def load_pairs(row, here, half, STEP: tl.constexpr, WOVEN: tl.constexpr, BH: tl.constexpr):
    """The first and the second values of pairs, (rows, BH) float32; `row` has rows' addresses."""
    BM: tl.constexpr = row.shape[0]
    if WOVEN:
        col = tl.arange(0, 2 * BH)
        block = tl.load(
            row[:, None] + (col * STEP)[None, :],
            here[:, None] & (col < 2 * half)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        first, second = tl.split(tl.reshape(block, (BM, BH, 2)))
    else:
        first = load_once(row, here, half, STEP, BH)
        second = load_once(row + half * STEP, here, half, STEP, BH)
    return first, second


@jit
def load_once(row, here, half, STEP: tl.constexpr, BH: tl.constexpr):
    """One value for each pair, (rows, BH) float32."""
    col = tl.arange(0, BH)
    places = row[:, None] + (col * STEP)[None, :]
    return tl.load(places, here[:, None] & (col < half)[None, :], other=0.0).to(tl.float32)


@jit
def load_table(
    row, here, half,
    STEP: tl.constexpr, WOVEN: tl.constexpr, EACH: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """cos or sin of the first and the second values; EACH: they have one of their own."""
    if EACH:
        first, second = load_pairs(row, here, half, STEP, WOVEN, BH)
    else:
        first = load_once(row, here, half, STEP, BH)
        second = first
    return first, second


@jit
def store_pairs(row, here, half, first, second, WOVEN: tl.constexpr):
    """The inverse of `load_pairs`, rounded to the type of y."""
    BM: tl.constexpr = first.shape[0]
    BH: tl.constexpr = first.shape[1]
    TYPE: tl.constexpr = row.dtype.element_ty
    if WOVEN:
        col = tl.arange(0, 2 * BH)
        block = tl.reshape(tl.join(narrow(first, TYPE), narrow(second, TYPE)), (BM, 2 * BH))
        tl.store(row[:, None] + col[None, :], block, here[:, None] & (col < 2 * half)[None, :])
    else:
        col = tl.arange(0, BH)
        within = here[:, None] & (col < half)[None, :]
        tl.store(row[:, None] + col[None, :], narrow(first, TYPE), within)
        tl.store(row[:, None] + (col + half)[None, :], narrow(second, TYPE), within)


@jit
def rotary_kernel(
    x, cos, sin, y, positions, heads, half,
    x_batch, x_position, x_head, y_batch, y_position, y_head,
    cos_batch, cos_position, sin_batch, sin_position,
    X_STEP: tl.constexpr, COS_STEP: tl.constexpr, SIN_STEP: tl.constexpr,
    COS_EACH: tl.constexpr, SIN_EACH: tl.constexpr, WOVEN: tl.constexpr,
    BM: tl.constexpr, BH: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """One program: BM positions of HEADS heads; WOVEN: pairs are neighbours."""
    batch = tl.program_id(2).to(tl.int64)
    position = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = position < positions
    cos += batch * cos_batch + position * cos_position
    sin += batch * sin_batch + position * sin_position
    cos_a, cos_b = load_table(cos, here, half, COS_STEP, WOVEN, COS_EACH, BH)
    sin_a, sin_b = load_table(sin, here, half, SIN_STEP, WOVEN, SIN_EACH, BH)
    for index in tl.static_range(HEADS):
        head = tl.program_id(1).to(tl.int64) * HEADS + index
        some = position < tl.where(head < heads, positions, 0)
        source = x + batch * x_batch + head * x_head + position * x_position
        a, b = load_pairs(source, some, half, X_STEP, WOVEN, BH)
        result = y + batch * y_batch + head * y_head + position * y_position
        store_pairs(result, some, half, a * cos_a - b * sin_a, b * cos_b + a * sin_b, WOVEN)


def empty(x: Tensor, cos: Tensor, sin: Tensor, pairs: str, axis: int) -> Tensor:
    """The result of `reference`, not filled."""
    _check(x, cos, sin, pairs, axis)
    return x.new_empty(x.shape)


def launch(
    results: tuple[Tensor, ...], x: Tensor, cos: Tensor, sin: Tensor, pairs: str, axis: int
) -> Launch | None:
    """What fills the one of `results`.

    Raises:
        BackendError: an operand does not fit x, or `pairs` or `axis` is unknown.
    """
    _check(x, cos, sin, pairs, axis)
    (y,) = results
    if x.numel() == 0:
        return None
    positions, heads, half = x.shape[axis], x.shape[3 - axis], x.shape[-1] // 2
    args: dict[str, Any] = {"x": x, "cos": cos, "sin": sin, "y": y}
    args |= {"positions": positions, "heads": heads, "half": half}
    args |= _strides("x", x, axis) | _strides("y", y, axis)
    constants: dict[str, Any] = {"WOVEN": pairs == "interleaved", "X_STEP": x.stride(-1)}
    for name, table in (("cos", cos), ("sin", sin)):
        args |= {f"{name}_batch": _batch_stride(table), f"{name}_position": table.stride(-2)}
        constants[f"{name.upper()}_STEP"] = table.stride(-1)
        constants[f"{name.upper()}_EACH"] = table.shape[-1] > half
    tile, warps = _tile(heads, half)
    grid = (cdiv(positions, tile["BM"]), cdiv(heads, tile["HEADS"]), x.shape[0])
    return Launch(rotary_kernel, grid, args, {**constants, **tile}, warps)


def _strides(name: str, tensor: Tensor, axis: int) -> dict[str, int]:
    batch, *middle, _ = tensor.stride()
    position, head = middle[axis - 1], middle[2 - axis]
    return {f"{name}_batch": batch, f"{name}_position": position, f"{name}_head": head}


def _batch_stride(table: Tensor) -> int:
    return table.stride(0) if table.dim() == DIMS - 1 and table.shape[0] > 1 else 0


def _tile(heads: int, half: int) -> tuple[dict[str, int], int]:
    """How much a program takes, and its warps."""
    pairs = power_of_two(half)
    rows = max(1, VALUES // (2 * pairs))
    tile = {"BM": rows, "BH": pairs, "HEADS": HEADS if heads >= HEADS else 1}
    return tile, max(4, 2 * pairs * rows // 512)


def _check(x: Tensor, cos: Tensor, sin: Tensor, pairs: str, axis: int) -> None:
    check(pairs in PAIRS, f"pairs: expected one of {', '.join(PAIRS)}, got {pairs!r}")
    check(axis in (1, 2), f"axis: expected 1 or 2, the positions' axis of x, got {axis}")
    shape = tuple(x.shape)
    check(
        len(shape) == DIMS and shape[-1] % 2 == 0 and shape[-1] <= WIDEST,
        f"x: expected four axes, of which the last is even and at most {WIDEST}, got {shape}; "
        "reshape to (batch, positions, heads, width)",
    )
    for name, table in (("cos", cos), ("sin", sin)):
        _check_table(name, tuple(table.shape), shape, shape[axis])
    for name, each in (("x", x), ("cos", cos), ("sin", sin)):
        check(each.dtype in FLOATS, f"{name}: expected a float of 16 or 32 bits, got {each.dtype}")


def _check_table(name: str, table: tuple[int, ...], shape: tuple[int, ...], positions: int) -> None:
    lead, last = table[:-2], table[-2:]
    fits = last in ((positions, shape[-1]), (positions, shape[-1] // 2))
    check(
        fits and lead in ((), (1,), shape[:1]),
        f"{name}: expected ({positions}, {shape[-1]}) or ({positions}, {shape[-1] // 2}), alone or "
        f"for each of a batch of {shape[0]}, got {table}; index it by x's positions first",
    )


NATIVE = Native(empty, launch)
TARGET = define("rotary", reference, NATIVE)


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    q, k = torch.randn(2, 5, 2, 3, 16, generator=g).unbind(2)  # planes of one result
    cos, sin = torch.randn(2, 5, 16, generator=g)
    each = torch.randn(2, 2, 5, 8, generator=g)
    woven = torch.view_as_real(torch.randn(5, 8, generator=g, dtype=torch.complex64))
    return [
        (q, cos, sin, "interleaved", 1),
        (k.half(), cos, sin, "halves", 1),
        (q.bfloat16().transpose(1, 2), cos[None], sin[None], "interleaved", 2),
        (k.transpose(1, 2), each[0], each[1], "halves", 2),
        (q.bfloat16(), woven[..., 0], woven[..., 1], "interleaved", 1),
        (q[:1, :1, :, :6], cos[:1, :6].half(), sin[:1, :3].half(), "halves", 1),
        (q[:, :0], cos[:0], sin[:0], "interleaved", 1),
    ]


ROW = Op(
    "rotary",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "rotary position embedding of queries or keys in one kernel",
    NATIVE,
)
