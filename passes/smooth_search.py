"""Which exponents smooth a group of layers best: their quantized outputs, tried on probes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effuse.errors import ConfigError
from effuse.graph import evaluate, value_of
from effuse.kernels.formats import Format, check_group
from effuse.kernels.quantizers import Quantizer, find_scale, round_trip
from effuse.passes.low_rank_factors import low_rank
from effuse.passes.smoothing import input_absmax, into_columns, smooth_scale
from effuse.program import Part, Program
from effuse.statistics import Calibration, Channels, Key

aten = torch.ops.aten

# the layers, and the axis of their input's channels, from the end
CHANNELS: dict[Any, int] = {aten.linear.default: -1, aten.conv2d.default: -3}
ROWS, WINDOW = 64, 8  # of a probe: tokens, or pixels each way, that candidates are tried on
FLOOR = 1e-3  # of a channel's range over the widest: it may wake up after calibration


@dataclass(frozen=True)
class Site:
    """A layer of a variant."""

    part: Part
    node: fx.Node

    @property
    def source(self) -> Key:
        """What the layer reads."""
        return self.part.name, self.x.name

    @property
    def x(self) -> fx.Node:
        """The node of what the layer reads."""
        node: Any = self.node.args[0]
        return node  # type: ignore[no-any-return]

    @property
    def axis(self) -> int:
        """Of the input's channels, from the end."""
        return CHANNELS[self.node.target]

    @property
    def weight(self) -> str:
        """The name of its weight."""
        return str(self.node.args[1].target)  # type: ignore[union-attr]


Samples = Mapping[Key, list[torch.Tensor]]  # what layers read, cut down, on each probe


def unfit(node: fx.Node, format: Format) -> str | None:
    """Why the format cannot quantize a layer, or None."""
    columns = value_of(node.args[1]).shape[1:]  # type: ignore[arg-type]
    weight, activation = quantizers(node, format)
    try:
        check_group(math.prod(columns), weight)
        if activation is not None:
            check_group(columns[0], activation)
    except ConfigError:
        return "the format's groups do not fill its rows"
    return None


def quantizers(node: fx.Node, format: Format) -> tuple[Quantizer, Quantizer | None]:
    """Those of a layer's weight and of its input."""
    if node.target is aten.linear.default:
        return format.weight, format.activation
    return format.conv_weight, format.conv_activation


def grouped(sites: Iterable[Site]) -> list[list[Site]]:
    """Layers that have to share a scale: they read one value, or are uses of one weight."""
    found: dict[Key | str, list[Site]] = {}
    for site in sites:
        known = [found[key] for key in (site.source, site.weight) if key in found]
        lists = {id(each): each for each in known}.values()
        merged = [*(other for each in lists for other in each), site]
        for each in merged:
            found[each.source] = found[each.weight] = merged
    return list({id(group): group for group in found.values()}.values())


def sampled(program: Program, groups: list[list[Site]], calibration: Calibration) -> Samples:
    """Some rows of what each layer reads, on the calibration's probes."""
    axes = {site.source: site.axis for group in groups for site in group}
    found: dict[Key, list[torch.Tensor]] = {}
    for part in program.variants:

        def observe(node: fx.Node, value: Any, name: str = part.name) -> None:
            if (name, node.name) in axes:
                few = excerpt(value, axes[name, node.name])
                found.setdefault((name, node.name), []).append(few)

        for probe in calibration.probes.get(part.name, ()):
            evaluate(part.graph, program.weights, probe, observe)
    return found


