"""Formats: how the weights and the activations of a network are quantized, as data.

One declaration, of which arithmetic, packing, lowering, cost and documentation are consequences.
A format is a row of texts (`int4/group64`, kernels/quantizers.py) for the weights and activations
of linear layers and of convolutions. The arithmetic is importable from here too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from effuse.errors import ConfigError
from effuse.errors import nearest as nearest_of
from effuse.kernels.grids import (
    E2M1,
    E4M3,
    E5M2,
    INT4,
    INT8,
    UINT4,
    UINT8,
    Grid,
    decode,
    encode,
    nearest,
    parse_grid,
    step,
)
from effuse.kernels.packing import pack, unpack
from effuse.kernels.quantizers import (
    Quantizer,
    block_bits,
    check_group,
    find_scale,
    from_codes,
    join_scale,
    parse_quantizer,
    round_trip,
    scale_of_range,
    split_scale,
    spread,
    storable,
    stored_bits,
    to_codes,
)

STUDY = "'<weights>:<activations>', as int3/group32:uint6/tensor/asymmetric or e3m0/group128:none"


@dataclass(frozen=True)
class Format:
    """How linear layers and convolutions are quantized.

    Args:
        name: the word for it, or its text.
        weight, activation: of linear layers; None leaves activations in float.
        conv_weight, conv_activation: of convolutions, whose weights are seen as (rows, columns)
            and whose activations have no last axis of channels to group.
        summary: what it is for, in a sentence.

    Raises:
        ConfigError: a quantizer is not one for its place.
    """

    name: str
    weight: Quantizer
    activation: Quantizer | None
    conv_weight: Quantizer
    conv_activation: Quantizer | None
    summary: str = ""

    def __post_init__(self) -> None:
        for weight in (self.weight, self.conv_weight):
            if reason := _no_weight(weight):
                raise ConfigError(f"format {self.name!r}: weights {weight}: {reason}")
        for activation in (self.activation, self.conv_activation):
            if activation and (reason := _no_activation(activation)):
                raise ConfigError(f"format {self.name!r}: activations {activation}: {reason}")

    def __str__(self) -> str:
        """The text of a study format, which `parse` takes."""
        parts = (self.weight, self.activation, self.conv_weight, self.conv_activation)
        return ":".join(str(part or "none") for part in parts)


def _no_weight(quantizer: Quantizer) -> str | None:
    if quantizer.granularity == "token":
        return "a token is of activations; expected tensor, channel or groupN"
    if quantizer.ranges != "static":
        return f"{quantizer.ranges} is of activations; weights are known"
    return None


def _no_activation(quantizer: Quantizer) -> str | None:
    if quantizer.granularity == "channel":
        return "a channel is of weights; expected tensor, token or groupN"
    if quantizer.granularity == "token" and quantizer.ranges != "dynamic":
        return "a token's range is known only at run time; add /dynamic"
    return None


def _read(name: str, text: str, summary: str = "") -> Format:
    """The format of a text of two parts, or of four with convolutions'."""
    parts = text.split(":")
    if len(parts) not in (2, 4):
        raise ConfigError(f"format {text!r}: expected {STUDY}; or the same again for convolutions")
    weight, activation = parse_quantizer(parts[0]), _activation(parts[1])
    if len(parts) == 2:
        return Format(name, weight, activation, weight, _of_tensor(activation), summary)
    return Format(name, weight, activation, parse_quantizer(parts[2]), _activation(parts[3]),
                  summary)  # fmt: skip


def _activation(text: str) -> Quantizer | None:
    return None if text == "none" else parse_quantizer(text)


def _of_tensor(quantizer: Quantizer | None) -> Quantizer | None:
    """The same quantizer with one scale."""
    return quantizer and replace(quantizer, granularity="tensor", group=0)


