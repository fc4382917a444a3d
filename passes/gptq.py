"""GPTQ: round a weight column by column; columns still open make up for the errors of those done.

Minimises tr(E H Eᵀ), E = W - Ŵ, H = 2 XᵀX / n over the layer's inputs X (METHODS 0.6). Columns go
in descending H_jj ("act-order") under scales that are fixed before: each keeps its own group's.
Unlike the reference, a column that calibration never saw (H_jj = 0) is rounded to nearest instead
of set to zero: both cost nothing there, but an input that was silent may speak up later.
Source: deepcompressor `quantizer/kernel/gptq.py`; Frantar et al., GPTQ, 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from effuse.errors import CalibrationError, PassError

ROWS = 4096  # of inputs in one product: float32 sums stay short, and so do temporaries
RAISES = 6  # dampings tried, each ten times the one before
LEAST_DAMP = 1e-6  # where raising starts

Nearest = Callable[[Tensor], Tensor]  # values in units of the scale -> nearest values of the grid


class Hessian:
    """H = 2 XᵀX / n of a layer's inputs, gathered batch by batch.

    `value` (columns, columns) is kept in float32, as a running mean that is updated in float64;
    `count` is n.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.value = torch.zeros(columns, columns, device=device)

    def add(self, x: Tensor) -> None:
        """Take in inputs of shape (..., columns).

        Raises:
            CalibrationError: the inputs have other columns, or are not finite.
        """
        columns = len(self.value)
        if x.shape[-1] != columns:
            raise CalibrationError(
                f"x: expected (..., {columns}), came {tuple(x.shape)}; for a convolution, add "
                "each of unfolded(x, ...)"
            )
        for rows in torch.split(x.flatten(0, -2), ROWS) if x.numel() else ():
            rows = rows.to(self.value)
            self._mean(rows.T @ rows * (2 / len(rows)), len(rows))

    def merge(self, other: Hessian) -> None:
        """Take in what `other` has seen.

        Raises:
            CalibrationError: the two have different columns.
        """
        if other.value.shape != self.value.shape:
            raise CalibrationError(
                f"other: expected {len(self.value)} columns, came {len(other.value)}; "
                "only statistics of the same layer can be merged"
            )
        if other.count:
            self._mean(other.value.to(self.value), other.count)

    def _mean(self, value: Tensor, count: int) -> None:
        if not value.diagonal().isfinite().all():  # a NaN anywhere in x reaches the diagonal
            raise CalibrationError(
                "x: the layer's inputs hold NaN or infinite values (or overflow when squared); "
                "calibrate in float32, or exclude the layer"
            )
        self.count += count
        change = (value.double() - self.value) * (count / self.count)
        self.value = (self.value + change).float()


