"""Resizing to the nearest pixel by factors that are not whole, as PyTorch rounds them.

PyTorch takes pixel floor(i · s), where s = in/out is rounded to float32 first; ONNX's Resize and
what reads it round later. Where i · in/out is a whole number, the two may differ by a whole pixel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effuse.graph import calls, emit, emit_weight, substitute, unused_name, value_of
from effuse.weights import WeightStore

aten = torch.ops.aten

NEAREST = (aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
FIRST = 2  # axis that is resized, behind the batch and the channels


def gather_uneven(graph: fx.Graph, weights: WeightStore) -> None:
    """upsample_nearest(x) -> x[…, rows, columns], where a factor is not whole; exact."""
    for node in calls(graph, *NEAREST):
        source: Any = node.args[0]
        sizes = [*zip(value_of(source).shape[FIRST:], value_of(node).shape[FIRST:], strict=True)]
        if not all(isinstance(size, int) for pair in sizes for size in pair):
            continue  # an open size: the factor is known when it runs
        rows = [pixels(node, axis, *pair) for axis, pair in enumerate(sizes)]
        if all(even(found, *pair) for found, pair in zip(rows, sizes, strict=True)):
            continue
        with graph.inserting_before(node):
            for axis, found in enumerate(rows):
                name = unused_name(weights, f"{node.name}.pixels")
                stored = emit_weight(graph, weights, name, found)
                source = emit(
                    graph, aten.index_select.default, source, axis + FIRST, stored, like=node
                )
        substitute(node, source)


def pixels(node: fx.Node, axis: int, size: int, wanted: int) -> torch.Tensor:
    """The pixels of an axis that PyTorch takes: what the call itself makes of their numbers."""
    factors: Any = node.args[2]
    options = ([wanted], None) if factors is None else (None, [factors[axis]])
    double = value_of(node).dtype is torch.float64  # which is rounded later, as are its factors
    numbers = torch.arange(size, dtype=torch.float64 if double else torch.float32)
    numbers = numbers.reshape(1, 1, -1)
    found: torch.Tensor = aten.upsample_nearest1d.vec(numbers, *options)
    return found.flatten().long()


def even(found: torch.Tensor, size: int, wanted: int) -> bool:
    """Whether the pixels are those of a whole factor, on which all agree."""
    whole = wanted % size == 0 or size % wanted == 0
    return whole and torch.equal(found, torch.arange(wanted) * size // wanted)