_ROWS = (
    ("w8a8", "int8/channel:uint8/tensor/asymmetric", "integer arithmetic, calibrated ranges"),
    ("w8a16", "int8/channel:none", "weights at a quarter of their size, float arithmetic"),
    ("w4a16", "int4/group64:none:int4/channel:none", "weights at an eighth, float arithmetic"),
    (
        "w4a8",
        # what ONNX Runtime's MatMulNBits computes at accuracy level 4
        "int4/group64:int8/group64/dynamic:int4/channel:uint8/tensor/asymmetric",
        "weights at an eighth, 8-bit integer arithmetic",
    ),
    (
        "w4a4",
        "int4/group64:int4/group64/dynamic:int4/group64:uint4/tensor/asymmetric",
        "4 bits everywhere; simulated where there is no 4-bit arithmetic",
    ),
    ("fp8", "e4m3/channel:e4m3/token/dynamic", "8-bit float arithmetic"),
    ("nvfp4", "e2m1/group16/scale-e4m3:e4m3/token/dynamic", "4-bit float weights, NVIDIA's scales"),
    ("mxfp4", "e2m1/group32/scale-e8m0:e4m3/token/dynamic", "4-bit float weights, OCP's MX scales"),
)

FORMATS: Mapping[str, Format] = MappingProxyType({row[0]: _read(*row) for row in _ROWS})
ALIASES: Mapping[str, str] = MappingProxyType({"fp4": "nvfp4"})


def parse(name: str) -> Format:
    """The format called `name`, or the one that a text spells out.

    A text is `<weights>:<activations>`, for convolutions the same (activations per tensor) unless
    `:<weights>:<activations>` of theirs follows; `none` leaves activations in float.

    Raises:
        ConfigError: no format has this name, or the text is no format.
    """
    known = ALIASES.get(name, name)
    if known in FORMATS:
        return FORMATS[known]
    if ":" in name:
        return _read(name, name)
    if "/" in name or re.fullmatch(r"u?int\d+|e\d+m\d+", name):
        raise ConfigError(f"format {name!r}: say what activations are: '{name}:none', or {STUDY}")
    hint = nearest_of(name, (*FORMATS, *ALIASES))
    raise ConfigError(f"format: {name!r} is unknown{hint}; or {STUDY}")


def describe(format: Format) -> dict[str, Any]:
    """A format's row in a table: its name, phrases for what is quantized how, and sizes.

    `bits_per_weight` counts the scales of groups; those of channels and tensors are a few bytes in
    all.
    """
    return {
        "name": format.name,
        "weights": phrase(format.weight),
        "activations": phrase(format.activation),
        "conv_weights": phrase(format.conv_weight),
        "conv_activations": phrase(format.conv_activation),
        "bits_per_weight": bits_per_value(format.weight),
        "conv_bits_per_weight": bits_per_value(format.conv_weight),
        "summary": format.summary,
    }


def phrase(quantizer: Quantizer | None) -> str:
    """A quantizer in words, such as `int4 in groups of 64`."""
    if quantizer is None:
        return "float"
    where = {"channel": "per output channel", "group": f"in groups of {quantizer.group}"}
    granularity = where.get(quantizer.granularity, f"per {quantizer.granularity}")
    scale = {"float32": "", "e4m3": " with e4m3 scales under one float32"}
    ranges = {"static": "", "dynamic": ", ranges at run time", "step": ", per group of steps"}
    return (
        f"{quantizer.grid}{'' if quantizer.symmetric else ' asymmetric'} {granularity}"
        f"{scale.get(quantizer.scale, f' with {quantizer.scale} scales')}"
        f"{ranges[quantizer.ranges]}"
    )


def bits_per_value(quantizer: Quantizer) -> float:
    """Bits of a code with its share of its group's scale and zero point."""
    share = block_bits(quantizer) / quantizer.group if quantizer.group else 0.0
    return quantizer.grid.bits + share


__all__ = [
    "ALIASES",
    "E2M1",
    "E4M3",
    "E5M2",
    "FORMATS",
    "INT4",
    "INT8",
    "UINT4",
    "UINT8",
    "Format",
    "Grid",
    "Quantizer",
    "bits_per_value",
    "check_group",
    "decode",
    "describe",
    "encode",
    "find_scale",
    "from_codes",
    "join_scale",
    "nearest",
    "pack",
    "parse",
    "parse_grid",
    "parse_quantizer",
    "phrase",
    "round_trip",
    "scale_of_range",
    "split_scale",
    "spread",
    "step",
    "storable",
    "stored_bits",
    "to_codes",
    "unpack",
]
