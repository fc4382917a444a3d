"""A linear layer on 8-bit codes: int8 or e4m3 products, scales, and the epilogue in one kernel.

    y_mn = epilogue(s_m · c_n · (Σ_k q_mk · w_nk - z · Σ_k w_nk))

q (…, K) and w (N, K) int8 or float8_e4m3fn; s float32, one element or one for each row (…, 1);
c (N,) float32; z int8, one element, with the sums (N,) int32 that it multiplies, or None for 0.
int8 products are summed in int32, exactly (K <= 2^16); e4m3 products in float32, 128 at a time
where the tensor cores add with fewer bits. Epilogue: kernels/epilogue.py.
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
from effuse.kernels.launch import Launch, Native, check, contiguous, define, dot, jit, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.tiles import BAND, Tile, clamped, load, pick, place, programs

DEEPEST = 1 << 16  # columns whose int8 products surely fit an int32


def reference(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    channels: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    parts: int,
    dtype: torch.dtype,
) -> Tensor:
    """codes (…, K), weight (N, K) -> (…, N) in `dtype`; the sums of products are in float64."""
    total = codes.double() @ weight.double().T
    if zero is not None and sums is not None:
        total = total - zero.double() * sums.double()
    if scale.numel() == 1:
        scale = scale.reshape(())
    scaled = total.float() * scale * channels
    return finish(scaled, Epilogue(bias, low, up, gate, residual, activation, parts), dtype)


@jit
def int8_sums(
    left, right, k, depth, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Σ_k left · right, int32 (BN, BM)."""
    total = tl.zeros((BN, BM), dtype=tl.int32)
    for start in range(0, depth, BK):
        w = load(left + start, k[None, :], depth - start, EVEN)
        q = load(right + start, k[:, None], depth - start, EVEN)
        total = dot(w, q, total)
    return total


