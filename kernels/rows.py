"""What ops over rows end in: values v (…, K) stored, or quantized by row or group, and projected.

    s = amax |v| / limit (1 for a row of zeros)    q = nearest(v / s)    low = v · downᵀ

v has x's dtype. Results are always three: codes (int8 or e4m3) or v itself, (…, K); the scales,
float32 (…, 1) of a token or (…, K/N) of groups; low (…, R) in x's dtype, summed in float32. What
is not asked for is empty, (0,). Codes and scales are those of kernels/quantizers.py, to the bit.
Fusing {smooth, quantize, down-projection} is SVDQuant's (METHODS 1.12).

A kernel over rows says how a block of v is made, as a function of Triton's language; `finish` does
the rest. A program takes a few rows: whole ones in registers where no projection needs many rows
at once, else in blocks of columns, whose values are made again for the codes of a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.kernels.launch import (
    IN_INTERPRETER,
    Launch,
    cdiv,
    check,
    constant,
    contiguous,
    dot,
    jit,
    power_of_two,
    rows_of,
    tl,
)
from effuse.kernels.quantizers import TINY, Quantizer, find_scale, parse_quantizer, to_codes

Results = tuple[Tensor, Tensor, Tensor]

GROUPS = tuple(2**n for n in range(4, 9))
WHOLE_ROW = 16384  # values that a program holds in registers at most
LOOP = 4096  # of longer rows at once
REGISTERS = 4096  # values of a program that takes several rows
PROGRAMS = 256  # that fill a GPU
ROUNDER = constant(1.5 * 2.0**23)  # a sum of this size has no fraction
LEAST = constant(TINY)
TAKEN = (
    "int8/token/dynamic", "e4m3/token/dynamic",
    *(f"int{bits}/group{size}/dynamic" for bits in (8, 4) for size in GROUPS),
)  # fmt: skip


def row_quantizer(text: str) -> Quantizer | None:
    """The quantizer of a text, None of an empty one.

    Raises:
        BackendError: kernels over rows have no such quantizer.
    """
    how = parse_quantizer(text) if text else None
    check(
        how is None or str(how) in TAKEN,
        f"quantizer: expected int8/token/dynamic, e4m3/token/dynamic, int8/groupN/dynamic or "
        f"int4/groupN/dynamic with N a power of two from {GROUPS[0]} to {GROUPS[-1]}, got "
        f"{text!r}; quantize in an op of its own (effuse::fake_quantize)",
    )
    return how


def finish_reference(values: Tensor, down: Tensor | None, quantizer: str) -> Results:
    """The results for fresh `values` (…, K) in x's dtype; `down` is (R, K) or None."""
    values = values.contiguous()
    low = values.new_empty(0) if down is None else project_rows(values, down)
    how = row_quantizer(quantizer)
    if how is None:
        return values, values.new_empty(0, dtype=torch.float32), low
    scale, _ = find_scale(values, how)
    codes = to_codes(values, scale, None, how)
    return codes.view(_dtype(values, how)), scale, low


def project_rows(values: Tensor, down: Tensor) -> Tensor:
    """values (…, K) · down (R, K)ᵀ in values' dtype, summed in float32."""
    return F.linear(values.float(), down.to(values.dtype).float()).to(values.dtype)


def smoothed(values: Tensor, smooth: Tensor | None) -> Tensor:
    """values · smooth (K,), rounded to values' dtype."""
    return values if smooth is None else (values.float() * smooth.float()).to(values.dtype)


