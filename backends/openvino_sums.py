"""Outputs of convolutions that go into sums, as the floats that OpenVINO's integer kernels write.

    dequantize(quantize(conv(x))) + y -> conv(x) + y

ONNX Runtime's convolutions write 8 bits; here that rounding is work of its own, and so are the
conversions of what is added. A UNet of 36 M parameters lost 57 such pairs, a twentieth of its
nodes, and its output is closer to the float network's. Where a layer reads the 8 bits they stay.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from effuse.backends.openvino_ranges import measured
from effuse.graph import calls, clone, eliminate, substitute
from effuse.passes.quantize_sites import CONVS
from effuse.program import Part, Program, prune_weights

aten, ops = torch.ops.aten, torch.ops.effuse

NOTE = (
    "outputs of convolutions go into sums without being rounded to 8 bits; the figures are of the "
    "roundings that are gone"
)


def float_sums(program: Program) -> Program:
    """The program without roundings that are there only for integer outputs of convolutions.

    A layer keeps its rounding in all parts if one of them reads the 8 bits, so that parts agree.
    """
    pairs = [node for part in program.parts for node in _pairs(part.graph)]
    read = {_weight(node) for node in pairs if not _only_summed(node)}
    found = [_unrounded(part, read) for part in program.parts]
    count = sum(number for _, number in found)
    if not count:
        return program
    changed = prune_weights(replace(program, parts=tuple(part for part, _ in found)))
    return measured(program, changed, {"sums": count}, NOTE)


def _unrounded(part: Part, read: Collection[str]) -> tuple[Part, int]:
    graph, _ = clone(part.graph)
    found = [n for n in _pairs(graph) if _only_summed(n) and _weight(n) not in read]
    for node in found:
        substitute(node, _layer(node))
    eliminate(graph)
    return replace(part, graph=graph), len(found)


def _pairs(graph: fx.Graph) -> list[fx.Node]:
    """The rounded outputs of convolutions on stored weights of 8 bits."""
    rounded = [
        node
        for node in calls(graph, ops.dequantize.default)
        if _is(node.args[0], ops.quantize.default) and _layer(node).target in CONVS
    ]
    return [node for node in rounded if _is(_layer(node).args[1], ops.dequantize.default)]


def _is(node: object, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _layer(pair: fx.Node) -> fx.Node:
    return pair.args[0].args[0]  # type: ignore[union-attr,return-value]


def _weight(pair: fx.Node) -> str:
    """The name under which the scales of the layer's weight are stored."""
    stored: Any = _layer(pair).args[1]
    return str(stored.args[1].target)


def _only_summed(pair: fx.Node) -> bool:
    """Whether sums alone read the output, and nothing its 8 bits."""
    codes: Any = pair.args[0]
    summed = all(user.target is aten.add.Tensor for user in pair.users)
    return summed and bool(pair.users) and len(codes.users) == 1
