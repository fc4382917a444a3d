"""What ONNX Runtime's documentation states of its CPU, as rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING

from effuse.errors import MissingExtra, require
from effuse.lint_onnx import DEQUANTIZE, ONNX_DOMAINS, QUANTIZE, Model, dtype, is_onnx, readers
from effuse.lint_rules import Found, Rule
from effuse.lint_rules_ops import blocks_of_bits, ir_newer, is_function, opset_outside, packed_shape
from effuse.lint_rules_qdq import PRODUCTS, misplaced

if TYPE_CHECKING:
    import onnx_ir as ir

SITE = "https://onnxruntime.ai/docs"
VERSIONS = f"ONNX Runtime compatibility: ONNX opset support; {SITE}/reference/compatibility.html"
QUANTIZE_MODELS = (
    f"ONNX Runtime: Quantize ONNX models; {SITE}/performance/model-optimizations/quantization.html"
)
REPOSITORY = "https://github.com/microsoft/onnxruntime/blob/main/docs"
CONTRIB = f"ONNX Runtime: Contrib Operator Schemas; {REPOSITORY}/ContribOperators.md"
KERNELS = f"ONNX Runtime: Supported Operators and Data Types; {REPOSITORY}/OperatorKernels.md"

ORT = ("onnxruntime",)
LOW = {  # types that few kernels have, by the runtime's names
    "FLOAT8E4M3FN": "float8e4m3fn", "FLOAT8E4M3FNUZ": "float8e4m3fnuz", "FLOAT8E5M2": "float8e5m2",
    "FLOAT8E5M2FNUZ": "float8e5m2fnuz", "FLOAT8E8M0": "float8e8m0", "FLOAT4E2M1": "float4e2m1",
    "INT4": "int4", "UINT4": "uint4", "INT2": "int2", "UINT2": "uint2",
}  # fmt: skip
FLOAT_OPS = (
    "Add", "Div", "Erf", "Exp", "Gelu", "GroupNormalization", "InstanceNormalization",
    "LayerNormalization", "Mul", "Pow", "ReduceMean", "RMSNormalization", "Sigmoid", "Softmax",
    "Sqrt", "Sub", "Swish", "Tanh",
)  # fmt: skip


def unfused(model: Model) -> Iterator[Found]:
    """Convolutions whose inputs are quantized, and whose output is not."""
    for node in model.nodes:
        if not is_onnx(node) or node.op_type != "Conv":
            continue
        pairs = [value is not None and _made_by(value, DEQUANTIZE) for value in node.inputs[:2]]
        if all(pairs) and not any(n.op_type == QUANTIZE for n, _ in readers(node.outputs[0])):
            yield node, "its inputs are quantized, its output is not"


def unknown_operators(model: Model) -> Iterator[Found]:
    """Operators of which the installed runtime has no schema."""
    names = _schemas()
    for node in model.nodes if names else ():
        domain = "" if node.domain in ONNX_DOMAINS else node.domain
        if node.op_type not in names.get(domain, ()) and not is_function(model, node):
            yield node, f"the installed runtime has no {node.op_type} in the domain {domain!r}"


def without_kernel(model: Model) -> Iterator[Found]:
    """Operators on types of few bits that no kernel of the installed CPU provider takes."""
    kernels = _low_kernels()
    for node in model.nodes if kernels else ():
        if not is_onnx(node):
            continue
        values = (*node.inputs, *node.outputs)
        found = {LOW[kind] for kind in map(dtype, values) if kind in LOW}
        if missing := sorted(found - kernels.get(node.op_type, frozenset())):
            yield node, f"no kernel of {node.op_type} for {', '.join(missing)}"


def _made_by(value: ir.Value, op: str) -> bool:
    node = value.producer()
    return node is not None and is_onnx(node) and node.op_type == op


@cache
def _schemas() -> Mapping[str, frozenset[str]]:
    """The operators that the installed runtime knows, by domain; none if it is not installed."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    try:
        state = require("onnxruntime.capi.onnxruntime_pybind11_state")
    except MissingExtra:
        return {}
    for schema in state.get_all_operator_schema():
        found[schema.domain].add(schema.name)
    return {domain: frozenset(names) for domain, names in found.items()}


@cache
def _low_kernels() -> Mapping[str, frozenset[str]]:
    """The types of few bits that each of ONNX's operators has a kernel for here."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    try:
        state = require("onnxruntime.capi.onnxruntime_pybind11_state")
    except MissingExtra:
        return {}
    for kernel in state.get_all_opkernel_def():
        if kernel.domain == "":
            types = {str(each) for many in kernel.type_constraints.values() for each in many}
            found[kernel.op_name] |= {each[len("tensor(") : -1] for each in types}
    return {op: frozenset(types) for op, types in found.items()}


ONNXRUNTIME: tuple[Rule, ...] = (
    Rule(
        "opset-21", ORT, "error", "The opset is from 7 to 21.", VERSIONS, opset_outside(7, 21),
        "Export to opset 21, or update onnxruntime.", until=(1, 21),
    ),
    Rule(
        "opset-26", ORT, "error", "The opset is from 7 to 26.", VERSIONS, opset_outside(7, 26),
        "Export to opset 26 or before.", since=(1, 21),
    ),
    Rule(
        "ir-version", ORT, "error", "The IR version is 13 at most.", VERSIONS, ir_newer(13),
        "Save the model with ir_version = 13 or before.",
    ),
    Rule(
        "operator", ORT, "error", "The runtime has the operator.", CONTRIB, unknown_operators,
        "Update onnxruntime, register the custom operator, or rewrite it.",
    ),
    Rule(
        "kernel", ORT, "error", "The CPU has a kernel for the types.", KERNELS, without_kernel,
        "Put DequantizeLinear before it, and QuantizeLinear behind.",
    ),
    Rule(
        "unfused", ORT, "info",
        "A convolution runs in 8 bits if pairs stand on its inputs and on its output.",
        QUANTIZE_MODELS, unfused, "Quantize its output too, or leave it in float.",
    ),
    Rule(
        "placement", ORT, "warning",
        "Quantizing norms, softmax and elementwise operators costs more than it saves.",
        QUANTIZE_MODELS, misplaced(FLOAT_OPS, PRODUCTS), "Remove the pair.",
    ),
    Rule(
        "nbits-block", ORT, "error",
        "MatMulNBits has 2, 4 or 8 bits, and blocks of a power of two from 16 on.",
        CONTRIB, blocks_of_bits((2, 4, 8), 16), "Quantize again, in blocks of 32 for instance.",
    ),
    Rule(
        "nbits-shape", ORT, "error", "MatMulNBits's weight is N × blocks × bytes of a block.",
        CONTRIB, packed_shape, "Pack the weight again.",
    ),
)  # fmt: skip
