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
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from effuse.errors import PassError
from effuse.graph import (
    calls,
    clone,
    eliminate,
    emit,
    emit_weight,
    evaluate,
    inputs,
    module_path,
    substitute,
    value_of,
)
from effuse.kernels import dynamic as dynamic  # registers the ops
from effuse.kernels.quantize import quantize_reference
from effuse.metrics import CEILING_DB
from effuse.passes.base import Pass, Work
from effuse.plan import Depends, Rate
from effuse.program import Layer, Part, Program, prune_weights
from effuse.rates import dependences
from effuse.statistics import Calibration, Statistics

aten, ops = torch.ops.aten, torch.ops.effuse

SITES = (aten.conv2d.default, aten.linear.default)
FORMATS = ("w8a8",)
QUANTIZED = (ops.quantize.default, ops.dequantize.default, ops.linear_dynamic.default,
             ops.conv2d_dynamic.default)  # fmt: skip
LEAST_SCALE = 1e-12  # of a channel of zeros
BIAS_LIMIT = 1 << 30  # of a bias in int32: as much again is left for the sum of the products
TINY = torch.finfo(torch.float32).tiny


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
        writer = Writer(
            graph, weights, part.name, calibration.statistics, self, part.rate < Rate.STEP
        )
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
        if not self.edges and site in last_layers(part):
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


def last_layers(part: Part) -> set[fx.Node]:
    """The layers whose result reaches the output through no other layer."""
    open_nodes = {part.graph.output_node()}
    last: set[fx.Node] = set()
    for node in reversed(part.graph.nodes):
        if any(user in open_nodes for user in node.users):
            (last if node.target in SITES else open_nodes).add(node)
    return last


