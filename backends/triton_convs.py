"""Convolutions and group norms as fused ops, on images in channels_last memory.

    conv2d_scaled       int8 codes · int8 weights, perhaps of two operands, and codes of the result
    group_norm_act      group norm, SiLU, and codes of the result

Codes per tensor are known before a step runs; what finds its range at run time stays.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from effuse.backends.triton_fuse import layer
from effuse.backends.triton_linears import STATIC, activation_of, bias_of, weight_of, wide_codes
from effuse.backends.triton_match import (
    Editor,
    Found,
    arguments,
    aten,
    chain,
    floats,
    given,
    is_call,
    operands,
    ops,
    shape_of,
    sole,
    uncast,
    unwidened,
)
from effuse.graph import emit, value_of
from effuse.passes.quantize_sites import VOLUME
from effuse.passes.quantize_writer import options_of

CONV, NORM = ops.conv2d_scaled.default, ops.group_norm_act.default
INNERMOST = [0, 2, 3, 1]  # (o, c, h, w) -> (o, h, w, c)
OUTERMOST = [0, 3, 1, 2]
SECOND = {"x": "x2", "scale": "scale2", "zero": "zero2", "weight": "weight2",
          "channels": "channels2", "sums": "sums2"}  # fmt: skip


def conv(edit: Editor, node: fx.Node) -> Found:
    """conv2d(x̂, ŵ, b) -> conv2d_scaled of x's and w's codes."""
    x, w, *rest = given(node)
    weight, read = weight_of(edit, w), activation_of(x)
    if isinstance(weight, str):
        return weight
    stride, padding, dilation, groups = options_of(node)
    if read.text != STATIC or not weight.text.startswith("int"):
        return f"no kernel takes weights {weight.text} beside activations {read.text}"
    if node.target is VOLUME:
        return "a three-dimensional convolution"
    if reason := _unfit(node, read.source, dilation, groups):
        return reason
    codes, scale, zero, _ = given(read.call)
    wide, sums = wide_codes(edit, weight)
    bias = bias_of(edit, *rest)
    return edit.call(
        CONV, node, x=codes, scale=scale, zero=zero, weight=innermost(edit, wide),
        channels=weight.scale, sums=sums, bias=bias, stride=stride, padding=padding,
        dtype=value_of(node).dtype,
    )  # fmt: skip


def _unfit(node: fx.Node, codes: fx.Node, dilation: list[int], groups: int) -> str | None:
    if value_of(codes).dim() != 4:
        return "a convolution without a batch"
    if groups != 1:
        return "a grouped convolution"
    if any(each != 1 for each in dilation):
        return "a dilated convolution"
    if str(value_of(codes).dtype) != "torch.int8":
        return "activations in uint8 whose zero point is computed"
    return None if floats(node) else "a result in another type"


def innermost(edit: Editor, codes: fx.Node) -> fx.Node:
    """A weight stored as (o, h, w, c), seen as (o, c, h, w): files keep no strides."""
    name = str(codes.target)
    stored = edit.stored(f"{name}.nhwc", lambda: edit.weights[name].permute(INNERMOST).contiguous())
    found: fx.Node = emit(edit.graph, aten.permute.default, stored, OUTERMOST, like=codes)
    return found


def shortcut(edit: Editor, node: fx.Node) -> Found:
    """conv(x₁) + conv(x₂) -> one convolution of two operands, each with scales of its own."""
    for one, other in operands(node):
        if _coded(one) and _coded(other):
            return "the convolutions' results are made codes before they are added"
        first, second = layer(one, CONV), layer(other, CONV)
        if first is None or second is None or second["bias"] is not None:
            continue
        if reason := _apart(first, second):
            return reason
        named = {word: second[name] for name, word in SECOND.items()}
        return edit.changed(one, **named, dtype=value_of(node).dtype)
    return None


def _coded(node: fx.Node) -> bool:
    """Whether a value is dequantize(quantize(conv)), as a quantized convolution is written."""
    steps = chain(uncast(node), (ops.dequantize.default, ops.quantize.default))
    return steps is not None and is_call(unwidened(given(steps[1])[0]), CONV)


def _apart(first: dict[str, Any], second: dict[str, Any]) -> str | None:
    """Why two convolutions are not computed as one, or None."""
    if any(each["activation"] or each["residual"] is not None for each in (first, second)):
        return "something follows one of the convolutions"
    if first["x2"] is not None or second["x2"] is not None:
        return "a sum of more than two convolutions"
    same = all(first[name] == second[name] for name in ("stride", "padding"))
    places = all(
        shape_of(first[name])[2:] == shape_of(second[name])[2:] for name in ("x", "weight")
    )
    return None if same and places else "convolutions of other sizes or options"


def recoded(edit: Editor, node: fx.Node) -> Found:
    """quantize(conv(x)) -> codes from the convolution itself."""
    x, scale, zero, _ = given(node)
    x = unwidened(x)
    found = layer(x, CONV)
    if found is None:
        return None
    if reason := _not_int8(scale, zero):
        return reason
    return edit.changed(x, out_scale=scale, out_zero=zero)


def _not_int8(scale: Any, zero: Any) -> str | None:
    one = value_of(scale).dim() == 0 and str(value_of(zero).dtype) == "torch.int8"
    return None if one else "codes that are not int8 under one scale"


def group_norm(edit: Editor, node: fx.Node) -> Found:
    """silu(group_norm(x)) -> group_norm_act(x, group_stats(x))."""
    x = given(node)[0]
    if not is_call(x, aten.group_norm.default):
        return None
    return _normed(edit, x, "silu") if sole(x) else "others read the norm"


def coded_norm(edit: Editor, node: fx.Node) -> Found:
    """Codes of a group norm, or of its SiLU -> codes from group_norm_act."""
    x, scale, zero, _ = given(node)
    x = unwidened(x)
    if not is_call(x, aten.group_norm.default, NORM):
        return None
    if reason := _not_int8(scale, zero):
        return reason
    if not sole(x):
        return "its input is needed in float too"
    if is_call(x, NORM):
        done = arguments(x)["scale"] is not None
        return None if done else edit.changed(x, scale=scale, zero=zero)
    return _normed(edit, x, "", scale=scale, zero=zero)


def _normed(edit: Editor, node: fx.Node, activation: str, **named: Any) -> Found:
    found = arguments(node)
    x, groups = found["input"], found["num_groups"]
    if value_of(x).dim() != 4 or not floats(x):
        return "a norm of other values than images"
    stats = edit.call(ops.group_stats.default, node, x=x, groups=groups, eps=found["eps"])
    return edit.call(
        NORM, node, x=x, stats=stats, groups=groups, weight=found["weight"], bias=found["bias"],
        activation=activation, **named,
    )  # fmt: skip
