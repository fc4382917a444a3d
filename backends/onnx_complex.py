"""Complex numbers for ONNX, which has none: as pairs where a part takes or gives them.

Inside a part the exporter writes products of pairs itself, but not of two precisions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from effuse.errors import BackendError
from effuse.graph import (
    calls,
    emit,
    inputs,
    outputs,
    renew_input,
    set_outputs,
    substitute,
    typing,
    value_of,
)
from effuse.program import Program

aten = torch.ops.aten

# What moves numbers about and does not compute: the same of pairs, by the number's rank. Their
# axis is the last, so that axes are counted from the first.
LAYOUT: Mapping[Any, Callable[..., tuple[Any, ...]]] = {
    aten.unsqueeze.default: lambda rank, axis: (axis % (rank + 1),),
    **dict.fromkeys(
        (aten.slice.Tensor, aten.select.int, aten.index_select.default, aten.squeeze.dim),
        lambda rank, axis=0, *rest: (axis % rank, *rest),
    ),
    aten.transpose.int: lambda rank, one, other: (one % rank, other % rank),
    aten.permute.default: lambda rank, axes: ([*(axis % rank for axis in axes), rank],),
    **dict.fromkeys(
        (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default),
        lambda rank, shape: ([*shape, 2],),
    ),
    aten.repeat.default: lambda rank, times: ([*times, 1],),
    aten.flatten.using_ints: lambda rank, first=0, last=-1: (first % rank, last % rank),
    aten.unflatten.int: lambda rank, axis, sizes: (axis % rank, sizes),
    **dict.fromkeys((aten.clone.default, aten.contiguous.default), lambda rank: ()),
}


def pair_ends(graph: fx.Graph) -> None:
    """Complex inputs and outputs of a part become pairs of real numbers, in a last axis; exact.

    What only moves numbers about moves their pairs.
    """
    for node in inputs(graph):
        if value_of(node).is_complex():
            with typing(graph):
                value = torch.view_as_real(value_of(node)).clone()
            pairs = renew_input(node, value)
            with graph.inserting_after(pairs):
                substitute(pairs, emit(graph, aten.view_as_complex.default, pairs))
    for node in calls(graph, *LAYOUT):
        if value_of(node).is_complex():
            _move_pairs(graph, node)
    with graph.inserting_before(graph.output_node()):
        set_outputs(graph, [_pairs(node) for node in outputs(graph)])


def check_outputs(program: Program, reader: str) -> None:
    """See that the network itself gives real numbers: its caller would get pairs.

    Raises:
        BackendError: it gives complex ones.
    """
    for part in program.parts:
        for name, node in zip(part.outputs, outputs(part.graph), strict=True):
            if name in program.outputs and value_of(node).is_complex():
                raise BackendError(
                    f"{reader}: the network gives complex numbers ({name}), and ONNX has none; let "
                    "forward give torch.view_as_real of them, or compile with backend='reference'"
                )


def _move_pairs(graph: fx.Graph, node: fx.Node) -> None:
    """layout(x) -> view_as_complex(layout(the pairs of x))."""
    source: Any = node.args[0]
    args = LAYOUT[node.target](value_of(source).dim(), *node.args[1:])
    with graph.inserting_before(node):
        moved = emit(graph, node.target, _pairs(source), *args, like=node, **node.kwargs)
        substitute(node, emit(graph, aten.view_as_complex.default, moved, like=node))


def _pairs(node: fx.Node) -> fx.Node:
    """The pairs of complex numbers, made at the insertion point; real ones as they are."""
    if not value_of(node).is_complex():
        return node
    if node.target is aten.view_as_complex.default:
        return node.args[0]  # type: ignore[return-value]
    return emit(node.graph, aten.view_as_real.default, node, like=node)  # type: ignore[no-any-return]


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
