"""What OpenVINO's documentation states, and what its ONNX frontend takes, as rows."""

from __future__ import annotations

from collections.abc import Iterator

from effuse.lint_onnx import Model, constant, given
from effuse.lint_rules import Found, Rule
from effuse.lint_rules_ops import contrib, domains, named, unranked
from effuse.lint_rules_qdq import asymmetric, block_remainder, other_types, scale_computed

SITE = "https://docs.openvino.ai/2025"
FRONTEND = (
    "OpenVINO: Supported Operations, ONNX; "
    f"{SITE}/documentation/compatibility-and-support/supported-operations.html"
)
LOW_PRECISION = (
    "OpenVINO: Low Precision Transformations; https://docs.openvino.ai/latest/"
    "openvino_docs_OV_UG_lpt.html"
)
FOUR_BITS = (
    f"OpenVINO: 4-bit Weight Quantization; {SITE}/openvino-workflow/model-optimization-guide/"
    "weight-compression/4-bit-weight-quantization.html"
)
SHAPES = (
    f"OpenVINO: Dynamic Shapes; {SITE}/openvino-workflow/running-inference/"
    "model-input-output/dynamic-shapes.html"
)

OPENVINO_ONLY = ("openvino",)
# "No conversion rule found" by the frontend of 2026.4, each operator read alone.
_ABSENT = """
    BitCast CausalConvWithState CumProd DeformConv Det ImageDecoder LinearAttention MaxUnpool
    MelWeightMatrix Optional OptionalGetElement OptionalHasElement ParametricSoftplus
    RegexFullMatch ScaledTanh SequenceErase SequenceInsert SequenceLength SequenceMap
    SplitToSequence StringConcat StringNormalizer StringSplit TensorScatter TfIdfVectorizer
"""
ABSENT = frozenset(_ABSENT.split())
_CONTRIB = """
    Attention BiasAdd BiasGelu BifurcationDetector DequantizeLinear DynamicQuantizeLSTM
    DynamicQuantizeMatMul EmbedLayerNormalization FastGelu FusedConv FusedGemm FusedMatMul
    GatherBlockQuantized GatherND Gelu GroupNorm GroupQueryAttention MatMulIntegerToFloat
    MatMulNBits MultiHeadAttention Pad QLinearAdd QLinearAveragePool QLinearConcat
    QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid QLinearSoftmax QLinearWhere
    QuantizeLinear QuickGelu Range RotaryEmbedding SkipLayerNormalization
    SkipSimplifiedLayerNormalization Trilu
"""
CONTRIB = frozenset(_CONTRIB.split())


def asymmetric_weights(model: Model) -> list[Found]:
    """Weights whose zero point is not zero."""
    return [(node, found) for node, found in asymmetric(model)
            if node is not None and model.is_constant(node.inputs[0])]  # fmt: skip


def computed_weights(model: Model) -> Iterator[Found]:
    """MatMulNBits whose packed weight is not stored as it is."""
    for node in contrib(model, "MatMulNBits"):
        weight = given(node, 1)
        if weight is not None and constant(weight) is None:
            yield node, "its packed weight is computed"


OPENVINO: tuple[Rule, ...] = (
    Rule(
        "operator", OPENVINO_ONLY, "error", "The frontend has the operator.",
        FRONTEND, named(ABSENT, "the frontend has no {}"), "Rewrite it, or add an extension.",
    ),
    Rule(
        "contrib", OPENVINO_ONLY, "error",
        "Of other domains the frontend has a part of com.microsoft only.",
        FRONTEND, domains(lambda domain: True, CONTRIB),
        "Export with standard operators, or add an extension.",
    ),
    Rule(
        "scale-constant", OPENVINO_ONLY, "warning",
        "Pairs with constant scales become FakeQuantize, which 8-bit kernels are made from.",
        LOW_PRECISION, scale_computed, "Store the scale; else the layer runs in float.",
    ),
    Rule(
        "quantized-type", OPENVINO_ONLY, "warning",
        "Integer kernels are for int8 and uint8; weights may be of 4 bits.",
        LOW_PRECISION, other_types(("INT8", "UINT8", "INT4", "UINT4", "INT32")),
        "Quantize to 8 bits; other types are made float.",
    ),
    Rule(
        "symmetric-weights", OPENVINO_ONLY, "warning", "Weights of 8-bit layers are symmetric.",
        LOW_PRECISION, asymmetric_weights, "Quantize weights to int8 with zero points of zero.",
    ),
    Rule(
        "block-divides", OPENVINO_ONLY, "error", "Groups of weights divide their axis.",
        FOUR_BITS, block_remainder, "Choose a group that divides the axis.",
    ),
    Rule(
        "nbits-constant", OPENVINO_ONLY, "error",
        "MatMulNBits's packed weight is an initializer, not one that a Reshape makes.",
        FRONTEND, computed_weights, "Fold constants before exporting.",
    ),
    Rule(
        "rank", OPENVINO_ONLY, "warning", "Inputs have a known rank.",
        SHAPES, unranked, "Give the inputs shapes; sizes may stay open.",
    ),
)  # fmt: skip
