"""Quantize: int8 weights per output channel, 8-bit activations per tensor (format w8a8).

Static: x̂ = (clamp(round(x/s)+z) - z)·s with one (s, z) per tensor over the whole trajectory,
asymmetric uint8, from the least and greatest value that calibration saw (METHODS 0.2). Weights are
symmetric, restricted to ±127. The bias becomes int32 at the products' scale. A convolution's output
is quantized too, because integer convolutions write 8 bits; a linear's is not.
Dynamic: the activation's range is found at run time, and nothing has to be calibrated.
The programs that run once a picture keep float activations: int8 storage is all there is to gain.

Every layer is measured on probes of the calibration run before it is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from effuse.errors import PassError
from effuse.graph import (
    calls,
    clone,
    eliminate,
    evaluate,
    module_path,
    substitute,
    value_of,
)
from effuse.metrics import CEILING_DB
from effuse.passes.base import Pass, Work
from effuse.passes.quantize_writer import Writer
from effuse.plan import Depends, Rate
from effuse.program import Layer, Part, Program, prune_weights
from effuse.rates import dependences
from effuse.statistics import Calibration, Statistics

aten, ops = torch.ops.aten, torch.ops.effuse

SITES = (aten.conv2d.default, aten.linear.default)
FORMATS = ("w8a8",)
QUANTIZED = (ops.quantize.default, ops.dequantize.default, ops.linear_dynamic.default,
             ops.conv2d_dynamic.default)  # fmt: skip


@dataclass(frozen=True)
class Quantize(Pass):
    """Linear and convolution layers of the step program in 8 bits, where they are faithful enough.

    Args:
        format: `w8a8`.
        activations: `static` (calibrated ranges) or `dynamic` (ranges found at run time).
        min_sqnr_db: a layer whose own output falls under this (dB, on the probes) stays in float.
        edges: whether the first and the last layer are quantized too.
    """

    name: ClassVar[str] = "quantize"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True

    format: Literal["w8a8"] = "w8a8"
    activations: Literal["static", "dynamic"] = "static"
    min_sqnr_db: float = 20.0
    edges: bool = False

    def requires(self, program: Program) -> str | None:
        """A known format, and no quantization yet."""
        if self.format not in FORMATS:
            return f"format {self.format!r} is not known here (known: {', '.join(FORMATS)})"
        if any(calls(part.graph, *QUANTIZED) for part in program.parts):
            return "the program is quantized already"
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Quantize every part, measured on the calibration's probes."""
        if work.calibration is None:
            raise PassError(
                "quantize needs calibration: hand compile(calibration=run) a function that samples "
                "with the model it is given, or leave calibration=None with a schedule"
            )
        weights = dict(program.weights)
        parts, layers = [], []
        for part in program.parts:
            changed, found = self._part(program, part, weights, work, work.calibration)
            parts.append(changed)
            if part.rate < Rate.STEP or part.name == program.plan.default:
                layers += found
            else:
                work.log.note(f"{part.name}: {summary(found)}")
        result = replace(program, parts=tuple(parts), weights=weights, layers=tuple(layers))
        return prune_weights(result)

    def _part(
        self, program: Program, part: Part, weights: dict[str, torch.Tensor], work: Work,
        calibration: Calibration,
    ) -> tuple[Part, list[Layer]]:  # fmt: skip
        found = sites(part, weights)
        seen = {site for site in found if self._seen(site, part, calibration.statistics)}
        reasons = {
            site.name: self.reason(site, part, program)
            or (None if site in seen else "never seen in calibration")
            for site in found
        }
        quality = measure(part, program.weights, self, calibration, work, seen)
        graph, mapping = clone(part.graph)
        writer = self.writer(graph, weights, part, calibration.statistics)
        layers = []
        for site in found:
            ratio = quality.get(site.name)
            reason = reasons[site.name] or too_noisy(ratio, self.min_sqnr_db)
            if reason:
                work.log.reject("quantize", reason.split(":")[0])
            elif work.log.spend("quantize"):
                node = mapping[site]
                substitute(node, writer.quantized(node))
            else:
                reason = "out of fuel"
            kind = self.format if part.rate is Rate.STEP else "w8"
            layers.append(layer(site, kind, ratio, reason))
        eliminate(graph)
        return replace(part, graph=graph, exact=False), layers

    def writer(
        self, graph: fx.Graph, weights: dict[str, torch.Tensor], part: Part, statistics: Statistics
    ) -> Writer:
        """Who writes the 8-bit layers of a part's graph."""
        dynamic = self.activations == "dynamic"
        return Writer(graph, weights, part.name, statistics, dynamic, part.rate < Rate.STEP)

    def _seen(self, site: fx.Node, part: Part, statistics: Statistics) -> bool:
        """Whether calibration has the ranges that the layer needs."""
        if part.rate < Rate.STEP or self.activations == "dynamic":
            return True
        needed = (site, *site.all_input_nodes[:1])  # integer convolutions write 8 bits
        if site.target is aten.linear.default:
            needed = needed[1:]
        return all((part.name, node.name) in statistics.ranges for node in needed)

    def reason(self, site: fx.Node, part: Part, program: Program) -> str | None:
        """Why a layer stays in float whatever its numbers, or None."""
        if unwanted := self.unwanted(module_path(site)):
            return unwanted
        if part.rate < Rate.STEP:
            return None
        if not self.edges and site in first_layers(part, program):
            return "first layer"
        if not self.edges and site in last_layers(part, program):
            return "last layer"
        return None


