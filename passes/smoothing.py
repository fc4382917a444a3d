"""Smoothing: move range from a layer's inputs into its weight, x̂ = x / s, Ŵ = W · s, ŷ = y.

    s_c = max|X_c|^α / max|W_c|^β                   per input channel c (METHODS 1.12, 0.6)

(α, β) = (0.5, 0.5) is SmoothQuant's middle; ViDiT-Q's balance x · m, m = max|W|^a / max|X|^(1-a)
(METHODS 1.8), is s = 1 / m: (α, β) = (1 - a, a). What divides x is folded into what computes it:
an affine norm, the rows of a linear layer, adaLN's modulation; SiLU and GELU cannot be crossed.
Source: deepcompressor `calib/smooth.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from effuse.errors import CalibrationError

Exponents = tuple[float, float]  # α of the inputs, β of the weight
CANDIDATES: tuple[Exponents, ...] = (
    (0.0, 0.0),  # no smoothing; first, so that it wins ties
    *((i / 20, 0.0) for i in range(1, 20)),
    *((i / 20, 1 - i / 20) for i in range(1, 20)),
)


def input_absmax(weight: Tensor) -> Tensor:
    """max|W_c| of each input channel of (out, in, …), (in,): of a linear layer or groups = 1."""
    return weight.detach().float().abs().movedim(1, 0).flatten(1).amax(1)


def smooth_scale(x_absmax: Tensor, w_absmax: Tensor, alpha: float, beta: float) -> Tensor:
    """s = x_absmax^α / w_absmax^β, float32; 1 where a channel of either is all zeros.

    Args:
        x_absmax: max|X_c| over calibration, (channels,).
        w_absmax: max|W_c| over all weights that read these inputs, (channels,).
        alpha: exponent of the inputs, 0 to 1.
        beta: exponent of the weight, 0 to 1.

    Raises:
        CalibrationError: the shapes differ, or a range is negative or not finite.
    """
    if x_absmax.shape != w_absmax.shape:
        raise CalibrationError(
            f"w_absmax: expected {tuple(x_absmax.shape)} as x_absmax, came {tuple(w_absmax.shape)}"
        )
    for name, value in (("x_absmax", x_absmax), ("w_absmax", w_absmax)):
        if not (value.isfinite() & (value >= 0)).all():
            raise CalibrationError(
                f"{name}: expected finite values ≥ 0, came NaN, infinite or negative ones; "
                "calibrate in float32, or exclude the layer"
            )
    scale = x_absmax.double().pow(alpha) / w_absmax.double().pow(beta)
    return torch.where((x_absmax > 0) & (w_absmax > 0), scale, 1.0).float()


def best_smoothing(
    evaluate: Callable[[float, float], float], candidates: Iterable[Exponents] = CANDIDATES
) -> tuple[Exponents, float]:
    """The candidate of the least error, and that error; the first of equals.

    Args:
        evaluate: (alpha, beta) -> the output error of the whole quantized layer.
        candidates: pairs of exponents; 39 by default.

    Raises:
        CalibrationError: no candidate has a finite error.
    """
    errors = {each: evaluate(*each) for each in candidates}
    finite = {each: error for each, error in errors.items() if math.isfinite(error)}
    if not finite:
        raise CalibrationError(
            f"evaluate: expected a finite error of at least one of {len(errors)} candidates, came "
            "none; are the layer's inputs finite?"
        )
    best = min(finite, key=lambda each: finite[each])
    return best, finite[best]


def into_columns(weight: Tensor, scale: Tensor) -> Tensor:
    """W · s along the input channels of (out, in, …): the layer that reads x / s."""
    return weight * scale.view(-1, *[1] * (weight.dim() - 2)).to(weight)


def into_rows(weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """W / s and b / s along the output channels: the layer that computes x, or adaLN's shift."""
    rows = weight / scale.view(-1, *[1] * (weight.dim() - 1)).to(weight)
    return rows, None if bias is None else bias / scale.to(bias)


def into_norm(gamma: Tensor, beta: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor | None]:
    """γ / s and β / s of the affine norm that computes x."""
    return gamma / scale.to(gamma), None if beta is None else beta / scale.to(beta)


def into_modulation(weight: Tensor, bias: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The rows that compute a, where x = norm · (1 + a) + c: W / s and (b + 1) / s - 1."""
    rows, _ = into_rows(weight, None, scale)
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    return rows, (bias + 1) / scale.to(bias) - 1
