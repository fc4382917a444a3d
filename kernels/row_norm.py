"""Layer norm or RMS norm of rows, modulated (adaLN), and quantized.

    layer  n = (x - mean x) / sqrt(var x + eps) · weight + bias        var is the biased one
    rms    n = x / sqrt(mean x² + eps) · weight + bias
    v = n · (offset + scale) + shift

x (…, K) float; weight and bias (K,); scale and shift (B, K), one row for each block of rows(x) / B
consecutive rows of x; without scale the factor is 1. Arithmetic is float32, rounded once, to x's
dtype. Then v is stored, or quantized and projected: kernels/rows.py. Source: Peebles and Xie, DiT
(adaLN); Zhang and Sennrich, RMSNorm.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.kernels.launch import Launch, Native, check, define, jit, rows_of, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.rows import (
    Results,
    empty_results,
    finish,
    finish_reference,
    launch_rows,
    load_columns,
    load_rows,
    narrow,
    row_stride,
)

KINDS = ("layer", "rms")


def reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    down: Tensor | None,
    eps: float,
    kind: str,
    offset: float,
    quantizer: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, K) -> values or codes (…, K), their scales, low (…, R); empty where not asked for.

    Raises:
        BackendError: the kind is unknown, rows of scale or shift do not fit, or the quantizer is
            none of rows.
    """
    _check(x, scale, shift, kind)
    values = _modulated(_normed(x.float(), weight, bias, eps, kind), scale, shift, offset)
    return finish_reference(values.to(x.dtype), down, quantizer)


def _normed(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, kind: str) -> Tensor:
    weight, bias = (None if each is None else each.float() for each in (weight, bias))
    if kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    n = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def _modulated(n: Tensor, scale: Tensor | None, shift: Tensor | None, offset: float) -> Tensor:
    if scale is not None:
        n = n * (offset + _spread(scale, n))
    return n if shift is None else n + _spread(shift, n)


def _spread(blocks: Tensor, x: Tensor) -> Tensor:
    """One row for each block of rows -> one for each row, in the shape of `x`."""
    each = rows_of(x) // blocks.shape[0]
    return blocks.float().repeat_interleave(each, 0).reshape(x.shape)


