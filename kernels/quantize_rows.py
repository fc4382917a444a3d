"""Quantize rows: smooth, scales found as they come, codes, and the down-projection beside them.

    v = x · smooth (rounded to x's dtype)    s = amax |v| / limit    q = nearest(v / s)

x (…, K) float; smooth (K,); down (R, K): low = v · downᵀ (…, R), summed in float32. Results, and
the quantizers that are taken: kernels/rows.py. Source: METHODS 1.12, fusion rule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.kernels.launch import Launch, Native, check, define, jit, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.rows import (
    Results,
    empty_results,
    finish,
    finish_reference,
    launch_rows,
    load_rows,
    smooth_block,
    smoothed,
)


def reference(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, quantizer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, K) -> codes (…, K), scale (…, 1 or groups), low (…, R) or empty.

    Raises:
        BackendError: the quantizer is none of rows.
    """
    _check(quantizer)
    return finish_reference(smoothed(x, smooth), down, quantizer)


@jit
def smooth_values(given, row, here, col, within):
    """A block of x · smooth, in x's type."""
    x, smooth, stride = given
    return smooth_block(load_rows(x, row, here, col, within, stride), smooth, col, within)


@jit
def quantize_rows_kernel(
    x, smooth, down, codes, scale, low, rows, columns, rank, stride,
    LIMIT: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program: BM rows, and BR of the ranks."""
    finish(
        smooth_values, (x, smooth, stride), down, codes, scale, low, rows, columns, rank,
        LIMIT, GROUP, WHOLE, BM, BK, BR,
    )  # fmt: skip


def empty(x: Tensor, smooth: Tensor | None, down: Tensor | None, quantizer: str) -> Results:
    """The results of `reference`, not filled."""
    _check(quantizer)
    return empty_results(x, x.shape[-1], down, quantizer)


def launch(
    results: tuple[Tensor, ...],
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    quantizer: str,
) -> Launch | None:
    """What fills `results`.

    Raises:
        BackendError: the rows of x are not at one distance, or an operand does not fit them.
    """
    _check(quantizer)
    vectors = {"smooth": smooth}
    return launch_rows(quantize_rows_kernel, results, x, down, quantizer, {}, {}, vectors)


def _check(quantizer: str) -> None:
    check(quantizer != "", "quantizer: expected a text such as int8/token/dynamic, got ''")


NATIVE = Native(empty, launch)
TARGET = define("quantize_rows", reference, NATIVE)


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    x = torch.randn(2, 5, 48, generator=g)
    smooth, down = torch.rand(48, generator=g) + 0.5, torch.randn(3, 48, generator=g)
    return [
        (x, None, None, "int8/token/dynamic"),
        (x, smooth, down, "int8/token/dynamic"),
        (x.half(), None, down.half(), "e4m3/token/dynamic"),
        (x.bfloat16(), smooth.bfloat16(), None, "int8/group16/dynamic"),
        (x[0, :1], smooth, down, "int4/group16/dynamic"),
        (x[:, :0], smooth, down, "int8/token/dynamic"),
        (torch.zeros(2, 48), None, None, "int8/token/dynamic"),
        (x.flatten(0, 1)[::2], None, None, "e4m3/token/dynamic"),
    ]


ROW = Op(
    "quantize_rows",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "smoothing, quantization and a low-rank branch's down-projection in one kernel",
    NATIVE,
)
