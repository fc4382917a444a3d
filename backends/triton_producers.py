"""What comes before a layer, in one kernel: norm and modulation, gated activations, quantization.

    row_norm        norm(x) · (1 + scale) + shift
    gated           hidden · act(gate), or act(x)

Where only low-bit layers read the result, the op gives its codes and scales instead; and D x. Each
rule is exact, up to roundings in between that the fused op leaves out.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from effuse.backends.triton_fuse import activation_kind
from effuse.backends.triton_match import (
    Editor,
    Found,
    arguments,
    as_rows,
    aten,
    chain,
    floats,
    given,
    in_blocks,
    is_call,
    is_stored,
    operands,
    ops,
    shape_of,
    sole,
    uncast,
    unwidened,
)
from effuse.graph import emit, value_of

ROW_NORM, GATED, ROWS = ops.row_norm.default, ops.gated.default, ops.quantize_rows.default
NORMS: dict[Any, str] = {aten.layer_norm.default: "layer", aten.rms_norm.default: "rms"}
CUTS = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
ROOT = (aten.rsqrt.default, aten.add.Tensor, aten.mean.dim, aten.pow.Tensor_Scalar)
KINDS = {  # by the activation, and the half that it is of
    ("gelu", 1): "geglu",
    ("gelu_tanh", 1): "geglu_tanh",
    ("silu", 1): "swiglu",
    ("silu", 0): "swiglu_first",
}


def norm_of(node: Any) -> dict[str, Any] | None:
    """The arguments of row_norm for a norm over the last axis; None of other values."""
    if is_call(node, *NORMS):
        return _aten_norm(node)
    if not is_call(node, operator.getitem) or not is_call(node.args[0], ROW_NORM):
        return None
    found = arguments(node.args[0])
    plain = not found["quantizer"] and found["down"] is None and found["shift"] is None
    return found if plain and node.args[1] == 0 else None


def _aten_norm(node: fx.Node) -> dict[str, Any] | None:
    found = arguments(node)
    if len(found["normalized_shape"]) != 1 or found["eps"] is None or not floats(node):
        return None
    return {"x": found["input"], "weight": found["weight"], "bias": found.get("bias"),
            "scale": None, "shift": None, "down": None, "eps": found["eps"],
            "kind": NORMS[node.target], "offset": 1.0, "quantizer": ""}  # fmt: skip


def values(edit: Editor, target: Any, node: fx.Node, **named: Any) -> fx.Node:
    """The values of an op over rows that does not quantize."""
    made = edit.call(target, node, **{"quantizer": "", **named})
    found: fx.Node = emit(edit.graph, operator.getitem, made, 0, like=node)
    return found


def rms(edit: Editor, node: fx.Node) -> Found:
    """x · rsqrt(mean(x²) + ε) · w -> row_norm, before views that leave its rows whole."""
    for one, weight in operands(node):
        if not is_stored(weight) or len(shape_of(weight)) != 1:
            continue
        found = _rsqrt_norm(uncast(one))
        if found is None:
            continue
        x, eps = found
        if value_of(x).dtype != value_of(node).dtype or not floats(x):
            return "a norm between types"
        views, inner = _beneath(x)
        new = values(edit, ROW_NORM, node, x=inner, weight=weight, eps=eps, kind="rms", offset=1.0)
        for view in reversed(views):
            new = emit(edit.graph, view.target, new, *view.args[1:], like=view)
        return new
    return None


def _rsqrt_norm(node: Any) -> tuple[fx.Node, float] | None:
    """x and ε of x · rsqrt(mean(x²) + ε) over the last axis, or None."""
    if not is_call(node, aten.mul.Tensor) or not sole(node):
        return None
    for x, root in operands(node):
        steps = chain(root, ROOT)
        if steps is None:
            continue
        total, square = given(steps[1]), given(steps[3])
        same = unwidened(square[0]) is unwidened(x) and square[1] == 2
        if same and _over_last(steps[2]) and isinstance(total[1], float):
            return unwidened(x), total[1]
    return None


def _over_last(mean: Any) -> bool:
    found = arguments(mean)
    last = value_of(mean).dim() - 1
    return bool(found["keepdim"]) and [each % (last + 1) for each in found["dim"]] == [last]


def _beneath(node: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """Transposes of `node` that leave the last axis, from the outside in; what is under them."""
    views: list[fx.Node] = []
    while is_call(node, aten.transpose.int, aten.permute.default) and _keeps_last(node):
        views.append(node)
        node = given(node)[0]
    return views, node


def _keeps_last(view: fx.Node) -> bool:
    dims = value_of(view).dim()
    if view.target is aten.permute.default:
        return bool(given(view)[1][-1] % dims == dims - 1)
    return all(axis % dims != dims - 1 for axis in given(view)[1:])


def scaled(edit: Editor, node: fx.Node) -> Found:
    """norm(x) · m or norm(x) · (1 + s), the same for blocks of rows -> row_norm(scale)."""
    for one, factor in operands(node):
        found = norm_of(one)
        if found is None or found["scale"] is not None or not in_blocks(factor, one):
            continue
        if not sole(one):
            return "others read the norm"
        if value_of(node).dtype != value_of(found["x"]).dtype:
            return "a modulation in another type"
        scale, offset = _one_more(factor)
        named = {**found, "scale": as_rows(edit, scale), "offset": offset}
        return values(edit, ROW_NORM, node, **named)
    return None


def _one_more(factor: fx.Node) -> tuple[fx.Node, float]:
    """s and 1 of s + 1, or the factor itself and 0."""
    if is_call(factor, aten.add.Tensor, aten.add.Scalar) and not factor.kwargs:
        scale, one = given(factor)
        if not isinstance(one, fx.Node) and one == 1 and floats(scale):
            return scale, 1.0
    return factor, 0.0


def moved(edit: Editor, node: fx.Node) -> Found:
    """norm(x) · m + shift, the same for blocks of rows -> row_norm(scale, shift)."""
    for one, shift in operands(node):
        found = norm_of(one)
        if found is None or found["scale"] is None or not in_blocks(shift, one):
            continue
        if not sole(one):
            return "others read the norm"
        if value_of(node).dtype == value_of(one).dtype:
            return values(edit, ROW_NORM, node, **{**found, "shift": as_rows(edit, shift)})
    return None


def halves(edit: Editor, node: fx.Node) -> Found:
    """hidden · act(gate), of the halves of one value -> gated."""
    for hidden, act in operands(node):
        kind = activation_kind(act)
        if kind is None or not sole(act):
            continue
        one, other = half_of(hidden), half_of(act.args[0])
        if one is None or other is None or one[0] is not other[0] or one[1] == other[1]:
            continue
        known = KINDS.get((kind, other[1]))
        if known is None:
            return f"{kind} of the first half"
        return values(edit, GATED, node, x=one[0], kind=known)
    return None


def half_of(node: Any) -> tuple[fx.Node, int] | None:
    """A value and which half of its last axis `node` is, or None."""
    found = _piece(node) if is_call(node, operator.getitem, aten.slice.Tensor) else None
    if found is None:
        return None
    source, axis, index = found
    whole, half = shape_of(source), shape_of(node)
    last = axis % len(whole) == len(whole) - 1
    even = str(2 * value_of(node).shape[-1]) == whole[-1]
    return (source, index) if last and even and whole[:-1] == half[:-1] else None


def _piece(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """A value, the axis along which `node` is cut out of it, and the place."""
    cut, *index = given(node)
    if is_call(cut, *CUTS) and len(value_of(cut)) == 2:
        return given(cut)[0], arguments(cut)["dim"], index[0]
    if not is_call(node, aten.slice.Tensor):
        return None
    found = arguments(node)
    start, axis = found["start"] or 0, found["dim"]
    size = value_of(node).shape[axis]
    whole = found["step"] == 1 and start in (0, size)
    return (cut, axis, int(start > 0)) if whole else None


def down(edit: Editor, node: fx.Node) -> Found:
    """project(x, D) beside the codes of x -> quantize_rows(x, D): x is read once."""
    x = given(node)[0]
    hosts = [each for each in x.users if is_call(each, ROWS) and given(each)[:2] == (x, None)]
    return _projected(edit, node, hosts[0]) if hosts else None


def down_float(edit: Editor, node: fx.Node) -> Found:
    """project(x, D) behind a norm or a gate -> that op's own projection."""
    x = given(node)[0]
    for target in (ROW_NORM, GATED):
        if _plain(x, target) is not None:
            return _projected(edit, node, given(x)[0])
    return None


