"""Rotary position embedding, which graphs hold by parts, in one kernel.

    rotary          x · cos + rot(x) · sin, with rot(x) = (-x₁, x₀) of x's pairs (x₀, x₁)
    rotary_pairs    (x₀ · cos - x₁ · sin, x₀ · sin + x₁ · cos)
    rotary_complex  (x₀ + i x₁) · (cos + i sin)

Pairs are neighbours, or the two halves of a head. A result that is only cast back to x's type is
given in that type. Exact, but for roundings in between that the fused op leaves out.
"""

from __future__ import annotations

import operator
from itertools import product
from typing import Any

import torch
from torch import fx

from effuse.backends.triton_match import (
    Editor,
    Found,
    arguments,
    aten,
    floats,
    given,
    is_call,
    operands,
    ops,
    shape_of,
    sole,
    unwidened,
)
from effuse.backends.triton_producers import half_of
from effuse.graph import emit, value_of
from effuse.kernels.rotary import DIMS

ROTARY = ops.rotary.default
WOVEN, HALVES = "interleaved", "halves"
MERGES = (aten.flatten.using_ints, aten.reshape.default)
SPLITS = (aten.unflatten.int, aten.reshape.default)
JOINS = (*MERGES, aten.cat.default, aten.slice_scatter.default)

Piece = tuple[fx.Node, str, int]  # a value, how it is paired, and the first or second of each pair
Join = tuple[Any, Any, str]  # the first and the second ones of pairs, and how they are paired
Turn = tuple[fx.Node, str, fx.Node, fx.Node]  # and the factors of x₀ and x₁


def added(edit: Editor, node: fx.Node) -> Found:
    """x · cos + rot(x) · sin -> rotary."""
    for straight, turned in operands(node):
        for x, cos in _factors(straight):
            for other, sin in _factors(turned):
                found = rotated(other)
                if found is not None and found[0] is unwidened(x):
                    return rotary(edit, node, *found, (cos, sin))
    return None


def paired(edit: Editor, node: fx.Node) -> Found:
    """x₀ · cos - x₁ · sin beside x₀ · sin + x₁ · cos -> rotary."""
    join = joined(node)
    if join is None:
        return None
    first, second = (_cast(each) for each in join[:2])
    turns = _turns(second, aten.add.Tensor)
    for x, pairs, cos, sin in _turns(first, aten.sub.Tensor):
        if (x, pairs, sin, cos) in turns:
            same = pairs == join[2]
            return rotary(edit, node, x, pairs, (cos, sin)) if same else "pairs lie in a new order"
    return None


def complexes(edit: Editor, node: fx.Node) -> Found:
    """x₀ + i x₁, times a table of complex numbers -> rotary."""
    real = given(node)[0]
    if not is_call(real, aten.view_as_real.default) or not _merges(node, real):
        return None
    for one, table in _factors(given(real)[0]):
        split = is_call(one, aten.view_as_complex.default) and split_of(given(one)[0])
        if split and value_of(table).dtype == torch.complex64:
            return rotary(edit, node, *split, (table,))
        if split:
            return f"a product in {value_of(one).dtype}"
    return None


def rotary(
    edit: Editor, node: fx.Node, x: fx.Node, pairs: str, tables: tuple[fx.Node, ...]
) -> Found:
    """The call that gives what `node` gives; `tables` are cos and sin, or both as one complex."""
    axis, *more = (positions_of(each, x) for each in tables)
    if isinstance(axis, str):
        return axis
    if any(each != axis for each in more):
        return "cosines and sines of different shapes"
    if not floats(x, node):
        return f"{value_of(x).dtype} in, and {value_of(node).dtype} out"
    angles = [_by_position(edit, each, x, axis) for each in tables]
    if len(angles) == 1:
        parts = once(edit, aten.view_as_real.default, *angles)
        angles = [once(edit, aten.select.int, parts, -1, index) for index in range(2)]
    end = ending(node, x)
    made = _call(edit, end, x, {"cos": angles[0], "sin": angles[1], "pairs": pairs, "axis": axis})
    if end is not node:
        edit.replace(end, made)
    return made


def _call(edit: Editor, node: fx.Node, x: fx.Node, named: dict[str, Any]) -> fx.Node:
    """The op on x (b, s, h, d), or on (b, s, d) as one head, with what `node` has for a dtype."""
    dtype, heads = value_of(node).dtype, value_of(x).dim() == DIMS
    if dtype == torch.float32 and value_of(x).dtype != dtype:
        x = emit(edit.graph, aten.to.dtype, x, dtype, like=node)
    if not heads:
        x = emit(edit.graph, aten.unsqueeze.default, x, 2, like=node)
    made = edit.call(ROTARY, node, x=x, **named)
    if not heads:
        made = emit(edit.graph, aten.squeeze.dim, made, 2, like=node)
    if value_of(made).dtype != dtype:
        made = emit(edit.graph, aten.to.dtype, made, dtype, like=node)
    return made


def ending(node: fx.Node, x: fx.Node) -> fx.Node:
    """The cast to x's type, if nothing else reads `node`; else `node`."""
    reader = next(iter(node.users), node)
    cast = is_call(reader, aten.to.dtype) and value_of(reader).dtype == value_of(x).dtype
    return reader if cast and sole(node) else node


def positions_of(table: fx.Node, x: fx.Node) -> int | str:
    """The axis of x along which a table of angles goes, or why it does not go along one."""
    own, whole = shape_of(table), shape_of(x)
    if len(whole) not in (DIMS - 1, DIMS) or len(own) > len(whole):
        return f"values of {len(whole)} axes, and angles of {len(own)}"
    lead = ("1",) * (len(whole) - len(own)) + own[:-1]
    (size, other), (first, second) = ((*each, "1")[1:3] for each in (whole[:-1], lead))
    if (first, second) == (size, "1"):
        return 1
    if (first, second) == ("1", other):
        return 2
    alone = (first, second) == ("1", "1")
    return "one angle for all positions" if alone else "angles that vary over the heads"


