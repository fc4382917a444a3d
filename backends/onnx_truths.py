"""Choices between truth values, which ONNX Runtime's Where does not take."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effuse.graph import calls, emit, substitute, value_of

aten = torch.ops.aten


def choose_truths(graph: fx.Graph) -> None:
    """where(c, a, b) -> (c and a) or (not c and b), of truth values; exact.

    So does masked_fill(x, c, value), which is x or c where the value is a number that is true.
    """
    for node in calls(graph, *FORMS):
        if value_of(node).dtype is not torch.bool:
            continue
        with graph.inserting_before(node):
            substitute(node, FORMS[node.target](graph, node))


def filled(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """masked_fill(x, mask, value)."""
    x, mask, value = node.args
    if isinstance(value, fx.Node):
        return _choice(graph, node, mask, value, x)
    if value:
        return _logical(graph, "or", node, x, mask)
    return _logical(graph, "and", node, x, _logical(graph, "not", node, mask))


def chosen(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """where(condition, one, other)."""
    return _choice(graph, node, *node.args)


def _choice(graph: fx.Graph, like: fx.Node, condition: Any, *values: Any) -> fx.Node:
    one, other = (value if isinstance(value, fx.Node) else
                  emit(graph, aten.full_like.default, condition, bool(value), like=like)
                  for value in values)  # fmt: skip
    kept = _logical(graph, "and", like, condition, one)
    rest = _logical(graph, "and", like, _logical(graph, "not", like, condition), other)
    return _logical(graph, "or", like, kept, rest)


def _logical(graph: fx.Graph, name: str, like: fx.Node, *args: Any) -> fx.Node:
    target = getattr(aten, f"logical_{name}").default
    made: fx.Node = emit(graph, target, *args, like=like)
    return made


FORMS: dict[Any, Any] = {
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther,
                     aten.where.Scalar), chosen),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), filled),
}  # fmt: skip
