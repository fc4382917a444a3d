"""Which positions of which values have to go together: dependency propagation by labels.

Each position along an axis carries the number of the atom (a head, a hidden unit, a channel) that
it belongs to, or FREE. From one labelled axis the labels spread through every op that reads or
makes the value, forwards and backwards, until layers (whose weights lose rows or columns) end them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import fx

from effuse.passes.prune_axes import FREE, GROUPS, SPECIAL, Atoms, Untied, size
from effuse.rates import SHAPE_READS

aten = torch.ops.aten

Axis = tuple[fx.Node, int]  # a value and one of its axes, counted from the left
Labels = dict[Axis, Atoms]
Key = TypeVar("Key")


def closure(seed: Axis, atoms: Atoms, stream: Collection[fx.Node]) -> Labels:
    """Every axis that has to be cut with `seed`, labelled; norm groups stay whole.

    Args:
        seed: where the labels start.
        atoms: the seed's labels.
        stream: sums of residual streams, which no cut may reach.

    Raises:
        Untied: something reads the positions together, or leaves the network with them.
    """
    found: Labels = {seed: atoms}
    queue = deque([seed])
    while queue:
        value, axis = queue.popleft()
        _check_place(value, stream)
        for op in (value, *value.users):
            for other, place, labels in tied(op, value, axis, found[value, axis]):
                merged = merge(found.get((other, place)), labels, size(other, place))
                if merged != found.get((other, place)):
                    found[other, place] = merged
                    queue.append((other, place))
    return renamed(found, whole_groups(found))


def _check_place(value: fx.Node, stream: Collection[fx.Node]) -> None:
    if value in stream:
        raise Untied("they are channels of a residual stream")
    if value.op == "placeholder":
        raise Untied("they are channels of an input")


def tied(op: fx.Node, value: fx.Node, axis: int, atoms: Atoms) -> list[tuple[fx.Node, int, Atoms]]:
    """The axes of `op`'s operands and result that have to be cut with `axis` of `value`.

    Raises:
        Untied: the op needs all positions.
    """
    if op.op == "get_attr" or op.target in SHAPE_READS:
        return []
    if op.op == "output":
        raise Untied("they leave the network")
    groups = [group for group in GROUPS.get(op.target, _nothing)(op) if (value, axis) in group]
    found = [(*key, atoms) for group in groups for key in group if key != (value, axis)]
    special = list(SPECIAL.get(op.target, _moves_nothing)(op, value, axis, atoms))
    if not groups and not special:
        raise Untied(f"{getattr(op.target, '__name__', op.target)} reads them as one")
    return [each for each in (*found, *special) if set(each[2]) != {FREE}]


def _nothing(op: fx.Node) -> list[list[Axis]]:
    return []


def _moves_nothing(
    op: fx.Node, value: fx.Node, axis: int, atoms: Atoms
) -> list[tuple[fx.Node, int, Atoms]]:
    return []


def merge(old: Atoms | None, new: Atoms, count: int) -> Atoms:
    """Both labellings of one axis of `count` positions.

    Raises:
        Untied: they contradict each other.

    >>> merge((0, -1), (-1, 1), 2)
    (0, 1)
    """
    if len(new) != count:
        raise Untied("values of other sizes share them")
    if old is None:
        return new
    if any(a != b and FREE not in (a, b) for a, b in zip(old, new, strict=True)):
        raise Untied("two of them meet at one position")
    return tuple(max(pair) for pair in zip(old, new, strict=True))


def whole_groups(found: Labels) -> dict[int, int]:
    """Atom -> the least atom that it shares norm groups with, or FREE if some position stays."""
    parent = {atom: atom for atoms in found.values() for atom in atoms}

    def root(atom: int) -> int:
        while parent[atom] != atom:
            atom = parent[atom]
        return atom

    for (node, axis), atoms in found.items():
        if node.target is aten.group_norm.default and axis == 1:
            groups: Any = node.args[1]
            for group in np.reshape(atoms, (groups, -1)).tolist():
                roots = {root(atom) for atom in group}
                parent |= dict.fromkeys(roots, min(roots))
    return {atom: root(atom) for atom in parent}


def renamed(found: Mapping[Key, Atoms], names: Mapping[int, int]) -> dict[Key, Atoms]:
    """The labels by the atoms' new names, these counted anew from 0 in the names' order.

    An axis of which every position is FREE then is left out.
    """
    kept = sorted(set(names.values()) - {FREE})
    numbers = {FREE: FREE, **{name: number for number, name in enumerate(kept)}}
    table = {atom: numbers[name] for atom, name in names.items()} | {FREE: FREE}
    labels = {key: tuple(table[atom] for atom in atoms) for key, atoms in found.items()}
    return {key: atoms for key, atoms in labels.items() if set(atoms) != {FREE}}