def affine(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale (float32) and zero point (uint8) that cover [low, high] and hold zero exactly."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    scale = scale if scale >= TINY else 1.0  # a subnormal scale would lose its precision
    zero = min(255, max(0, round(-low / scale)))
    return torch.tensor(scale, dtype=torch.float32), torch.tensor(zero, dtype=torch.uint8)


def weight_scale(weight: torch.Tensor) -> torch.Tensor:
    """Symmetric scale per output channel: greatest magnitude over 127; (out,), float32."""
    return (weight.float().abs().flatten(1).amax(1) / 127).clamp(min=LEAST_SCALE)


@dataclass
class Writer:
    """Writes quantized layers into one graph; a tensor that several read is quantized once."""

    graph: fx.Graph
    weights: dict[str, torch.Tensor]
    part: str
    statistics: Statistics
    options: Quantize
    stored_only: bool = False  # int8 weights, float arithmetic

    def __post_init__(self) -> None:
        self._pairs: dict[fx.Node, tuple[fx.Node, torch.Tensor]] = {}

    def quantized(self, site: fx.Node) -> fx.Node:
        """New nodes after `site` that compute it from int8 weights; the last of them."""
        with self.graph.inserting_after(site):
            anchor = self.graph.create_node("call_function", _nothing)
        with self.graph.inserting_before(anchor):
            new = self._method()(site)
        self.graph.erase_node(anchor)
        return new

    def _method(self) -> Callable[[fx.Node], fx.Node]:
        if self.stored_only:
            return self._weight_only
        return self._dynamic if self.options.activations == "dynamic" else self._static

    def _weight_only(self, site: fx.Node) -> fx.Node:
        weight, scale, numbers = self._stored(site)
        real = self._real(site, weight, scale, numbers)
        return self._emit(site, site.target, site.args[0], real, *site.args[2:])

    def _real(
        self, site: fx.Node, weight: fx.Node, scale: fx.Node, numbers: torch.Tensor
    ) -> fx.Node:
        """dequantize(weight), per output channel."""
        zeros = torch.zeros(len(numbers), dtype=torch.int8)
        stored = self._weight(f"zeros.int8.{len(numbers)}", zeros)
        return self._dequantized(site, weight, scale, stored)

    def _dequantized(self, like: fx.Node, *args: Any) -> fx.Node:
        """dequantize(…), which is float32, in the type of `like`."""
        return self._cast(like, self._emit(like, ops.dequantize.default, *args, 0), like)

    def _cast(self, like: fx.Node, node: fx.Node, to: fx.Node | None = None) -> fx.Node:
        """`node` in the type of `to`, or in float32."""
        dtype = torch.float32 if to is None else value_of(to).dtype
        same = value_of(node).dtype == dtype
        return node if same else self._emit(like, aten.to.dtype, node, dtype)

    def _emit(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        node: fx.Node = emit(self.graph, target, *args, like=like)
        return node

    def _weight(self, name: str, tensor: torch.Tensor) -> fx.Node:
        return emit_weight(self.graph, self.weights, name, tensor)

    def _stored(
        self, site: fx.Node, least: torch.Tensor | None = None
    ) -> tuple[fx.Node, fx.Node, torch.Tensor]:
        """The layer's weight in int8 with its scale, as nodes, and the scale as numbers."""
        name = str(site.args[1].target)  # type: ignore[union-attr]
        weight = self.weights[name]
        scale = weight_scale(weight)
        if least is not None and (least > scale).any():
            scale = torch.maximum(scale, least)
            name = f"{name}.{self.part}.{site.name}"  # another layer may share the weight
        zero = torch.zeros(len(scale), dtype=torch.int8)
        steps = quantize_reference(weight, scale, zero, 0).clamp(min=-127)
        return self._weight(f"{name}.int8", steps), self._weight(f"{name}.scale", scale), scale

    def _dynamic(self, site: fx.Node) -> fx.Node:
        weight, scale, _ = self._stored(site)
        x, _, bias, *rest = site.args if len(site.args) > 2 else (*site.args, None)
        if site.target is aten.linear.default:
            return self._emit(site, ops.linear_dynamic.default, x, weight, scale, bias)
        return self._emit(
            site, ops.conv2d_dynamic.default, x, weight, scale, bias, *conv_options(rest)
        )

    def _static(self, site: fx.Node) -> fx.Node:
        x, step = self._activation(site.args[0])  # type: ignore[arg-type]
        weight, scale, numbers = self._stored(site, self._least_scale(site, step))
        real = self._real(site, weight, scale, numbers)
        bias = self._bias(site, step * numbers)
        new = self._emit(site, site.target, x, real, bias, *site.args[3:])
        if site.target is aten.linear.default:
            return new
        pair = self._pair(new, site)
        self._pairs[pair[0]] = pair  # a layer that reads this output takes its 8 bits as they are
        return pair[0]

    def _activation(self, source: fx.Node) -> tuple[fx.Node, torch.Tensor]:
        """The dequantized input of a layer, and its scale."""
        if source not in self._pairs:
            last = inputs(self.graph)[-1] if source.op == "placeholder" else source
            with self.graph.inserting_after(last):
                anchor = self.graph.create_node("call_function", _nothing)
            with self.graph.inserting_before(anchor):
                self._pairs[source] = self._pair(source, source)
            self.graph.erase_node(anchor)
        return self._pairs[source]

    def _pair(self, node: fx.Node, measured: fx.Node) -> tuple[fx.Node, torch.Tensor]:
        """quantize → dequantize of `node`, with the range that was seen at `measured`."""
        scale, zero = affine(*self.statistics.ranges[self.part, measured.name].overall)
        name = f"range.{self.part}.{measured.name}"
        at = (self._weight(f"{name}.scale", scale), self._weight(f"{name}.zero", zero))
        steps = self._emit(measured, ops.quantize.default, self._cast(measured, node), *at, 0)
        return self._dequantized(measured, steps, *at), scale

    def _bias(self, site: fx.Node, scale: torch.Tensor) -> fx.Node | None:
        """The bias in int32 at the scale of the products, as the integer kernels add it."""
        node = _bias_of(site)
        if node is None or node.op != "get_attr":
            return node
        name = f"{node.target}.{self.part}.{site.name}"
        steps = torch.round(self.weights[str(node.target)].double() / scale.double())
        stored = steps.clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        return self._dequantized(
            site,
            self._weight(f"{name}.int32", stored),
            self._weight(f"{name}.scale", scale),
            self._weight(f"zeros.int32.{len(scale)}", zeros),
        )

    def _least_scale(self, site: fx.Node, step: torch.Tensor) -> torch.Tensor | None:
        """The least weight scales with which the bias fits at the products' scale; None without."""
        node = _bias_of(site)
        if node is None or node.op != "get_attr":
            return None
        return self.weights[str(node.target)].float().abs() / (step * BIAS_LIMIT)


def _bias_of(site: fx.Node) -> fx.Node | None:
    node = site.args[2] if len(site.args) > 2 else None
    return node if isinstance(node, fx.Node) else None


def _nothing() -> None:
    """A place in the graph, for inserting before."""


def conv_options(rest: Iterable[Any]) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups with their defaults filled in."""
    given = tuple(rest)
    defaults: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], 1)
    stride, padding, dilation, groups = given + defaults[len(given) :]
    return stride, padding, dilation, groups


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
    writer = Writer(
        graph, weights, part.name, calibration.statistics, options, part.rate < Rate.STEP
    )
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
