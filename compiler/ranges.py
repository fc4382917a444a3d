"""Range setters: which (low, high) a quantizer shall cover, from a histogram or a weight's rows.

A setter weighs the values that it clips against the coarser steps of a wider range (METHODS 0.2).
Activations stream into a `Histogram`, which merges exactly; weights are searched as they are. What
a format makes of values in a range is a `Rounding`, so that setters know no format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from effuse.errors import CalibrationError

Tensor = torch.Tensor
Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]  # values, low, high -> what the format holds
Range = tuple[float, float]

BINS = 2048  # a power of two
FINEST = -149  # exponent of the narrowest bin: float32's least value
DIGITS = 40  # binary ones of the greatest magnitude that bins can tell apart
POINTS = 4  # in a bin, when errors are taken: its values are taken to be spread evenly
CANDIDATES = 80  # shrunken ranges, each a hundredth narrower
POWER = 2.4  # of the error, in BRECQ's and Q-Diffusion's search
SHARE = 0.9999  # of the values, that `percentile` covers
FLOOR = 1e-4  # probability of a bin that the quantized distribution misses
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Histogram:
    """How many values fell into each of 2048 equal bins between the least and greatest seen.

    Bins are 2^exponent wide and begin at multiples of that. The exponent is the least with which
    all values fit, so it follows from `low` and `high` alone, and coarser bins are unions of finer
    ones: any way of merging gives the same counts as one pass. It takes 16 KiB.
    """

    low: float
    high: float
    counts: Tensor  # (BINS,) int64

    @classmethod
    def empty(cls) -> Histogram:
        """The neutral element of `merge`."""
        return cls(math.inf, -math.inf, torch.zeros(BINS, dtype=torch.int64))

    @classmethod
    def of(cls, tensor: Tensor) -> Histogram:
        """The histogram of a floating tensor of any shape.

        Raises:
            ValueError: it holds NaN or infinite values.
        """
        if tensor.numel() == 0:
            return cls.empty()
        low, high = extremes(tensor)
        exponent = _exponent(low, high)
        bins = tensor.detach().flatten().double().mul(2.0**-exponent).floor_().long()
        bins -= _bin(low, exponent)
        return cls(low, high, torch.bincount(bins, minlength=BINS))

    def merge(self, other: Histogram) -> Histogram:
        """The histogram of both; exactly associative and commutative."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        if low > high:
            return self
        return Histogram(low, high, self._placed(low, high) + other._placed(low, high))

    @property
    def total(self) -> int:
        """How many values it counts."""
        return int(self.counts.sum())

    @property
    def width(self) -> float:
        """Of one bin."""
        return math.ldexp(1.0, _exponent(self.low, self.high))

    def edges(self) -> Tensor:
        """The lower edge of each bin; (BINS,) float64."""
        first = _bin(self.low, _exponent(self.low, self.high))
        return (first + torch.arange(BINS, dtype=torch.float64)) * self.width

    def points(self, per_bin: int = POINTS) -> tuple[Tensor, Tensor]:
        """Values that stand for the bins that are not empty, evenly spread, with their weights.

        Both (points,) float64; the weights sum to 1.
        """
        used = self.counts > 0
        inside = (torch.arange(per_bin, dtype=torch.float64) + 0.5) / per_bin * self.width
        values = (self.edges()[used, None] + inside).clamp(self.low, self.high)
        shares = self.counts[used].double() / (self.total * per_bin)
        return values.flatten(), shares.repeat_interleave(per_bin)

    def _placed(self, low: float, high: float) -> Tensor:
        """The counts in the bins of the wider range [low, high]."""
        found = torch.zeros_like(self.counts)
        if self.low > self.high:
            return found
        before, after = _exponent(self.low, self.high), _exponent(low, high)
        bins = _bin(self.low, before) + torch.arange(BINS)
        bins = (bins >> min(after - before, 62)) - _bin(low, after)
        return found.index_add_(0, bins.clamp(0, BINS - 1), self.counts)  # beyond are empty ones


def extremes(tensor: Tensor) -> Range:
    """Least and greatest value.

    Raises:
        ValueError: it holds NaN or infinite values.
    """
    low, high = (bound.item() for bound in tensor.aminmax())  # NaN shows in both
    if not math.isfinite(low) or not math.isfinite(high):
        raise ValueError("a range cannot hold NaN or infinite values")
    return float(low), float(high)


