"""Signal-to-quantization-noise and peak signal-to-noise ratios, in dB (numpy only)."""

from __future__ import annotations

from typing import Any

import numpy as np

CEILING_DB = 200.0  # stands for "equal to the bit"


def sqnr_db(signal: Any, other: Any) -> float:
    """10·log10(Σ signal² / Σ (signal - other)²), in dB; 200 where nothing differs."""
    signal = np.asarray(signal, dtype=np.float64)
    noise = float(np.sum((signal - np.asarray(other, dtype=np.float64)) ** 2))
    power = float(np.sum(signal**2))
    if noise == 0:
        return CEILING_DB
    if power == 0 or not np.isfinite(noise):
        return -CEILING_DB
    return _bounded(power / noise)


def psnr_db(picture: Any, other: Any, peak: float = 2.0) -> float:
    """10·log10(peak² / mean squared difference), in dB; `peak` is 2 for pixels in [-1, 1]."""
    difference = np.asarray(picture, dtype=np.float64) - np.asarray(other, dtype=np.float64)
    error = float(np.mean(difference**2))
    if error == 0:
        return CEILING_DB
    return _bounded(peak**2 / error) if np.isfinite(error) else -CEILING_DB


def _bounded(ratio: float) -> float:
    if ratio == 0:
        return -CEILING_DB
    return max(-CEILING_DB, min(CEILING_DB, 10 * float(np.log10(ratio))))
