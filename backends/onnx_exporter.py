"""torch's ONNX exporter, its table of operators made once and not again for each part.

`torch.onnx.export` reads the source of some 500 functions at every call, for 0.3 to 0.9 s.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.export import ExportedProgram

OPSET = 21
INTERNALS = "torch.onnx._internal.exporter"
TAKEN = ("registry", "input_names", "output_names", "verbose", "optimize", "opset_version")


def to_onnx(
    exported: ExportedProgram, input_names: Sequence[str], output_names: Sequence[str],
    translations: Mapping[Any, Any],
) -> Any:  # fmt: skip
    """The exported program as an onnx_ir model, its ops written as `translations` say."""
    named = {"input_names": list(input_names), "output_names": list(output_names)}
    settings: dict[str, Any] = {
        **named,
        "opset_version": OPSET,
        "verbose": False,
        "optimize": False,
    }
    if takes_table():
        core = import_module(f"{INTERNALS}._core")
        table = operators(tuple(translations.items()))
        return core.export(exported, registry=table, **settings).model
    program = torch.onnx.export(
        exported, dynamo=True, custom_translation_table=dict(translations), **settings
    )
    assert program is not None
    return program.model


@cache
def takes_table() -> bool:
    """Whether this torch's exporter can be given a table; it is none of its public arguments."""
    try:
        core = import_module(f"{INTERNALS}._core")
        made = import_module(f"{INTERNALS}._registration").ONNXRegistry.from_torchlib
        taken = inspect.signature(core.export).parameters
    except (ImportError, AttributeError):
        return False
    return callable(made) and set(TAKEN) <= taken.keys()


@cache
def operators(translations: tuple[tuple[Any, Any], ...]) -> Any:
    """The exporter's table of operators, with these forms before its own."""
    registry = import_module(f"{INTERNALS}._registration").ONNXRegistry
    table = registry.from_torchlib(opset_version=OPSET)
    for target, form in translations:
        table.register_op(target, form)
    return table
