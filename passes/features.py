"""Features along calibration trajectories: what a cache's schedule and forecast are fitted to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.errors import CalibrationError
from effuse.graph import outputs
from effuse.program import Part
from effuse.watch import Watch

Array = np.ndarray[Any, Any]

SAMPLED = 65536  # elements kept of all slots together, at each step: 13 MB over 50 steps
RIDGE = 1e-9  # relative: two refreshes may hold nearly the same


class Features(Watch):
    """Keeps a fixed random choice of the slots' elements at every step."""

    def __init__(self, part: Part, slots: Sequence[str], seed: int = 0) -> None:
        names = dict(zip(part.outputs, outputs(part.graph), strict=True))
        self._part = part.name
        self.nodes = {slot: names[slot].name for slot in slots}
        self._nodes = list(self.nodes.values())
        self.channels: dict[str, Array] = {}  # of the kept elements, by node
        self.widths: dict[str, int] = {}  # how many channels a node's value has
        self._places: dict[str, torch.Tensor] = {}
        self._random = torch.Generator().manual_seed(seed)
        self._index: int | None = None
        self.by_step: defaultdict[int, list[dict[str, torch.Tensor]]] = defaultdict(list)

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """A call at step `index`."""
        self._index = index
        if index is not None:
            self.by_step[index].append({})

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Keep some elements, if it is a slot's value."""
        if part.name != self._part or self._index is None or node.name not in self._nodes:
            return
        if node.name not in self._places:
            count = max(1, min(value.numel(), SAMPLED // len(self._nodes)))
            chosen = torch.randperm(value.numel(), generator=self._random)[:count]
            places = chosen.sort().values
            self._places[node.name] = places
            self.channels[node.name] = channel_of(places, value.shape).numpy()
            self.widths[node.name] = value.shape[channel_axis(value.dim())]
        flat = value.flatten()
        places = self._places[node.name]
        self.by_step[self._index][-1][node.name] = flat[places % flat.numel()].float()

    def at(self, index: int, run: int) -> Array:
        """All kept elements of step `index` in the trajectory number `run`."""
        kept = self.by_step[index][run]
        return np.concatenate([kept[name].numpy() for name in self._nodes])


def channel_axis(dims: int) -> int:
    """Where the channels of an activation are: (N, C, H, W), or (…, C) of tokens."""
    return 1 if dims == 4 else dims - 1


def channel_of(places: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The channels of elements at `places` of a flattened activation of that shape."""
    axis = channel_axis(len(shape))
    return places // prod(shape[axis + 1 :]) % shape[axis]


def whole_runs(features: Features, steps: int) -> int:
    """How many trajectories went through all steps.

    Raises:
        CalibrationError: none did.
    """
    runs = min(len(features.by_step.get(index, ())) for index in range(steps))
    if not runs:
        missing = [index for index in range(steps) if not features.by_step.get(index)]
        raise CalibrationError(
            f"cache: calibration never ran step {missing[0]} of {steps}; hand compile a "
            "calibration run that samples over the whole schedule"
        )
    return runs


def gram_matrix(features: Features, steps: int) -> Array:
    """(steps, steps) inner products, summed over the whole trajectories that were seen.

    Raises:
        CalibrationError: no trajectory went through all steps.
    """
    runs = whole_runs(features, steps)
    total = np.zeros((steps, steps))
    for run in range(runs):
        rows = np.stack([features.at(index, run) for index in range(steps)]).astype(np.float64)
        total += rows @ rows.T
    return total


def fitted_weights(gram: Array, sources: Sequence[int], at: int) -> tuple[float, ...]:
    """The weights w with the least |F_at - Σ_j w_j F_sources_j|², by the normal equations."""
    chosen = list(sources)
    system = gram[np.ix_(chosen, chosen)]
    least = RIDGE * np.trace(system) or 1.0  # of nothing but zeros: any will do
    ridge = least * np.eye(len(chosen))
    return tuple(float(w) for w in np.linalg.solve(system + ridge, gram[chosen, at]))