def excerpt(x: torch.Tensor, axis: int) -> torch.Tensor:
    """Evenly spread rows of (…, channels), or the middle of two of the images; float32."""
    if axis == -1:
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: max(1, len(rows) // ROWS)].float()
    for place in (-2, -1):
        size = min(WINDOW, x.shape[place])
        x = x.narrow(place, (x.shape[place] - size) // 2, size)
    return x[:: max(1, len(x) - 1)].float()


def seen_by(group: list[Site], calibration: Calibration) -> dict[Key, Channels]:
    """The statistics of what the layers read, where calibration ran them."""
    known = calibration.statistics.channels
    found = {site.source: known[site.source] for site in group if site.source in known}
    axes = {site.source: site.axis for site in group}
    return {key: each for key, each in found.items() if each.axis == axes[key]}


@dataclass
class Trial:
    """The error of a group's quantized layers under a scale, beside branches of `rank`."""

    group: list[Site]
    weights: Mapping[str, torch.Tensor]
    seen: Mapping[Key, Channels]
    samples: Samples
    format: Format
    rank: int = 0
    truth: dict[tuple[Key, str, int], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        x = torch.stack([each.absmax for each in self.seen.values()]).amax(0)
        self._x = torch.where(x > 0, x.clamp(min=FLOOR * x.max().item()), x)
        self._layers = {site.weight: site.node for site in self.group}
        ranges = [input_absmax(self.weights[name]) for name in self._layers]
        self._w = torch.stack(ranges).amax(0)
        self._reads = {name: self._sources(name) for name in self._layers}
        self._bases: dict[str, torch.Tensor | None] = {}

    def _sources(self, weight: str) -> list[Key]:
        """What the uses of a weight read, each once."""
        found = (site.source for site in self.group if site.weight == weight)
        return [key for key in dict.fromkeys(found) if key in self.seen]

    def scale(self, alpha: float, beta: float) -> torch.Tensor:
        """s, (channels,) float32."""
        return smooth_scale(self._x, self._w, alpha, beta)

    def error(self, alpha: float, beta: float) -> float:
        """Summed squared error of all outputs, on the samples."""
        scale, total = self.scale(alpha, beta), 0.0
        for name, node in self._layers.items():
            weight, quantizer = self.weights[name].float(), quantizers(node, self.format)[0]
            rows = into_columns(weight, scale).flatten(1)
            branch = self._branch(name, rows)
            stored = round_trip(rows - branch if self.rank else rows, quantizer).view_as(weight)
            for key in self._reads[name]:
                total += self._error(key, node, name, stored, branch.view_as(weight), scale)
        return total

    def _branch(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The part of a scaled weight that a branch keeps in float, by a decomposition in one go.

        Each candidate's leading rows are near those of the one before: it starts from them.
        """
        if not self.rank:
            return torch.zeros(()).expand(rows.shape)
        rank = min(self.rank, *rows.shape)
        up, down, self._bases[name] = low_rank(rows, rank, basis=self._bases.get(name))
        return up @ down

    def _error(
        self, key: Key, node: fx.Node, name: str, stored: torch.Tensor, branch: torch.Tensor,
        scale: torch.Tensor,
    ) -> float:  # fmt: skip
        quantizer, total = quantizers(node, self.format)[1], 0.0
        for number, x in enumerate(self.samples.get(key, ())):
            if (key, name, number) not in self.truth:
                self.truth[key, name, number] = applied(node, x, self.weights[name].float())
            real = inner = x / scale.view([-1] + [1] * (-CHANNELS[node.target] - 1))
            if quantizer is not None:
                inner = rounded(inner, quantizer, self.seen[key], scale)
            wrong = applied(node, inner, stored) - self.truth[key, name, number]
            if self.rank:
                wrong += applied(node, real, branch)
            total += wrong.double().square().sum().item()
        return total


def applied(node: fx.Node, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The layer without its bias."""
    result: torch.Tensor = node.target(x, weight, None, *node.args[3:])  # type: ignore[operator]
    return result


def rounded(
    x: torch.Tensor, quantizer: Quantizer, seen: Channels, scale: torch.Tensor
) -> torch.Tensor:
    """x / s quantized and back, with the range that calibration would find where it is static."""
    if quantizer.granularity != "tensor" or quantizer.ranges == "dynamic":
        return round_trip(x, quantizer)
    ends = torch.stack([seen.low.amin(0), seen.high.amax(0)]) / scale
    return round_trip(x, quantizer, *find_scale(ends, quantizer))
