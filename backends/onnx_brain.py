"""bfloat16 for ONNX Runtime, whose CPU computes nothing in it but casts.

    f(x) -> round(f(float32(x)))

is what PyTorch's own kernels do: they compute in float32 and round what they give.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from effuse.graph import calls, cast, emit, substitute, value_of

aten = torch.ops.aten
BRAIN, FLOAT = torch.bfloat16, torch.float32
CASTS = (aten.to.dtype, aten._to_copy.default)


def widen_brain(graph: fx.Graph) -> None:
    """Compute in float32 what is computed in bfloat16, and round it."""
    for node in calls(graph):
        if node.target not in CASTS and (brain(node) or any(map(brain, node.all_input_nodes))):
            with graph.inserting_before(node):
                substitute(node, rounded(graph, node))


def brain(node: fx.Node) -> bool:
    """Whether some value that a node gives is of bfloat16."""
    return any(getattr(each, "dtype", None) is BRAIN for each in pytree.tree_leaves(value_of(node)))


def rounded(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The call in float32, rounded to bfloat16 if the node is of that."""

    def widened(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            one = isinstance(value_of(argument), torch.Tensor) and brain(argument)
            return cast(argument, FLOAT) if one else argument
        return FLOAT if argument is BRAIN else argument

    args, kwargs = map_aggregate(node.args, widened), map_aggregate(node.kwargs, widened)
    wide: fx.Node = emit(graph, node.target, *args, like=node, **kwargs)
    return cast(wide, BRAIN) if isinstance(value_of(node), torch.Tensor) and brain(node) else wide