def _projected(edit: Editor, node: fx.Node, host: fx.Node) -> Found:
    matrix = given(node)[1]
    if not is_stored(matrix) or matrix.target in edit.swappable:
        return None
    if arguments(host)["down"] is not None:
        return "the values have another branch already"
    with edit.graph.inserting_before(min(host, node)):
        new = edit.changed(host, down=edit.again(matrix))
    edit.replace(host, new)
    return edit.item(new, 2)


def smooth(edit: Editor, node: fx.Node) -> Found:
    """Codes of x · s, s for each column -> quantize_rows(x, s)."""
    x: Any = node.args[0]
    if not is_call(x, aten.mul.Tensor) or node.args[1] is not None:
        return None
    for one, factor in operands(x):
        if is_stored(factor) and shape_of(factor) == shape_of(one)[-1:] and floats(one, factor):
            if not sole(x):
                return "the product is needed in float too"
            if value_of(one).dtype == value_of(x).dtype:
                return edit.changed(node, x=one, smooth=factor)
    return None


def quantized(edit: Editor, node: fx.Node) -> Found:
    """Codes of what a norm, a gate or an activation gives -> that op's own codes."""
    x: Any = node.args[0]
    found = arguments(node)
    for target, read in ((ROW_NORM, _norm_before), (GATED, _gate_before)):
        before = read(x)
        if before is None:
            continue
        if reason := _not_one(target, x, before, found):
            return reason
        own = {name: found[name] for name in ("down", "smooth") if found[name] is not None}
        return edit.call(target, node, **{**before, **own, "quantizer": found["quantizer"]})
    return None


