"""Low-bit layers as fused ops: what a linear layer's operands are, and which kernel takes them.

    static       quantize(x), int8 codes under one scale, and Σ_k w for its zero point
    rows         quantize_rows(x), a scale for each row or group of it; once for all its readers
    float        x as it is

These meet the weights in linear_scaled, for codes of 8 bits both, or in linear_packed, which
unpacks weights of 4 bits in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from effuse.backends.triton_match import (
    Editor,
    Found,
    given,
    is_call,
    is_stored,
    ops,
    shifted,
    uncast,
    unwidened,
)
from effuse.graph import emit, value_of
from effuse.kernels.low_bit import widen_reference
from effuse.kernels.quantizers import parse_quantizer
from effuse.kernels.rows import TAKEN

STATIC, FLOAT = "static", "float"
INT8, E4M3 = "int8/channel", "e4m3/channel"
TOKEN, E4M3_TOKEN = "int8/token/dynamic", "e4m3/token/dynamic"
FLOAT4 = ("e2m1/group16/scale-e4m3", "e2m1/group32/scale-e8m0")
LEAST_GROUP = 16


@dataclass(frozen=True)
class Weight:
    """A low-bit weight: its quantizer's text, and the nodes of its codes and scales.

    `call` is what makes it float: dequantize or unpack.
    """

    text: str
    codes: fx.Node  # int8, or packed
    scale: fx.Node
    call: fx.Node

    @property
    def over(self) -> Any:
        """The scale over e4m3 scales, or None."""
        return given(self.call)[3] if self.call.target is ops.unpack.default else None


@dataclass(frozen=True)
class Activation:
    """A layer's input: `static`, `float`, or the quantizer's text; what is quantized, and how."""

    text: str
    source: fx.Node
    call: fx.Node


def weight_of(edit: Editor, node: Any) -> Weight | str:
    """The low-bit weight behind a layer's operand, or why it is none."""
    call = uncast(node)
    if is_call(call, ops.unpack.default):
        packed, scale, zero, _, text, _ = call.args
        return f"weights {text}" if zero is not None else Weight(text, packed, scale, call)
    if not is_call(call, ops.dequantize.default):
        return "a layer in float"
    codes, scale, zeros, axis = call.args
    if axis != 0 or not is_stored(zeros) or edit.weights[zeros.target].any():
        return "weights with zero points"
    if is_stored(codes):
        return Weight(INT8, codes, scale, call)
    if is_call(codes, ops.widen.default):
        return Weight(f"int{codes.args[1]}/channel", codes.args[0], scale, call)
    return "weights whose codes are computed"


def activation_of(node: fx.Node) -> Activation:
    """What a layer reads."""
    call = uncast(node)
    if is_call(call, ops.dequantize.default):
        return Activation(STATIC, call.args[0], call)
    if is_call(call, ops.fake_quantize.default):
        x, scale, _, text = call.args
        return Activation(text if scale is None else f"{text} of known range", x, call)
    return Activation(FLOAT, node, node)


def kernel_of(activation: str, weight: str) -> str:
    """`scaled` or `packed`, or the reason why no kernel takes both."""
    beside = f"no kernel takes weights {weight} beside activations {activation}"
    four = weight in FLOAT4 or weight == "int4/channel" or _by_group(weight)
    if activation == STATIC:
        return "scaled" if weight.startswith("int") and weight.endswith("/channel") else beside
    if activation == FLOAT:
        return "packed" if four else beside
    if activation not in TAKEN:
        return beside
    if (activation, weight) in ((TOKEN, INT8), (E4M3_TOKEN, E4M3)):
        return "scaled"
    if activation == E4M3_TOKEN:
        return "packed" if weight in FLOAT4 else beside
    same = activation == TOKEN or weight == f"int4/group{parse_quantizer(activation).group}"
    return "packed" if weight.startswith("int4/") and four and same else beside


def _by_group(weight: str) -> bool:
    """Whether a weight is int4 in groups of a power of two."""
    how = parse_quantizer(weight)
    group = how.group
    plain = weight == f"int4/group{group}"
    return plain and group >= LEAST_GROUP and group & (group - 1) == 0


def linear(edit: Editor, node: fx.Node) -> Found:
    """linear(x̂, ŵ, b) -> linear_scaled or linear_packed of x's and w's codes."""
    x, w, *rest = given(node)
    weight, read = weight_of(edit, w), activation_of(x)
    if isinstance(weight, str):
        return weight
    kernel = kernel_of(read.text, weight.text)
    if kernel not in WRITERS:
        return kernel
    if read.text == STATIC and value_of(read.source).dtype != torch.int8:
        return "activations in uint8 whose zero point is computed"
    bias = bias_of(edit, *rest)
    named = {"bias": bias, "dtype": value_of(node).dtype, **WRITERS[kernel](edit, weight, read)}
    return edit.call(TARGETS[kernel], node, **named)


