"""What each op ties together: axes of its operands and result that can only be cut with each other.

`GROUPS` are axes with the same positions; `SPECIAL` are ops that move positions (reshapes,
concatenations and their pieces).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from operator import getitem
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.graph import value_of

aten = torch.ops.aten

FREE = -1  # a position of no atom: it always stays
Atoms = tuple[int, ...]  # the atom of each position along an axis

ELEMENTWISE = (
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default,
    aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default,
    aten.tanh.default, aten.mish.default, aten.elu.default, aten.leaky_relu.default,
    aten.pow.Tensor_Scalar, aten.clamp.default, aten.to.dtype, aten.clone.default,
    aten.contiguous.default, aten.expand.default, aten.type_as.default,
)  # fmt: skip
BY_CHANNEL = (aten.upsample_nearest2d.vec, aten.avg_pool2d.default)
RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
SPLITS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


class Untied(Exception):
    """Why an axis cannot be cut."""


def size(node: fx.Node, axis: int) -> int:
    """Positions along an axis; of a tuple of pieces, those of its source."""
    value = value_of(node)
    if isinstance(value, (tuple, list)):
        if node.target in SPLITS:
            return size(node.args[0], axis)  # type: ignore[arg-type]
        value = value[0]
    return _number(value.shape[axis])


def _number(value: Any) -> int:
    """A size, an open one as it was at capture."""
    return int(value.node.hint if isinstance(value, torch.SymInt) else value)


def rank(node: Any) -> int:
    """The number of axes of a value, or of each piece of a tuple."""
    value = value_of(node)
    return len((value[0] if isinstance(value, (tuple, list)) else value).shape)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and isinstance(value_of(value), torch.Tensor)


def split_axis(node: fx.Node) -> int:
    """The axis that a split cuts."""
    default = {**node.kwargs}.get("dim", 0)
    return int(node.args[2] if len(node.args) > 2 else default) % rank(node)  # type: ignore[arg-type]


def _axis(node: fx.Node, place: int, count: int) -> int:
    """The axis that an op is told at this place of its arguments, 0 by default."""
    return int(node.args[place] if len(node.args) > place else 0) % count  # type: ignore[arg-type]


Group = list[tuple[Any, int]]


def _nothing(node: fx.Node) -> list[Group]:
    return []


def _elementwise(node: fx.Node) -> list[Group]:
    """Axes of the same place from the right, but for what is broadcast along them."""
    operands = [node, *(each for each in node.args if _is_tensor(each))]
    groups = []
    for back in range(1, rank(node) + 1):
        near = [(each, rank(each) - back) for each in operands if rank(each) >= back]
        groups.append([key for key in near if _hint(*key) == _hint(node, rank(node) - back)])
    return groups


def _hint(node: Any, axis: int) -> int:
    return _number(value_of(node).shape[axis])


def _linear(node: fx.Node) -> list[Group]:
    x, weight, *bias = node.args
    last = rank(node) - 1
    rows: Group = [(node, last), (weight, 0), *((b, 0) for b in bias if b is not None)]
    return [rows, [(x, last), (weight, 1)], *([(node, axis), (x, axis)] for axis in range(last))]


def _conv(node: fx.Node) -> list[Group]:
    x, weight, *rest = node.args
    if size(x, 1) != size(weight, 1):  # type: ignore[arg-type]
        return []  # in groups
    bias = [each for each in rest[:1] if each is not None]
    return [[(node, 1), (weight, 0), *((each, 0) for each in bias)], [(x, 1), (weight, 1)]]


def _group_norm(node: fx.Node) -> list[Group]:
    x, _, *affine = node.args
    return [[(node, 1), (x, 1), *((each, 0) for each in affine[:2] if each is not None)]]


def _norm(node: fx.Node) -> list[Group]:
    """Norms over the last axes pass the others."""
    normalized: Any = node.args[1]
    return [[(node, axis), (node.args[0], axis)] for axis in range(rank(node) - len(normalized))]


def _attention(node: fx.Node) -> list[Group]:
    """The heads of query, key, value and result."""
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    values = [node, *node.args[:3]]
    if any(rank(each) != 4 for each in values):
        return []
    if _is_tensor(mask) and rank(mask) == 4 and _hint(mask, 1) > 1:
        values.append(mask)
    return [[(each, 1) for each in values]]


def _transpose(node: fx.Node) -> list[Group]:
    count = rank(node)
    order = list(range(count))
    one, other = _axis(node, 1, count), _axis(node, 2, count)
    order[one], order[other] = order[other], order[one]
    return [[(node, axis), (node.args[0], source)] for axis, source in enumerate(order)]


def _permute(node: fx.Node) -> list[Group]:
    order: Any = node.args[1]
    return [[(node, axis), (node.args[0], source % rank(node))]
            for axis, source in enumerate(order)]  # fmt: skip


def _unsqueeze(node: fx.Node) -> list[Group]:
    new = _axis(node, 1, rank(node))
    kept = [axis for axis in range(rank(node)) if axis != new]
    return [[(node, axis), (node.args[0], source)] for source, axis in enumerate(kept)]


def _without_axis(node: fx.Node) -> list[Group]:
    """select and unbind: the axis that they are told is gone."""
    source: Any = node.args[0]
    gone = _axis(node, 1, rank(source))
    kept = [axis for axis in range(rank(source)) if axis != gone]
    return [[(node, axis), (source, old)] for axis, old in enumerate(kept)]


def _stack(node: fx.Node) -> list[Group]:
    values: Any = node.args[0]
    new = _axis(node, 1, rank(node))
    kept = [axis for axis in range(rank(node)) if axis != new]
    return [[(node, axis), *((each, old) for each in values)] for old, axis in enumerate(kept)]


def _cat(node: fx.Node) -> list[Group]:
    values: Any = node.args[0]
    along = _axis(node, 1, rank(node))
    return [[(node, axis), *((each, axis) for each in values)]
            for axis in range(rank(node)) if axis != along]  # fmt: skip


def _same_axes(node: fx.Node) -> list[Group]:
    """All axes of one operand but the one that is cut into pieces."""
    source: Any = node.args[0]
    along = split_axis(node) if node.target in SPLITS else None
    if node.target is aten.slice.Tensor:
        along = _axis(node, 1, rank(node))
    if node.target is getitem and source.target in SPLITS:
        along = split_axis(source)
    return [[(node, axis), (source, axis)] for axis in range(rank(node)) if axis != along]


def _channels(node: fx.Node) -> list[Group]:
    """Ops on images treat each channel alike."""
    return [[(node, axis), (node.args[0], axis)] for axis in range(2)]


GROUPS: dict[Any, Callable[[fx.Node], list[Group]]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(BY_CHANNEL, _channels),
    **dict.fromkeys((*SPLITS, getitem, aten.slice.Tensor), _same_axes),
    aten.linear.default: _linear,
    aten.conv2d.default: _conv,
    aten.group_norm.default: _group_norm,
    aten.layer_norm.default: _norm,
    aten.rms_norm.default: _norm,
    aten.scaled_dot_product_attention.default: _attention,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.select.int: _without_axis,
    aten.unbind.int: _without_axis,
    aten.stack.default: _stack,
    aten.cat.default: _cat,
}

Tied = Iterator[tuple[Any, int, Atoms]]


def _reshaped(node: fx.Node, value: fx.Node, axis: int, atoms: Atoms) -> Tied:
    source: Any = node.args[0]
    other = source if value is node else node
    shapes = [[_hint(each, place) for place in range(rank(each))] for each in (value, other)]
    yield (other, *relabelled(shapes[0], shapes[1], axis, atoms))


def relabelled(old: list[int], new: list[int], axis: int, atoms: Atoms) -> tuple[int, Atoms]:
    """The axis that holds the labelled one after a reshape, and its labels.

    Raises:
        Untied: the labels lie across several axes.

    >>> relabelled([2, 6], [2, 2, 3], 1, (0, 0, 0, 1, 1, 1))
    (1, (0, 1))
    """
    (low, high), (first, end) = _segment(old, new, axis)
    shape = [1] * (high - low)
    shape[axis - low] = len(atoms)
    table = np.broadcast_to(np.reshape(atoms, shape), old[low:high]).reshape(new[first:end])
    for place in sorted(range(table.ndim), key=lambda place: -table.shape[place]):
        rest = tuple(each for each in range(table.ndim) if each != place)
        least, most = table.min(rest), table.max(rest)
        if (least == most).all():
            return first + place, tuple(least.tolist())
    raise Untied("they are spread over several axes")


def _segment(old: list[int], new: list[int], axis: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shortest runs of axes of equal size around `axis`, before and after a reshape."""
    ends = [(i, j) for i in range(len(old) + 1) for j in range(len(new) + 1)
            if prod(old[:i]) == prod(new[:j])]  # fmt: skip
    low = max(pair for pair in ends if pair[0] <= axis)
    high = min(pair for pair in ends if pair[0] > axis)
    return (low[0], high[0]), (low[1], high[1])


