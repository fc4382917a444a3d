"""What the lowering reads in a graph and how it writes: operands behind casts, values, edits.

A rule looks at a call of one of its targets. It gives the call that takes its place, a reason why
it does not apply to a site of its kind, or None where there is no such site.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from effuse.backends.triton_layout import as_read
from effuse.errors import BackendError
from effuse.graph import emit, emit_weight, substitute, typing, unused_name, value_of
from effuse.kernels.launch import as_tuple
from effuse.kernels.table import BY_TARGET
from effuse.log import Log
from effuse.weights import Weights, WeightStore

aten, ops = torch.ops.aten, torch.ops.effuse

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
DEFAULTS: dict[str, Any] = {"activation": "", "parts": 1}  # of arguments that a rule leaves out

Found = fx.Node | str | None


@dataclass(frozen=True)
class Rule:
    """A rewrite of the calls of `targets`; its function's docstring holds the equation."""

    name: str
    targets: tuple[Any, ...]
    rewrite: Callable[[Editor, fx.Node], Found]


@dataclass
class Editor:
    """One graph under edit.

    Args:
        swappable: names of weights that a run may replace by others.
        known: names of stored tensors by what they were made of; all parts share it.
        shared: nodes that several sites read, by what they compute.
    """

    graph: fx.Graph
    weights: WeightStore
    swappable: frozenset[str] = frozenset()
    log: Log = field(default_factory=Log)
    known: dict[tuple[str, ...], str] = field(default_factory=dict)
    shared: dict[Any, fx.Node] = field(default_factory=dict)

    def call(self, target: Any, like: fx.Node, **named: Any) -> fx.Node:
        """A call with arguments by name; what is not named is left out.

        Raises:
            BackendError: the op's kernel does not take them.
        """
        names = [each.name for each in target._schema.arguments]
        args = [named.pop(name, DEFAULTS.get(name)) for name in names]
        if named:
            raise TypeError(f"{target} has no arguments {', '.join(named)}")
        node: fx.Node = emit(self.graph, target, *args, like=like)
        self._try(node)
        return node

    def _try(self, node: fx.Node) -> None:
        row = BY_TARGET.get(node.target)
        if row is None or row.native is None:
            return
        try:
            with typing(self.graph):
                row.native.launch(as_tuple(value_of(node)), *as_read(node))
        except BackendError:
            self.drop(node)
            raise

    def changed(self, node: fx.Node, **named: Any) -> fx.Node:
        """The same call with some arguments replaced."""
        return self.call(node.target, node, **{**arguments(node), **named})

    def stored(self, name: str, make: Callable[[], Tensor]) -> fx.Node:
        """A node that reads the weight `name`, which is made if it is not there yet."""
        tensor = self.weights[name] if name in self.weights else make()
        return emit_weight(self.graph, self.weights, name, tensor)

    def joined(self, names: tuple[str, ...]) -> fx.Node:
        """A node that reads stored tensors as one, one under another."""
        if names not in self.known:
            self.known[names] = unused_name(self.weights, f"{names[0]}+{len(names) - 1}")
        return self.stored(
            self.known[names], lambda: torch.cat([self.weights[each] for each in names])
        )

    def again(self, node: fx.Node) -> fx.Node:
        """Another read of the weight that `node` reads."""
        return self.stored(str(node.target), lambda: self.weights[str(node.target)])

    def item(self, node: fx.Node, index: int) -> fx.Node:
        """One of several results, read right behind their call."""
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == index:
                return user
        with self.graph.inserting_after(node):
            found: fx.Node = emit(self.graph, operator.getitem, node, index, like=node)
        return found

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let `new` be read instead of `old`, and forget what nothing reads any more."""
        substitute(old, new)
        self.drop(old)

    def drop(self, node: fx.Node) -> None:
        """Forget a value without readers, and those that only it read."""
        if node._erased or node.users or node.op in ("placeholder", "output"):
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        for each in sources:
            self.drop(each)


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an op by name, those left out by their defaults."""
    given = iter(node.args)
    return {
        each.name: node.kwargs.get(each.name, next(given, each.default_value))
        for each in node.target._schema.arguments  # type: ignore[union-attr]
    }


