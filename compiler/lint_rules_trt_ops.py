"""What the ONNX parser of TensorRT 10 and 11 takes: operators, opsets, types, as rows."""

from __future__ import annotations

from effuse.lint_rules import Check, Rule
from effuse.lint_rules_ops import (
    attribute_limits,
    computed_inputs,
    domains,
    extra_inputs,
    extra_outputs,
    in_opset,
    input_ranks,
    mixed_norm,
    named,
    no_tensors,
    opset_outside,
    outside,
    value_types,
)
from effuse.lint_rules_qdq import of_types, scales_of

REPOSITORY = "https://github.com/onnx/onnx-tensorrt/blob/main/docs"
MATRIX = f"ONNX-TensorRT: Supported ONNX Operators; {REPOSITORY}/operators.md"
CHANGES = f"ONNX-TensorRT: Changelog; {REPOSITORY}/Changelog.md"
SITE = "https://docs.nvidia.com/deeplearning/tensorrt/latest"
OPSETS = f"TensorRT: ONNX Opset Guide; {SITE}/reference/onnx-opset-guide.html"
RELEASES = f"TensorRT: Release Notes; {SITE}/getting-started/release-notes.html"
ORT_EP = (
    "ONNX Runtime: TensorRT Execution Provider, trt_op_types_to_exclude; "
    "https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html"
)

TRT = ("tensorrt",)
_SUPPORTED = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization
    BlackmanWindow Cast CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf
    Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample
    GroupNormalization HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If
    ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu
    Pad ParametricSoftplus Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
    ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape
    Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt
    Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where
    Xor
