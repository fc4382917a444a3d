"""A whole run of DDIM in numpy, for the rows of the CPU benchmark that must not import torch."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from cpu_job import Arrays, Run

KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # ᾱ of DDPM's linear betas


def sample(run: Run, inputs: Arrays, timesteps: Sequence[int]) -> tuple[np.ndarray, float]:
    """The last picture, in [-1, 1], from the inputs' own noise; seconds inside the network.

    What the network gives, of the sample's shape, is taken for v = √ᾱ ε - √(1 - ᾱ) x₀: a step then
    turns the sample by a small angle whatever v is. As a noise prediction, divided by √ᾱ, what a
    random network gives would throw the first samples about as no trained one does.
    """
    name = next(each for each in inputs if inputs[each].ndim == 4)
    x, seconds = inputs[name].astype(np.float64), 0.0
    for now, then in zip(timesteps, [*timesteps[1:], None], strict=True):
        given = {**inputs, name: x.astype(np.float32),
                 "timestep": np.full_like(inputs["timestep"], now)}  # fmt: skip
        start = time.perf_counter()
        v = run(given).astype(np.float64)
        seconds += time.perf_counter() - start
        kept, left = KEPT[now], 1.0 if then is None else KEPT[then]
        clean = math.sqrt(kept) * x - math.sqrt(1 - kept) * v
        noise = math.sqrt(kept) * v + math.sqrt(1 - kept) * x
        x = math.sqrt(left) * clean + math.sqrt(1 - left) * noise
    return np.clip(x, -1, 1), seconds
