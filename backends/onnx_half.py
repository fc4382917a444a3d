"""The float16 variant of a lowered part: weights and values in float16, what must not in float32.

Norms, softmax, sums, powers, all that leads to a sine or cosine, and layers on quantized values
stay in float32. Inputs and outputs keep their types, so that a session needs to know nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate

from effuse.graph import calls, emit, emit_weight, outputs, set_outputs, substitute, value_of
from effuse.kernels import attention as attention  # registers the ops
from effuse.kernels import low_bit as low_bit
from effuse.weights import WeightStore, derive

aten, ops = torch.ops.aten, torch.ops.effuse
FLOAT, HALF = torch.float32, torch.float16

WIDE = frozenset({  # by overload packet
    aten.group_norm, aten.native_group_norm, aten.layer_norm, aten.native_layer_norm,
    aten.rms_norm, aten.softmax, aten._softmax, aten.logsumexp, aten.mean, aten.var, aten.sum,
    aten.cumsum, aten.exp, aten.pow, aten.rsqrt, aten.arange,
})  # fmt: skip
ANGLES = (aten.sin.default, aten.cos.default)  # of numbers as great as a timestep
NARROW_OPS = (ops.attention, ops.linear_nbits)  # of effuse's, those whose kernels take float16


def halve(graph: fx.Graph, weights: WeightStore, swappable: Collection[str] = ()) -> None:
    """Rewrite a graph of float32 in place; `swappable` weights keep their type and are cast."""
    job = Halving(graph, weights, swappable)
    for node in list(graph.nodes):
        if node.op == "call_function":
            job.rewrite(node)
    set_outputs(graph, [job.as_given(node) for node in outputs(graph)])


class Halving:
    """One graph, its weights, and the casts that it has so far."""

    def __init__(self, graph: fx.Graph, weights: WeightStore, swappable: Collection[str]) -> None:
        self.graph, self.weights, self.swappable = graph, weights, swappable
        self._casts: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        self._wide = {node for node in graph.nodes if wide(node)} | leading_to(graph, *ANGLES)
        self._types = {node: value_of(node).dtype for node in outputs(graph)}

    def rewrite(self, node: fx.Node) -> None:
        """The same call on values of the type that it computes in."""
        dtype = FLOAT if node in self._wide else HALF

        def converted(argument: Any) -> Any:
            if isinstance(argument, fx.Node):
                return self.cast(argument, dtype)
            return dtype if argument is FLOAT else argument

        args, kwargs = map_aggregate(node.args, converted), map_aggregate(node.kwargs, converted)
        with self.graph.inserting_before(node):
            new = emit(self.graph, node.target, *args, like=node, **kwargs)
        if node in self._types:
            self._types[new] = self._types.pop(node)
        substitute(node, new)
        self.graph.erase_node(node)

    def as_given(self, node: fx.Node) -> fx.Node:
        """An output in the type that it had."""
        return self.cast(node, self._types[node]) if self._types[node] is FLOAT else node

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A float value in that type; others as they are."""
        found = getattr(value_of(node), "dtype", None)
        if found is dtype or found not in (FLOAT, HALF):
            return node
        if (node, dtype) not in self._casts:
            self._casts[node, dtype] = self._made(node, dtype)
        return self._casts[node, dtype]

    def _made(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The cast, of a weight when compiling, behind its source and all inputs."""
        name = str(node.target)
        place = next(each for each in self.graph.nodes if each.op != "placeholder")
        if node.op != "placeholder":
            place = node.next
        with self.graph.inserting_before(place):
            if node.op == "get_attr" and name not in self.swappable:
                stored = derive(self.weights, [name], lambda each: each.to(dtype), f"as {dtype}")
                return emit_weight(self.graph, self.weights, f"{name}.{dtype}", stored)
            made: fx.Node = emit(self.graph, aten.to.dtype, node, dtype, like=node)
            return made


def wide(node: fx.Node) -> bool:
    """Whether a call computes in float32, whatever it leads to."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    packet = getattr(node.target, "overloadpacket", None)
    if getattr(node.target, "namespace", "") == "effuse":
        return packet not in NARROW_OPS or _rounds(node)
    quantized = ops.dequantize.default
    return packet in WIDE or any(each.target is quantized for each in node.all_input_nodes)


def _rounds(node: fx.Node) -> bool:
    """Whether a product rounds its activations first."""
    return node.target is ops.linear_nbits.default and bool(node.args[5])


def leading_to(graph: fx.Graph, *targets: Any) -> set[fx.Node]:
    """The calls of these targets, and all calls that they are computed from."""
    found: set[fx.Node] = set()
    waiting = calls(graph, *targets)
    while waiting:
        node = waiting.pop()
        if node.op == "call_function" and node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    return found
