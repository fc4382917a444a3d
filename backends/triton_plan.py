"""A static plan of one graph: an order of calls, and one arena that their results share.

Every result of a kernel has its place in the arena from the start to the end of its life, which is
known: two results share bytes only if none of them is alive while the other is. Placing the largest
first, each as low as it fits, is TensorFlow Lite's planner ("greedy by size", Pisarchyk and Lee
2020). Results of ATen calls that are not views are PyTorch's to place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from effuse.errors import BackendError
from effuse.graph import calls, recorded, value_of
from effuse.kernels.launch import Native, as_tuple
from effuse.kernels.table import BY_TARGET

ALIGNMENT = 256  # bytes; kernels count on 16


@dataclass(frozen=True)
class Span:
    """A buffer's bytes, and the first and last place in the order at which it is alive."""

    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """Where each result of each kernel is, by node and number, and the bytes of all of it."""

    offsets: Mapping[tuple[str, int], int]
    bytes: int


def place(spans: Sequence[Span]) -> tuple[list[int], int]:
    """An offset for each span, with those alive at one time apart; the bytes in all."""
    offsets = [0] * len(spans)
    placed: list[int] = []
    for index in sorted(range(len(spans)), key=lambda each: (-spans[each].bytes, each)):
        beside = [each for each in placed if _meet(spans[index], spans[each])]
        offsets[index] = _lowest(spans[index].bytes, [(offsets[e], spans[e].bytes) for e in beside])
        placed.append(index)
    ends = (offset + span.bytes for offset, span in zip(offsets, spans, strict=True))
    return offsets, max(ends, default=0)


def _meet(one: Span, other: Span) -> bool:
    return one.first <= other.last and other.first <= one.last


def _lowest(size: int, taken: Iterable[tuple[int, int]]) -> int:
    """The lowest offset at which `size` bytes fit between those taken, (offset, bytes) each."""
    low = 0
    for offset, length in sorted(taken):
        if low + size <= offset:
            break
        low = max(low, offset + length)
    return low


def native_of(node: fx.Node) -> Native | None:
    """The kernel that computes a call; None if there is none, or it refuses the recorded values."""
    row = BY_TARGET.get(node.target)
    if row is None or row.native is None:
        return None
    try:
        row.native.launch(as_tuple(value_of(node)), *recorded(node.args))
    except BackendError:
        return None
    return row.native


def plan_arena(graph: fx.Graph) -> Arena:
    """Places for the results of the graph's kernels, by its recorded values."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    ends = last_uses(graph, order)
    names, spans = [], []
    for node in calls(graph):
        if native_of(node) is None:
            continue
        for number, tensor in enumerate(as_tuple(value_of(node))):
            size = padded(tensor)
            if size:
                names.append((node.name, number))
                spans.append(Span(size, order[node], ends[storage(tensor)]))
    offsets, total = place(spans)
    return Arena(dict(zip(names, offsets, strict=True)), total)


def last_uses(graph: fx.Graph, order: Mapping[fx.Node, int]) -> dict[int, int]:
    """For each storage, the place of the last node that reads it, be it through a view."""
    found: dict[int, int] = {}
    for node in graph.nodes:
        for each in (node, *node.all_input_nodes):
            for tensor in tensors(each):
                found[storage(tensor)] = order[node]
    return found


def tensors(node: fx.Node) -> list[torch.Tensor]:
    """The recorded tensors of a node."""
    value = node.meta.get("val")
    several = value if isinstance(value, (tuple, list)) else (value,)
    return [each for each in several if isinstance(each, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    """What tells whether two recorded tensors share memory."""
    return int(tensor.untyped_storage()._cdata)


def padded(tensor: torch.Tensor) -> int:
    """The bytes that a result takes in the arena."""
    return -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT


def in_arena(arena: torch.Tensor, offset: int, like: torch.Tensor) -> torch.Tensor:
    """The arena's bytes from `offset` on as a tensor of the shape, type and strides of `like`."""
    flat = arena[offset : offset + like.untyped_storage().nbytes()].view(like.dtype)
    return flat.as_strided(like.shape, like.stride())
