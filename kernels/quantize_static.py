# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""effuse::quantize on a GPU: a known scale and zero point for the whole tensor.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)

x of any shape, float; scale and zero_point have one element; q has zero_point's dtype, int8 or
uint8. Arithmetic is float32, to the bit that of kernels/quantize.py, which has the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.kernels.launch import Launch, Native


def empty(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """The codes, not filled."""
    return torch.empty_like(x, dtype=zero_point.dtype)


def launch(
    results: tuple[Tensor, ...], x: Tensor, scale: Tensor, zero_point: Tensor, axis: int
) -> Launch | None:
    """What fills `results`."""
    raise NotImplementedError


NATIVE = Native(empty, launch)
