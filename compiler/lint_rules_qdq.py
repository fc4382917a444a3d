"""Checks on QuantizeLinear and DequantizeLinear: parameters, granularity, where they stand."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.lint_onnx import (
    DEQUANTIZE,
    QUANTIZE,
    Model,
    array,
    attribute,
    axis_of,
    dtype,
    elements,
    given,
    is_onnx,
    quantized_type,
    readers,
    shape,
)
from effuse.lint_rules import Check, Found

if TYPE_CHECKING:
    import onnx_ir as ir

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # operators with low-bit kernels
FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
E8M0 = "FLOAT8E8M0"


def asymmetric(model: Model) -> Iterator[Found]:
    """Zero points other than zero, or unknown ones."""
    for node in model.quantizers:
        zero = given(node, 2)
        if zero is None:
            continue
        stored = array(zero)
        if stored is None:
            yield node, "its zero point is no constant"
        elif np.any(stored.astype(np.float32)):
            yield node, f"its zero point is {_words(stored)}"


def scale_sign(model: Model) -> Iterator[Found]:
    """Scales of zero or less."""
    for node, scale in _scales(model):
        if np.any(scale <= 0):
            yield node, f"a scale of {float(scale.min()):g}"


def scale_finite(model: Model) -> Iterator[Found]:
    """Scales that are infinite or no number."""
    for node, scale in _scales(model):
        if not np.all(np.isfinite(scale)):
            yield node, f"{np.count_nonzero(~np.isfinite(scale))} scales that are not finite"


def scale_computed(model: Model) -> Iterator[Found]:
    """Scales that are computed at run time."""
    for node in model.quantizers:
        if not model.is_constant(given(node, 1)):
            yield node, "its scale is computed at run time"


def axis_outside(model: Model) -> Iterator[Found]:
    """Axes that the tensor does not have."""
    for node in model.quantizers:
        sizes, axis = shape(node.inputs[0]), axis_of(node)
        if sizes is not None and axis is not None and not -len(sizes) <= axis < len(sizes):
            yield node, f"axis {axis} of a tensor of rank {len(sizes)}"


def scale_shape(model: Model) -> Iterator[Found]:
    """Scales that are not one a tensor, one a channel, or one a block."""
    for node in model.quantizers:
        sizes, scales = shape(node.inputs[0]), shape(given(node, 1))
        axis, block = axis_of(node), int(attribute(node, "block_size", 0))
        if sizes is None or scales is None or axis is None or not -len(sizes) <= axis < len(sizes):
            continue
        expected: tuple[int | None, ...] = (sizes[axis],)
        if block:
            expected = (*sizes[:axis], _blocks(sizes[axis], block), *_after(sizes, axis))
        if not _agree(scales, expected):
            yield node, f"scales of shape {list(scales)}, expected {list(expected)}"


def block_remainder(model: Model) -> Iterator[Found]:
    """Blocks that do not divide their axis."""
    for node in blocked(model):
        size, block = _blocked_size(node), int(attribute(node, "block_size", 0))
        if size is not None and size % block:
            yield node, f"blocks of {block} along an axis of {size}"


def blocked(model: Model) -> Iterator[ir.Node]:
    """The quantizers with a scale for each block."""
    return (node for node in model.quantizers if attribute(node, "block_size", 0))


def blocks_of(types: Collection[str], allowed: Collection[int], scales: str = "") -> Check:
    """What finds blocks of other sizes in some types, or in those with scales of one type."""

    def check(model: Model) -> Iterator[Found]:
        for node in blocked(model):
            size = int(attribute(node, "block_size", 0))
            chosen = quantized_type(node) in types and scales in ("", scale_type(given(node, 1)))
            if chosen and size not in allowed:
                yield node, f"{quantized_type(node)} in blocks of {size}"

    return check


def activation_channels(model: Model) -> Iterator[Found]:
    """Activations with more than one scale."""
    for node in model.quantizers:
        count = elements(given(node, 1))
        if not model.is_constant(node.inputs[0]) and count is not None and count > 1:
            yield node, f"an activation with {count} scales"


def weight_axis(model: Model) -> Iterator[Found]:
    """Weights with a scale for each of something else than the output's channels."""
    for node in model.quantizers:
        axis, sizes = axis_of(node), shape(node.inputs[0])
        weight = model.is_constant(node.inputs[0]) and not attribute(node, "block_size", 0)
        if axis is None or sizes is None or not weight or len(sizes) < 2:
            continue
        for reader, index, here in _axis_readers(node.outputs[0], axis % len(sizes), len(sizes)):
            wanted = output_axis(reader, index, len(sizes))
            if wanted is not None and here != wanted:
                yield node, f"axis {here} of {reader.op_type}'s weight, expected {wanted}"


