"""The float16 variant for TensorRT: layers on quantized values in float16 too.

`onnx_half.halve` leaves those in float32, where ONNX Runtime's kernels are. An engine's 8-bit
layers write the type of their scales: float16 here, so that nothing is cast in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effuse.backends.onnx_half import halve
from effuse.backends.tensorrt_lower import uncast
from effuse.graph import calls, emit, emit_weight, substitute, value_of
from effuse.passes.quantize_sites import SITES
from effuse.weights import WeightStore

aten, ops = torch.ops.aten, torch.ops.effuse
FLOAT, HALF = torch.float32, torch.float16
LEAST = 2.0**-24  # above zero in float16


def halve_layers(graph: fx.Graph, weights: WeightStore) -> None:
    """Rewrite a graph of float32 in place, its quantized layers included."""
    halve(graph, weights)
    narrow = Narrow(graph, weights)
    for site in calls(graph, *SITES):
        if value_of(site).dtype is FLOAT:
            narrow.layer(site)


class Narrow:
    """Rewrites the layers of one graph."""

    def __init__(self, graph: fx.Graph, weights: WeightStore) -> None:
        self._graph, self._weights = graph, weights
        self._rounded: dict[fx.Node, fx.Node] = {}

    def layer(self, site: fx.Node) -> None:
        """The same layer in float16; who reads it in float32 gets a cast."""
        given, weight, *rest = site.args
        source = self._input(given)
        with self._graph.inserting_before(site):
            real = emit(self._graph, aten.to.dtype, uncast(weight), HALF)
            others = [self._bias(rest[0])] if rest else []
            arguments = (source, real, *others, *rest[1:])
            new = emit(self._graph, site.target, *arguments, like=site)
            back = emit(self._graph, aten.to.dtype, new, FLOAT)
        substitute(site, back)
        for user in list(back.users):
            if user.target is aten.to.dtype and value_of(user).dtype is HALF:
                substitute(user, new)

    def _input(self, given: Any) -> fx.Node:
        """What a layer reads, in float16: rounded there, once for all that read it."""
        node = uncast(given)
        if node not in self._rounded:
            first = node.args[0] if node.target is ops.dequantize.default else node
            with self._graph.inserting_before(node.next if node is first else first):  # type: ignore[arg-type]
                self._rounded[node] = self._made(node)
        return self._rounded[node]

    def _made(self, node: fx.Node) -> fx.Node:
        if node.target is ops.fake_quantize.default:
            source, *how = node.args
            return self._emit(node.target, self._half(source), *how)
        steps: Any = node.args[0] if node.target is ops.dequantize.default else None
        if steps is None:
            return self._half(node)
        source, scale, zero, axis = steps.args
        narrow = self._stored(scale)
        codes = self._emit(ops.quantize.default, self._half(source), narrow, zero, axis)
        return self._emit(ops.dequantize.default, codes, narrow, zero, axis)

    def _half(self, node: Any) -> fx.Node:
        source = uncast(node)
        same = value_of(source).dtype is HALF
        return source if same else self._emit(aten.to.dtype, source, HALF)

    def _bias(self, node: Any) -> Any:
        if node is None:
            return None
        source = uncast(node)
        stored = source.op == "get_attr" and value_of(source).dtype is FLOAT
        return self._stored(source, least=None) if stored else self._half(source)

    def _stored(self, node: fx.Node, least: float | None = LEAST) -> fx.Node:
        """A weight, stored in float16; scales stay positive."""
        value = self._weights[str(node.target)]
        value = value if least is None else value.clamp(min=least)
        return emit_weight(self._graph, self._weights, f"{node.target}.{HALF}", value.to(HALF))

    def _emit(self, target: Any, *args: Any) -> fx.Node:
        node: fx.Node = emit(self._graph, target, *args)
        return node
