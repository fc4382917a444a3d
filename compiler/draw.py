"""Which calls calibration records: how many at each step of the schedule.

`uniform` is Q-Diffusion's (METHODS 1.2), `normal` PTQ4DM's (1.1), `density` EDA-DM's (1.4). A draw
is a count for each step; sampling runs as ever, and what a step has beyond its count is not kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import takewhile
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import fx

from effuse.errors import CalibrationError
from effuse.graph import value_of
from effuse.plan import Depends
from effuse.program import Part, Program
from effuse.rates import dependences
from effuse.watch import Watch

Draw = Literal["all", "uniform", "normal", "density"]
DRAWS: tuple[str, ...] = get_args(Draw)
Counts = tuple[int, ...]  # by step

aten = torch.ops.aten

CONVS = (aten.conv2d.default, aten.conv3d.default)
LAYERS = (aten.linear.default, *CONVS)
MEAN, STD = 0.4, 0.4  # of the drawn timestep, as shares of the schedule, in PTQ4DM's runs
VARIETY = 1.2  # EDA-DM's λ for CIFAR and ImageNet
SAME = 1e-9  # features that differ less are the same but for rounding
SAMPLED = 4096  # elements kept of a feature: 16 KiB a step


def uniform_counts(steps: int, calls: int) -> Counts:
    """Calls spread evenly over the steps.

    Where `calls` divides `steps` they are at range(0, steps, steps // calls), as Q-Diffusion's.
    """
    return _counts((index * steps // calls for index in range(calls)), steps)


def normal_counts(
    steps: int, calls: int, seed: int = 0, mean: float = MEAN, std: float = STD
) -> Counts:
    """Timesteps from N(mean T, std T), rounded and clamped to [0, T - 1] (PTQ4DM); T = `steps`.

    Timestep 0 is the cleanest, which is the last step of the run. A mean under one half leans to
    the clean end.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = mean * steps + std * steps * torch.randn(calls, generator=generator)
    times = drawn.round().clamp(0, steps - 1).long().tolist()
    return _counts((steps - 1 - time for time in times), steps)


def _counts(chosen: Any, steps: int) -> Counts:
    found = [0] * steps
    for index in chosen:
        found[index] += 1
    return tuple(found)


def density(features: torch.Tensor, radius: float | None = None) -> torch.Tensor:
    """D_t: how many other steps' features are within `radius` of f_t in mean squared distance.

    Args:
        features: (steps, elements).
        radius: None: the median distance of two steps, as the paper's 0.3 and 3.0 are of its
            networks' scale.
    """
    features = features.double()
    apart = torch.stack([(features - each).square().mean(1) for each in features])
    others = ~torch.eye(len(features), dtype=torch.bool)
    within = apart[others].median() if radius is None else radius
    return ((apart <= within) & others).sum(1).double()


def variety(features: torch.Tensor) -> torch.Tensor:
    """Var_t = Σ_j (1 - cos(f_t, f_j)) of features (steps, elements)."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    return (1 - unit @ unit.T).sum(1)


def density_counts(
    features: torch.Tensor, calls: int, radius: float | None = None, weight: float = VARIETY
) -> Counts:
    """n_t = round(calls · w_t / Σ w), w = D + weight · Var, both scaled to [0, 1] (EDA-DM).

    What rounding lacks goes to the largest count; what it has too much is taken from the end.
    """
    steps = len(features)
    if steps < 2:
        return (calls,) * steps
    weights = _unit(density(features, radius)) + weight * _unit(variety(features))
    if not weights.any():
        return uniform_counts(steps, calls)
    shares = calls * weights / weights.sum()
    return _repaired([int(share) for share in shares.round()], calls)


def _unit(values: torch.Tensor) -> torch.Tensor:
    """Scaled to [0, 1]; zeros where all are the same."""
    low, high = values.min(), values.max()
    same = bool(high - low <= SAME * len(values))
    return torch.zeros_like(values) if same else (values - low) / (high - low)


def _repaired(counts: list[int], calls: int) -> Counts:
    missing = calls - sum(counts)
    counts[counts.index(max(counts))] += max(0, missing)
    for index in reversed(range(len(counts))):
        taken = min(counts[index], max(0, -missing))
        counts[index] -= taken
        missing += taken
    return tuple(counts)


# ---- the bottleneck ------------------------------------------------------------------------------


class Bottleneck(Watch):
    """Keeps the mean feature of the network's middle at each step, some of its elements."""

    def __init__(self, part: Part, program: Program, seed: int = 0) -> None:
        self.node = find_bottleneck(part, program)
        self._part = part.name
        self._random = torch.Generator().manual_seed(seed)
        self._places: torch.Tensor | None = None
        self._index: int | None = None
        self._sums: dict[int, torch.Tensor] = {}
        self._seen: defaultdict[int, int] = defaultdict(int)

    def begin(self, values: Any, index: int | None) -> None:
        """A call at step `index`."""
        self._index = index

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Add the feature, averaged over the batch, if this is it."""
        if part.name != self._part or node.name != self.node.name or self._index is None:
            return
        flat = value.float().mean(0).flatten()
        if self._places is None:
            chosen = torch.randperm(flat.numel(), generator=self._random)[:SAMPLED]
            self._places = chosen.sort().values
        kept = flat[self._places % flat.numel()]
        self._sums[self._index] = self._sums.get(self._index, torch.zeros_like(kept)) + kept
        self._seen[self._index] += 1

    def counts(self, steps: int, calls: int) -> Counts:
        """EDA-DM's counts over the steps that were run; the others get none.

        Raises:
            CalibrationError: no step was run.
        """
        if not self._sums:
            raise CalibrationError(
                "calibration_steps: 'density' saw no step of the schedule; hand compile a "
                "calibration run that samples over it, or choose 'uniform'"
            )
        seen = sorted(self._sums)
        features = torch.stack([self._sums[index] / self._seen[index] for index in seen])
        found = dict(zip(seen, density_counts(features, calls), strict=True))
        return tuple(found.get(index, 0) for index in range(steps))


def find_bottleneck(part: Part, program: Program) -> fx.Node:
    """The middle one of the values that layers read at the network's smallest spatial size.

    Those before skips are joined are taken where there are any, and no pooled 1×1 ones. In a
    network that keeps one size, such as a transformer over tokens, it is the middle of all that
    layers read.

    Raises:
        CalibrationError: no layer reads anything that changes with the latent.
    """
    depends = dependences(part.graph, program.sources)
    fresh = [node for node in part.graph.nodes if depends[node] & Depends.LATENT]
    read: list[fx.Node] = [node for node in fresh if _readers(node)]
    read = [node for node in read if _area(node) != 1] or read
    sizes = {node: size for node in read if (size := _area(node)) is not None}
    least = min(sizes.values(), default=0)
    if least < max(sizes.values(), default=0):
        before = set(takewhile(lambda node: node.target is not aten.cat.default, fresh))
        smallest = [node for node in read if sizes.get(node) == least]
        read = [node for node in smallest if node in before] or smallest
    if not read:
        raise CalibrationError(
            "calibration_steps: 'density' looks at the middle of the network, and no linear or "
            "convolution layer reads what changes with the latent; choose 'uniform'"
        )
    return read[len(read) // 2]


def _readers(node: fx.Node) -> set[Any]:
    """The kinds of layer that read the node as their input."""
    return {each.target for each in node.users if each.target in LAYERS and each.args[0] is node}


def _area(node: fx.Node) -> int | None:
    """The spatial size of what a layer reads, if it is an image or a video."""
    shape: Sequence[Any] = value_of(node).shape
    if len(shape) not in (4, 5):
        return None
    sides = shape[2:] if _readers(node) & set(CONVS) else shape[1:-1]
    return prod(int(size.node.hint if isinstance(size, torch.SymInt) else size) for size in sides)
