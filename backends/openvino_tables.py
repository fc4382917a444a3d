"""Rows of many tables of the schedule read as one: a step reads one row and cuts it up."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from effuse.graph import calls, emit, emit_weight, substitute, value_of
from effuse.weights import WeightStore, derive

aten = torch.ops.aten


def join_tables(graph: fx.Graph, weights: WeightStore) -> None:
    """index_select(table_i, 0, step) of all tables -> pieces of index_select([table_1 …], 0, step).

    Each was a lookup and a conversion of its own, 44 small nodes in a UNet of 36 M parameters.
    """
    groups: dict[Any, list[fx.Node]] = defaultdict(list)
    for node in calls(graph, aten.index_select.default):
        table, axis, index = _arguments(node)
        stored = isinstance(table, fx.Node) and table.op == "get_attr"
        if stored and axis == 0 and value_of(index).numel() == 1:
            value = value_of(table)
            groups[index, value.dtype, len(value)].append(node)
    for found in groups.values():
        if len(found) > 1:
            _join(graph, weights, found)


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _join(graph: fx.Graph, weights: WeightStore, lookups: Sequence[fx.Node]) -> None:
    names = [str(node.args[0].target) for node in lookups]  # type: ignore[union-attr]
    sizes = [value_of(node).numel() for node in lookups]
    index = _arguments(lookups[0])[2]
    joined = derive(weights, names, _side_by_side, "side by side")
    with graph.inserting_after(index):
        row = emit_weight(graph, weights, f"{names[0]}.joined", joined)
    with graph.inserting_before(lookups[0]):
        row = emit(graph, aten.index_select.default, row, 0, index, like=lookups[0])
        pieces = emit(graph, aten.split_with_sizes.default, row, sizes, 1, like=lookups[0])
        for place, node in enumerate(lookups):
            piece = emit(graph, operator.getitem, pieces, place, like=node)
            shape = list(value_of(node).shape)
            substitute(node, emit(graph, aten.reshape.default, piece, shape, like=node))


def _side_by_side(*tables: torch.Tensor) -> torch.Tensor:
    return torch.cat([table.flatten(1) for table in tables], 1)