def output_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """The axis of the output's channels in an input of a product; None for others."""
    left = index == 0
    if not is_onnx(node) or index > 1 or (left and node.op_type in ("Conv", "ConvTranspose")):
        return None
    if node.op_type in ("Conv", "ConvTranspose"):
        return int(node.op_type == "ConvTranspose")
    if node.op_type == "MatMul":
        return rank - 2 if left else rank - 1
    if node.op_type == "Gemm":
        swapped = bool(attribute(node, "transA" if left else "transB", 0))
        return int(left == swapped)
    return None


def reduction_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """The axis that a product sums over in one of its two inputs; None for others."""
    outer = output_axis(node, index, rank)
    if outer is None or node.op_type in ("Conv", "ConvTranspose"):
        return None if outer is None else 1 - outer
    return rank - 1 if outer == rank - 2 else rank - 2


def block_axis(types: Collection[str]) -> Check:
    """What finds weights in blocks along another axis than the one that is summed over."""

    def check(model: Model) -> Iterator[Found]:
        for node in blocked(model):
            sizes, axis = shape(node.inputs[0]), int(attribute(node, "axis", 1))
            if sizes is None or len(sizes) < 2 or quantized_type(node) not in types:
                continue
            for reader, index, here in _axis_readers(
                node.outputs[0], axis % len(sizes), len(sizes)
            ):
                wanted = reduction_axis(reader, index, len(sizes))
                if wanted is not None and here != wanted:
                    yield node, f"blocks along axis {here} of {reader.op_type}, expected {wanted}"

    return check


def of_types(types: Collection[str], words: str) -> Check:
    """What finds quantizers to or from some types."""
    return lambda model: (
        (node, words.format(quantized_type(node)))
        for node in model.quantizers
        if quantized_type(node) in types
    )


def other_types(types: Collection[str]) -> Check:
    """What finds quantizers to or from other types than these."""
    return lambda model: (
        (node, f"quantized to {quantized_type(node)}")
        for node in model.quantizers
        if quantized_type(node) and quantized_type(node) not in types
    )


def activations_of(types: Collection[str]) -> Check:
    """What finds activations quantized to some types."""
    return lambda model: (
        (node, f"an activation in {quantized_type(node)}")
        for node in model.quantizers
        if quantized_type(node) in types and not model.is_constant(node.inputs[0])
    )


def dangling(model: Model) -> Iterator[Found]:
    """Quantized tensors that something else than a DequantizeLinear reads."""
    for node in model.quantizers:
        if node.op_type != QUANTIZE:
            continue
        others = {n.op_type for n, _ in readers(node.outputs[0]) if n.op_type != DEQUANTIZE}
        if node.outputs[0].is_graph_output():
            yield node, "its quantized tensor is an output"
        elif others:
            yield node, f"its quantized tensor is read by {', '.join(sorted(others))}"
        elif not node.outputs[0].uses():
            yield node, "nothing reads its quantized tensor"


def misplaced(harmful: Collection[str], makers: Collection[str] = ()) -> Check:
    """What finds activations quantized for none but operators without low-bit kernels.

    Those that one of `makers` computes are let be: its kernel writes them quantized.
    """

    def check(model: Model) -> Iterator[Found]:
        for node in model.quantizers:
            if node.op_type != DEQUANTIZE or model.is_constant(node.inputs[0]):
                continue
            if maker(node) in makers:
                continue
            found = {reader.op_type for reader, _ in readers(node.outputs[0])}
            if found and found <= set(harmful):
                yield node, f"only {', '.join(sorted(found))} reads it"

    return check


