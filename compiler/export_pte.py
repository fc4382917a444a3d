"""Artifacts for ExecuTorch: one `.pte` file for each part, its float layers delegated to XNNPACK.

Made from an artifact of backend="reference", whose graphs are PyTorch's. The device runs the files
with ExecuTorch's own library and follows the plan in manifest.json; where Python and `executorch`
are, `effuse.load` does. Weights are embedded in each file, and sizes are fixed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from effuse import artifact
from effuse.backends.onnx import PartModule
from effuse.backends.reference import TorchArrays
from effuse.buckets import stored_specs
from effuse.errors import BackendError, ConfigError, InputError, require
from effuse.plan import FORECAST_INPUT, STEP_INPUT, PartSpec, ProgramSpec
from effuse.program import Part
from effuse.runtime import Run, Session
from effuse.serial import graph_from_json


def export(source: Path, goal: Path) -> dict[str, int]:
    """Write a reference artifact again for ExecuTorch; the files with their bytes.

    Raises:
        ConfigError: another back end's artifact, low-bit operators, or sizes left open.
        BackendError: ExecuTorch does not lower a part.
        ArtifactError: the artifact is damaged, or the goal cannot be written.
    """
    artifact.check_target(goal)
    opened = artifact.Opened(source)
    manifest = opened.network
    if reason := unfit(manifest):
        raise ConfigError(f"{source}: {reason}")
    with tempfile.TemporaryDirectory(prefix="effuse-") as holder:
        folder = Path(holder)
        for spec in stored_specs(manifest):
            for part, module, given in modules(spec, opened.folder):
                (folder / f"{part.name}.pte").write_bytes(lowered(part.name, module, given))
        described = {**manifest, "backend": "executorch", "export": {"format": "pte"}}
        artifact.finish(folder, described)
        artifact.save(folder, goal)
        return {each.name: each.stat().st_size for each in sorted(folder.iterdir())}


def unfit(manifest: Mapping[str, Any]) -> str | None:
    """Why an artifact has no form in ExecuTorch, or None."""
    if manifest["backend"] != "reference":
        return f"backend {manifest['backend']!r}; .pte files are made from backend='reference'"
    if manifest["native"]:
        return f"ExecuTorch has no kernels for {', '.join(manifest['native'])}; leave Quantize out"
    if manifest["program"]["bounds"] and not manifest.get("buckets"):
        return f"sizes are left open: {', '.join(manifest['program']['bounds'])}; fix them"
    return None


def modules(spec: ProgramSpec, folder: Path) -> list[tuple[PartSpec, PartModule, list[Any]]]:
    """Each part as a module with example inputs, found by running the parts in order."""
    graphs = json.loads((folder / "graphs.json").read_text(encoding="utf-8"))
    weights = require("safetensors.torch").load_file(folder / "weights.safetensors")
    values = inputs_of(spec)
    found = []
    for part in spec.parts:
        graph = graph_from_json(graphs[part.name])
        module = PartModule(Part(part.name, part.depends, graph, part.outputs), weights).eval()
        given = [values[name] for name in part.inputs]
        with torch.no_grad():
            values |= dict(zip(part.outputs, module(*given), strict=True))
        found.append((part, module, given))
    return found


def inputs_of(spec: ProgramSpec) -> dict[str, torch.Tensor]:
    """Zeros for all that parts read from outside: inputs, slots, the step and the forecast."""

    def zeros(shape: Sequence[Any], dtype: str) -> torch.Tensor:
        return torch.zeros(tuple(shape), dtype=getattr(torch, dtype))

    found = {each.name: zeros(each.shape, each.dtype) for each in spec.inputs}
    for slot in spec.plan.slots:
        found |= {name: zeros(slot.shape, slot.dtype) for name in slot.past}
    depth = max((slot.depth for slot in spec.plan.slots), default=1)
    return {**found, STEP_INPUT: zeros((1,), "int64"), FORECAST_INPUT: zeros((depth,), "float32")}


def lowered(name: str, module: PartModule, given: list[Any]) -> bytes:
    """A part as the bytes of a .pte file.

    Raises:
        BackendError: ExecuTorch does not lower it.
    """
    exir = require("executorch.exir", "executorch")
    xnnpack = require("executorch.backends.xnnpack.partition.xnnpack_partitioner", "executorch")
    try:
        exported = torch.export.export(module, tuple(given), strict=False)
        edge = exir.to_edge_transform_and_lower(
            exported, partitioner=[xnnpack.XnnpackPartitioner()]
        )
        return bytes(edge.to_executorch().buffer)
    except Exception as error:  # of no common base
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"executorch: the part {name!r} has no .pte form: {reason}") from error


def open_session(spec: ProgramSpec, folder: Path) -> Session:
    """A Session over `<part>.pte` in `folder`, in ExecuTorch's Python runtime."""
    runtime = require("executorch.runtime", "executorch").Runtime.get()
    runs = {part.name: _run(part, folder, runtime) for part in spec.parts}
    return Session(spec, runs, TorchArrays())


def _run(part: PartSpec, folder: Path, runtime: Any) -> Run:
    program = runtime.load_program(folder / f"{part.name}.pte")
    method = program.load_method("forward")

    def run(values: Mapping[str, Any]) -> Sequence[Any]:
        given = [values[name].contiguous() for name in part.inputs]
        try:
            return [each.clone() for each in method.execute(given)]
        except RuntimeError as error:
            raise InputError(f"{part.name}: ExecuTorch refused the inputs: {error}") from error

    return run