@jit
def statistics(
    x, row, here, columns, stride, eps,
    LAYER: tl.constexpr, WHOLE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Each row's mean (0 for RMS) and 1 / deviation; blocks are merged as Chan et al. do."""
    mean = tl.zeros((BM,), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    for start in range(0, BK if WHOLE else columns, BK):
        col = start + tl.arange(0, BK)
        v = load_rows(x, row, here, col, col < columns, stride).to(tl.float32)
        if LAYER:
            count = tl.minimum(columns - start, BK).to(tl.float32)
            total = tl.minimum(columns, start + BK).to(tl.float32)
            middle = tl.sum(v, 1) / count
            v = tl.where((col < columns)[None, :], v - middle[:, None], 0.0)
            delta = middle - mean
            mean += delta * (count / total)
            squares += delta * delta * (count * (total - count) / total)
        squares += tl.sum(v * v, 1)
    return mean, tl.div_rn(1.0, tl.sqrt_rn(squares / columns + eps))


@jit
def norm_values(given, row, here, col, within):
    """A block of the modulated norm, in x's type."""
    x, stride, mean, deviation, weight, bias, factor, shift, offset, places = given
    factor_stride, factor_rows, shift_stride, shift_rows = places
    block = load_rows(x, row, here, col, within, stride)
    v = (block.to(tl.float32) - mean[:, None]) * deviation[:, None]
    if weight is not None:
        v *= load_columns(weight, col, within)
    if bias is not None:
        v += load_columns(bias, col, within)
    if factor is not None:
        f = load_rows(factor, row // factor_rows, here, col, within, factor_stride)
        v *= offset + f.to(tl.float32)
    if shift is not None:
        v += load_rows(shift, row // shift_rows, here, col, within, shift_stride).to(tl.float32)
    return narrow(v, block.dtype)


@jit
def row_norm_kernel(
    x, weight, bias, factor, shift, eps, offset,
    factor_stride, factor_rows, shift_stride, shift_rows,
    down, codes, scale, low, rows, columns, rank, stride,
    LAYER: tl.constexpr, LIMIT: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program: BM rows, and BR of the ranks; `factor` is the op's scale."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mean, deviation = statistics(x, row, row < rows, columns, stride, eps, LAYER, WHOLE, BM, BK)
    places = (factor_stride, factor_rows, shift_stride, shift_rows)
    given = (x, stride, mean, deviation, weight, bias, factor, shift, offset, places)
    finish(
        norm_values, given, down, codes, scale, low, rows, columns, rank,
        LIMIT, GROUP, WHOLE, BM, BK, BR,
    )  # fmt: skip


def empty(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    down: Tensor | None,
    eps: float,
    kind: str,
    offset: float,
    quantizer: str,
) -> Results:
    """The results of `reference`, not filled."""
    _check(x, scale, shift, kind)
    return empty_results(x, x.shape[-1], down, quantizer)


def launch(
    results: tuple[Tensor, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    down: Tensor | None,
    eps: float,
    kind: str,
    offset: float,
    quantizer: str,
) -> Launch | None:
    """What fills `results`.

    Raises:
        BackendError: the rows of x, scale or shift are not at one distance, or an operand does not
            fit them.
    """
    _check(x, scale, shift, kind)
    args = {"factor": scale, "shift": shift, "eps": eps, "offset": offset}
    args |= _blocks("factor", scale, x) | _blocks("shift", shift, x)
    constants, vectors = {"LAYER": kind == "layer"}, {"weight": weight, "bias": bias}
    return launch_rows(row_norm_kernel, results, x, down, quantizer, args, constants, vectors)


def _blocks(name: str, blocks: Tensor | None, x: Tensor) -> dict[str, int]:
    """How far apart the rows of `blocks` are, and how many rows of x each is for."""
    if blocks is None:
        return {f"{name}_stride": 0, f"{name}_rows": 1}
    each = rows_of(x) // blocks.shape[0]
    return {f"{name}_stride": row_stride(name, blocks), f"{name}_rows": each}


def _check(x: Tensor, scale: Tensor | None, shift: Tensor | None, kind: str) -> None:
    check(kind in KINDS, f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    rows, columns = rows_of(x), x.shape[-1]
    for name, blocks in (("scale", scale), ("shift", shift)):
        shape = (1, columns) if blocks is None else tuple(blocks.shape)
        check(
            len(shape) == 2 and shape[1] == columns and shape[0] > 0 and rows % shape[0] == 0,
            f"{name}: expected (B, {columns}) with B a divisor of the {rows} rows of x, got "
            f"{shape}; flatten its leading axes",
        )


NATIVE = Native(empty, launch)
TARGET = define("row_norm", reference, NATIVE)


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    x, down = torch.randn(2, 5, 48, generator=g) + 0.3, torch.randn(3, 48, generator=g)
    weight, bias = torch.rand(48, generator=g) + 0.5, torch.randn(48, generator=g)
    wide = torch.randn(2, 6 * 48, generator=g)
    shift, scale = wide.chunk(6, -1)[:2]
    return [
        (x, weight, bias, None, None, None, 1e-5, "layer", 1.0, ""),
        (x, None, None, scale, shift, None, 1e-6, "layer", 1.0, "int8/token/dynamic"),
        (x.half(), None, None, scale.half(), None, down.half(), 1e-6, "layer", 0.0, ""),
        (x, weight, None, None, None, down, 1e-6, "rms", 1.0, "e4m3/token/dynamic"),
        (x.bfloat16(), weight, bias, scale, shift, None, 1e-6, "rms", 1.0, "int8/group16/dynamic"),
        (x[0, :1], weight, None, None, shift[:1], down, 1e-6, "layer", 1.0, "int4/group16/dynamic"),
        (x[:, :0], weight, None, scale, None, None, 1e-6, "layer", 1.0, "int8/token/dynamic"),
    ]


ROW = Op(
    "row_norm",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "layer or RMS norm with its modulation, quantization and down-projection in one kernel",
    NATIVE,
)
