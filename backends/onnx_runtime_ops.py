"""ONNX Runtime's own ops (domain com.microsoft), as callables for the exporter's translations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx.defs import OpSchema
from onnxscript import values

DOMAIN = values.Opset("com.microsoft", 1)


def runtime_op(name: str, inputs: Sequence[str], attributes: dict[str, Any]) -> values.Op:
    """The op `name`; inputs named with a question mark may be left out.

    `attributes` gives the kind of each one, an `OpSchema.AttrType`.
    """
    given = [_parameter(each, f"T{number}") for number, each in enumerate(inputs)]
    schema = OpSchema(
        name,
        "com.microsoft",
        1,
        inputs=given,
        outputs=[OpSchema.FormalParameter("y", "T0")],
        type_constraints=[(f"T{n}", ANY, "") for n in range(len(inputs))],
        attributes=[OpSchema.Attribute(key, kind) for key, kind in attributes.items()],
    )
    return values.Op(DOMAIN, name, schema)


def _parameter(name: str, kind: str) -> OpSchema.FormalParameter:
    options = OpSchema.FormalParameterOption
    option = options.Optional if name.endswith("?") else options.Single
    return OpSchema.FormalParameter(name.rstrip("?"), kind, param_option=option)


ANY = ["tensor(float)", "tensor(float16)", "tensor(uint8)", "tensor(int8)", "tensor(int32)"]
INT, FLOAT = OpSchema.AttrType.INT, OpSchema.AttrType.FLOAT

MULTI_HEAD_ATTENTION = runtime_op(
    "MultiHeadAttention",
    ("query", "key?", "value?", "bias?", "key_padding_mask?", "attention_bias?"),
    {"num_heads": INT, "scale": FLOAT, "unidirectional": INT},
)
MATMUL_NBITS = runtime_op(
    "MatMulNBits",
    ("A", "B", "scales", "zero_points?", "g_idx?", "bias?"),
    {"K": INT, "N": INT, "bits": INT, "block_size": INT, "accuracy_level": INT},
)
