"""Runs the parts of an OpenVINO artifact on the CPU (imports no torch).

The parts are ONNX files, which OpenVINO reads as they are; their weights are mapped from the one
file that all parts share. Each part repacks what its kernels want for itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effuse.errors import ArtifactError, BackendError, InputError, require
from effuse.plan import PartSpec, ProgramSpec
from effuse.runtime import Run, Session
from effuse.tensor_file import open_tensors, read_tensor

DEVICE, EXTRA = "CPU", "openvino"
WEIGHTS = "weights.safetensors"
GROUPS = "openvino.json"  # by part: in what groups a linear layer's input is rounded, as it comes
LAYERS = ("Convolution", "FullyConnected", "MatMul")
# OpenVINO computes in bfloat16 where the processor can, and rounds the inputs of linear layers on
# weights of few bits to 8 bits; here it computes what the graph says.
SETTINGS: Mapping[str, Any] = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "PERFORMANCE_HINT": "LATENCY",
    "NUM_STREAMS": 1,
}


def open_session(
    spec: ProgramSpec, folder: Path, *, threads: int = 0, providers: Sequence[str] = ()
) -> Session:
    """A Session over `<part>.onnx` in `folder`, in float32 but for what the graphs quantize.

    Args:
        threads: of the whole; 0 lets OpenVINO choose.
        providers: are onnxruntime's; there must be none.

    Raises:
        MissingExtra: OpenVINO is not installed.
        BackendError: providers were asked for.
        ArtifactError: a file is missing or damaged, or this OpenVINO cannot read it.
    """
    if providers:
        raise BackendError(
            f"providers: {list(providers)} are onnxruntime's, and this artifact is built for "
            "OpenVINO, which runs it on the CPU; leave them out, or compile with backend='onnx'"
        )
    core, groups = require("openvino", EXTRA).Core(), read_groups(folder)
    runs = {}
    for part in spec.parts:
        settings = {
            **SETTINGS,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": groups.get(part.name, 0),
            "INFERENCE_NUM_THREADS": threads,
        }
        compiled = compile_part(core, folder / f"{part.name}.onnx", settings)
        runs[part.name] = _run(part, compiled, folder)
    return Session(spec, runs)


def read_groups(folder: Path) -> dict[str, int]:
    """By part, the size of the groups in which inputs of linear layers are rounded at run time.

    Raises:
        ArtifactError: the file says something else.
    """
    try:
        found = json.loads((folder / GROUPS).read_text(encoding="utf-8"))
        return {str(part): int(size) for part, size in found.items()}
    except (OSError, AttributeError, TypeError, ValueError) as error:
        raise ArtifactError(f"{GROUPS}: missing or damaged: {error}") from None


def compile_part(core: Any, path: Path, settings: Mapping[str, Any]) -> Any:
    """OpenVINO's compiled model of an ONNX file.

    Raises:
        ArtifactError: it cannot be read or compiled.
    """
    try:
        return core.compile_model(core.read_model(str(path)), DEVICE, dict(settings))
    except Exception as error:  # openvino's exceptions have no common base
        version = core.get_versions(DEVICE)[DEVICE].build_number.split("-")[0]
        raise ArtifactError(
            f"{path.name}: OpenVINO {version} cannot load it: {brief(error)}; if a newer one built "
            "it (versions are in manifest.json), run: pip install -U openvino"
        ) from error


def brief(error: Exception) -> str:
    """What OpenVINO says, without the places in its source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [each for each in lines if each and not each.startswith(("Exception from", "src/"))]
    return said[-1] if said else type(error).__name__


def _run(part: PartSpec, compiled: Any, folder: Path) -> Run:
    request = compiled.create_infer_request()
    names = [item.any_name for item in compiled.inputs]
    stored = _stored(folder, [name for name in names if name not in part.inputs])
    ports = [compiled.output(name) for name in part.outputs]

    def run(values: Mapping[str, Any]) -> Sequence[Any]:
        given = {**stored, **values}
        feed = {name: given[name] for name in names}
        try:
            request.infer(feed, share_inputs=True)
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise InputError(f"{part.name}: OpenVINO refused {shapes}: {brief(error)}") from error
        return [request.get_tensor(port).data.copy() for port in ports]

    return run


def _stored(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The values of swappable weights as the artifact has them."""
    if not names:
        return {}
    path = folder / WEIGHTS
    entries = open_tensors(path).entries
    with path.open("rb") as file:
        return {name: read_tensor(file, entries[name]) for name in names}


def low_bit_layers(compiled: Any) -> dict[str, tuple[int, int]]:
    """By kind of layer, how many compute in 8-bit integers and how many there are.

    Args:
        compiled: an openvino.CompiledModel; its runtime's graph tells.
    """
    found: dict[str, tuple[int, int]] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = node.get_rt_info()
        kind, kernel = (info[key].astype(str) for key in ("layerType", "primitiveType"))
        if kind in LAYERS:
            low, every = found.get(kind, (0, 0))
            found[kind] = (low + kernel.endswith("_I8"), every + 1)
    return found
