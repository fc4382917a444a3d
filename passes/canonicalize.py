"""Canonicalize: what says nothing goes, so that every later pass sees one way to write a thing."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from effuse.graph import (
    calls,
    clone,
    eliminate,
    emit,
    emit_weight,
    inputs,
    substitute,
    unused_name,
    value_of,
)
from effuse.log import Log
from effuse.passes.base import Pass, Work
from effuse.passes.unread import without_addend
from effuse.program import Part, Program, prune_weights
from effuse.rates import random
from effuse.weights import WeightStore, copied, derive

aten = torch.ops.aten

ROW = ".row"  # in the name of a one-dimensional convolution's weight as an image's
FOLD_LIMIT = 1 << 16  # elements: a folded constant may be this large, or as large as its inputs

DROPOUTS = (aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
            aten.feature_alpha_dropout.default)  # fmt: skip
LAYOUTS = (aten.clone.default, aten.contiguous.default)  # they change strides alone
IDENTITIES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
STRIDED = (aten.view_as_complex.default, aten.view.dtype, aten.as_strided.default)  # read strides
CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default,
         aten.type_as.default)  # fmt: skip
VIEWS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, operator.getitem,
         aten.unbind.int, aten.select.int, aten.slice.Tensor, aten.squeeze.dim,
         aten.unsqueeze.default, aten.reshape.default, aten.unflatten.int, aten.transpose.int,
         aten.permute.default, aten.flatten.using_ints)  # fmt: skip
RESHAPES = (aten.reshape.default, aten.expand.default, aten.slice.Tensor)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Dropout, asserts, no-op casts and views out; constants folded; duplicates and dead code out.

    Exact. `view` becomes `reshape`, which makes `contiguous` a no-op on values.
    """

    name: ClassVar[str] = "canonicalize"

    def run(self, program: Program, work: Work) -> Program:
        """Canonicalize every part."""
        weights = copied(program.weights)
        parts = [canonical(part, weights, work.log) for part in program.parts]
        return prune_weights(replace(program, parts=tuple(parts), weights=weights))

    def ensures(self, program: Program) -> str | None:
        """No dropout and no assertion is left."""
        for part in program.parts:
            for node in calls(part.graph):
                if node.target in DROPOUTS or "_assert" in str(node.target):
                    return f"{node} is still there in {part.name}"
        return None


def canonical(part: Part, weights: WeightStore, log: Log) -> Part:
    """A canonical copy of a part."""
    graph, _ = clone(part.graph)
    views(graph, log)
    named_paddings(graph, log)
    for node in calls(graph):
        for name, replacement in SIMPLIFICATIONS:
            new = replacement(node)
            if new is not None and log.spend(name):
                substitute(node, new)
                break
    sizes_from_inputs(graph, log)
    merge_duplicates(graph, log)
    fold_constants(graph, weights, log)
    images_of_rows(graph, weights, log)  # of weights that were computed of weights as well
    merge_duplicates(graph, log)
    dead = eliminate(graph)
    if dead:
        log.rewrites["dead"] += dead
    return replace(part, graph=graph)


SAME: dict[Any, Any] = {  # other names of what every later pass knows under one
    aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default,
    aten.concat.default: aten.cat.default, aten.concatenate.default: aten.cat.default,
}  # fmt: skip


def views(graph: fx.Graph, log: Log) -> None:
    """view(x, s) -> reshape(x, s), which does not ask for strides; concat(x, d) -> cat(x, d)."""
    for node in calls(graph, *SAME):
        if log.spend("view"):
            node.target = SAME[node.target]


NAMED_PADDINGS: dict[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default, aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}  # fmt: skip


def named_paddings(graph: fx.Graph, log: Log) -> None:
    """conv(…, "same") and conv(…, "valid") -> with numbers, the odd one padded at the end before.

    Every later pass knows the op with numbers, to which torch itself turns them in this way.
    """
    for node in calls(graph, *NAMED_PADDINGS):
        if log.spend("padding"):
            with graph.inserting_before(node):
                substitute(node, _padded(graph, node))


