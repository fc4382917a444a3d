"""A linear layer on a 4-bit weight, unpacked in registers, with its epilogue in one kernel.

    y_mn = epilogue(Σ_k x̂_mk · ŵ_nk),   ŵ_nk = code_nk · t_n,k/G (· over),   x̂_mk = x_mk · s

`packed` (N, K / 2) holds codes on int4 or e2m1, low half first; t (N, K / G) or (N, 1) is stored
as kernels/low_bit.py has it. What x is decides the arithmetic:

    x any float, no scale           products in x's type, to which ŵ is rounded
    x int8, s (…, K / G) or (…, 1)  int8 products, exact in int32 over each group
    x e4m3, s (…, 1), weights e2m1  products of x and code · t in bfloat16, which holds both exactly

Sums are in float32. Epilogue: kernels/epilogue.py.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from effuse.cost import FORMULAS, matmul_flops
from effuse.kernels.epilogue import (
    Epilogue,
    check_tail,
    finish,
    finish_tile,
    result_shape,
    tail_args,
    tail_constants,
)
from effuse.kernels.launch import Launch, Native, define, dot, jit, tl
from effuse.kernels.low_bit import pack_weight, unpack_reference
from effuse.kernels.op import Op, Sample
from effuse.kernels.packed_arguments import check_activations, check_weight
from effuse.kernels.quantizers import Quantizer, find_scale, parse_quantizer, to_codes
from effuse.kernels.rows import narrow
from effuse.kernels.tiles import BAND, Tile, clamped, load, pick, place, programs
from effuse.kernels.unpacking import (
    e2m1_to_float,
    halves,
    int4_in_high_bits,
    int4_to_float,
    scale_to_float,
    spread,
)


def reference(
    x: Tensor,
    scale: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    over: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    weight: str,
    activation: str,
    parts: int,
    dtype: torch.dtype,
) -> Tensor:
    """x (…, K) -> (…, N) in `dtype`; the sum is in float64. `weight` is the weight's quantizer."""
    columns = x.shape[-1]
    real = unpack_reference(packed, w_scale, None, over, weight, [len(packed), columns])
    real = real.double() if scale is not None else real.to(x.dtype).double()
    given = x.double() if scale is None else x.double() * _spread(scale, columns)
    total = (given @ real.T).float()
    return finish(total, Epilogue(bias, low, up, gate, residual, activation, parts), dtype)


