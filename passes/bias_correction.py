"""Bias correction: take the mean error of a quantized layer's output off its bias.

    b' = b - (Ŵ - W) E[x] - Ŵ E[x̂ - x]             so that E[Ŵ x̂ + b'] = E[W x + b]

A convolution is taken as if every position saw whole windows: Ŵ - W summed over the kernel, E[x] by
input channel. Where zero padding is read, at the borders, the correction is too large by the share
of the window that is padding. Source: Nagel et al., Data-Free Quantization, 2019, section 4.2.
"""

from __future__ import annotations

from torch import Tensor

from effuse.errors import CalibrationError


def corrected_bias(
    bias: Tensor | None,
    weight: Tensor,
    quantized: Tensor,
    mean: Tensor,
    mean_error: Tensor | None = None,
    groups: int = 1,
) -> Tensor:
    """The bias (out,) under which the mean output of the quantized layer is the float layer's.

    Args:
        bias: (out,), or None for none.
        weight: (out, in / groups) or (out, in / groups, height, width).
        quantized: its value on the grid.
        mean: E[x], what the float layer sees, by input channel (in,).
        mean_error: E[x̂ - x] of the quantized input, (in,); None: the input is not quantized.
        groups: of the convolution.

    Raises:
        CalibrationError: a mean has other channels than the weight, or is not finite.
    """
    shift = mean_output(quantized.double() - weight.double(), mean, groups)
    if mean_error is not None:
        shift += mean_output(quantized, mean_error, groups)
    before = weight.new_zeros(len(weight)) if bias is None else bias
    return (before - shift).to(before.dtype)


def mean_output(weight: Tensor, mean: Tensor, groups: int = 1) -> Tensor:
    """W E[x] of a linear layer or a convolution away from its borders, (out,), float64.

    Raises:
        CalibrationError: `mean` has other channels than the weight, or is not finite.
    """
    channels = weight.shape[1] * groups
    if mean.shape != (channels,):
        raise CalibrationError(
            f"mean: expected ({channels},), one for each input channel, came {tuple(mean.shape)}"
        )
    if not mean.isfinite().all():
        raise CalibrationError(
            "mean: expected finite values, came NaN or infinite ones; calibrate in float32, or "
            "exclude the layer"
        )
    kernel = weight.double().reshape(groups, -1, *weight.shape[1:])
    kernel = kernel.sum(dim=tuple(range(3, kernel.dim()))) if kernel.dim() > 3 else kernel
    grouped = mean.to(kernel).view(groups, -1, 1)
    return (kernel @ grouped).flatten()
