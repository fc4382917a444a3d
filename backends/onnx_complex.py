"""Products of complex numbers of two precisions, which ONNX's exporter cannot make one."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effuse.graph import calls, emit, value_of

aten = torch.ops.aten


def widen_pairs(graph: fx.Graph) -> None:
    """view_as_complex(x) · c -> view_as_complex(x in c's precision) · c; exact, as torch widens.

    Rotary angles kept in double precision meet tokens in single precision so. Of the pairs that
    make a number ONNX knows a cast, of the number itself it knows none.
    """
    for node in calls(graph, aten.mul.Tensor):
        for place, each in enumerate(node.args):
            if not isinstance(each, fx.Node) or each.target is not aten.view_as_complex.default:
                continue
            if value_of(each).dtype is not value_of(node).dtype:
                node.update_arg(place, widened(graph, each, value_of(node).dtype))


def widened(graph: fx.Graph, number: Any, dtype: torch.dtype) -> fx.Node:
    """The number, its pair cast before."""
    with graph.inserting_before(number):
        pair = emit(graph, aten._to_copy.default, number.args[0], dtype=dtype.to_real(),
                    like=number)  # fmt: skip
        return emit(graph, aten.view_as_complex.default, pair, like=number)  # type: ignore[no-any-return]