def given(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a call that it gives by position."""
    return node.args


def is_call(node: Any, *targets: Any) -> bool:
    """Whether a value is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def chain(node: Any, targets: tuple[Any, ...]) -> tuple[fx.Node, ...] | None:
    """Calls of `targets`, each one of what the next one gives, down from `node`; or None."""
    found: list[fx.Node] = []
    for target in targets:
        if not is_call(node, target):
            return None
        found.append(node)
        node = given(node)[0]
    return tuple(found)


def is_stored(node: Any) -> bool:
    """Whether a value is a weight."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


def uncast(node: Any) -> Any:
    """What a value was before it was cast."""
    while is_call(node, aten.to.dtype):
        node = node.args[0]
    return node


def unwidened(node: Any) -> Any:
    """What a value was before it was cast to float32, which keeps it as it is."""
    while is_call(node, aten.to.dtype) and node.args[1] == torch.float32 and floats(node.args[0]):
        node = node.args[0]
    return node


def floats(*nodes: fx.Node) -> bool:
    """Whether all values are floats that kernels take."""
    return all(value_of(node).dtype in FLOATS for node in nodes)


def sole(node: fx.Node) -> bool:
    """Whether only one call reads a value."""
    return len(node.users) == 1


def shape_of(node: fx.Node) -> tuple[str, ...]:
    """The sizes of a value, as texts: sizes left open have no other equality."""
    return tuple(str(size) for size in value_of(node).shape)


def operands(node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """Both orders of the operands of a commutative call of two different values, if it is one."""
    pair = given(node)
    if len(pair) != 2 or node.kwargs or not all(isinstance(each, fx.Node) for each in pair):
        return ()
    if pair[0] is pair[1]:
        return ()
    return (pair, pair[::-1])


def latest(pairs: tuple[tuple[fx.Node, fx.Node], ...]) -> list[tuple[fx.Node, fx.Node]]:
    """The pairs, those first whose first operand comes last in the graph."""
    return sorted(pairs, key=lambda pair: pair[0], reverse=True)


def plain_cast(edit: Editor, node: fx.Node) -> Found:
    """_to_copy(x, dtype=…) and type_as(x, y) -> to(x, dtype)."""
    source = given(node)[0]
    if set(node.kwargs) - {"dtype"} or value_of(source).device != value_of(node).device:
        return None
    found: fx.Node = emit(edit.graph, aten.to.dtype, source, value_of(node).dtype, like=node)
    return found


def in_blocks(node: fx.Node, like: fx.Node) -> bool:
    """Whether a value (…, K) says the same of all rows of `like` in a block of consecutive ones.

    It has the leading sizes of `like`, then ones, then the columns.
    """
    own, whole = shape_of(node), shape_of(like)
    if not own or not floats(node) or own[-1] != whole[-1] or len(own) > len(whole):
        return False
    lead = ("1",) * (len(whole) - len(own)) + own[:-1]
    same = 0
    while same < len(lead) and lead[same] == whole[same]:
        same += 1
    return all(size == "1" for size in lead[same:])


def as_rows(edit: Editor, node: fx.Node) -> fx.Node:
    """A value of `in_blocks` as (blocks, K)."""
    dims = value_of(node).dim()
    if dims == 2:
        return node
    if dims == 1:
        return edit.call(aten.unsqueeze.default, node, self=node, dim=0)
    found: fx.Node = emit(edit.graph, aten.flatten.using_ints, node, 0, -2, like=node)
    return found


def shifted(edit: Editor, zero: fx.Node) -> fx.Node | None:
    """A zero point of uint8 codes for the same codes as int8, 128 less; None if it is computed."""
    if is_stored(zero):
        name = str(zero.target)
        return edit.stored(f"{name}.int8", lambda: _less(edit.weights, name))
    if not is_call(zero, aten.squeeze.dim, aten.index_select.default):
        return None
    source = shifted(edit, zero.args[0])  # type: ignore[arg-type]
    if source is None:
        return None
    found: fx.Node = emit(edit.graph, zero.target, source, *zero.args[1:], like=zero)
    return found


def _less(weights: Weights, name: str) -> Tensor:
    return (weights[name].to(torch.int16) - 128).to(torch.int8)