def empty_results(x: Tensor, columns: int, down: Tensor | None, quantizer: str) -> Results:
    """The results for rows of `columns` values made of the rows of `x`, not filled."""
    lead, how = x.shape[:-1], row_quantizer(quantizer)
    low = x.new_empty(0 if down is None else (*lead, down.shape[0]))
    scales: int | tuple[int, ...] = 0
    if how is not None:
        scales = (*lead, columns // how.group if how.group else 1)
    codes = x.new_empty((*lead, columns), dtype=_dtype(x, how))
    return codes, x.new_empty(scales, dtype=torch.float32), low


def _dtype(x: Tensor, how: Quantizer | None) -> torch.dtype:
    if how is None:
        return x.dtype
    return torch.int8 if how.grid.kind == "int" else torch.float8_e4m3fn


@dataclass(frozen=True)
class Tile:
    """What a program takes at once: rows, columns and ranks; and its warps."""

    rows: int
    columns: int
    ranks: int
    warps: int


@jit
def round_even(v):
    """The nearest integers, ties to even, of |v| < 2^22; what is larger stays so."""
    return (v + ROUNDER) - ROUNDER


@jit
def narrow(v, TYPE: tl.constexpr):
    """v in a float type, rounded to the nearest, ties to even."""
    if IN_INTERPRETER and v.dtype == tl.float32 and tl.bfloat16 == TYPE:  # it would cut off
        bits = v.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        v = (bits & -0x10000).to(tl.float32, bitcast=True)
    return v.to(TYPE)


@jit
def to_code(v, LIMIT: tl.constexpr):
    """The codes of v (float32, in units of the scale): e4m3 where LIMIT is 448, else int8."""
    v = tl.clamp(v, -LIMIT, LIMIT)
    return to_e4m3(v) if LIMIT == 448.0 else round_even(v).to(tl.int8)


@jit
def to_e4m3(v):
    """v (float32, within ±448) as float8e4nv, to the nearest, ties to even."""
    if IN_INTERPRETER:  # it would lose what is carried into the exponent
        bits = v.to(tl.int32, bitcast=True)
        binade = tl.maximum(bits & 0x7F800000, 121 << 23)
        step = (binade - (3 << 23)).to(tl.float32, bitcast=True)
        rounded = (round_even(tl.abs(v) / step) * step).to(tl.int32, bitcast=True)
        v = (rounded | (bits & -0x80000000)).to(tl.float32, bitcast=True)
    return v.to(tl.float8e4nv)


@jit
def scale_of(amax, LIMIT: tl.constexpr):
    """The scales of blocks whose greatest magnitude is `amax`."""
    scale = tl.div_rn(amax, LIMIT)
    return tl.where(scale < LEAST, 1.0, scale)


@jit
def load_rows(x, row, here, col, within, stride):
    """A block (rows, columns) of x, whose rows are `stride` apart; 0 outside."""
    mask = here[:, None] & within[None, :]
    return tl.load(x + row[:, None] * stride + col[None, :], mask=mask, other=0.0)


@jit
def load_columns(vector, col, within):
    """A row (1, columns) of float32; 0 outside."""
    return tl.load(vector + col, mask=within, other=0.0).to(tl.float32)[None, :]


@jit
def smooth_block(v, smooth, col, within):
    """v · smooth, rounded to v's type."""
    if smooth is not None:
        v = narrow(v.to(tl.float32) * load_columns(smooth, col, within), v.dtype)
    return v


@jit
def project_block(v, acc, down, rank, columns, col, within, BR: tl.constexpr):
    """acc + v · downᵀ over a block of columns, for a block of the ranks."""
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    mask = within[:, None] & (r < rank)[None, :]
    d = tl.load(down + r[None, :] * columns + col[:, None], mask=mask, other=0.0)
    return dot(v, narrow(d, v.dtype), acc)


@jit
def store_rows(codes, q, row, here, col, columns):
    """Store a block of dense rows."""
    mask = here[:, None] & (col < columns)[None, :]
    q = narrow(q, codes.dtype.element_ty)
    tl.store(codes + row[:, None] * columns + col[None, :], q, mask=mask)


@jit
def store_groups(
    codes, scale, v, row, here, col, start, columns,
    LIMIT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Quantize a block by groups, and store its codes and scales."""
    parts = tl.reshape(v.to(tl.float32), (BM, BK // GROUP, GROUP))
    s = scale_of(tl.max(tl.abs(parts), 2), LIMIT)
    q = to_code(tl.div_rn(parts, s[:, :, None]), LIMIT)
    store_rows(codes, tl.reshape(q, (BM, BK)), row, here, col, columns)
    group = start // GROUP + tl.arange(0, BK // GROUP)
    store_rows(scale, s, row, here, group, columns // GROUP)


@jit
def store_tokens(codes, v, s, row, here, col, columns, LIMIT: tl.constexpr):
    """Quantize a block under its rows' scales, and store its codes."""
    q = to_code(tl.div_rn(v.to(tl.float32), s[:, None]), LIMIT)
    store_rows(codes, q, row, here, col, columns)


@jit
def block_of(values: tl.constexpr, given, row, here, col, columns):
    """The block of v that `values` makes; 0 outside."""
    within = col < columns
    v = values(given, row, here, col, within)
    return tl.where(here[:, None] & within[None, :], v, 0.0).to(v.dtype)


@jit
def finish(
    values: tl.constexpr, given, down, codes, scale, low, rows, columns, rank,
    LIMIT: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Make v by `values(given, row, here, col, within)` in x's type, and store the results.

    LIMIT is 0 where v itself is stored; GROUP is 0 for tokens; WHOLE: a row fits in a block.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    here = row < rows
    mine = row < tl.where(tl.program_id(1) == 0, rows, 0)  # other programs: other ranks, no more
    TOKEN: tl.constexpr = LIMIT != 0 and GROUP == 0
    amax = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BR), tl.float32)
    for start in range(0, BK if WHOLE else columns, BK):
        col = start + tl.arange(0, BK)
        v = block_of(values, given, row, here, col, columns)
        if down is not None:
            acc = project_block(v, acc, down, rank, columns, col, col < columns, BR)
        if TOKEN:
            amax = tl.maximum(amax, tl.max(tl.abs(v.to(tl.float32)), 1))
        elif LIMIT == 0:
            store_rows(codes, v, row, mine, col, columns)
        else:
            store_groups(codes, scale, v, row, mine, col, start, columns, LIMIT, GROUP, BM, BK)
    if TOKEN:
        s = scale_of(amax, LIMIT)
        for start in range(0, BK if WHOLE else columns, BK):
            col = start + tl.arange(0, BK)
            v = block_of(values, given, row, here, col, columns)
            store_tokens(codes, v, s, row, mine, col, columns, LIMIT)
        tl.store(scale + row, s, mask=mine)  # last: a whole row's v is computed but once then
    if down is not None:
        r = tl.program_id(1) * BR + tl.arange(0, BR)
        store_rows(low, acc, row, here, r, rank)


def launch_rows(
    kernel: Any,
    results: tuple[Tensor, ...],
    x: Tensor,
    down: Tensor | None,
    quantizer: str,
    args: Mapping[str, Tensor | int | float | None],
    constants: Mapping[str, Any],
    vectors: Mapping[str, Tensor | None],
) -> Launch | None:
    """The launch of `kernel`, which ends in `finish`; None where there are no values.

    Args:
        kernel: takes `args`, `vectors`, and what `finish` does, under its names.
        results: as `empty_results` gives them.
        x: whose rows are taken, at `stride` from each other.
        down: (R, K) or None.
        quantizer: as `row_quantizer` takes it.
        args: of the kernel, beside the vectors.
        constants: of the kernel.
        vectors: (K,), by name.

    Raises:
        BackendError: rows are no plain rows, or a vector or `down` does not fit them.
    """
    codes, scale, low = results
    rows, columns = rows_of(codes), codes.shape[-1]
    stride = row_stride("x", x)
    _check_operands(x, columns, down, vectors)
    if not codes.numel():
        return None
    how = row_quantizer(quantizer)
    limit, group = (0.0, 0) if how is None else (how.grid.high, how.group)
    rank = 0 if down is None else down.shape[0]
    tile = row_tile(rows, columns, rank, group, x.element_size())
    own = {"down": down if rank else None, "codes": codes, "scale": scale, "low": low}
    sizes = {"rows": rows, "columns": columns, "rank": rank, "stride": stride}
    blocks = {"BM": tile.rows, "BK": tile.columns, "BR": tile.ranks}
    grid = (cdiv(rows, tile.rows), max(1, cdiv(rank, tile.ranks)))
    flags = {"LIMIT": limit, "GROUP": group, "WHOLE": tile.columns >= columns}
    return Launch(
        kernel,
        grid,
        {"x": x, **vectors, **args, **own, **sizes},
        {**constants, **flags, **blocks},
        warps=tile.warps,
    )


def _check_operands(
    x: Tensor, columns: int, down: Tensor | None, vectors: Mapping[str, Tensor | None]
) -> None:
    check(
        x.dtype in (torch.float32, torch.float16, torch.bfloat16),
        f"x: expected float32, float16 or bfloat16, got {x.dtype}; cast it first",
    )
    contiguous(down=down, **vectors)
    shapes = {"down": down, **vectors}
    for name, tensor in shapes.items():
        dims = 2 if name == "down" else 1
        check(
            tensor is None or (tensor.dim() == dims and tensor.shape[-1] == columns),
            f"{name}: expected {'(R, ' if dims == 2 else '('}{columns}) for rows of {columns} "
            f"values, got {tensor if tensor is None else tuple(tensor.shape)}",
        )


def row_stride(name: str, x: Tensor) -> int:
    """How far apart the rows of `x` are, whose leading axes merge into one.

    Raises:
        BackendError: they do not merge, or the rows' elements are not neighbours.
    """
    lead = [axis for axis in zip(x.shape[:-1], x.stride()[:-1], strict=True) if axis[0] != 1]
    merge = all(outer == size * inner for (_, outer), (size, inner) in pairwise(lead))
    check(
        not x.numel() or (merge and (x.stride(-1) == 1 or x.shape[-1] == 1)),
        f"{name}: expected dense rows at one distance from each other, got shape "
        f"{tuple(x.shape)} with strides {x.stride()}; call .contiguous() first",
    )
    return lead[-1][1] if lead else x.shape[-1]


def row_tile(rows: int, columns: int, rank: int, group: int, width: int) -> Tile:
    """The tile for `rows` of `columns` values of `width` bytes, `rank` 0 without a projection."""
    if not rank:
        block = power_of_two(columns, 16)
        block = block if block <= WHOLE_ROW else LOOP
        several = min(power_of_two(rows // PROGRAMS), max(1, REGISTERS // block), 32)
        return Tile(several, block, 16, min(16, max(4, several * block // 1024)))
    wide = width == 2  # float32 has no exact tensor cores: its products are made in registers
    block = power_of_two(columns, max(16, group), max(group, 128 if wide else 32))
    ranks = power_of_two(rank, 16, (128 * 128 if wide else 1024) // block)
    return Tile(16, block, ranks, 8 if block > 128 else 4)
