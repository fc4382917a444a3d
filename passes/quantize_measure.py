"""What quantizing a layer does to its own output, measured on the calibration's probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effuse.graph import clone, evaluate
from effuse.kernels.low_rank import BRANCH
from effuse.metrics import CEILING_DB
from effuse.passes.quantize_sites import Recipe, channel_axis
from effuse.passes.quantize_writer import Writer
from effuse.weights import Weights, WeightStore, copied

aten = torch.ops.aten


@dataclass
class Quality:
    """Power of a layer's output and of its error, and the error's sum by output channel."""

    signal: float = 0.0
    noise: float = 0.0
    count: int = 0
    total: torch.Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))

    def add(self, real: torch.Tensor, error: torch.Tensor, axis: int) -> None:
        """Take in one output and its error, channels along `axis`."""
        self.signal += real.square().sum().item()
        self.noise += error.square().sum().item()
        rows = error.movedim(axis, -1).flatten(0, -2)
        self.total = self.total + rows.sum(0)
        self.count += len(rows)

    @property
    def sqnr_db(self) -> float:
        """10 log10 of signal over noise, between limits."""
        if self.noise == 0:
            return CEILING_DB
        return 10 * math.log10(self.signal / self.noise) if self.signal else -CEILING_DB

    @property
    def mean_error(self) -> torch.Tensor:
        """Of each output channel, (out,) float64: what bias correction takes back."""
        return self.total / max(1, self.count)


def measure(
    graph: fx.Graph,
    weights: Weights,
    recipes: Mapping[fx.Node, Recipe],
    writer: Callable[[fx.Graph, WeightStore], Writer],
    probes: Sequence[Mapping[str, torch.Tensor]],
    progress: Callable[[str, int, int], None],
) -> dict[str, Quality]:
    """Each layer's quantized twin against itself, on the same float inputs.

    The twins stand beside the layers in a copy of the graph and feed nothing. Beside a low-rank
    branch, the signal is the sum with it: the layer alone is what the branch has left over.
    """
    if not probes:
        return {}
    weights = copied(weights)
    copy, mapping = clone(graph)
    sums = {total: mapping[site] for site in recipes if (total := with_branch(mapping[site]))}
    remainders = set(sums.values())
    writing = writer(copy, weights)
    twins = {writing.quantized(mapping[site], how): mapping[site] for site, how in recipes.items()}
    wanted = set(twins.values())
    truth: dict[fx.Node, torch.Tensor] = {}
    found: dict[str, Quality] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node in wanted:
            truth[node] = value
        elif node in twins:
            site = twins[node]
            real = truth.pop(site).double()
            quality = found.setdefault(site.name, Quality())
            quality.add(real, value.double() - real, channel_axis(site, real.dim()))
            if site in remainders:
                quality.signal -= real.square().sum().item()
        elif node in sums:
            found[sums[node].name].signal += value.double().square().sum().item()

    for number, probe in enumerate(probes, start=1):
        evaluate(copy, weights, probe, observe)
        progress("measure layers", number, len(probes))
    return found


def with_branch(site: fx.Node) -> fx.Node | None:
    """The sum of a layer and its low-rank branch, or None where it has no branch."""
    total = next(iter(site.users), None)
    if total is None or total.target is not aten.add.Tensor or len(site.users) > 1:
        return None
    return total if any(each.target in BRANCH for each in total.all_input_nodes) else None