@jit
def e4m3_sums(
    left,
    right,
    k,
    depth,
    s,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """s · Σ_k left · right, float32 (BN, BM).

    Tensor cores keep some 14 bits of a sum of e4m3 products. So each BK products are a sum of
    their own; the scale is multiplied here lest the compiler add them up in the tensor cores again.
    """
    total = tl.zeros((BN, BM), dtype=tl.float32)
    for start in range(0, depth, BK):
        w = load(left + start, k[None, :], depth - start, EVEN)
        q = load(right + start, k[:, None], depth - start, EVEN)
        total += dot(w, q, tl.zeros((BN, BM), dtype=tl.float32)) * s
    return total


@jit
def linear_scaled_kernel(
    y, codes, scale, zero, weight, channels, sums, bias, low, up, gate, residual,
    rows, columns, depth, rank, span, plane,
    PER_ROW: tl.constexpr, ACTIVATION: tl.constexpr, PLANES: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One tile of y: rows m, columns n."""
    m, n = place(rows, columns, BM, BN, BAND)
    k = tl.arange(0, BK)
    left = weight + clamped(n, columns)[:, None] * depth + k[None, :]
    right = codes + clamped(m, rows)[None, :] * depth + k[:, None]
    s = tl.load(scale + m, mask=m < rows, other=0.0)[None, :] if PER_ROW else tl.load(scale)
    if codes.dtype.element_ty == tl.int8:
        whole = int8_sums(left, right, k, depth, EVEN, BM, BN, BK)
        if zero is not None:
            offset = tl.load(zero).to(tl.int32) * tl.load(sums + n, mask=n < columns, other=0)
            whole -= offset[:, None]
        total = whole.to(tl.float32) * s
    else:
        total = e4m3_sums(left, right, k, depth, s, EVEN, BM, BN, BK)
    total *= tl.load(channels + n, mask=n < columns, other=0.0)[:, None]
    finish_tile(y, total, m, n, bias, low, up, gate, residual, rows, columns, rank, span, plane,
                ACTIVATION, PLANES, BR)  # fmt: skip


TILES = (
    Tile(128, 128, 128, 8, 3),
    Tile(64, 128, 128, 4, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(32, 64, 128, 4, 4),
    Tile(16, 64, 128, 4, 4),
)


def empty(codes: Tensor, *args: Any) -> Tensor:
    """The result of `reference`, not filled."""
    weight, parts, dtype = args[2], args[-2], args[-1]
    shape = result_shape((*codes.shape[:-1], weight.shape[0]), parts)
    return codes.new_empty(shape, dtype=dtype)


def launch(
    results: tuple[Tensor, ...],
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    channels: Tensor,
    sums: Tensor | None,
    *rest: Any,
) -> Launch | None:
    """What fills the result.

    Raises:
        BackendError: the kernel cannot take the arguments.
    """
    tail = Epilogue(*rest[:-1])
    columns, depth = weight.shape
    rows = prod(codes.shape[:-1])
    _check_codes(codes, weight)
    _check_scales(codes, scale, zero, columns, channels, sums)
    check_tail(tail, (*codes.shape[:-1], columns))
    if not results[0].numel():
        return None
    tile = pick(TILES, rows, columns)
    return Launch(
        linear_scaled_kernel,
        (programs(tile, rows, columns),),
        {
            "y": results[0],
            "codes": codes,
            "scale": scale,
            "zero": zero,
            "weight": weight,
            "channels": channels,
            "sums": sums,
            "depth": depth,
            **tail_args(tail, rows, columns),
        },
        _blocks(tile, scale, depth) | tail_constants(tail),
        tile.warps,
        tile.stages,
    )


def _blocks(tile: Tile, scale: Tensor, depth: int) -> dict[str, int | bool]:
    """How the product is cut into tiles."""
    return {
        "PER_ROW": scale.numel() > 1,
        "EVEN": depth % tile.depth == 0,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "BAND": BAND,
    }


def _check_codes(codes: Tensor, weight: Tensor) -> None:
    contiguous(codes=codes, weight=weight)
    check(
        codes.dtype == weight.dtype and codes.dtype in (torch.int8, torch.float8_e4m3fn),
        "codes, weight: expected both int8 or both float8_e4m3fn, got "
        f"{codes.dtype} and {weight.dtype}; quantize both alike",
    )
    check(
        weight.dim() == 2 and codes.shape[-1] == weight.shape[1],
        f"weight: expected (N, {codes.shape[-1]}), as codes' last axis, got {tuple(weight.shape)}",
    )
    check(
        codes.dtype != torch.int8 or weight.shape[1] <= DEEPEST,
        f"weight: expected at most {DEEPEST} int8 columns, whose sums fit 32 bits, got "
        f"{weight.shape[1]}; split the sum",
    )


def _check_scales(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    columns: int,
    channels: Tensor,
    sums: Tensor | None,
) -> None:
    contiguous(scale=scale, channels=channels, sums=sums)
    per_row = tuple(scale.shape) == (*codes.shape[:-1], 1)
    check(
        scale.dtype == torch.float32 and (scale.numel() == 1 or per_row),
        "scale: expected float32, one element or one for each row (…, 1), got "
        f"{scale.dtype} of shape {tuple(scale.shape)}; use a coarser quantizer",
    )
    check(
        channels.dtype == torch.float32 and tuple(channels.shape) == (columns,),
        f"channels: expected float32 ({columns},), got {channels.dtype} {tuple(channels.shape)}; "
        "expand a scale of the tensor",
    )
    check(
        (zero is None) == (sums is None),
        "zero, sums: expected both or neither; sums is weight.sum(1, dtype=torch.int32)",
    )
    if zero is not None and sums is not None:
        given = (codes.dtype, zero.dtype, zero.numel(), scale.numel(), sums.dtype, sums.numel())
        check(
            given == (torch.int8, torch.int8, 1, 1, torch.int32, columns),
            "zero: expected one int8 element beside int8 codes with one scale, and int32 sums "
            f"({columns},); got {zero.dtype} {tuple(zero.shape)} beside {codes.dtype} codes, "
            f"{scale.numel()} scales, {sums.dtype} sums {tuple(sums.shape)}; requantize",
        )


TARGET = define("linear_scaled", reference, Native(empty, launch))
FORMULAS[torch.ops.effuse.linear_scaled] = matmul_flops


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    one, two = (5, 48, 33), (6, 32, 24)
    zero = torch.tensor([11], dtype=torch.int8)
    e4m3, row, half = torch.float8_e4m3fn, (2, 3, 1), torch.bfloat16
    return [
        _sample(g, one, (1,), torch.int8, dtype=torch.float32, zero=zero, bias=_random(g, 33)),
        _sample(g, two, row, torch.int8, (2, 3), activation="gelu", low=_random(g, 2, 3, 4).half(),
                up=_random(g, 24, 4), dtype=torch.float16),
        _sample(g, two, row, torch.int8, (2, 3), parts=3, bias=_random(g, 24), activation="silu"),
        _sample(g, two, row, e4m3, (2, 3), activation="gelu_tanh", dtype=torch.float32,
                gate=_random(g, 2, 24), residual=_random(g, 2, 3, 24)),
        _sample(g, one, (1,), e4m3, low=_random(g, 5, 70).to(half), up=_random(g, 33, 70).to(half)),
        _sample(g, (1, 16, 8), (1, 1), e4m3, dtype=torch.float32),
        _sample(g, (0, 16, 8), (0, 1), torch.int8),
    ]  # fmt: skip


def _sample(
    g: torch.Generator,
    sizes: tuple[int, int, int],
    scale: tuple[int, ...],
    codes: torch.dtype,
    lead: tuple[int, ...] | None = None,
    zero: Tensor | None = None,
    activation: str = "",
    parts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **tail: Tensor,
) -> Sample:
    rows, depth, columns = sizes
    weight = _codes(g, codes, columns, depth)
    sums = None if zero is None else weight.sum(1, dtype=torch.int32)
    names = ("bias", "low", "up", "gate", "residual")
    return (
        _codes(g, codes, *(lead or (rows,)), depth),
        torch.rand(scale, generator=g) * 0.01 + 0.001,
        zero,
        weight,
        torch.rand(columns, generator=g) * 0.1 + 0.01,
        sums,
        *(tail.get(name) for name in names),
        activation,
        parts,
        dtype,
    )


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def _codes(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    return (_random(g, *shape) * 60).clamp(-448, 448).to(dtype)


ROW = Op(
    "linear_scaled",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "8-bit linear layer with its epilogue: int8 or fp8 tensor cores",
    Native(empty, launch),
)