def _padded(graph: fx.Graph, node: fx.Node) -> fx.Node:
    x, weight, bias, stride, name, dilation, groups = _given(node)
    sizes = value_of(weight).shape[2:]
    strides, dilations = (_each(given, len(sizes)) for given in (stride, dilation))
    total = [step * (size - 1) for step, size in zip(dilations, sizes, strict=True)]
    total = [0] * len(sizes) if name == "valid" else total
    if any(amount % 2 for amount in total):
        ends = [end for amount in reversed(total) for end in (0, amount % 2)]
        x = _of_operands(graph, x, aten.constant_pad_nd.default, ends, 0.0)
    pads = [amount // 2 for amount in total]
    options = (strides, pads, dilations, groups)
    made = emit(graph, NAMED_PADDINGS[node.target], x, weight, bias, *options, like=node)
    return made  # type: ignore[no-any-return]


def _given(node: fx.Node) -> list[Any]:
    """All arguments of a call in their places, defaults filled in."""
    named = node.target._schema.arguments  # type: ignore[union-attr]
    placed: Any = [*node.args, *(each.default_value for each in named[len(node.args) :])]
    return [node.kwargs.get(each.name, value) for each, value in zip(named, placed, strict=True)]


def _each(given: Any, count: int) -> list[int]:
    """A number for each dimension."""
    many = list(given) if isinstance(given, (list, tuple)) else [given]
    return many * count if len(many) == 1 else many


def images_of_rows(graph: fx.Graph, weights: WeightStore, log: Log) -> None:
    """conv1d -> conv2d of an image of one row, as torch itself computes it.

    Every later pass, and the kernels of the back ends, know the two-dimensional one. What one row
    of images is concatenated of is one row each.
    """
    for node in calls(graph, aten.conv1d.default):
        weight: Any = node.args[1]
        if isinstance(weight, fx.Node) and weight.op == "get_attr" and log.spend("conv1d"):
            with graph.inserting_before(node):
                substitute(node, _image(graph, node, weights))


def _image(graph: fx.Graph, node: fx.Node, weights: WeightStore) -> fx.Node:
    x, weight, bias, *rest = (*node.args, None)[: max(3, len(node.args))]
    name = f"{weight.target}{ROW}"  # type: ignore[union-attr]
    fresh = derive(weights, [str(weight.target)], _as_row, "row")  # type: ignore[union-attr]
    stored = emit_weight(graph, weights, name, weights.get(name, fresh))
    options = [[first, *each] if isinstance(each, list) else each
               for each, first in zip(rest, (1, 0, 1), strict=False)]  # fmt: skip
    options += rest[3:]
    image = _of_operands(graph, x, aten.unsqueeze.default, -2)
    made = emit(graph, aten.conv2d.default, image, stored, bias, *options, like=node)
    found: fx.Node = emit(graph, aten.squeeze.dim, made, -2, like=node)
    return found


def _as_row(weight: torch.Tensor) -> torch.Tensor:
    return weight.unsqueeze(-2)


def _of_operands(graph: fx.Graph, x: Any, target: Any, *args: Any) -> Any:
    """A call on x; of channels that are concatenated, on each operand: later passes see them."""
    if x.target is aten.cat.default and x.args[1:] == (1,) and len(x.users) == 1:
        each = [_of_operands(graph, operand, target, *args) for operand in x.args[0]]
        return emit(graph, aten.cat.default, each, 1, like=x)
    return emit(graph, target, x, *args, like=x)


def identity(node: fx.Node) -> Any:
    """f(x) -> x where f keeps every value, and its strides where a later op reads them."""
    if node.target in DROPOUTS:  # dropout(x, p, train)
        return None if node.args[2] else node.args[0]
    if node.target in LAYOUTS:
        kept = calls(node.graph, *STRIDED) or channels_first(node) or attended_rows(node)
        return None if kept else node.args[0]
    return node.args[0] if node.target in IDENTITIES else None


def channels_first(node: fx.Node) -> bool:
    """Whether a video with its channels last is laid out anew, for what goes by strides.

    Norms and convolutions of videos sum in another order where channels are last, and so would all
    that follow them: the values would be off by more than an exact pass may move them.
    """
    before, after = (value_of(each) for each in (node.args[0], node))  # type: ignore[arg-type]
    if before.dim() != 5 or before.stride(1) != 1 or after.stride(1) == 1:
        return False
    return any(user.target is not aten.reshape.default for user in node.users)


def attended_rows(node: fx.Node) -> bool:
    """Whether attention reads what is laid out anew so that the numbers of a row are neighbours.

    torch computes attention of such rows block by block, of others as two products with all scores
    between: the values would be off by more than an exact pass may move them.
    """
    if in_rows(value_of(node.args[0])) or not in_rows(value_of(node)):  # type: ignore[arg-type]
        return False
    found, seen = [node], {node}
    while found:
        for user in found.pop().users:
            if user.target is aten.scaled_dot_product_attention.default:
                return True
            if user.target in VIEWS and user not in seen and in_rows(value_of(user)):
                seen.add(user)
                found.append(user)
    return False


def in_rows(value: Any) -> bool:
    """Whether the numbers of a row are neighbours; of several tensors, it is not asked."""
    strides = value.stride() if isinstance(value, torch.Tensor) else ()
    return not strides or str(strides[-1]) == "1"


def cast(node: fx.Node) -> Any:
    """to(x, dtype of x) -> x."""
    source = node.args[0] if node.target in CASTS else None
    if not isinstance(source, fx.Node):
        return None
    before, after = value_of(source), value_of(node)
    return source if (before.dtype, before.device) == (after.dtype, after.device) else None


def reshaped(node: fx.Node) -> Any:
    """reshape, expand or slice of x to x's own shape -> x."""
    if node.target not in RESHAPES:
        return None
    source: Any = node.args[0]
    return source if _same_shape(value_of(source), value_of(node)) else None


def _same_shape(one: torch.Tensor, other: torch.Tensor) -> bool:
    return [str(size) for size in one.shape] == [str(size) for size in other.shape]


def unit(node: fx.Node) -> Any:
    """x / 1 -> x and x · 1 -> x."""
    if node.target not in (aten.div.Tensor, aten.mul.Tensor) or len(node.args) < 2:
        return None
    source, factor = node.args[:2]
    if isinstance(factor, fx.Node) or factor != 1 or not isinstance(source, fx.Node):
        return None
    return source if value_of(source).dtype == value_of(node).dtype else None


SIMPLIFICATIONS: tuple[tuple[str, Callable[[fx.Node], Any]], ...] = (
    ("identity", identity),
    ("cast", cast),
    ("reshaped", reshaped),
    ("unit", unit),
    ("addend", without_addend),
)


def sizes_from_inputs(graph: fx.Graph, log: Log) -> None:
    """A size read from any tensor -> the same size read from an input, which every part has."""
    places = {
        str(size): (node, axis)
        for node in reversed(inputs(graph))
        for axis, size in enumerate(getattr(value_of(node), "shape", ()))
        if not isinstance(size, int)
    }
    for node in calls(graph, aten.sym_size.int):
        known = places.get(str(value_of(node)))
        if known and node.args[:2] != known and log.spend("size"):
            with graph.inserting_before(node):
                substitute(node, emit(graph, aten.sym_size.int, *known, like=node))


def _pure(node: fx.Node) -> bool:
    if random(node) or node.target in DROPOUTS:
        return False
    schema = getattr(node.target, "_schema", None)
    return schema is None or not schema.is_mutable


def merge_duplicates(graph: fx.Graph, log: Log) -> None:
    """Two calls of one function on the same arguments -> one."""
    seen: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            key: Any = ("weight", node.target)
        elif node.op == "call_function" and _pure(node):
            key = (node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        else:
            continue
        first = seen.setdefault(key, node)
        if first is not node and (node.op == "get_attr" or log.spend("duplicate")):
            substitute(node, first)


def fold_constants(graph: fx.Graph, weights: WeightStore, log: Log) -> None:
    """Calls on weights and numbers alone -> a stored tensor, where that costs little space."""
    for node in calls(graph):
        made = _made_by(node)
        sources = made.all_input_nodes
        value = value_of(node)
        constant = (
            all(source.op == "get_attr" for source in sources)
            and isinstance(value, torch.Tensor)
            and _pure(made)
            and _small(value, sources)
        )
        if constant and log.spend("constant"):
            _fold(graph, node, weights)


def _made_by(node: fx.Node) -> fx.Node:
    """The call that computes what a node gives: of one of several results, the call of all."""
    source = node.args[0] if node.target is operator.getitem else node
    return source if isinstance(source, fx.Node) and source.op == "call_function" else node


def _small(value: torch.Tensor, sources: list[fx.Node]) -> bool:
    if not all(isinstance(size, int) for size in value.shape):
        return False
    given: int = sum(value_of(source).numel() for source in sources)
    return value.numel() <= max(FOLD_LIMIT, given)


def _fold(graph: fx.Graph, node: fx.Node, weights: WeightStore) -> None:
    def real(source: fx.Node) -> torch.Tensor:
        return weights[str(source.target)]

    made = _made_by(node)
    with torch.no_grad():
        args, kwargs = fx.map_arg(made.args, real), fx.map_arg(made.kwargs, real)
        value = made.target(*args, **kwargs)  # type: ignore[operator]
    value = value if made is node else value[node.args[1]]
    name = unused_name(weights, f"folded.{node.name}")
    with graph.inserting_before(node):
        folded = emit_weight(graph, weights, name, value.contiguous())
    substitute(node, folded)
