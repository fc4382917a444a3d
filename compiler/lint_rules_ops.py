"""Checks on operators: which, from which version on, with which attributes, inputs and types."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from effuse.errors import require
from effuse.lint_onnx import (
    QUANTIZE,
    Model,
    attribute,
    dtype,
    given,
    is_onnx,
    shape,
)
from effuse.lint_rules import Check, Found

if TYPE_CHECKING:
    import onnx_ir as ir


def opset_outside(low: int, high: int) -> Check:
    """What finds a model of another opset."""

    def check(model: Model) -> Iterator[Found]:
        if not low <= model.opset <= high:
            yield None, f"opset {model.opset}, outside {low} to {high}"

    return check


def ir_newer(than: int) -> Check:
    """What finds a model of a newer version of the file format."""

    def check(model: Model) -> Iterator[Found]:
        if model.root.ir_version > than:
            yield None, f"IR version {model.root.ir_version}, over {than}"

    return check


def named(names: Collection[str], words: str) -> Check:
    """What finds some of ONNX's operators."""
    return lambda model: (
        (node, words.format(node.op_type))
        for node in model.nodes
        if is_onnx(node) and node.op_type in names
    )


def outside(names: Collection[str]) -> Check:
    """What finds ONNX's operators that are not among these."""
    return lambda model: (
        (node, f"{node.op_type} is not supported")
        for node in model.nodes
        if is_onnx(node) and node.op_type not in names and not is_function(model, node)
    )


def domains(wanted: Callable[[str], bool], known: Collection[str] = ()) -> Check:
    """What finds operators of some domains; those in `known` are let be, and local functions."""
    return lambda model: (
        (node, f"an operator of the domain {node.domain!r}")
        for node in model.nodes
        if not is_onnx(node)
        and wanted(node.domain)
        and node.op_type not in known
        and not is_function(model, node)
    )


def is_function(model: Model, node: ir.Node) -> bool:
    """Whether a node calls a function that the model brings along."""
    called = (node.domain, node.op_type)
    return any((made.domain, made.name) == called for made in model.root.functions.values())


def attribute_limits(limits: Sequence[tuple[str, str, Collection[Any]]]) -> Check:
    """What finds attributes of other values; lists must have none but allowed elements."""
    rows = defaultdict(list)
    for op, name, allowed in limits:
        rows[op].append((name, allowed))

    def check(model: Model) -> Iterator[Found]:
        for node in filter(is_onnx, model.nodes):
            for name, allowed in rows.get(node.op_type, ()):
                value = attribute(node, name, None)
                values = value if isinstance(value, tuple) else (value,)
                if value is not None and any(each not in allowed for each in values):
                    yield node, f"{name} = {value}; supported: {', '.join(map(str, allowed))}"

    return check


def extra_outputs(limits: Mapping[str, int]) -> Check:
    """What finds operators with more outputs in use than are supported."""
    return lambda model: (
        (node, f"its output {index} is used; supported: the first {limits[node.op_type]}")
        for node in model.nodes
        if is_onnx(node) and node.op_type in limits
        for index, value in enumerate(node.outputs)
        if index >= limits[node.op_type] and (value.uses() or value.is_graph_output())
    )


def extra_inputs(limits: Mapping[str, int]) -> Check:
    """What finds operators with more inputs than are supported."""
    return lambda model: (
        (node, f"its input {index} is given; supported: the first {limits[node.op_type]}")
        for node in model.nodes
        if is_onnx(node) and node.op_type in limits
        for index, value in enumerate(node.inputs)
        if index >= limits[node.op_type] and value is not None
    )


def input_ranks(limits: Mapping[str, Collection[int]]) -> Check:
    """What finds operators on tensors of another rank."""

    def check(model: Model) -> Iterator[Found]:
        for node in model.nodes:
            sizes = shape(given(node, 0))
            allowed = limits.get(node.op_type) if is_onnx(node) else None
            if allowed is not None and sizes is not None and len(sizes) not in allowed:
                yield node, f"rank {len(sizes)}; supported: {', '.join(map(str, allowed))}"

    return check


def computed_inputs(limits: Mapping[str, Collection[int]]) -> Check:
    """What finds inputs that must be constants, and are computed."""
    return lambda model: (
        (node, f"its input {index} is computed at run time")
        for node in model.nodes
        if is_onnx(node)
        for index in limits.get(node.op_type, ())
        if not model.is_constant(given(node, index))
    )


def mixed_types(model: Model) -> Iterator[Found]:
    """Inputs that ONNX wants of one type, and that are of several."""
    for node in filter(is_onnx, model.nodes):
        groups: defaultdict[str, set[str]] = defaultdict(set)
        for parameter, value in zip(_parameters(node, model.opset), node.inputs, strict=False):
            if parameter and dtype(value):
                groups[parameter].add(dtype(value))
        for types in groups.values():
            if len(types) > 1:
                yield node, f"inputs of the types {', '.join(sorted(types))}"


