"""Activations that kernels compute on their way: GELU (exact or by tanh) and SiLU, in float32.

    gelu(x) = x · Φ(x)         gelu_tanh(x) = x · sigmoid(2 √(2/π) (x + 0.044715 x³))
    silu(x) = x · sigmoid(x)

Source: Hendrycks and Gimpel, Gaussian error linear units.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from effuse.kernels.launch import jit, tl

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of float32 x."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x