def _exponent(low: float, high: float) -> int:
    """The least exponent whose bins hold [low, high]; it never falls as the range widens."""
    greatest, spread = max(abs(low), abs(high)), high - low
    exponent = FINEST
    if greatest:  # frexp says that zero's exponent is 0
        exponent = max(exponent, math.frexp(greatest)[1] - DIGITS)
    if spread:
        exponent = max(exponent, math.frexp(spread)[1] - BINS.bit_length() + 1)
    while _bin(high, exponent) - _bin(low, exponent) >= BINS:
        exponent += 1
    return exponent


def _bin(value: float, exponent: int) -> int:
    return math.floor(math.ldexp(value, -exponent))


# ---- what a format makes of values ---------------------------------------------------------------


@dataclass(frozen=True)
class Uniform:
    """An integer grid over a range that is widened to hold zero exactly (METHODS 0.2).

    Args:
        bits: of a code, at least 2.
        symmetric: ±(2^(bits-1) - 1) steps of max|range|, or 2^bits - 1 steps from low to high.
    """

    bits: int
    symmetric: bool = False

    def scale_zero(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The step and the zero point, in the shape and dtype of `low`."""
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.symmetric:
            scale = torch.maximum(-low, high) / (2 ** (self.bits - 1) - 1)
            return torch.where(scale >= TINY, scale, 1.0), torch.zeros_like(scale)
        scale = (high - low) / (2**self.bits - 1)
        scale = torch.where(scale >= TINY, scale, 1.0)  # a subnormal one would lose its precision
        return scale, (-low / scale).round()

    def __call__(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """`values` quantized and back; `low` and `high` broadcast against them."""
        scale, zero = self.scale_zero(low, high)
        limit = 2 ** (self.bits - 1) - 1
        least, most = (-limit, limit) if self.symmetric else (0, 2**self.bits - 1)
        codes = ((values / scale).round_() + zero).clamp_(least, most)
        return (codes - zero) * scale


@dataclass(frozen=True)
class Levels:
    """Any symmetric grid, such as a float one: `values`, sorted, in units of the scale."""

    values: tuple[float, ...]

    def __call__(self, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Each value's nearest level, the greatest of which stands at max|range|."""
        levels = torch.tensor(self.values, dtype=values.dtype, device=values.device)
        scale = torch.maximum(-low, high).clamp(min=0) / levels[-1]
        scale = torch.where(scale >= TINY, scale, 1.0)
        nearest = torch.bucketize(values / scale, (levels[1:] + levels[:-1]) / 2)
        return levels[nearest] * scale


# ---- setters -------------------------------------------------------------------------------------


def min_max(histogram: Histogram, rounding: Rounding | None = None) -> Range:
    """All that was seen."""
    _check(histogram)
    return histogram.low, histogram.high


def mse(histogram: Histogram, rounding: Rounding, power: float = POWER) -> Range:
    """The range, shrunken by 0 to 79 %, with the least mean |x - x̂|^power (METHODS 0.2).

    A power of 2.4 is BRECQ's and Q-Diffusion's, 2 the squared error.
    """
    _check(histogram)
    values, weights = histogram.points()
    ranges = list(shrunken(*_bounds(histogram)))
    lows, highs = (torch.stack(each) for each in zip(*ranges, strict=True))
    errors = (rounding(values, lows, highs) - values).abs_().pow_(power) @ weights
    best = int(errors.argmin())
    return lows[best].item(), highs[best].item()


def percentile(
    histogram: Histogram, rounding: Rounding | None = None, share: float = SHARE
) -> Range:
    """The range without the bins of the (1 - share) / 2 least and greatest values."""
    _check(histogram)
    edges, cut = histogram.edges(), (1 - share) / 2 * histogram.total
    first = int((histogram.counts.cumsum(0) > cut).long().argmax())
    last = BINS - 1 - int((histogram.counts.flip(0).cumsum(0) > cut).long().argmax())
    low, high = edges[first].item(), edges[last].item() + histogram.width
    return max(low, histogram.low), min(high, histogram.high)


def entropy(histogram: Histogram, rounding: Rounding) -> Range:
    """The shrunken range with the least KL divergence of the quantized from the real distribution.

    As TensorRT's calibrator has it: the values beyond the range count at its ends in the real
    distribution, and are missing in the quantized one, where the bins that round to one level
    share its counts. Of zeros, which every format holds, as many count as of their neighbours.
    """
    _check(histogram)
    values, weights = histogram.points(1)
    weights = _without_spike(values, weights)
    ranges = list(shrunken(*_bounds(histogram)))
    found = [_divergence(values, weights, rounding, *each) for each in ranges]
    low, high = ranges[found.index(min(found))]
    return low.item(), high.item()


def _without_spike(values: Tensor, weights: Tensor) -> Tensor:
    """The weights, scaled to sum to 1, with zero's no greater than that of the bins beside it."""
    at = int(values.abs().argmin())
    beside = torch.cat([weights[max(0, at - 1) : at], weights[at + 1 : at + 2]])
    result = weights.clone()
    if len(beside):
        result[at] = torch.minimum(result[at], beside.max())
    return result / result.sum()


def _divergence(
    values: Tensor, weights: Tensor, rounding: Rounding, low: Tensor, high: Tensor
) -> float:
    """KL(P‖Q) over the bins that `low` and `high`, with zero between them, leave."""
    inside = (values >= low.clamp(max=0)) & (values <= high.clamp(min=0))
    if not inside.any():
        return math.inf
    kept, real = values[inside], weights[inside].clone()
    level = torch.unique(rounding(kept, low, high), return_inverse=True)[1]
    sums = torch.zeros(len(kept), dtype=real.dtype).index_add_(0, level, real)
    spread = (sums / torch.bincount(level, minlength=len(kept)).clamp(min=1))[level]
    real[0] += weights[values < kept[0]].sum()
    real[-1] += weights[values > kept[-1]].sum()
    spread = (spread / spread.sum()).clamp(min=FLOOR / len(kept))
    return float((real * (real / spread).log()).sum())


Setter = Callable[..., Range]  # of a histogram and a rounding
SETTERS: Mapping[str, Setter] = {
    "minmax": min_max,
    "mse": mse,
    "percentile": percentile,
    "entropy": entropy,
}


def shrunken(low: Tensor, high: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The candidates of a search: [low, high] itself first, then shrunk towards zero.

    None leaves [low, high], also where that does not hold zero.
    """
    for number in range(CANDIDATES):
        share = 1 - number / 100
        yield (low * share).clamp(low, high), (high * share).clamp(low, high)


def _bounds(histogram: Histogram) -> tuple[Tensor, Tensor]:
    """Least and greatest value, (1,) float64."""
    low, high = torch.tensor([[histogram.low], [histogram.high]], dtype=torch.float64)
    return low, high


def _check(histogram: Histogram) -> None:
    if histogram.low > histogram.high:
        raise CalibrationError(
            "ranges: no value was counted, so there is no range; calibrate with inputs that reach "
            "this tensor"
        )


# ---- weights -------------------------------------------------------------------------------------


def weight_ranges(
    weight: Tensor, setter: str, rounding: Rounding, **options: Any
) -> tuple[Tensor, Tensor]:
    """The range of each row of a weight, (rows,) float32 twice.

    Args:
        weight: (rows, columns); for groups, hand over (rows · groups, group).
        setter: a name in `SETTERS`; `minmax` and `mse` are vectorised over the rows.
        rounding: of values to what the format holds.
        options: of the setter, `power` or `share`.

    Raises:
        CalibrationError: the weight holds NaN or infinite values, or no columns.
    """
    if weight.numel() == 0 or not weight.isfinite().all():
        raise CalibrationError(
            f"ranges: a weight of shape {tuple(weight.shape)} is empty or holds NaN or infinite "
            "values; check the checkpoint that it was loaded from"
        )
    if setter == "mse":
        return weight_scale_search(weight, rounding, **options)
    if setter == "minmax":
        low, high = weight.float().aminmax(dim=1)
        return low, high
    found = [SETTERS[setter](Histogram.of(row), rounding, **options) for row in weight]
    low, high = torch.tensor(found, dtype=torch.float32).unbind(1)
    return low, high


def weight_scale_search(
    weight: Tensor, rounding: Rounding, power: float = POWER
) -> tuple[Tensor, Tensor]:
    """`mse` of each row of a finite weight (rows, columns) itself: low and high, (rows,) float32.

    Its mean |w - ŵ|^power is never above that of the whole range, which is the first candidate.
    """
    values = weight.float()
    low, high = values.aminmax(dim=1, keepdim=True)
    least = torch.full_like(low, math.inf)
    best = low, high
    for one, other in shrunken(low, high):
        error = (rounding(values, one, other) - values).abs_().pow_(power).mean(1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best = torch.where(better, one, best[0]), torch.where(better, other, best[1])
    return best[0].flatten(), best[1].flatten()
