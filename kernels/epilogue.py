"""The end of a low-bit linear layer, which its kernel computes before anything is stored.

    y = act(total + low · upᵀ + bias) · gate + residual          rounded once, to y's type

total (…, N) float32 is the layer's scaled sum. low (…, R), up (N, R): a low-rank branch's second
projection, multiplied in low's type and accumulated in float32 (SVDQuant's fusion rule, METHODS
1.12). bias (N,). act: none, GELU (exact or tanh) or SiLU. gate (B, N): one row for each block of
M / B consecutive rows of y. residual: shaped as y. What is None is left out. Arithmetic is float32.
"""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from effuse.kernels.activations import ACTIVATIONS, activate
from effuse.kernels.launch import check, contiguous, dot, jit, power_of_two, tl
from effuse.kernels.rows import narrow


class Epilogue(NamedTuple):
    """What follows the sum of a linear layer.

    Attributes:
        bias, low, up, gate, residual: see above; any float type.
        activation: a key of ACTIVATIONS.
        parts: y's columns are cut into so many equal planes, each a result of its own.
    """

    bias: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None
    gate: Tensor | None = None
    residual: Tensor | None = None
    activation: str = ""
    parts: int = 1


def finish(total: Tensor, tail: Epilogue, dtype: torch.dtype) -> Tensor:
    """total (…, N) float32 -> y (…, N), or (parts, …, N / parts), contiguous."""
    *lead, columns = total.shape
    y = total.reshape(prod(lead), columns)
    if tail.low is not None and tail.up is not None:
        low = tail.low.reshape(len(y), tail.up.shape[1])
        y = y + low.float() @ tail.up.to(low.dtype).float().T
    if tail.bias is not None:
        y = y + tail.bias.float()
    y = ACTIVATIONS[tail.activation](y)
    if tail.gate is not None:
        y = y * tail.gate.float().repeat_interleave(len(y) // max(1, len(tail.gate)), 0)
    if tail.residual is not None:
        y = y + tail.residual.reshape(y.shape).float()
    planes = y.to(dtype).reshape(len(y), tail.parts, columns // tail.parts).movedim(1, 0)
    return planes.reshape(result_shape((*lead, columns), tail.parts)).contiguous()


def result_shape(shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """The shape of y for a total of `shape`."""
    return shape if parts == 1 else (parts, *shape[:-1], shape[-1] // parts)


def check_tail(tail: Epilogue, shape: tuple[int, ...]) -> None:
    """See that the kernels can end a sum of `shape` (…, N) with `tail`.

    Raises:
        BackendError: they cannot; it says which argument is wrong, and the way out.
    """
    *lead, columns = shape
    names = ("bias", "low", "up", "gate", "residual")
    contiguous(**{name: getattr(tail, name) for name in names})
    check(
        tail.activation in ACTIVATIONS,
        f"activation: expected one of {sorted(ACTIVATIONS)}, got {tail.activation!r}",
    )
    _check_shape("bias", tail.bias, (columns,))
    _check_shape("residual", tail.residual, (*lead, columns))
    _check_low_rank(tail, lead, columns)
    _check_gate(tail.gate, prod(lead), columns)
    _check_parts(tail, columns)


def _check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None:
        got = tuple(tensor.shape)
        check(got == shape, f"{name}: expected shape {shape}, got {got}; broadcast it before")


def _check_low_rank(tail: Epilogue, lead: list[int], columns: int) -> None:
    check(
        (tail.low is None) == (tail.up is None),
        "low, up: expected both or neither; hand over the two projections of one branch",
    )
    if tail.low is not None and tail.up is not None:
        rank = tail.up.shape[-1]
        _check_shape("up", tail.up, (columns, rank))
        _check_shape("low", tail.low, (*lead, rank))


def _check_gate(gate: Tensor | None, rows: int, columns: int) -> None:
    if gate is not None:
        blocks = gate.shape[0]
        _check_shape("gate", gate, (blocks, columns))
        check(
            blocks > 0 and rows % blocks == 0,
            f"gate: expected a row for each of equal blocks of {rows} rows, got {blocks} rows; "
            "repeat its rows",
        )


def _check_parts(tail: Epilogue, columns: int) -> None:
    check(
        tail.parts > 0 and columns % tail.parts == 0,
        f"parts: expected a divisor of the {columns} columns, got {tail.parts}",
    )
    check(
        tail.parts == 1 or (tail.gate is None and tail.residual is None),
        f"parts: expected 1 beside a gate or a residual, got {tail.parts}; add them later",
    )


def tail_args(tail: Epilogue, rows: int, columns: int) -> dict[str, Tensor | int | None]:
    """The arguments by which a kernel takes `tail`."""
    return {
        "bias": tail.bias,
        "low": tail.low,
        "up": tail.up,
        "gate": tail.gate,
        "residual": tail.residual,
        "rows": rows,
        "columns": columns,
        "rank": 0 if tail.up is None else tail.up.shape[1],
        "span": rows if tail.gate is None else rows // tail.gate.shape[0],
        "plane": columns // tail.parts,
    }


def tail_constants(tail: Epilogue) -> dict[str, Any]:
    """The constants by which a kernel is compiled for `tail`."""
    widest = 16 if tail.low is not None and tail.low.dtype == torch.float32 else 64
    return {
        "ACTIVATION": tail.activation,
        "PLANES": tail.parts > 1,
        "BR": 16 if tail.up is None else power_of_two(tail.up.shape[1], 16, widest),
    }


@jit
def add_low_rank(total, low, up, m, n, rows, columns, rank, BR: tl.constexpr):
    """total (BN, BM) + up (BN, R) · lowᵀ (R, BM)."""
    r = tl.arange(0, BR)
    left = up + n.to(tl.int64)[:, None] * rank + r[None, :]
    right = low + m.to(tl.int64)[None, :] * rank + r[:, None]
    for start in tl.range(0, rank, BR, num_stages=1):
        inside = start + r < rank
        a = tl.load(left + start, mask=(n < columns)[:, None] & inside[None, :], other=0.0)
        b = tl.load(right + start, mask=(m < rows)[None, :] & inside[:, None], other=0.0)
        total = dot(narrow(a, b.dtype), b, total)
    return total


@jit
def finish_tile(
    y, total, m, n, bias, low, up, gate, residual, rows, columns, rank, span, plane,
    ACTIVATION: tl.constexpr, PLANES: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Store y for a tile: total (BN, BM) float32 of the rows m and the columns n."""
    if low is not None:
        total = add_low_rank(total, low, up, m, n, rows, columns, rank, BR)
    if bias is not None:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[:, None]
    total = activate(total, ACTIVATION)
    inside = (n < columns)[:, None] & (m < rows)[None, :]
    at = m.to(tl.int64)[None, :] * columns + n[:, None]
    if gate is not None:
        block = (m // span).to(tl.int64)[None, :] * columns + n[:, None]
        total *= tl.load(gate + block, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if PLANES:
        at = (n // plane).to(tl.int64)[:, None] * rows * plane
        at += m.to(tl.int64)[None, :] * plane + (n % plane)[:, None]
    tl.store(y + at, narrow(total, y.dtype.element_ty), mask=inside)
