"""Which axis of a video's latent counts its frames: the network's weights fix the other one."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from effuse.capture_inputs import FRAMES_AXIS, Leaf, replaced
from effuse.capture_unwrap import unwrapped
from effuse.example_trial import trial
from effuse.plan import Role

OTHER_AXIS = 1  # of frames, in (batch, frames, channels, height, width)


def laid_out(
    model: nn.Module, inputs: Mapping[str, Any], leaves: list[Leaf], roles: Mapping[str, Role],
    words: Collection[str],
) -> list[Leaf]:  # fmt: skip
    """The leaves with the network's own axis of frames, where that is to be named."""
    latent = next(leaf for leaf in leaves if roles[leaf.label] is Role.LATENT)
    if "frames" not in words or latent.tensor.dim() != 5:
        return leaves
    axis = frames_axis(model, inputs, latent)
    return [replace(leaf, frames=axis) for leaf in leaves]


def frames_axis(model: nn.Module, inputs: Mapping[str, Any], latent: Leaf) -> int:
    """The axis of a latent of which the network takes more, or which it refuses later.

    Channels are refused by the first layer. Frames may be, too, by what is as long as they are.
    """
    run = trial(unwrapped(model))

    def progress(axis: int) -> tuple[float, ...]:
        doubled = latent.tensor.repeat_interleave(2, dim=axis)
        failure = run(replaced(inputs, {latent.label: doubled}))
        return (math.inf,) if failure is None else failure.progress

    return max((FRAMES_AXIS, OTHER_AXIS), key=progress)