def unfolded(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    values: int = 2**24,
) -> Iterator[Tensor]:
    """A convolution's inputs as a linear layer sees them, for groups = 1.

    Args:
        x: (batch, channels, height, width), or of videos (batch, channels, frames, height, width).
        kernel, stride, padding, dilation: of the convolution, in the order of the sizes.
        values: about how many values one block holds at most.

    Yields:
        (positions, channels · sizes of the kernel), in the order of `weight.flatten(1)`; an image
        or some of its rows (of a video, of its frames) at a time.
    """
    spans = [step * (size - 1) + 1 for step, size in zip(dilation, kernel, strict=True)]
    x = functional.pad(x, [end for amount in reversed(padding) for end in (amount, amount)])
    sizes = zip(x.shape[2:], spans, stride, strict=True)
    high, *others = ((size - span) // step + 1 for size, span, step in sizes)
    rows = max(1, values // (x.shape[1] * math.prod(kernel) * math.prod(others)))
    for image in x:
        for top in range(0, high, rows):
            last = min(top + rows, high) - 1
            band = image[:, top * stride[0] : last * stride[0] + spans[0]]
            yield _windows(band, spans, stride, dilation)


def _windows(
    image: Tensor, spans: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """The windows of an image (channels, …), (positions, channels · sizes of the kernel)."""
    for axis, (span, step) in enumerate(zip(spans, stride, strict=True), start=1):
        image = image.unfold(axis, span, step)
    for axis, step in enumerate(dilation, start=len(spans) + 1):
        image = image[(slice(None),) * axis + (slice(None, None, step),)]
    return image.movedim(0, len(spans)).flatten(0, len(spans) - 1).flatten(1)


def gptq(
    weight: Tensor,
    hessian: Hessian,
    scale: Tensor,
    group: int,
    nearest: Nearest,
    zero: Tensor | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> Tensor:
    """The weight rounded to its grid such that the layer's output changes little.

    Args:
        weight: (rows, columns); of a convolution `weight.flatten(1)`.
        hessian: of the layer's inputs, with as many columns.
        scale: a scalar, (rows, 1) or (rows, groups), positive.
        group: consecutive columns that share a scale; 0: all of them.
        nearest: values in units of the scale (any shape) to the grid's nearest, saturating.
        zero: of an integer grid, the value that stands for 0, shaped as `scale`; None: 0.
        block: columns after which the rest is updated at once.
        damp: share of the mean of H's diagonal that is added to it.

    Returns:
        (rows, columns) float32 real values (q - zero) · scale, q on the grid.

    Raises:
        CalibrationError: the Hessian is empty or of other columns.
        PassError: the scales do not fit, or no damping makes H positive definite.
    """
    settled = compensated(weight, hessian, scale, group, nearest, zero, block, damp)
    scales = per_column(scale, weight.shape[1], group)
    zeros = None if zero is None else per_column(zero, weight.shape[1], group)
    return _round(settled, scales, zeros, nearest)


def compensated(
    weight: Tensor,
    hessian: Hessian,
    scale: Tensor,
    group: int,
    nearest: Nearest,
    zero: Tensor | None = None,
    block: int = 128,
    damp: float = 0.01,
) -> Tensor:
    """The real weight (rows, columns) whose nearest values on the grid are those of `gptq`.

    Each column is as it was when its turn came. It is where learning a rounding may go on from.
    Arguments and errors are those of `gptq`.
    """
    _check(weight, hessian, scale)
    value = hessian.value.to(weight.device)
    order = value.diagonal().argsort(descending=True, stable=True)
    factor = inverse_factor(value[order][:, order], damp).float()
    columns = weight.shape[1]
    rest = weight.float().T[order]
    scales = per_column(scale, columns, group).T[order]
    zeros = None if zero is None else per_column(zero, columns, group).T[order]
    for start in range(0, columns, block):
        part = slice(start, start + block)
        offsets = None if zeros is None else zeros[part]
        errors = _compensate(rest[part], scales[part], offsets, factor[part, part], nearest)
        rest[part.stop :] -= factor[part, part.stop :].T @ errors
    return rest[order.argsort()].T.contiguous()


def _check(weight: Tensor, hessian: Hessian, scale: Tensor) -> None:
    if weight.shape[1] != len(hessian.value):
        raise CalibrationError(
            f"hessian: expected {weight.shape[1]} columns as the weight has, came "
            f"{len(hessian.value)}; gather it from this layer's inputs"
        )
    if hessian.count == 0:
        raise CalibrationError(
            "hessian: expected the layer's inputs, came none; calibrate over steps at which the "
            "layer runs"
        )
    if not (scale > 0).all():
        raise PassError(
            "scale: expected positive values, came zero, negative or NaN ones; give rows of zeros "
            "any positive scale"
        )


def _compensate(
    rest: Tensor, scales: Tensor, zeros: Tensor | None, factor: Tensor, nearest: Nearest
) -> Tensor:
    """Update a block of columns (columns, rows) for those before; the errors over U_jj."""
    errors = torch.empty_like(rest)
    for j in range(len(rest)):
        rounded = _round(rest[j], scales[j], None if zeros is None else zeros[j], nearest)
        errors[j] = (rest[j] - rounded) / factor[j, j]
        rest[j + 1 :] -= factor[j, j + 1 :, None] * errors[j]
    return errors


def _round(values: Tensor, scales: Tensor, zeros: Tensor | None, nearest: Nearest) -> Tensor:
    codes = values / scales
    if zeros is None:
        return nearest(codes) * scales
    return (nearest(codes.round() + zeros) - zeros) * scales  # ties do not depend on zeros


def per_column(scale: Tensor, columns: int, group: int) -> Tensor:
    """Scales that are a scalar, (rows, 1) or (rows, groups), as (rows or 1, columns).

    Raises:
        PassError: the groups do not cover the columns.
    """
    scale = scale if scale.dim() else scale.view(1, 1)
    group = columns if scale.shape[-1] == 1 else group or columns
    if scale.dim() != 2 or scale.shape[1] != -(-columns // group):
        raise PassError(
            f"scale: expected (rows, 1) or (rows, {-(-columns // group)}) for groups of {group} "
            f"of {columns} columns, came {tuple(scale.shape)}"
        )
    return scale.float().repeat_interleave(group, dim=1)[:, :columns]


def inverse_factor(hessian: Tensor, damp: float) -> Tensor:
    """U, upper triangular, float64, with UᵀU = (H + λI)⁻¹; λ = `damp` times H's mean diagonal.

    λ is raised tenfold until H + λI is positive definite. A column never seen takes the mean
    diagonal, which touches no other column.

    Raises:
        PassError: no damping makes H positive definite.
    """
    # H = RRᵀ with R upper triangular gives H⁻¹ = R⁻ᵀR⁻¹, so U = R⁻¹ takes one factorisation;
    # R is the lower Cholesky factor of H read backwards
    backwards = hessian.double().flip(0, 1)
    diagonal = backwards.diagonal()
    alive = diagonal > 0
    mean = diagonal[alive].mean().item() if alive.any() else 1.0
    undamped = torch.where(alive, diagonal, mean)
    shares = [damp, *(max(damp, LEAST_DAMP) * 10**times for times in range(1, RAISES))]
    for share in shares:
        diagonal.copy_(undamped + share * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not failed:
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1)
    raise PassError(
        f"hessian: expected XᵀX of real inputs, came {len(hessian)} columns that are not positive "
        f"definite even with {shares[-1]:g} of the mean diagonal added; gather it anew"
    )


def output_error(error: Tensor, hessian: Hessian) -> Tensor:
    """tr(E H Eᵀ) by rows: twice the mean squared output error of each output channel, (rows,)."""
    error = error.double()
    return ((error @ hessian.value.double()) * error).sum(1)
