"""What the ONNX specification states, for every target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from effuse.errors import require
from effuse.lint_files import LARGEST
from effuse.lint_onnx import Model, attribute, axis_of, quantized_type
from effuse.lint_rules import Found, Rule
from effuse.lint_rules_ops import mixed_types
from effuse.lint_rules_qdq import axis_outside, scale_finite, scale_shape

if TYPE_CHECKING:
    import onnx_ir as ir

DOCS = "https://onnx.ai/onnx"
IR_SPEC = f"ONNX IR specification; {DOCS}/repo-docs/IR.html"
CHECKER = f"ONNX API: onnx.checker; {DOCS}/api/checker.html"
EXTERNAL = f"ONNX: External Data; {DOCS}/repo-docs/ExternalData.html"
LIMITS = "Protocol Buffers: Proto Limits; https://protobuf.dev/programming-guides/proto-limits"
DEQUANTIZE_OP = f"ONNX operators: DequantizeLinear; {DOCS}/operators/onnx__DequantizeLinear.html"
QUANTIZE_OP = f"ONNX operators: QuantizeLinear; {DOCS}/operators/onnx__QuantizeLinear.html"
TYPES = f"ONNX concepts: Types; {DOCS}/intro/concepts.html"

ALL = ("tensorrt", "onnxruntime", "openvino")
WHOLE = 64 << 20  # bytes; larger files are checked without inferring their types once more
SINCE = {  # quantized type -> first opset
    "FLOAT8E4M3FN": 19, "FLOAT8E5M2": 19, "INT4": 21, "UINT4": 21, "INT16": 21, "UINT16": 21,
    "FLOAT4E2M1": 23, "INT2": 25, "UINT2": 25,
}  # fmt: skip


def invalid(model: Model) -> Iterator[Found]:
    """What ONNX's own checker finds first."""
    onnx = require("onnx")
    try:
        if model.path is not None:
            small = model.path.stat().st_size <= WHOLE
            onnx.checker.check_model(str(model.path), full_check=small)
        elif model.proto is not None:
            onnx.checker.check_model(model.proto, full_check=model.proto.ByteSize() <= WHOLE)
        else:
            require("onnx_ir.passes.common").CheckerPass()(model.root)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        yield None, " ".join(lines[:2])


def duplicates(model: Model) -> Iterator[Found]:
    """Nodes and initializers of one name in one graph."""
    names = Counter(node.name for node in model.nodes if node.name)
    seen: set[str] = set()
    for node in model.nodes:
        if node.name and names[node.name] > 1 and node.name in seen:
            yield node, f"{names[node.name]} nodes are named {node.name!r}"
        seen.add(node.name or "")
    if model.proto is not None:
        stored = Counter(each.name for each in model.proto.graph.initializer)
        for name, count in stored.items():
            if count > 1:
                yield None, f"{count} initializers are named {name!r}"


def unused(model: Model) -> Iterator[Found]:
    """Initializers that nothing reads."""
    names = [v.name for v in model.initializers if not v.uses() and not v.is_graph_output()]
    if names:
        shown = ", ".join(repr(name) for name in names[:3])
        yield None, f"{len(names)} of them: {shown}{', …' if len(names) > 3 else ''}"


def too_large(model: Model) -> Iterator[Found]:
    """More bytes inside the file than a reader takes."""
    external = require("onnx_ir").ExternalTensor
    tensors = (value.const_value for value in model.initializers)
    inside = sum(t.nbytes for t in tensors if t is not None and not isinstance(t, external))
    if inside > LARGEST:
        yield None, f"{inside / 1e9:.2f} GB of weights inside the file"


def outside_folder(model: Model) -> Iterator[Found]:
    """External data that are not below the model's folder."""
    for location in sorted({str(tensor.location) for tensor in external_tensors(model)}):
        path = PurePath(location)
        if path.is_absolute() or ".." in path.parts:
            yield None, f"external data in {location!r}"


def cut_off(model: Model) -> Iterator[Found]:
    """External data that reach over the end of their file."""
    if model.path is None:
        return
    for tensor in external_tensors(model):
        size = Path(tensor.path).stat().st_size
        if (tensor.offset or 0) + (tensor.length or tensor.nbytes) > size:
            yield None, f"{tensor.name!r} ends behind the end of {str(tensor.location)!r}"


def external_tensors(model: Model) -> Iterator[Any]:
    """The tensors whose data are in other files."""
    external = require("onnx_ir").ExternalTensor
    tensors = (value.const_value for value in model.initializers)
    return (tensor for tensor in tensors if isinstance(tensor, external))


def too_old(model: Model) -> Iterator[Found]:
    """Quantizers that use what their opset does not have."""
    for node in model.quantizers:
        needs = max((since for what, since in _features(node) if what), default=0)
        if model.opset < needs:
            yield node, f"needs opset {needs}, the model has {model.opset}"


def _features(node: ir.Node) -> Iterator[tuple[bool, int]]:
    """What a quantizer uses, with the first opset that has it."""
    yield axis_of(node) is not None, 13
    yield bool(attribute(node, "block_size", 0)), 21
    kind = quantized_type(node)
    yield kind in SINCE, SINCE.get(kind, 0)


COMMON: tuple[Rule, ...] = (
    Rule(
        "valid", ALL, "error", "The model passes ONNX's own checker.",
        CHECKER, invalid, "Export again, or mend what the message names.",
    ),
    Rule(
        "unique-names", ALL, "warning", "Names are given once in a graph.",
        IR_SPEC, duplicates, "Rename one of them.",
    ),
    Rule(
        "unused-initializers", ALL, "info", "Every initializer is read.",
        IR_SPEC, unused, "Remove them: they take space and nothing else.",
    ),
    Rule(
        "file-size", ALL, "error", "A file has less than 2 GiB.",
        LIMITS, too_large, "Store the weights as external data.",
    ),
    Rule(
        "external-folder", ALL, "error",
        "External data are named relative to the model's folder, and are in it.",
        EXTERNAL, outside_folder, "Move the data beside the model, and name the file only.",
    ),
    Rule(
        "external-range", ALL, "error", "External data are wholly in their file.",
        EXTERNAL, cut_off, "Copy or export the data again.",
    ),
    Rule(
        "same-types", ALL, "error", "Inputs that share a type parameter are of one type.",
        TYPES, mixed_types, "Cast one of them: strongly typed networks do not.",
    ),
    Rule(
        "scale-finite", ALL, "error", "Scales are finite.",
        QUANTIZE_OP, scale_finite, "Calibrate again: a range was infinite or no number.",
    ),
    Rule(
        "axis-range", ALL, "error", "The axis is one of the tensor's.",
        QUANTIZE_OP, axis_outside, "Give an axis from -rank to rank - 1.",
    ),
    Rule(
        "scale-shape", ALL, "error",
        "There is one scale, one a channel along the axis, or one a block.",
        DEQUANTIZE_OP, scale_shape, "Quantize again, with scales along that axis.",
    ),
    Rule(
        "quantizer-opset", ALL, "error", "What a quantizer uses is in the model's opset.",
        QUANTIZE_OP, too_old, "Export to a newer opset, or quantize more simply.",
    ),
)  # fmt: skip
