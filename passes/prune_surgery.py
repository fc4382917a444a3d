"""Pruning a program: joins become their shortcuts, and layers lose rows and columns.

`pruned` makes smaller weights and graphs; `masked` computes the same with zeros in place of what
went, which is what the smaller one is held against.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.graph import (
    calls,
    clone,
    drop_unused_inputs,
    eliminate,
    emit,
    emit_input,
    emit_weight,
    fake_mode,
    inputs,
    substitute,
    value_of,
)
from effuse.passes.cut import sizes_from_inputs
from effuse.passes.prune_axes import SPLITS, Atoms, piece_range, rank, split_axis
from effuse.passes.prune_candidates import CONVS, LINEARS, Candidate, Site
from effuse.passes.skip_blocks import without
from effuse.program import Part, Program, prune_weights
from effuse.weights import WeightStore, copied

aten = torch.ops.aten

Kept = Mapping[tuple[str, int], list[int]]  # value's name, axis -> the positions that stay


def pruned(program: Program, chosen: Sequence[Candidate]) -> Program:
    """The program without `chosen`, smaller in weights and arithmetic; itself if nothing goes."""
    if not chosen:
        return program
    part = program.part(program.plan.default)
    blocks = [each.block for each in chosen if each.block]
    if blocks:
        part = replace(without(part, part.name, blocks), exact=part.exact)
    weights = copied(program.weights)
    part = cut(part, kept_positions(chosen), weights)
    parts = [part if each.name == part.name else each for each in program.parts]
    return prune_weights(replace(program, parts=tuple(parts), weights=weights))


def kept_positions(chosen: Iterable[Candidate]) -> Kept:
    """Of each axis that is cut, the positions that stay."""
    gone: defaultdict[tuple[str, int], set[int]] = defaultdict(set)
    lengths: dict[tuple[str, int], int] = {}
    for site, atoms in by_site(chosen):
        for key, labels in site.labels.items():
            lengths[key] = len(labels)
            gone[key].update(place for place, atom in enumerate(labels) if atom in atoms)
    return {key: [place for place in range(lengths[key]) if place not in places]
            for key, places in gone.items() if places}  # fmt: skip


def by_site(chosen: Iterable[Candidate]) -> list[tuple[Site, set[int]]]:
    """The sites that lose atoms, each with those."""
    found: dict[int, tuple[Site, set[int]]] = {}
    for each in chosen:
        if each.site is not None:
            found.setdefault(id(each.site), (each.site, set()))[1].add(each.atom)
    return list(found.values())


def cut(part: Part, kept: Kept, weights: WeightStore) -> Part:
    """The part with `kept` positions only; its smaller weights are put into `weights`."""
    if not kept:
        return part
    graph, _ = clone(part.graph)
    axes: defaultdict[str, dict[int, list[int]]] = defaultdict(dict)
    for (name, axis), places in kept.items():
        axes[name][axis] = places
    changes = [(node, told(node, axes)) for node in graph.nodes if _changes(node, axes)]
    for node, (target, literals) in changes:
        with graph.inserting_before(node):
            if node.op == "get_attr":
                new = _smaller(graph, node, axes[node.name], weights)
            else:
                args = [literals.get(place, arg) for place, arg in enumerate(node.args)]
                new = emit(graph, target, *args, *_more(args, literals), like=node, **node.kwargs)
        substitute(node, new)
    sizes_from_inputs(graph)
    eliminate(graph)
    drop_unused_inputs(graph)
    return replace(part, graph=graph)


def _more(args: Sequence[Any], literals: Mapping[int, Any]) -> list[Any]:
    """Literals behind the arguments that the call has."""
    return [literals[place] for place in sorted(literals) if place >= len(args)]


def _changes(node: fx.Node, axes: Mapping[str, Any]) -> bool:
    """Whether a node gives less than before, or starts elsewhere in what it reads."""
    source = node.args[0] if node.target is aten.slice.Tensor else None
    return node.name in axes or (isinstance(source, fx.Node) and source.name in axes)


def _smaller(
    graph: fx.Graph, node: fx.Node, axes: Mapping[int, list[int]], weights: WeightStore
) -> fx.Node:
    """The weight with the kept positions only, under the same name."""
    tensor = weights[str(node.target)]
    for axis, places in axes.items():
        tensor = tensor.index_select(axis, torch.tensor(places, device=tensor.device))
    return emit_weight(graph, weights, str(node.target), tensor.contiguous())


# ---- what a call is told anew --------------------------------------------------------------------

Axes = Mapping[str, Mapping[int, list[int]]]
Told = tuple[Any, dict[int, Any]]  # the function to call, and arguments by their places


def told(node: fx.Node, axes: Axes) -> Told:
    """The call and its arguments that hold sizes, for a result with the kept positions only."""
    rule = TOLD.get(node.target)
    return rule(node, axes) if rule else (node.target, {})


def _shape(node: fx.Node, axes: Axes) -> Told:
    """reshape and expand: the sizes, aligned from the right."""
    shape: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    first = rank(node) - len(shape)
    return node.target, {1: _sizes(shape, axes[node.name], first)}


def _unflatten(node: fx.Node, axes: Axes) -> Told:
    _, axis, sizes = node.args
    first = axis % rank(node.args[0])  # type: ignore[operator]
    return node.target, {2: _sizes(list(sizes), axes[node.name], first)}  # type: ignore[arg-type]


def _sizes(shape: list[Any], axes: Mapping[int, list[int]], first: int) -> list[Any]:
    """A list of sizes, that starts at axis `first`, with those of the cut axes."""
    for axis, places in axes.items():
        if first <= axis < first + len(shape) and shape[axis - first] != -1:
            shape[axis - first] = len(places)
    return shape


def _group_norm(node: fx.Node, axes: Axes) -> Told:
    """As many channels a group as before."""
    places = axes[node.name].get(1)
    groups: Any = node.args[1]
    count = value_of(node).shape[1]
    return node.target, {} if places is None else {1: groups * len(places) // count}


def _split(node: fx.Node, axes: Axes) -> Told:
    """Pieces of what stays of each."""
    axis = split_axis(node)
    places = axes[node.name].get(axis)
    if places is None:
        return node.target, {}
    ends = np.cumsum([int(each.shape[axis]) for each in value_of(node)])
    pieces = np.bincount(np.searchsorted(ends, places, side="right"), minlength=len(ends))
    return aten.split_with_sizes.default, {1: pieces.tolist(), 2: axis}


def _slice(node: fx.Node, axes: Axes) -> Told:
    """From the first to the last of its positions that stay in its source."""
    axis = int(node.args[1] if len(node.args) > 1 else 0) % rank(node)  # type: ignore[arg-type]
    source: Any = node.args[0]
    places = axes.get(source.name, {}).get(axis)
    if places is None:
        return node.target, {}
    low, high = piece_range(node)
    start, end = np.searchsorted(places, [low, high]).tolist()
    return node.target, {1: axis, 2: start, 3: end}


TOLD: dict[Any, Callable[[fx.Node, Axes], Told]] = {
    **dict.fromkeys(SPLITS, _split),
    aten.reshape.default: _shape,
    aten.expand.default: _shape,
    aten.unflatten.int: _unflatten,
    aten.group_norm.default: _group_norm,
    aten.slice.Tensor: _slice,
}


# ---- the same with zeros -------------------------------------------------------------------------


@dataclass(frozen=True)
class Masked:
    """A graph with a mask on what each layer reads of a site.

    Args:
        graph: reads the masks as inputs.
        layers: these inputs' names -> the layers behind them.
        atoms: of the positions that each mask is for, by the inputs' names.
    """

    graph: fx.Graph
    layers: Mapping[str, str]
    atoms: Mapping[str, Atoms]

    def values(self, gone: Collection[int]) -> dict[str, torch.Tensor]:
        """The masks: 0 at the positions of the atoms `gone`, else 1."""
        shapes = {str(node.target): value_of(node) for node in inputs(self.graph)}
        return {
            name: torch.tensor([float(atom not in gone) for atom in atoms])
            .reshape(shapes[name].shape)
            .to(shapes[name].device, shapes[name].dtype)
            for name, atoms in self.atoms.items()
        }


def masked(part: Part, site: Site) -> Masked:
    """The part's graph with an input `mask.KIND.LAYER` before each layer that reads the site."""
    graph, _ = clone(part.graph)
    layers: dict[str, str] = {}
    labels: dict[str, Atoms] = {}
    for node in calls(graph, *LINEARS, *CONVS):
        weight: Any = node.args[1]
        if atoms := site.labels.get((weight.name, 1)):
            name = f"mask.{site.kind}.{node.name}"
            layers[name], labels[name] = node.name, atoms
            _mask(graph, node, name)
    return Masked(graph, layers, labels)


def _mask(graph: fx.Graph, layer: fx.Node, name: str) -> None:
    source: Any = layer.args[0]
    axis = 1 if layer.target in CONVS else rank(source) - 1
    shape = [-1 if each == axis else 1 for each in range(axis, rank(source))]
    like = value_of(source)
    with fake_mode(graph):
        value = torch.ones(like.shape[axis], dtype=like.dtype, device=like.device).reshape(shape)
    given = emit_input(graph, name, value)
    with graph.inserting_before(layer):
        layer.replace_input_with(source, emit(graph, aten.mul.Tensor, source, given, like=layer))
