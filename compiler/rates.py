"""Binding-time analysis: how often does each value of a graph change?

Dataflow from the inputs' roles, over the chain const < schedule < prompt < step (DESIGN 2). Only
values count: a size read from a tensor is fixed within a picture, so it depends on nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from effuse.plan import Depends

SHAPE_READS = (
    torch.ops.aten.sym_size.int,
    torch.ops.aten.sym_numel.default,
    torch.ops.aten.sym_stride.int,
)

RANDOM = ("rand", "bernoulli", "normal_", "aten.normal.", "multinomial", "exponential")
DROPOUT = (torch.ops.aten.dropout.default, torch.ops.aten.native_dropout.default)


def random(node: fx.Node) -> bool:
    """Whether a call gives other values each time that it runs."""
    if node.target in DROPOUT:  # dropout(x, p, train)
        return bool(node.args[1]) and bool(node.args[2])
    return any(word in str(node.target) for word in RANDOM)


def dependences(graph: fx.Graph, sources: Mapping[str, Depends]) -> dict[fx.Node, Depends]:
    """For each node, the kinds of input it is computed from; `sources` says it of the inputs."""
    found: dict[fx.Node, Depends] = {}
    for node in graph.nodes:
        depends = Depends.NOTHING
        if node.op == "placeholder":
            depends = sources[str(node.target)]
        elif node.target not in SHAPE_READS:
            for source in node.all_input_nodes:
                depends |= found[source]
        found[node] = depends
    return found
