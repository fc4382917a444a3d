"""The end of a low-bit linear layer, which its kernel computes before anything is stored.

    y = act(total + low · upᵀ + bias) · gate + residual          rounded once, to y's type

total (…, N) float32 is the layer's scaled sum. low (…, R), up (N, R): a low-rank branch's second
projection, multiplied in low's type and accumulated in float32 (SVDQuant's fusion rule, METHODS
1.12). bias (N,). act: none, GELU (exact or tanh) or SiLU. gate (B, N): one row for each block of
M / B consecutive rows of y. residual: shaped as y. What is None is left out. Arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


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