def dynamic(edit: Editor, node: fx.Node) -> Found:
    """Layers of ranges found at run time stay: no kernel finds one scale over a whole tensor."""
    return "one scale over the whole input, found at run time"


def _scaled(edit: Editor, weight: Weight, read: Activation) -> dict[str, Any]:
    if read.text != STATIC:
        codes, scale = codes_of(edit, read)
        int8 = {"weight": weight.codes, "channels": weight.scale}
        own = e4m3(edit, weight) if weight.text == E4M3 else int8
        return {"codes": codes, "scale": scale, **own}
    wide, sums = wide_codes(edit, weight)
    codes, scale, zero, _ = given(read.call)
    return {"codes": codes, "scale": scale, "zero": zero, "weight": wide,
            "channels": weight.scale, "sums": sums}  # fmt: skip


def _packed(edit: Editor, weight: Weight, read: Activation) -> dict[str, Any]:
    x, scale = (read.source, None) if read.text == FLOAT else codes_of(edit, read)
    return {"x": x, "scale": scale, "packed": weight.codes, "w_scale": columns(edit, weight),
            "over": weight.over, "weight": weight.text}  # fmt: skip


WRITERS = {"scaled": _scaled, "packed": _packed}
TARGETS = {"scaled": ops.linear_scaled.default, "packed": ops.linear_packed.default}


def codes_of(edit: Editor, read: Activation) -> tuple[fx.Node, fx.Node]:
    """The codes and scales of an activation, found once for all that read it so."""
    key = (read.source, read.text)
    if key not in edit.shared or edit.shared[key]._erased:
        with edit.graph.inserting_before(read.call):
            edit.shared[key] = edit.call(
                ops.quantize_rows.default, read.call, x=read.source, quantizer=read.text
            )
    made = edit.shared[key]
    return edit.item(made, 0), edit.item(made, 1)


def e4m3(edit: Editor, weight: Weight) -> dict[str, fx.Node]:
    """A weight's e4m3 patterns as floats of that type, and its scales as a vector."""
    codes, scale, shape = str(weight.codes.target), str(weight.scale.target), given(weight.call)[5]
    view = edit.stored(
        f"{codes}.float8",
        lambda: edit.weights[codes].view(torch.float8_e4m3fn).reshape(shape),
    )
    channels = edit.stored(f"{scale}.channels", lambda: edit.weights[scale].flatten())
    return {"weight": view, "channels": channels}


def columns(edit: Editor, weight: Weight) -> fx.Node:
    """Scales as (N, groups)."""
    if value_of(weight.scale).dim() == 2:
        return weight.scale
    name = str(weight.scale.target)
    return edit.stored(f"{name}.column", lambda: edit.weights[name][:, None].contiguous())


def wide_codes(edit: Editor, weight: Weight) -> tuple[fx.Node, fx.Node]:
    """A weight's codes as int8, and their sums over all but the output channels, int32."""
    name, codes = str(weight.codes.target), weight.codes
    if weight.text != INT8:
        _, bits, shape = given(given(weight.call)[0])
        packed, name = name, f"{name}.wide"
        codes = edit.stored(name, lambda: widen_reference(edit.weights[packed], bits, shape))
    sums = edit.stored(
        f"{name}.sums", lambda: edit.weights[name].flatten(1).sum(1, dtype=torch.int32)
    )
    return codes, sums


def bias_of(edit: Editor, node: Any = None, *_: Any) -> fx.Node | None:
    """A bias in float: one stored as int32 at the scale of the products is made float32 here."""
    call = uncast(node)
    if not is_call(call, ops.dequantize.default):
        return node  # type: ignore[no-any-return]
    codes, scale, zeros, _ = call.args
    if not is_stored(codes) or not is_stored(scale) or edit.weights[zeros.target].any():
        return call  # type: ignore[no-any-return]
    stored = edit.weights
    return edit.stored(
        f"{codes.target}.float", lambda: stored[codes.target].float() * stored[scale.target]
    )


def signed(edit: Editor, node: fx.Node) -> Found:
    """(q - z) · s of uint8 codes = (q' - z') · s of int8 codes, with q' = q - 128, z' = z - 128."""
    x, scale, zero, axis = given(node)
    if value_of(zero).dtype != torch.uint8:
        return None
    readers = list(node.users)
    if not all(is_call(each, ops.dequantize.default) and each.args[2] is zero for each in readers):
        return "codes that others read"
    new = shifted(edit, zero)
    if new is None:
        return "its zero point is computed"
    codes: fx.Node = emit(edit.graph, node.target, unwidened(x), scale, new, axis, like=node)
    for each in readers:
        with edit.graph.inserting_before(each):
            real = emit(edit.graph, each.target, codes, each.args[1], new, axis, like=each)
        edit.replace(each, real)
    return codes