def maker(node: ir.Node) -> str:
    """What computes the tensor that a DequantizeLinear and the QuantizeLinear before it round."""
    pair = node.inputs[0].producer() if node.inputs[0] is not None else None
    source = pair.inputs[0] if pair is not None and pair.op_type == QUANTIZE else None
    made = None if source is None else source.producer()
    return "" if made is None else made.op_type


def repeated(model: Model) -> Iterator[Found]:
    """Tensors that several pairs quantize alike."""
    seen: defaultdict[Any, list[ir.Node]] = defaultdict(list)
    for node in model.quantizers:
        if node.op_type == QUANTIZE:
            seen[node.inputs[0]].append(node)
    for value, nodes in seen.items():
        for extra in nodes[1:]:
            yield extra, f"{value.name!r} is quantized {len(nodes)} times"


def inputs_of(allowed: Collection[str]) -> Check:
    """What finds QuantizeLinear of other types than these."""
    return lambda model: (
        (node, f"quantizes {dtype(node.inputs[0])}")
        for node in model.quantizers
        if node.op_type == QUANTIZE and dtype(node.inputs[0]) not in ("", *allowed)
    )


def blocks_scaled_by(types: Collection[str], scales: Collection[str]) -> Check:
    """What finds blocks of some types whose own scales are of other types than these."""

    def check(model: Model) -> Iterator[Found]:
        for node in blocked(model):
            stored = scale_type(given(node, 1))
            if quantized_type(node) in types and stored and stored not in scales:
                yield node, f"{quantized_type(node)} in blocks whose scales are {stored}"

    return check


def scales_of(scales: Collection[str], types: Collection[str]) -> Check:
    """What finds quantizers with scales of some types for other types than these."""
    return lambda model: (
        (node, f"{quantized_type(node)} with scales in {scale_type(given(node, 1))}")
        for node in model.quantizers
        if scale_type(given(node, 1)) in scales and quantized_type(node) not in ("", *types)
    )


def scale_type(scale: ir.Value | None) -> str:
    """The type that scales are stored in: of a dequantized one, what it is dequantized from."""
    source = None if scale is None else scale.producer()
    widened = source is not None and is_onnx(source) and source.op_type in (DEQUANTIZE, "Cast")
    if source is not None and widened and dtype(scale) in FLOATS:
        return scale_type(source.inputs[0])
    return dtype(scale)


def _scales(model: Model) -> Iterator[tuple[ir.Node, np.ndarray[Any, Any]]]:
    for node in model.quantizers:
        stored = array(given(node, 1))
        if stored is not None:
            yield node, stored.astype(np.float32)


def _axis_readers(value: ir.Value, axis: int, rank: int) -> Iterator[tuple[ir.Node, int, int]]:
    """The readers of a weight with the place of one of its axes there, through transpositions."""
    for node, index in value.uses():
        if is_onnx(node) and node.op_type == "Transpose":
            order = attribute(node, "perm", tuple(reversed(range(rank))))
            yield from _axis_readers(node.outputs[0], list(order).index(axis), rank)
        elif is_onnx(node) and node.op_type in (QUANTIZE, DEQUANTIZE, "Cast", "Identity"):
            yield from _axis_readers(node.outputs[0], axis, rank)
        else:
            yield node, index, axis


def _blocked_size(node: ir.Node) -> int | None:
    sizes, axis = shape(node.inputs[0]), int(attribute(node, "axis", 1))
    return sizes[axis] if sizes is not None and -len(sizes) <= axis < len(sizes) else None


def _blocks(size: int | None, block: int) -> int | None:
    return None if size is None else -(-size // block)


def _after(sizes: tuple[int | None, ...], axis: int) -> tuple[int | None, ...]:
    return sizes[axis % len(sizes) + 1 :]


def _agree(one: tuple[int | None, ...], other: tuple[int | None, ...]) -> bool:
    pairs = zip(one, other, strict=False)
    return len(one) == len(other) and all(None in pair or pair[0] == pair[1] for pair in pairs)


def _words(values: np.ndarray[Any, Any]) -> str:
    flat = values.astype(np.float32).reshape(-1)
    low, high = float(flat.min()), float(flat.max())
    return f"{low:g}" if low == high else f"from {low:g} to {high:g}"