def _not_one(target: Any, x: fx.Node, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """Why an op and the codes of its result stay two ops, or None."""
    if not sole(x):
        return "its input is needed in float too"
    if before["down"] is not None and (after["down"] or after["smooth"]) is not None:
        return "its input has a branch of its own"
    smoothed = target is ROW_NORM and after["smooth"] is not None
    return "a factor between a norm and its codes" if smoothed else None


def _norm_before(x: Any) -> dict[str, Any] | None:
    return _aten_norm(x) if is_call(x, *NORMS) else _plain(x, ROW_NORM)


def _gate_before(x: Any) -> dict[str, Any] | None:
    kind = activation_kind(x)
    if kind is not None:
        return {"x": x.args[0], "smooth": None, "down": None, "kind": kind}
    return _plain(x, GATED)


def _plain(x: Any, target: Any) -> dict[str, Any] | None:
    """The arguments of an op that gives `x` in float."""
    if not is_call(x, operator.getitem) or x.args[1] != 0 or not is_call(x.args[0], target):
        return None
    found = arguments(x.args[0])
    return None if found["quantizer"] else found


def narrowed(edit: Editor, node: fx.Node) -> Found:
    """A norm of x cast to float32, and cast back -> row_norm of x, which computes in float32."""
    one: Any = node.args[0]
    found = _norm_before(one)
    if found is None or not sole(one) or found["down"] is not None:
        return None
    source: Any = found["x"].args[0] if is_call(found["x"], aten.to.dtype) else None
    if source is None or not floats(source) or value_of(source).dtype != value_of(node).dtype:
        return None
    return values(edit, ROW_NORM, node, **{**found, "x": source})