def _catenated(node: fx.Node, value: fx.Node, axis: int, atoms: Atoms) -> Tied:
    values: Any = node.args[0]
    if axis != _axis(node, 1, rank(node)):
        return
    start = 0
    for each in values:
        count = size(each, axis)
        if value is node:
            yield each, axis, atoms[start : start + count]
        elif value is each:
            rest = size(node, axis) - start - count
            yield node, axis, (FREE,) * start + atoms + (FREE,) * rest
        start += count


def _split(node: fx.Node, value: fx.Node, axis: int, atoms: Atoms) -> Tied:
    if axis == split_axis(node):
        yield (node.args[0] if value is node else node), axis, atoms


def piece_range(node: fx.Node) -> tuple[int, int]:
    """Where in its source a getitem of a split, or a slice of step 1, starts and ends."""
    source: Any = node.args[0]
    if node.target is getitem:
        axis, index = split_axis(source), int(node.args[1])  # type: ignore[arg-type]
        sizes = [_number(each.shape[axis]) for each in value_of(source)]
        return sum(sizes[:index]), sum(sizes[: index + 1])
    count = size(source, _axis(node, 1, rank(node)))
    start: Any = node.args[2] if len(node.args) > 2 and node.args[2] is not None else 0
    low = start if start >= 0 else max(0, count + start)
    return low, low + size(node, _axis(node, 1, rank(node)))


def _piece(node: fx.Node, value: fx.Node, axis: int, atoms: Atoms) -> Tied:
    source: Any = node.args[0]
    if node.target is getitem and (source.target not in SPLITS or axis != split_axis(source)):
        return
    if node.target is aten.slice.Tensor:
        if axis != _axis(node, 1, rank(node)):
            return
        if len(node.args) > 4 and node.args[4] != 1:
            raise Untied("a slice takes every other one")
    low, high = piece_range(node)
    if value is node:
        rest = size(source, axis) - high
        yield source, axis, (FREE,) * low + atoms + (FREE,) * rest
    else:
        yield node, axis, atoms[low:high]


SPECIAL: dict[Any, Callable[[fx.Node, fx.Node, int, Atoms], Tied]] = {
    **dict.fromkeys(RESHAPES, _reshaped),
    **dict.fromkeys(SPLITS, _split),
    getitem: _piece,
    aten.slice.Tensor: _piece,
    aten.cat.default: _catenated,
}