def _spread(scale: Tensor, columns: int) -> Tensor:
    return scale.double().repeat_interleave(columns // max(1, scale.shape[-1]), -1)


@jit
def int8_sums(
    packed, right, w_scale, x_scale, k, half, depth,
    GROUP: tl.constexpr, X_GROUP: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
    STAGES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Σ over groups of scales · (Σ_k packed · right in int32), float32 (BN, BM).

    A scale whose group is 0 is left out: it is the same for the whole row.
    """
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for start in tl.range(0, depth, STEP, num_stages=STAGES):  # said, it brings scales early too
        size = tl.minimum(depth - start, STEP)
        w = int4_in_high_bits(load(packed + start // 2, half[None, :], size // 2, EVEN))
        q = load(right + start, k[:, None], size, EVEN)
        part = dot(w, q, tl.zeros((BN, BM), dtype=tl.int32)).to(tl.float32)
        if GROUP:
            part *= tl.load(w_scale + start // GROUP)[:, None]
        if X_GROUP:
            part *= tl.load(x_scale + start // X_GROUP)[None, :]
        total += part
    return total * 0.0625


@jit
def float_sums(
    packed, right, w_scale, over, k, half, depth, groups, compute,
    GRID: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Σ_k (code · scale · over) · right, both rounded to the type `compute`, float32 (BN, BM)."""
    total = tl.zeros((BN, BM), dtype=tl.float32)
    g = tl.arange(0, GROUPS)
    for start in range(0, depth, BK):
        bits = halves(load(packed + start // 2, half[None, :], (depth - start) // 2, EVEN))
        value = int4_to_float(bits) if GRID == "int" else e2m1_to_float(bits)
        at = start // GROUP + g if GROUP else g
        stored = load(w_scale[:, None] + at[None, :], at[None, :], groups, EVEN)
        w = value * spread(scale_to_float(stored, SCALE) * over, BN, GROUPS, BK)
        x = load(right + start, k[:, None], depth - start, EVEN)
        total = dot(narrow(w, compute), x.to(compute), total)
    return total


@jit
def linear_packed_kernel(
    y, x, scale, packed, w_scale, over, bias, low, up, gate, residual,
    rows, columns, depth, groups, rank, span, plane,
    GRID: tl.constexpr, SCALE: tl.constexpr, GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    STEP: tl.constexpr, GROUPS: tl.constexpr, ACTIVATION: tl.constexpr, PLANES: tl.constexpr,
    EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
    BAND: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y: rows m, columns n."""
    m, n = place(rows, columns, BM, BN, BAND)
    row, column = clamped(m, rows), clamped(n, columns)
    k, half = tl.arange(0, BK), tl.arange(0, BK // 2)
    left = packed + column[:, None] * (depth // 2) + half[None, :]
    right = x + row[None, :] * depth + k[:, None]
    w_scale += column * groups
    if x.dtype.element_ty == tl.int8:
        x_scale = scale + row * (depth // X_GROUP) if X_GROUP else scale
        total = int8_sums(left, right, w_scale, x_scale, k, half, depth,
                          GROUP, X_GROUP, STEP, EVEN, STAGES, BM, BN, BK)  # fmt: skip
        if not GROUP:
            total *= tl.load(w_scale)[:, None]
        if not X_GROUP:
            total *= tl.load(scale + m, mask=m < rows, other=0.0)[None, :]
    elif scale is not None:
        total = float_sums(left, right, w_scale, 1.0, k, half, depth, groups, tl.bfloat16,
                           GRID, SCALE, GROUP, EVEN, BM, BN, BK, GROUPS)  # fmt: skip
        total *= tl.load(scale + m, mask=m < rows, other=0.0)[None, :]
        if over is not None:
            total *= tl.load(over)
    else:
        factor = tl.load(over) if over is not None else 1.0
        total = float_sums(left, right, w_scale, factor, k, half, depth, groups,
                           x.dtype.element_ty, GRID, SCALE, GROUP, EVEN, BM, BN, BK,
                           GROUPS)  # fmt: skip
    finish_tile(y, total, m, n, bias, low, up, gate, residual, rows, columns, rank, span, plane,
                ACTIVATION, PLANES, BR)  # fmt: skip


LEAST = 32  # columns that an int8 product takes at least
TILES = {
    torch.int8: (
        Tile(128, 128, 128, 8, 3),
        Tile(64, 128, 128, 4, 3),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 64, 128, 4, 4),
        Tile(16, 64, 128, 4, 4),
    ),
    torch.bfloat16: (
        Tile(128, 128, 64, 8, 3),
        Tile(64, 128, 64, 4, 3),
        Tile(64, 64, 64, 4, 4),
        Tile(32, 64, 64, 4, 4),
        Tile(16, 64, 64, 4, 4),
    ),
    torch.float32: (Tile(64, 64, 16, 8, 2), Tile(16, 64, 32, 4, 2)),
}
TILES[torch.float16] = TILES[torch.float8_e4m3fn] = TILES[torch.bfloat16]


def empty(x: Tensor, scale: Tensor | None, packed: Tensor, *args: Any) -> Tensor:
    """The result of `reference`, not filled."""
    parts, dtype = args[-2:]
    return x.new_empty(result_shape((*x.shape[:-1], packed.shape[0]), parts), dtype=dtype)


def launch(
    results: tuple[Tensor, ...],
    x: Tensor,
    scale: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    over: Tensor | None,
    *rest: Any,
) -> Launch | None:
    """What fills the result.

    Raises:
        BackendError: the kernel cannot take the arguments.
    """
    bias, low, up, gate, residual, weight, activation, parts, _ = rest
    how, tail = parse_quantizer(weight), Epilogue(bias, low, up, gate, residual, activation, parts)
    rows, columns = prod(x.shape[:-1]), len(packed)
    check_weight(x, packed, w_scale, over, how)
    check_activations(x, scale, how)
    check_tail(tail, (*x.shape[:-1], columns))
    if not results[0].numel():
        return None
    tile = pick(TILES[x.dtype], rows, columns)
    return Launch(
        linear_packed_kernel,
        (programs(tile, rows, columns),),
        {
            "y": results[0],
            "x": x,
            "scale": scale,
            "packed": packed,
            "w_scale": w_scale,
            "over": over,
            "depth": x.shape[-1],
            "groups": w_scale.shape[1],
            **tail_args(tail, rows, columns),
        },
        _blocks(x, scale, how, tile) | tail_constants(tail),
        tile.warps,
        tile.stages,
    )


def _blocks(x: Tensor, scale: Tensor | None, how: Quantizer, tile: Tile) -> dict[str, Any]:
    """How the sum over the columns is cut: what an int8 product adds up has one scale."""
    depth = x.shape[-1]
    group, x_group = how.group, 0
    if scale is not None and scale.shape[-1] > 1:
        x_group = depth // scale.shape[-1]
    step = block = tile.depth
    if x.dtype == torch.int8:
        step = min(size for size in (step, group, x_group) if size)
        block = max(step, LEAST)
    return {
        "GRID": how.grid.kind,
        "SCALE": how.scale.partition("-")[0],
        "BM": tile.rows,
        "BN": tile.columns,
        "BAND": BAND,
        "STAGES": tile.stages,
        "GROUP": group,
        "X_GROUP": x_group,
        "STEP": step,
        "BK": block,
        "GROUPS": max(1, block // group) if group else 1,
        "EVEN": depth % step == 0 and step == block,
    }


TARGET = define("linear_packed", reference, Native(empty, launch))
FORMULAS[torch.ops.effuse.linear_packed] = matmul_flops


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    int4, nvfp4, mxfp4 = "int4/group32", "e2m1/group16/scale-e4m3", "e2m1/group32/scale-e8m0"
    half, e4m3 = torch.bfloat16, "e4m3/token/dynamic"
    return [
        _sample(g, (5,), 64, 33, int4, dtype=torch.float32, bias=_random(g, 33)),
        _sample(g, (2, 3), 48, 24, nvfp4, x_type=half, activation="gelu", parts=3),
        _sample(g, (1,), 40, 8, "int4/channel", x_type=torch.float16, gate=_random(g, 1, 8),
                residual=_random(g, 1, 8)),
        _sample(g, (5,), 64, 33, int4, "int8/group32/dynamic", low=_random(g, 5, 4),
                up=_random(g, 33, 4)),
        _sample(g, (2, 3), 64, 24, "int4/group16", "int8/group16/dynamic", gate=_random(g, 2, 24)),
        _sample(g, (3,), 64, 24, int4, "int8/token/dynamic", activation="silu"),
        _sample(g, (3,), 64, 24, mxfp4, e4m3, activation="gelu_tanh"),
        _sample(g, (5,), 48, 33, nvfp4, e4m3, dtype=torch.float32),
        _sample(g, (0,), 64, 8, mxfp4, x_type=half),
    ]  # fmt: skip


def _sample(
    g: torch.Generator,
    lead: tuple[int, ...],
    depth: int,
    columns: int,
    weight: str,
    given: str = "",
    x_type: torch.dtype = torch.float32,
    activation: str = "",
    parts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **tail: Tensor,
) -> Sample:
    stored = pack_weight(_random(g, columns, depth), parse_quantizer(weight))
    names = ("bias", "low", "up", "gate", "residual")
    return (
        *_activations(_random(g, *lead, depth).to(x_type), given),
        stored.packed,
        stored.scale,
        stored.over,
        *(tail.get(name) for name in names),
        weight,
        activation,
        parts,
        dtype,
    )


def _activations(x: Tensor, quantizer: str) -> tuple[Tensor, Tensor | None]:
    """x as it is, or its codes and their scales."""
    if not quantizer:
        return x, None
    how = parse_quantizer(quantizer)
    scale, _ = find_scale(x, how)
    codes = to_codes(x, scale, None, how)
    return codes if how.grid.kind == "int" else codes.view(torch.float8_e4m3fn), scale


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


ROW = Op(
    "linear_packed",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "4-bit weights unpacked in registers: int8 or 16-bit tensor cores",
    Native(empty, launch),
)
