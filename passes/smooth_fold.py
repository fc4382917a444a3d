"""Where a division of a layer's input by one number a channel goes: x / s, computed as x was.

    norm(h)·γ + β      ->  norm(h)·(γ/s) + (β/s)         layer, group and RMS norm
    y·m + c            ->  y·(m/s) + (c/s)               adaLN's modulation, m and c small
    W h + b            ->  (W/s) h + (b/s)               rows of the layer before
    relu(h)            ->  relu(h/s)                     s > 0

A stored operand is stored divided; one that says the same of every token (a row of Hoist's tables
is stored) is multiplied by 1/s, which costs next to nothing. SiLU and GELU cannot be crossed
(METHODS 0.6). Nothing that others read too is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from effuse.graph import emit, emit_weight, unused_name, value_of
from effuse.weights import WeightStore

aten = torch.ops.aten

MARK = ".smooth"  # in the name of what is stored multiplied or divided

ROWS: dict[Any, int] = {aten.linear.default: -1, aten.conv2d.default: -3}  # axis of the outputs
ROW_NORMS = {aten.layer_norm.default: (2, 3), aten.rms_norm.default: (2,)}  # places of γ and β
SUMS = (aten.add.Tensor, aten.sub.Tensor)
THROUGH = (aten.relu.default, aten.leaky_relu.default, aten.div.Tensor, aten.to.dtype)
VIEWS = (aten.squeeze.dim, aten.unsqueeze.default, aten.expand.default, aten.index_select.default)


@dataclass(frozen=True)
class Fold:
    """A value to be divided: by dividing some arguments of its call, or (none) itself."""

    node: fx.Node | None  # None: a factor that is not there, which is 1
    axis: int  # of the channels, from the end
    places: tuple[tuple[int, Fold], ...] = ()


@dataclass(frozen=True)
class Search:
    """Looks for the fold of a value of one shape."""

    shape: tuple[Any, ...]  # of the layer's input
    channels: int

    def find(self, node: fx.Node, axis: int, readers: Collection[fx.Node]) -> Fold | str:
        """How `node`, which only `readers` may read, is divided; or why that takes a multiply."""
        if node.op != "call_function":
            return "its input comes from elsewhere"
        if set(node.users) - set(readers):
            return "others read its input too"
        for rule in RULES:
            found = rule(self, node, axis)
            if found is not None:
                return found
        return f"{node.target} cannot be crossed"

    def operand(self, parent: fx.Node, place: int, axis: int) -> Fold | str:
        """The fold of an operand of an element-wise call."""
        node: Any = parent.args[place]
        if not isinstance(node, fx.Node):
            return "a number is added"
        if node.op == "get_attr" and self.has_channels(node, axis):
            return Fold(node, axis)
        if self.small(node, axis):
            return self.table(node, axis) or Fold(node, axis)
        return self.find(node, axis, [parent])

    def small(self, node: fx.Node, axis: int) -> bool:
        """Whether a value says the same of all tokens or pixels of a sample."""
        shape = value_of(node).shape
        others = [place for place in range(-len(self.shape) + 1, 0) if place != axis]
        sizes = [shape[place] for place in others if -place <= len(shape)]
        return bool(others) and all(isinstance(size, int) and size == 1 for size in sizes)

    def table(self, node: fx.Node, axis: int) -> Fold | None:
        """The fold of a row of a stored table, into the table."""
        if not self.has_channels(node, axis):
            return None
        if node.op == "get_attr":
            return Fold(node, axis)
        if node.target not in VIEWS or not _before(node, axis):
            return None
        inner = self.table(node.args[0], axis)  # type: ignore[arg-type]
        return inner and Fold(node, axis, ((0, inner),))

    def has_channels(self, node: fx.Node, axis: int) -> bool:
        """Whether a value has the channels where they would be."""
        shape = value_of(node).shape
        size = shape[axis] if len(shape) >= -axis else None
        return isinstance(size, int) and size == self.channels


def _before(view: fx.Node, axis: int) -> bool:
    """Whether a view only touches dimensions in front of the channels."""
    if view.target is aten.expand.default:
        return True
    dims = max(value_of(view).dim(), value_of(view.args[0]).dim())  # type: ignore[arg-type]
    at: Any = view.args[1]
    return bool(at % dims < dims + axis)


def _norm(search: Search, node: fx.Node, axis: int) -> Fold | str | None:
    """norm(h, γ, β) -> norm(h, γ/s, β/s)."""
    places: tuple[int, ...]
    if node.target in ROW_NORMS:
        places, fits = ROW_NORMS[node.target], axis == -1 and len(node.args[1]) == 1  # type: ignore[arg-type]
    elif node.target is aten.group_norm.default:
        places, fits = (2, 3), axis == 1 - value_of(node).dim()
    else:
        return None
    given = [(place, node.args[place] if place < len(node.args) else None) for place in places]
    if not fits:
        return "the norm is over another axis than the channels"
    if any(each is not None and each.op != "get_attr" for _, each in given):  # type: ignore[union-attr]
        return "the norm's factors are computed"
    wanted = [(p, each) for p, each in given if p == 2 or each is not None]
    return Fold(node, axis, tuple((p, Fold(each, -1)) for p, each in wanted))  # type: ignore[arg-type]


def _rows(search: Search, node: fx.Node, axis: int) -> Fold | str | None:
    """W h + b -> (W/s) h + b/s."""
    if ROWS.get(node.target) != axis:
        return None
    given: list[Any] = [each for each in node.args[1:3] if each is not None]
    if any(each.op != "get_attr" for each in given):
        return "the layer before has a computed weight or bias"
    folds = (Fold(each, -value_of(each).dim()) for each in given)
    return Fold(node, axis, tuple(enumerate(folds, start=1)))


def _sum(search: Search, node: fx.Node, axis: int) -> Fold | str | None:
    """a + c -> a/s + c/s."""
    if node.target not in SUMS:
        return None
    places = []
    for place in (0, 1):
        found = search.operand(node, place, axis)
        if isinstance(found, str):
            return found
        places.append((place, found))
    return Fold(node, axis, tuple(places))


def _product(search: Search, node: fx.Node, axis: int) -> Fold | str | None:
    """y · m -> y · (m/s), or (y/s) · m: by the operand that takes less."""
    if node.target is not aten.mul.Tensor:
        return None
    found = [search.operand(node, place, axis) for place in (0, 1)]
    folds = [(place, each) for place, each in enumerate(found) if isinstance(each, Fold)]
    if not folds:
        return next(each for each in found if isinstance(each, str))
    return Fold(node, axis, (min(folds, key=lambda each: _cost(each[1])),))


def _through(search: Search, node: fx.Node, axis: int) -> Fold | str | None:
    """f(h) -> f(h/s) where f(h)/s = f(h/s)."""
    if node.target not in THROUGH:
        return None
    source: Any = node.args[0]
    if not search.has_channels(source, axis):
        return "its input is broadcast over the channels"
    found = search.operand(node, 0, axis)
    return found if isinstance(found, str) else Fold(node, axis, ((0, found),))


def _cost(fold: Fold) -> tuple[int, int]:
    """Multiplies at run time, and the nodes on the way."""
    stored = fold.node is None or fold.node.op == "get_attr"
    costs = [_cost(each) for _, each in fold.places]
    many = sum(cost for cost, _ in costs) if costs else int(not stored)
    return many, 1 + max((depth for _, depth in costs), default=0)


RULES: tuple[Callable[[Search, fx.Node, int], Fold | str | None], ...] = (
    _norm, _rows, _sum, _product, _through
)  # fmt: skip


@dataclass
class Divider:
    """Writes values divided by `scale` into one graph; variants share what is stored."""

    graph: fx.Graph
    weights: WeightStore
    known: dict[Any, str]  # what is stored already, by what it was made of
    mapping: dict[fx.Node, fx.Node]  # from the nodes that folds name to those of `graph`
    factors: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)  # by name, by axis
    label: str = ""  # of the layers that share the scale
    scale: torch.Tensor = field(default_factory=lambda: torch.ones(()))

    def of(self, label: str, scale: torch.Tensor) -> Divider:
        """The divider by another scale."""
        return replace(self, label=label, scale=scale)

    def divided(self, fold: Fold, value: Any, before: fx.Node) -> fx.Node:
        """`value`, which is the fold's node by now, divided; before the node `before`."""
        if value is None:
            return self._inverse(before, -1, before)
        if fold.places:
            return self._call(fold, value)
        if value.op == "get_attr":
            with self.graph.inserting_before(before):
                return self.stored(value, fold.axis, 1 / self.scale.double())
        inverse = self._inverse(before, fold.axis, value)
        with self.graph.inserting_before(before):
            new: fx.Node = emit(self.graph, aten.mul.Tensor, value, inverse, like=value)
        return new

    def _call(self, fold: Fold, node: fx.Node) -> fx.Node:
        """The call of divided arguments; nothing but the fold's own reader reads the old one."""
        args = list(node.args)
        args += [None] * (1 + max(place for place, _ in fold.places) - len(args))
        for place, each in fold.places:
            args[place] = self.divided(each, args[place], node)
        with self.graph.inserting_before(node):
            new: fx.Node = emit(self.graph, node.target, *args, like=node, **node.kwargs)
        if fold.node is not None and node.target not in VIEWS:  # views may have other readers
            self.mapping[fold.node] = new
        return new

    def stored(self, node: fx.Node, axis: int, factor: torch.Tensor) -> fx.Node:
        """A stored tensor times `factor` along an axis, at the graph's insertion point."""
        name = str(node.target)
        key = (name, axis, self.label)
        value = self.weights[name]
        if key not in self.known:
            shape = [-1] + [1] * (value.dim() - 1 - axis % value.dim())
            product = (value.double() * factor.double().view(shape)).to(value.dtype)
            self.known[key] = unused_name(self.weights, f"{name.removesuffix(MARK)}{MARK}")
            self.weights[self.known[key]] = product
            found, place = dict(self.factors.get(name, {})), axis % value.dim()
            found[place] = found.get(place, 1.0) * factor.double()
            self.factors[self.known[key]] = found
        stored = self.known[key]
        return emit_weight(self.graph, self.weights, stored, self.weights[stored])

    def _inverse(self, before: fx.Node, axis: int, like: fx.Node) -> fx.Node:
        """1/s, shaped to multiply along an axis."""
        dtype = value_of(like).dtype
        name = self.known.setdefault(
            (self.label, axis, dtype),
            unused_name(self.weights, f"{self.label}.inverse{MARK}"),
        )
        value = (1 / self.scale.double()).to(dtype).view([-1] + [1] * (-axis - 1))
        with self.graph.inserting_before(before):
            return emit_weight(self.graph, self.weights, name, value)
