"""Activations, gated ones too, and quantized.

    geglu, geglu_tanh, swiglu   v = x[:K] · act(x[K:])     as diffusers' GEGLU and SwiGLU
    swiglu_first                v = act(x[:K]) · x[K:]
    gelu, gelu_tanh, silu       v = act(x)

x (…, 2K) or (…, K) float; act is gelu, gelu by tanh, or silu. Arithmetic is float32, rounded to x's
dtype; then v · smooth (K,), rounded again. Then v is stored, or quantized and projected:
kernels/rows.py. Source: Shazeer, GLU variants improve transformers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.kernels.activations import ACTIVATIONS as KNOWN
from effuse.kernels.activations import activate
from effuse.kernels.launch import Launch, Native, check, define, jit, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.rows import (
    Results,
    empty_results,
    finish,
    finish_reference,
    launch_rows,
    load_rows,
    narrow,
    smooth_block,
    smoothed,
)

ACTIVATIONS = {name: function for name, function in KNOWN.items() if name}
HALVES = {  # the activation, and which half it takes
    "geglu": ("gelu", 1),
    "geglu_tanh": ("gelu_tanh", 1),
    "swiglu": ("silu", 1),
    "swiglu_first": ("silu", 0),
}


def reference(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, kind: str, quantizer: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x (…, K or 2K) -> values or codes (…, K), their scales, low (…, R); empty if not asked for.

    Raises:
        BackendError: the kind is unknown, a gated row is odd, or the quantizer is none of rows.
    """
    _columns(x, kind)
    values = _activated(x.float(), kind).to(x.dtype)
    return finish_reference(smoothed(values, smooth), down, quantizer)


def _activated(x: Tensor, kind: str) -> Tensor:
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind](x)
    name, half = HALVES[kind]
    halves = x.chunk(2, -1)
    return ACTIVATIONS[name](halves[half]) * halves[1 - half]


@jit
def gated_values(given, row, here, col, within):
    """A block of the activated x · smooth, in x's type."""
    x, smooth, stride, half = given[0]
    ACTIVATION: tl.constexpr = given[1]
    GATE: tl.constexpr = given[2]
    a = load_rows(x, row, here, col, within, stride)
    v = a.to(tl.float32)
    if GATE == -1:
        v = activate(v, ACTIVATION)
    else:
        b = load_rows(x + half, row, here, col, within, stride).to(tl.float32)
        v = activate(v, ACTIVATION) * b if GATE == 0 else v * activate(b, ACTIVATION)
    return smooth_block(narrow(v, a.dtype), smooth, col, within)


@jit
def gated_kernel(
    x, smooth, half, down, codes, scale, low, rows, columns, rank, stride,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    LIMIT: tl.constexpr, GROUP: tl.constexpr, WHOLE: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One program: BM rows, and BR of the ranks; GATE: which half is activated, -1 of none."""
    finish(
        gated_values, ((x, smooth, stride, half), ACTIVATION, GATE),
        down, codes, scale, low, rows, columns, rank, LIMIT, GROUP, WHOLE, BM, BK, BR,
    )  # fmt: skip


def empty(
    x: Tensor, smooth: Tensor | None, down: Tensor | None, kind: str, quantizer: str
) -> Results:
    """The results of `reference`, not filled."""
    return empty_results(x, _columns(x, kind), down, quantizer)


def launch(
    results: tuple[Tensor, ...],
    x: Tensor,
    smooth: Tensor | None,
    down: Tensor | None,
    kind: str,
    quantizer: str,
) -> Launch | None:
    """What fills `results`.

    Raises:
        BackendError: the rows of x are not at one distance, or an operand does not fit them.
    """
    name, half = HALVES.get(kind, (kind, -1))
    args, constants = {"half": _columns(x, kind)}, {"ACTIVATION": name, "GATE": half}
    vectors = {"smooth": smooth}
    return launch_rows(gated_kernel, results, x, down, quantizer, args, constants, vectors)


def _columns(x: Tensor, kind: str) -> int:
    """How many values a row of `x` becomes."""
    names = (*HALVES, *ACTIVATIONS)
    check(kind in names, f"kind: expected one of {sorted(names)}, got {kind!r}")
    columns = x.shape[-1]
    if kind in ACTIVATIONS:
        return columns
    check(columns % 2 == 0, f"x: expected two halves for {kind}, got {columns} columns")
    return columns // 2


NATIVE = Native(empty, launch)
TARGET = define("gated", reference, NATIVE)


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    x = torch.randn(2, 5, 64, generator=g)
    smooth, down = torch.rand(32, generator=g) + 0.5, torch.randn(3, 32, generator=g)
    return [
        (x, None, None, "geglu", ""),
        (x, smooth, down, "geglu", "int8/token/dynamic"),
        (x.half(), None, None, "geglu_tanh", "e4m3/token/dynamic"),
        (x.bfloat16(), None, down.bfloat16(), "swiglu", "int8/group16/dynamic"),
        (x[0, :1], smooth, None, "swiglu_first", "int4/group32/dynamic"),
        (x[..., :32], smooth, None, "gelu", ""),
        (x[..., :32], None, None, "gelu_tanh", "int8/token/dynamic"),
        (x[:, :0], None, down, "swiglu", "int8/token/dynamic"),
        (x[..., 32:], None, None, "silu", "int8/token/dynamic"),
    ]


ROW = Op(
    "gated",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "GELU, SiLU, GEGLU or SwiGLU, quantization and down-projection in one kernel",
    NATIVE,
)
