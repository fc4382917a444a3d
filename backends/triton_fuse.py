"""What follows a fused layer, into its epilogue: y = act(sum + low · upᵀ) · gate + residual.

Every rule takes one call behind a layer that nothing else reads; in the order of the graph they
take whole chains. A chain in another order than the epilogue's keeps what does not fit.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from effuse.backends.triton_match import (
    Editor,
    Found,
    arguments,
    as_rows,
    aten,
    floats,
    given,
    in_blocks,
    is_call,
    is_stored,
    latest,
    operands,
    ops,
    shape_of,
    sole,
    unwidened,
)
from effuse.graph import emit, value_of

LINEARS = (ops.linear_scaled.default, ops.linear_packed.default)
LAYERS = (*LINEARS, ops.conv2d_scaled.default)
MOST_PLANES = 4  # queries, keys, values and a gate

ROWS: dict[
    Any, tuple[str, ...]
] = {  # the arguments that have a row, or a number, for each output column
    ops.linear_scaled.default: ("weight", "channels", "sums", "bias", "up"),
    ops.linear_packed.default: ("packed", "w_scale", "bias", "up"),
}


def layer(node: Any, *targets: Any) -> dict[str, Any] | None:
    """The arguments of a fused layer whose result only one call reads, as it is; None of others."""
    if not is_call(node, *(targets or LAYERS)) or not sole(node):
        return None
    found = arguments(node)
    whole = found.get("parts", 1) == 1 and found.get("out_scale") is None
    return found if whole else None


def activation_kind(node: Any) -> str | None:
    """`gelu`, `gelu_tanh` or `silu`, or None of another value."""
    if is_call(node, aten.silu.default):
        return "silu"
    if not is_call(node, aten.gelu.default):
        return None
    return "gelu_tanh" if arguments(node)["approximate"] == "tanh" else "gelu"


def branch(edit: Editor, node: fx.Node) -> Found:
    """sum + project(low, U) -> sum + low · Uᵀ: the second half of a low-rank branch."""
    for one, other in operands(node):
        found = layer(one, *LINEARS)
        if found is None or not is_call(other, ops.project.default) or not sole(other):
            continue
        low, up = given(other)
        if not is_stored(up) or up.target in edit.swappable:
            return "the branch takes LoRAs while it runs"
        if found["low"] is not None or found["activation"] or found["gate"] is not None:
            return "the layer's epilogue has no room for a branch"
        if shape_of(one) == shape_of(node):
            return edit.changed(one, low=low, up=up, dtype=value_of(node).dtype)
    return None


def activated(edit: Editor, node: fx.Node) -> Found:
    """act(sum)."""
    source = given(node)[0]
    found = layer(source)
    if found is None:
        return None
    if found["activation"] or found.get("gate") is not None or found["residual"] is not None:
        return "the layer's epilogue is past its activation"
    return edit.changed(source, activation=activation_kind(node))


def gated_rows(edit: Editor, node: fx.Node) -> Found:
    """sum · gate, a gate that is the same for blocks of rows."""
    for one, gate in latest(operands(node)):
        found = layer(one, *LINEARS)
        if found is None or shape_of(one) != shape_of(node) or not in_blocks(gate, one):
            continue
        if found["gate"] is not None or found["residual"] is not None:
            return "the layer's epilogue is past its gate"
        return edit.changed(one, gate=as_rows(edit, gate), dtype=value_of(node).dtype)
    return None


def added(edit: Editor, node: fx.Node) -> Found:
    """sum + residual, of the same shape."""
    for one, residual in latest(operands(node)):
        found = layer(one)
        if found is None or not floats(residual):
            continue
        if found["residual"] is not None:
            return "the layer's epilogue has a residual already"
        if shape_of(one) == shape_of(residual):
            return edit.changed(one, residual=unwidened(residual), dtype=value_of(node).dtype)
    return None


def casted(edit: Editor, node: fx.Node) -> Found:
    """The result in the type that it is cast to."""
    source = given(node)[0]
    if layer(source) is None or not floats(node):
        return None
    return edit.changed(source, dtype=value_of(node).dtype)


def planes(edit: Editor, node: fx.Node) -> Found:
    """W₁ x, W₂ x, … -> (W₁; W₂; …) x in planes: layers of one shape that read one x."""
    group = [each for each in siblings(node) if key_of(each) == key_of(node)]
    if len(group) < 2 or arguments(node)["parts"] != 1:
        return None
    if reason := _apart(group):
        return reason
    first = min(group)
    found = [arguments(each) for each in group]
    with edit.graph.inserting_before(first):
        rows = {name: joined(edit, [each[name] for each in found]) for name in ROWS[node.target]}
        whole = edit.changed(first, **rows, parts=len(group))
        slices = [emit(edit.graph, aten.select.int, whole, 0, i, like=each)
                  for i, each in enumerate(group)]  # fmt: skip
    for old, new in zip(group, slices, strict=True):
        edit.replace(old, new)
    return whole


def siblings(node: fx.Node) -> list[fx.Node]:
    """The layers that read the same first operand, in the order of the graph."""
    first = given(node)[0]
    return sorted(each for each in first.users if each.target is node.target)


def key_of(node: fx.Node) -> tuple[Any, ...]:
    """What layers have in common that one product can compute."""
    found = arguments(node)
    rows = ROWS[node.target]
    given = tuple(value_of(each).shape if each is not None else None
                  for each in (found[name] for name in rows))  # fmt: skip
    others = tuple(str(each) for name, each in found.items() if name not in rows)
    return (node.target, given, others)


def _apart(group: list[fx.Node]) -> str | None:
    """Why layers of one key stay apart, or None."""
    found = arguments(group[0])
    if found.get("gate") is not None or found["residual"] is not None:
        return "a gate or a residual of its own"
    if len(group) > MOST_PLANES:
        return f"more than {MOST_PLANES} layers read one value"
    rows = [each for node in group for each in (arguments(node)[n] for n in ROWS[node.target])]
    return None if all(each is None or is_stored(each) for each in rows) else "a computed operand"


def joined(edit: Editor, nodes: list[fx.Node | None]) -> fx.Node | None:
    """Stored tensors one under another; None of none."""
    names = tuple(str(each.target) for each in nodes if each is not None)
    return edit.joined(names) if names else None