def _by_position(edit: Editor, table: fx.Node, x: fx.Node, axis: int) -> fx.Node:
    """A table as (positions, columns), perhaps for each of a batch: without the heads' axis."""
    heads = value_of(table).dim() - DIMS + 3 - axis
    if value_of(x).dim() < DIMS or heads < 0:
        return table
    return once(edit, aten.squeeze.dim, table, heads)


def once(edit: Editor, target: Any, *args: Any) -> fx.Node:
    """A call that all sites share."""
    key = (target, *args)
    if key not in edit.shared or edit.shared[key]._erased:
        edit.shared[key] = emit(edit.graph, target, *args, like=args[0])
    return edit.shared[key]


def rotated(node: Any) -> tuple[fx.Node, str] | None:
    """x and its pairing of (-x₁, x₀), or None."""
    join = joined(unwidened(node))
    if join is None or not is_call(minus := unwidened(join[0]), aten.neg.default):
        return None
    second, first = piece(given(minus)[0]), piece(join[1])
    if first is None or (*first[:2], 1) != second or first[1:] != (join[2], 0):
        return None
    return first[:2]


def joined(node: Any) -> Join | None:
    """What `node` has for the first and the second ones of pairs, or None."""
    if is_call(node, *MERGES):
        return _stacked(node, given(node)[0])
    if is_call(node, aten.cat.default):
        parts, axis = arguments(node)["tensors"], arguments(node)["dim"]
        even = len(parts) == 2 and shape_of(parts[0]) == shape_of(parts[1])
        return (*parts, HALVES) if even and _last(node, axis) else None
    return _scattered(node) if is_call(node, aten.slice_scatter.default) else None


def _stacked(node: fx.Node, stack: Any) -> Join | None:
    if not is_call(stack, aten.stack.default) or not _merges(node, stack):
        return None
    parts, axis = arguments(stack)["tensors"], arguments(stack)["dim"] % value_of(stack).dim()
    pairs = {1: WOVEN, 2: HALVES}.get(value_of(stack).dim() - axis)
    return (*parts, pairs) if pairs is not None and len(parts) == 2 else None


def _scattered(node: fx.Node) -> Join | None:
    """Two writes that are every second value each, and so all of them."""
    written: dict[int, Any] = {}
    for call in (node, given(node)[0]):
        place = every_second(call) if is_call(call, aten.slice_scatter.default) else None
        if place is None:
            return None
        source = arguments(call)["src"]
        written[place] = given(source)[1] if is_call(source, aten.copy.default) else source
    return (written[0], written[1], WOVEN) if len(written) == 2 else None


def piece(node: Any) -> Piece | None:
    """What `node` is every second value or one half of, or None."""
    node = unwidened(node)
    if is_call(node, aten.slice.Tensor) and (place := every_second(node)) is not None:
        return unwidened(given(node)[0]), WOVEN, place
    cut = given(node)[0] if is_call(node, operator.getitem) else node
    if is_call(cut, aten.unbind.int, aten.select.int):
        told = arguments(cut)
        split = split_of(told["self"], told["dim"])
        return None if split is None else (*split, told.get("index", node.args[-1]))
    half = half_of(node)
    return None if half is None else (unwidened(half[0]), HALVES, half[1])


def every_second(node: fx.Node) -> int | None:
    """Which one of each pair a slice of an even last axis takes, from its start to its end."""
    whole, told = given(node)[0], arguments(node)
    start, size = told["start"] or 0, value_of(whole).shape[-1]
    if not _last(whole, told["dim"]) or told["step"] != 2 or start not in (0, 1) or size % 2:
        return None
    return start if told["end"] is None or told["end"] >= size else None


def split_of(node: Any, axis: int = -1) -> tuple[fx.Node, str] | None:
    """x and its pairing, of x (…, d) as (…, d/2, 2) or (…, 2, d/2) with the two along `axis`."""
    node = unwidened(node)
    if not is_call(node, *SPLITS) or not _merges(given(node)[0], node):
        return None
    pairs = {1: WOVEN, 2: HALVES}.get(value_of(node).dim() - axis % value_of(node).dim())
    two = value_of(node).shape[axis] == 2
    return (unwidened(given(node)[0]), pairs) if pairs is not None and two else None


def _merges(node: fx.Node, split: fx.Node) -> bool:
    """Whether the last axis of `node` is the last two of `split`."""
    *lead, first, second = value_of(split).shape
    return shape_of(node) == (*map(str, lead), str(first * second))


def _last(node: fx.Node, axis: int) -> bool:
    dims: int = value_of(node).dim()
    return axis % dims == dims - 1


def _cast(node: Any) -> Any:
    """What is cast to a float type, or `node` itself."""
    return given(node)[0] if is_call(node, aten.to.dtype) and floats(node) else node


def _factors(node: Any) -> tuple[tuple[fx.Node, fx.Node], ...]:
    return operands(node) if is_call(node, aten.mul.Tensor) else ()


def _turns(node: Any, target: Any) -> list[Turn]:
    """x, its pairing, and the factors a, b of a · x₀ ± b · x₁, the other way round for +."""
    pairs = operands(node) if is_call(node, target) else ()
    found = []
    for one, other in pairs[:1] if target is aten.sub.Tensor else pairs:
        for (x, a), (y, b) in product(_factors(one), _factors(other)):
            first, second = piece(x), piece(y)
            if first is not None and first[2] == 0 and (*first[:2], 1) == second:
                found.append((*first[:2], a, b))
    return found
