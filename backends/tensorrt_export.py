"""Writes a program's parts as ONNX for TensorRT, and the table from which engines are built."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from effuse.backends import tensorrt_builder as builder
from effuse.backends.onnx import PartModule, example, exported, open_axes, strip
from effuse.backends.tensorrt_ops import TRANSLATIONS, factor_name, prepare, retype
from effuse.errors import BackendError, require
from effuse.formula import evaluated
from effuse.graph import clone, inputs, value_of
from effuse.onnx_store import Store
from effuse.plan import factor_axes
from effuse.program import Part, Program
from effuse.specialise import proportional
from effuse.weights import copied

WEIGHTS = "weights.safetensors"
SCRIPT, COMMANDS = "build_engines.py", "trtexec.txt"

Progress = Any


def export(
    program: Program, folder: Path, progress: Progress, half: bool = False
) -> dict[str, Any]:
    """Write `<part>.onnx` for every part, the weights of all, and the table; the table.

    With `half` the parts compute in float16, and take and give what they did.

    Raises:
        BackendError: an op has no ONNX form.
    """
    store = Store()
    models = {}
    padded, factors = with_capacity(program), set(factor_axes(program.adapters))
    for number, part in enumerate(program.parts):
        progress("export to ONNX", number, len(program.parts))
        models[part.name] = export_part(part, padded, factors, half)
        store.take(models[part.name])
    for name in sorted(adapter_weights(program)):
        tensor = program.weights[name].contiguous()
        store.add(name, require("onnx_ir.tensor_adapters").TorchTensor(tensor, name=name))
    store.write(folder / WEIGHTS)
    for name, model in models.items():
        store.save(model, folder / f"{name}.onnx")
    progress("export to ONNX", len(program.parts), len(program.parts))
    table = describe(program, models, folder)
    text = json.dumps(table, indent=1, sort_keys=True) + "\n"
    (folder / builder.TABLE).write_text(text, encoding="utf-8")
    (folder / SCRIPT).write_text(inspect.getsource(builder), encoding="utf-8")
    lines = [builder.command(name, table) for name in table["parts"]]
    (folder / COMMANDS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def export_part(
    part: Part, weights: Mapping[str, torch.Tensor], factors: set[str], half: bool = False
) -> Any:
    """One part as an onnx_ir model; the stored forms of `factors` keep their names."""
    graph, _ = clone(part.graph)
    own = copied(weights)
    prepare(graph, own, half)
    lowered = Part(part.name, part.depends, graph, part.outputs)
    places = inputs(graph)
    module = PartModule(lowered, own).eval()
    model = exported(
        part, module, [example(node) for node in places], [open_axes(node) for node in places],
        translations=TRANSLATIONS, reader="tensorrt",
    )  # fmt: skip
    retype(model)
    strip(model, {initializer for name in factors if (initializer := stored_factor(model, name))})
    return model


def stored_factor(model: Any, name: str) -> str | None:
    """What the stored form of a factor is called in a model, in whatever type; None without one."""
    wanted = PartModule.attribute(factor_name(name))
    named = (each for each in model.graph.initializers if f"{each}__".startswith(f"{wanted}__"))
    return next(named, None)


# ---- low-rank factors that LoRAs extend ----------------------------------------------------------


def adapter_weights(program: Program) -> set[str]:
    """The weights that loading a LoRA reads: the factors, and what passes have multiplied with."""
    fields = ("down", "up", "rows", "columns")
    named = {getattr(each, name) for each in program.adapters for name in fields}
    return {name for name in named if name}


def with_capacity(program: Program) -> Mapping[str, torch.Tensor]:
    """The weights, the factors with room for LoRAs: zeros up to the greatest rank.

    A refit gives an engine other numbers, not other shapes.
    """
    weights = copied(program.weights)
    for name, (axis, _) in factor_axes(program.adapters).items():
        factor = weights[name]
        extra = list(factor.shape)
        extra[axis] = program.max_rank
        weights[name] = torch.cat([factor, factor.new_zeros(extra)], axis)
    return weights


def refits(program: Program, model: Any) -> dict[str, dict[str, Any]]:
    """The factors that a part's engine takes anew: what each is called there, and how it lies."""
    found = {}
    for name, (axis, _) in sorted(factor_axes(program.adapters).items()):
        if initializer := stored_factor(model, name):
            stored = model.graph.initializers[initializer].const_value
            flat = len(stored.shape) == 2
            found[name] = {
                "initializer": initializer,
                "shape": [int(size) for size in stored.shape],
                "transposed": flat,
                "axis": 1 - axis if flat else axis,
                "dtype": str(stored.dtype.numpy()),
            }
    return found


# ---- the table -----------------------------------------------------------------------------------


def describe(program: Program, models: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the builder has to know: files, digests, profiles and what can be refitted, by part."""
    stored = digest(folder / WEIGHTS)
    return {
        "format": builder.FORMAT,
        "parts": {
            part.name: {
                "onnx": f"{part.name}.onnx",
                "digest": digest(folder / f"{part.name}.onnx", stored),
                "profile": profile(part, program),
                "refit": refits(program, models[part.name]),
            }
            for part in program.parts
        },
    }


def digest(path: Path, salt: str = "") -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256")
    found.update(salt.encode())
    return found.hexdigest()


def profile(part: Part, program: Program) -> dict[str, list[list[int]]]:
    """The least, usual and greatest sizes of the inputs that leave sizes open."""
    limits = symbol_limits(program)
    found = {}
    for node in inputs(part.graph):
        shape = value_of(node).shape
        if any(not isinstance(size, int) for size in shape):
            found[str(node.target)] = [
                [_size(size, limits, place) for size in shape] for place in range(3)
            ]
    return found


def symbol_limits(program: Program) -> dict[str, tuple[int, int]]:
    """The bounds of the symbols that recorded sizes are written with."""
    found = {}
    wanted = {item.name: item.shape for item in program.inputs}
    for part in program.parts:
        for node in inputs(part.graph):
            for name, size in zip(
                wanted.get(str(node.target), ()), value_of(node).shape, strict=False
            ):
                if isinstance(name, str):
                    symbol, factor = proportional(size)
                    low, high = program.bounds.get(name) or ends(name, program.bounds)
                    found[symbol] = (-(-low // factor), high // factor)
    return found


def ends(formula: str, bounds: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """The bounds of a size that follows from others."""
    low, high = (evaluated(formula, {name: each[place] for name, each in bounds.items()})
                 for place in range(2))  # fmt: skip
    if low is None or high is None:
        raise BackendError(
            f"tensorrt: the bounds of an input's size, {formula}, are not known; compile for known "
            "sizes, shapes=[…]"
        )
    return low, high


def _size(size: Any, limits: Mapping[str, tuple[int, int]], place: int) -> int:
    """An open size at its least (0), as in the example (1) or at its greatest (2)."""
    if isinstance(size, int):
        return size
    if place == 1:
        return int(size.node.hint)
    expression = size.node.expr
    values = {each: limits[str(each)][place // 2] for each in expression.free_symbols}
    return int(expression.subs(values))