"""
SUPPORTED = frozenset(_SUPPORTED.split())
SINCE = {  # operator -> the first version that has it
    "Attention": (10, 14), "DFT": (11, 2), "DeformConv": (10, 1), "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15), "STFT": (10, 5), "Swish": (11, 0), "TensorScatter": (10, 15),
}  # fmt: skip
NEWEST = (  # until which version which opset is the newest: that of the ONNX release in it
    (None, (10, 6), 21, CHANGES), ((10, 6), (10, 11), 22, CHANGES),
    ((10, 11), (10, 15), 23, CHANGES), ((10, 15), (11, 5), 24, MATRIX), ((11, 5), None, 25, OPSETS),
)  # fmt: skip
REDUCTIONS = sorted(name for name in SUPPORTED if name.startswith("Reduce"))
ATTRIBUTES = (
    ("Attention", "qk_matmul_output_mode", (0,)), ("Attention", "softcap", (0.0,)),
    ("AveragePool", "dilations", (1,)), ("LSTM", "input_forget", (0,)), ("LSTM", "layout", (0,)),
    ("LpPool", "dilations", (1,)), ("MaxPool", "dilations", (1,)), ("Resize", "antialias", (0,)),
    ("Resize", "mode", ("nearest", "linear")),
    ("Resize", "coordinate_transformation_mode", (
        "half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners",
    )),
    ("Resize", "keep_aspect_ratio_policy", ("stretch",)), ("ScatterND", "reduction", ("none",)),
    ("TensorScatter", "axis", (-2,)), ("TopK", "sorted", (1,)),
)  # fmt: skip
OUTPUTS = {"Attention": 1, "LayerNormalization": 1, "MaxPool": 1}
INPUTS = {"Attention": 4}
RANKS = {"Attention": (4,), "AveragePool": (4, 5), "MaxPool": (4, 5), "TensorScatter": (4,)}
CONSTANT_INPUTS = {
    **dict.fromkeys(REDUCTIONS, (1,)), "CumSum": (1,), "OneHot": (1,), "STFT": (1, 2),
    "Squeeze": (1,), "Unsqueeze": (1,),
}  # fmt: skip
ABSENT = (  # types of tensors that TensorRT has not
    "COMPLEX128", "COMPLEX64", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "INT16", "INT2",
    "UINT16", "UINT2", "UINT32", "UINT4", "UINT64",
)  # fmt: skip


def _since(op: str, first: tuple[int, ...]) -> Rule:
    """The row of an operator that a version brought."""
    version = ".".join(map(str, first))
    return Rule(
        f"operator-{op.lower()}", TRT, "error", f"{op} is there since {version}.",
        RELEASES if first >= (11, 0) else CHANGES, named((op,), "{} is not there yet"),
        f"Export to an opset without {op}, or build with TensorRT {version}.", until=first,
    )  # fmt: skip


def _opset(row: tuple[tuple[int, ...] | None, tuple[int, ...] | None, int, str]) -> Rule:
    """The row of the opsets of some versions."""
    since, until, newest, source = row
    return Rule(
        f"opset-{newest}", TRT, "error", f"The opset is from 9 to {newest}.", source,
        opset_outside(9, newest), f"Export to opset {newest} or before.", since, until,
    )  # fmt: skip


def _foreign(domain: str) -> bool:
    return domain in ("com.microsoft", "com.ms.internal.nhwc", "com.microsoft.nchwc", "ai.onnx.ml")


def _plugin(domain: str) -> bool:
    return not _foreign(domain) and not domain.startswith("trt")


def _row(name: str, rule: str, check: Check, remedy: str) -> Rule:
    """The row of a restriction in the table of operators."""
    return Rule(name, TRT, "error", rule, MATRIX, check, remedy)


TENSORRT_OPS: tuple[Rule, ...] = (
    *map(_opset, NEWEST),
    *(_since(op, first) for op, first in SINCE.items()),
    _row(
        "operator", "Operators are among those that the parser has.",
        outside(SUPPORTED | SINCE.keys()),
        "Rewrite it by others; dynamic and integer products as QuantizeLinear, DequantizeLinear.",
    ),
    _row(
        "contrib", "No operators of ONNX Runtime's own.", domains(_foreign),
        "Export with standard operators and pairs of QuantizeLinear and DequantizeLinear.",
    ),
    Rule(
        "plugin", TRT, "warning", "Operators of other domains need a plugin.",
        MATRIX, domains(_plugin), "Load the plugin's library, or rewrite the operator.",
    ),
    Rule(
        "group-norm", TRT, "error", "GroupNormalization of opset 21 is there since 10.9.",
        CHANGES, in_opset(("GroupNormalization",), 21),
        "Write it as InstanceNormalization, or build with TensorRT 10.9.", until=(10, 9),
    ),
    Rule(
        "e2m1-version", TRT, "error", "e2m1 is there since 10.8.",
        CHANGES, of_types(("FLOAT4E2M1",), "quantized to {}"), "Build with 10.8.", until=(10, 8),
    ),
    Rule(
        "mxfp8-version", TRT, "error", "MXFP8 is there since 10.12.", CHANGES,
        scales_of(("FLOAT8E8M0",), ()), "Use float scales, or build with 10.12.", until=(10, 12),
    ),
    Rule(
        "batch-norm", TRT, "error", "BatchNormalization of several types is there since 10.7.",
        CHANGES, mixed_norm, "Cast its statistics, or build with 10.7.", until=(10, 7),
    ),
    _row("attribute", "Attributes have the values that the parser has.",
         attribute_limits(ATTRIBUTES), "Export with a supported value, or rewrite the operator."),
    _row("extra-output", "Outputs that the parser leaves out are not read.",
         extra_outputs(OUTPUTS), "Compute the second output by operators of its own."),
    _row("extra-input", "Inputs that the parser leaves out are not given.",
         extra_inputs(INPUTS), "Keep past keys and values outside of Attention."),
    _row("rank", "Tensors have the rank that the operator takes.",
         input_ranks(RANKS), "Add or join axes before, and undo it behind."),
    Rule(
        "grid-rank", TRT, "error", "GridSample is 2-D; 3-D since 11.2.", MATRIX,
        input_ranks({"GridSample": (4,)}), "Sample in 2-D, or build with 11.2.", until=(11, 2),
    ),
    _row("constant-input", "Axes, depths and steps are constants.",
         computed_inputs(CONSTANT_INPUTS), "Fold constants, or export with fixed values."),
    _row("type", "Tensors are of types that TensorRT has.",
         value_types(ABSENT), "Cast to a supported type."),
    _row("uint8", "uint8 is for inputs and outputs only.",
         value_types(("UINT8",), inside=True), "Compute in int8, int32 or float."),
    Rule(
        "double", TRT, "warning", "double is cut down to float32.",
        MATRIX, value_types(("DOUBLE",)), "Cast to float32 before exporting.",
    ),
    _row("tensors-only", "Values are tensors of numbers: no sequences, optional values, text.",
         no_tensors, "Rewrite with tensors and shapes."),
    Rule(
        "data-dependent", TRT, "warning",
        "Shapes that depend on values (NonZero, NonMaxSuppression, RoiAlign) cost speed.",
        ORT_EP, named(("NonZero", "NonMaxSuppression", "RoiAlign"), "{}'s shape is known late"),
        "Replace it by Where or Gather with fixed shapes.",
    ),
)  # fmt: skip