def _parameters(node: ir.Node, opset: int) -> list[str]:
    """The type parameter of each input (`T`, `T1`, …); empty where the type is a fixed one."""
    defs = require("onnx").defs
    if not defs.has(node.op_type, opset, ""):
        return []
    schema = defs.get_schema(node.op_type, opset, "")
    formal = [(each.type_str, each.option.name, each.is_homogeneous) for each in schema.inputs]
    names = [name if same and "(" not in name else "" for name, _, same in formal]
    variadic = bool(formal) and formal[-1][1] == "Variadic"
    return names + names[-1:] * len(node.inputs) if variadic else names


def value_types(types: Collection[str], inside: bool = False) -> Check:
    """What finds values of some types: computed ones, and unless `inside` inputs and constants.

    What QuantizeLinear writes has rules of its own.
    """

    def check(model: Model) -> Iterator[Found]:
        for node in model.nodes:
            for value in () if node.op_type == QUANTIZE else node.outputs:
                if dtype(value) in types and not (inside and value.is_graph_output()):
                    yield node, f"computes {dtype(value)}"
        if not inside:
            for value in (*model.root.graph.inputs, *model.initializers):
                if dtype(value) in types:
                    yield None, f"{value.name!r} is {dtype(value)}"

    return check


def no_tensors(model: Model) -> Iterator[Found]:
    """Sequences, optional values and text."""
    for value in model.root.graph.inputs:
        if word := _no_tensor(value):
            yield None, f"the input {value.name!r} is {word}"
    for node in filter(is_onnx, model.nodes):
        kinds = _kinds(node, model.opset) | set(map(_no_tensor, node.outputs)) - {""}
        if kinds:
            yield node, f"computes {', '.join(sorted(kinds))}"


def _no_tensor(value: ir.Value) -> str:
    kind = type(value.type).__name__.removesuffix("Type")
    if value.type is not None and kind != "Tensor":
        return f"a {kind.lower()}"
    return "text" if dtype(value) == "STRING" else ""


def _kinds(node: ir.Node, opset: int) -> set[str]:
    """What outputs can only be, where that is no tensor of numbers: `seq`, `optional`, `text`."""
    defs = require("onnx").defs
    if not defs.has(node.op_type, opset, ""):
        return set()
    outputs = defs.get_schema(node.op_type, opset, "").outputs
    kinds = [
        {t if t == "tensor(string)" else t.split("(")[0] for t in out.types} for out in outputs
    ]
    return {kind for each in kinds if "tensor" not in each for kind in each}


def _kind(allowed: str) -> str:
    """`seq`, `optional`, `tensor`; text is a kind of its own."""
    return "text" if allowed == "tensor(string)" else allowed.split("(")[0]


def mixed_norm(model: Model) -> Iterator[Found]:
    """Batch norms whose statistics are of another type than their input."""
    for node in model.nodes:
        types = {dtype(value) for value in node.inputs if dtype(value)}
        if is_onnx(node) and node.op_type == "BatchNormalization" and len(types) > 1:
            yield node, f"inputs of the types {', '.join(sorted(types))}"


def unranked(model: Model) -> Iterator[Found]:
    """Inputs of open rank."""
    for value in model.root.graph.inputs:
        if value.shape is None:
            yield None, f"the input {value.name!r} has no shape"


def in_opset(names: Collection[str], opset: int) -> Check:
    """What finds some operators in models from an opset on."""
    return lambda model: (
        (node, f"{node.op_type} of opset {model.opset}")
        for node in model.nodes
        if model.opset >= opset and is_onnx(node) and node.op_type in names
    )


def blocks_of_bits(bits: Collection[int], least: int) -> Check:
    """What finds MatMulNBits of other bits, or blocks that are no power of two over `least`."""

    def check(model: Model) -> Iterator[Found]:
        for node in contrib(model, "MatMulNBits"):
            width, block = attribute(node, "bits", 4), attribute(node, "block_size", 0)
            if width not in bits:
                yield node, f"{width} bits; supported: {', '.join(map(str, bits))}"
            if block < least or block & (block - 1):
                yield node, f"blocks of {block}"

    return check


def packed_shape(model: Model) -> Iterator[Found]:
    """MatMulNBits whose packed weight has not the shape that its attributes say."""
    for node in contrib(model, "MatMulNBits"):
        rows, length = attribute(node, "N", 0), attribute(node, "K", 0)
        width, block = attribute(node, "bits", 4), attribute(node, "block_size", 0)
        stored = shape(given(node, 1))
        if not block or stored is None or None in stored:
            continue
        expected = (rows, -(-length // block), block * width // 8)
        if stored != expected and stored != (rows, expected[1] * expected[2]):
            yield node, f"a packed weight of shape {list(stored)}, expected {list(expected)}"


def contrib(model: Model, name: str) -> Iterator[ir.Node]:
    """The nodes of one of ONNX Runtime's own operators."""
    return (n for n in model.nodes if n.domain == "com.microsoft" and n.op_type == name)
