"""The writer of 8-bit layers: weights and biases as stored, ranges of activations, casts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effuse.graph import emit, emit_weight, inputs, value_of
from effuse.kernels import dynamic as dynamic  # registers the ops
from effuse.kernels.quantize import quantize_reference
from effuse.statistics import Statistics

aten, ops = torch.ops.aten, torch.ops.effuse

LEAST_SCALE = 1e-12  # of a channel of zeros
BIAS_LIMIT = 1 << 30  # of a bias in int32: as much again is left for the sum of the products
TINY = torch.finfo(torch.float32).tiny


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
    dynamic: bool  # ranges found at run time
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
        return self._dynamic if self.dynamic else self._static

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