def too_noisy(ratio: float | None, bound: float) -> str | None:
    """Why a measured layer stays in float, or None."""
    if ratio is None or ratio >= bound:
        return None
    return f"under the bound: {ratio:.1f} dB, the bound is {bound:g} dB"


def layer(site: fx.Node, format: str, ratio: float | None, reason: str | None) -> Layer:
    """The line of the report for one layer."""
    weight: Any = site.args[1]
    return Layer(
        name=module_path(site) or site.name,
        op=str(site.target).removeprefix("aten.").removesuffix(".default"),
        format="float" if reason else format,
        parameters=math.prod(value_of(weight).shape),
        sqnr_db=None if ratio is None else round(ratio, 2),
        reason=reason or "",
    )


def summary(layers: Sequence[Layer]) -> str:
    """How many layers of another variant are in 8 bits, and the worst of them."""
    changed = [layer for layer in layers if not layer.reason]
    worst = min((layer.sqnr_db for layer in changed if layer.sqnr_db is not None), default=None)
    quality = "" if worst is None else f", {worst:.1f} dB at worst"
    return f"{len(changed)} of {len(layers)} layers in 8 bits{quality}"


def sites(part: Part, weights: Mapping[str, torch.Tensor]) -> list[fx.Node]:
    """The linear and convolution calls whose weight is stored and in floating point."""
    found = []
    for node in calls(part.graph, *SITES):
        weight = node.args[1]
        stored = isinstance(weight, fx.Node) and weight.op == "get_attr"
        if stored and weights[str(weight.target)].is_floating_point():  # type: ignore[union-attr]
            found.append(node)
    return found


def first_layers(part: Part, program: Program) -> set[fx.Node]:
    """The layers that the latent reaches before any other layer."""
    depends = dependences(part.graph, program.sources)
    given = {item.name for item in program.inputs}  # a slot's past has been through layers
    fresh: set[fx.Node] = set()  # computed from the latent, by no layer so far
    first: set[fx.Node] = set()
    for node in part.graph.nodes:
        if node.op == "placeholder" and node.target in given and depends[node] & Depends.LATENT:
            fresh.add(node)
        elif any(source in fresh for source in node.all_input_nodes):
            (first if node.target in SITES else fresh).add(node)
    return first


def last_layers(part: Part, program: Program) -> set[fx.Node]:
    """The layers whose result reaches an output of the network through no other layer."""
    (values,) = part.graph.output_node().args
    named = zip(part.outputs, values, strict=True)  # type: ignore[arg-type]
    results = {node for name, node in named if name in program.outputs}  # no slot to be filled
    open_nodes: set[fx.Node] = set()
    last: set[fx.Node] = set()
    for node in reversed(part.graph.nodes):
        if node in results or any(user in open_nodes for user in node.users):
            (last if node.target in SITES else open_nodes).add(node)
    return last


def measure(
    part: Part,
    weights: Mapping[str, torch.Tensor],
    options: Quantize,
    calibration: Calibration,
    work: Work,
    layers: Collection[fx.Node],
) -> dict[str, float]:
    """SQNR (dB) of each of `layers`: its 8-bit twin against itself, on the same float inputs.

    The twins stand beside the layers in a copy of the graph and feed nothing.
    """
    weights = dict(weights)
    graph, mapping = clone(part.graph)
    writer = options.writer(graph, weights, part, calibration.statistics)
    chosen = [site for site in sites(part, weights) if site in layers]
    twins = {writer.quantized(mapping[site]): mapping[site] for site in chosen}
    wanted = set(twins.values())
    truth: dict[fx.Node, torch.Tensor] = {}
    power: dict[str, list[float]] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node in wanted:
            truth[node] = value
        elif node in twins:
            real = truth.pop(twins[node]).double()
            sums = power.setdefault(twins[node].name, [0.0, 0.0])
            sums[0] += real.square().sum().item()
            sums[1] += (real - value.double()).square().sum().item()

    probes = calibration.probes[part.name]
    for number, probe in enumerate(probes, start=1):
        evaluate(graph, weights, probe, observe)
        work.progress("measure layers", number, len(probes))
    return {name: _ratio(signal, noise) for name, (signal, noise) in power.items()}


def _ratio(signal: float, noise: float) -> float:
    if noise == 0:
        return CEILING_DB
    return 10 * math.log10(signal / noise) if signal else -CEILING_DB
