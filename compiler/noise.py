"""The normal noise of torch's CPU generator, in numpy: a seed gives the same picture without torch.

torch draws 24-bit uniforms from a Mersenne twister and turns sixteen at a time to normals by Box
and Muller's transform: u_0 … u_7 give radii sqrt(-2 ln(1 - u)), u_8 … u_15 angles 2π u. The last
sixteen are drawn anew where the count is no multiple of it. Equal to torch's to float32 rounding of
ln, cos and sin.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from effuse.errors import InputError

GROUP = 16

Array = np.ndarray[Any, Any]


def normal(seed: int, shape: Sequence[int]) -> Array:
    """`torch.randn(shape, generator=torch.Generator().manual_seed(seed))` in float32.

    Raises:
        InputError: fewer than 16 numbers, which torch draws in another way.
    """
    return draws(seed)(shape)


def draws(seed: int) -> Callable[[Sequence[int]], Array]:
    """What one such generator gives in calls one after another, by shape.

    Its result raises:
        InputError: fewer than 16 numbers.
    """
    source = np.random.RandomState(seed & 0xFFFFFFFF)
    return lambda shape: _drawn(source, shape)


def _drawn(source: np.random.RandomState, shape: Sequence[int]) -> Array:
    count = int(np.prod(shape))
    if count < GROUP:
        raise InputError(f"shape: {tuple(shape)} has {count} numbers, and at least {GROUP} go here")
    rest = GROUP if count % GROUP else 0
    drawn = source.randint(0, 2**32, count + rest, dtype=np.uint32)
    uniform = (drawn & 0xFFFFFF).astype(np.float32) / np.float32(2**24)
    whole = count - count % GROUP
    found = np.empty(count, np.float32)
    found[:whole] = _normals(uniform[:whole])
    if rest:
        found[-GROUP:] = _normals(uniform[-GROUP:])
    return found.reshape(shape)


def _normals(uniform: Array) -> Array:
    first, second = np.split(uniform.reshape(-1, 2, GROUP // 2), 2, axis=1)
    radius = np.sqrt(np.float32(-2) * np.log1p(-first))
    angle = np.float32(2 * np.pi) * second
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
