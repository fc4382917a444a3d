"""What NVIDIA's documentation states of TensorRT 10 and 11, as rows."""

from __future__ import annotations

from effuse.lint_rules import Rule
from effuse.lint_rules_qdq import (
    E8M0,
    FLOATS,
    activation_channels,
    activations_of,
    asymmetric,
    block_axis,
    block_remainder,
    blocks_of,
    blocks_scaled_by,
    dangling,
    inputs_of,
    misplaced,
    other_types,
    repeated,
    scale_computed,
    scale_sign,
    scales_of,
    weight_axis,
)

SITE = "https://docs.nvidia.com/deeplearning/tensorrt/latest"
QUANTIZED = f"TensorRT: Working with Quantized Types, {{}}; {SITE}/inference-library/{{}}.html"
SCHEMES = QUANTIZED.format("Quantization Schemes", "quantized-types-schemes")
EXPLICIT = QUANTIZED.format("Explicit Quantization", "quantized-types-explicit-quantization")
QUANTIZE_OP = f"TensorRT operators: Quantize; {SITE}/_static/operators/Quantize.html"
DEQUANTIZE_OP = f"TensorRT operators: Dequantize; {SITE}/_static/operators/Dequantize.html"
DYNAMIC_OP = f"TensorRT operators: DynamicQuantize; {SITE}/_static/operators/DynamicQuantize.html"

TRT = ("tensorrt",)
FORMATS = ("INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1")
UNQUANTIZABLE = (
    "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "LogSoftmax",
    "ReduceMean", "RMSNormalization", "Sigmoid", "Softmax", "Swish",
)  # fmt: skip

TENSORRT: tuple[Rule, ...] = (
    Rule(
        "symmetric", TRT, "error", "Zero points are zero, or left out.",
        DEQUANTIZE_OP, asymmetric, "Quantize symmetrically, to a signed type.",
    ),
    Rule(
        "scale-positive", TRT, "error", "Scales are over zero.",
        DEQUANTIZE_OP, scale_sign, "Give channels without values any positive scale.",
    ),
    Rule(
        "scale-constant", TRT, "error", "Scales are known when the engine is built.",
        QUANTIZE_OP, scale_computed, "Store the scale; dynamic ranges need float activations.",
    ),
    Rule(
        "activation-per-tensor", TRT, "error",
        "Activations have one scale; only constant weights have one a channel or block.",
        EXPLICIT, activation_channels, "Quantize the activation per tensor.",
    ),
    Rule(
        "weight-axis", TRT, "error",
        "Scales a channel are those of the output's channels: axis 0 of Conv's weight, 1 of "
        "ConvTranspose's, the columns' of MatMul's and Gemm's.",
        EXPLICIT, weight_axis, "Quantize along the output's channels, or per tensor.",
    ),
    Rule(
        "quantized-type", TRT, "error",
        "Quantized types are int8, int4, e4m3 and e2m1: none unsigned, no e5m2, no int32 biases.",
        SCHEMES, other_types((*FORMATS, E8M0)), "Use int8 or e4m3; leave biases in float.",
    ),
    Rule(
        "weight-only-int4", TRT, "error", "int4 is for weights only.",
        EXPLICIT, activations_of(("INT4",)), "Leave the activation in float, or use int8.",
    ),
    Rule(
        "int4-block", TRT, "error", "int4 weights have blocks of 64 or 128.",
        EXPLICIT, blocks_of(("INT4",), (64, 128)), "Quantize again in blocks of 64 or 128.",
    ),
    Rule(
        "block-axis", TRT, "error", "Blocks of weights run along the axis that is summed over.",
        DEQUANTIZE_OP, block_axis(("INT4", "FLOAT8E4M3FN", "FLOAT4E2M1", "INT8")),
        "Quantize in blocks along the input's channels.",
    ),
    Rule(
        "block-divides", TRT, "error", "Blocks divide their axis.",
        DYNAMIC_OP, block_remainder, "Pad the weight, or leave this layer in float.",
    ),
    Rule(
        "nvfp4-block", TRT, "error", "e2m1 has blocks of 16.",
        SCHEMES, blocks_of(("FLOAT4E2M1",), (16,)), "Quantize again in blocks of 16.",
    ),
    Rule(
        "nvfp4-scale", TRT, "error",
        "The scales of e2m1's blocks are e4m3, themselves scaled by one float.",
        SCHEMES, blocks_scaled_by(("FLOAT4E2M1",), ("FLOAT8E4M3FN",)),
        "Quantize the blocks' scales to e4m3: a DequantizeLinear of scales before that of weights.",
    ),
    Rule(
        "mxfp8-block", TRT, "error", "Blocks with e8m0 scales are of 32.",
        SCHEMES, blocks_of(("FLOAT8E4M3FN",), (32,), E8M0), "Quantize again in blocks of 32.",
    ),
    Rule(
        "mxfp8-type", TRT, "error", "Scales in e8m0 are for e4m3 (MXFP8).",
        SCHEMES, scales_of((E8M0,), ("FLOAT8E4M3FN",)), "Use float scales, or e4m3 values.",
    ),
    Rule(
        "quantize-input", TRT, "error", "What is quantized is float32, float16 or bfloat16.",
        QUANTIZE_OP, inputs_of(FLOATS), "Cast before QuantizeLinear.",
    ),
    Rule(
        "dangling-quantize", TRT, "error", "Only DequantizeLinear reads a quantized tensor.",
        EXPLICIT, dangling, "Put a DequantizeLinear behind each QuantizeLinear.",
    ),
    Rule(
        "placement", TRT, "warning",
        "Pairs stand on the inputs of products: norms, softmax and activations stay in float.",
        EXPLICIT, misplaced(UNQUANTIZABLE), "Remove the pair: it breaks a fusion.",
    ),
    Rule(
        "shared-pair", TRT, "warning", "One pair quantizes a tensor for all who read it.",
        EXPLICIT, repeated, "Let the readers share one QuantizeLinear.",
    ),
)  # fmt: skip
