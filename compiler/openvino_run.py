"""Runs the parts of an OpenVINO artifact on the CPU (imports no torch).

The parts are ONNX files, which OpenVINO reads as they are; their weights are mapped from the one
file that all parts share. Each part repacks what its kernels want for itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from effuse.arrays import real_pairs
from effuse.errors import ArtifactError, BackendError, InputError, require
from effuse.plan import PartSpec, ProgramSpec
from effuse.runtime import Run, Session
from effuse.tensor_file import open_tensors, read_tensor

DEVICE, EXTRA = "CPU", "openvino"
WEIGHTS = "weights.safetensors"
SETTINGS = "openvino.json"
LAYERS = ("Convolution", "FullyConnected", "MatMul")
PRECISIONS = ("f32", "bf16")
HINTS: Mapping[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}


@dataclass(frozen=True)
class Settings:
    """What OpenVINO would choose for itself, and does here as the artifact says.

    Args:
        precision: of floats; by itself it takes bfloat16 wherever the processor has it.
        groups: by part, the size of the groups in which inputs of linear layers on weights of few
            bits are rounded to 8 bits at run time; by itself it does that everywhere.
    """

    precision: str = "f32"
    groups: Mapping[str, int] = field(default_factory=dict)

    def of(self, part: str) -> dict[str, Any]:
        """OpenVINO's own names and values."""
        return {
            **HINTS,
            "INFERENCE_PRECISION_HINT": self.precision,
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": self.groups.get(part, 0),
        }


def open_session(
    spec: ProgramSpec, folder: Path, *, threads: int = 0, providers: Sequence[str] = ()
) -> Session:
    """A Session over `<part>.onnx` in `folder`, with the settings that were written beside them.

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
    core, settings = require("openvino", EXTRA).Core(), read_settings(folder)
    runs = {}
    for part in spec.parts:
        chosen = {**settings.of(part.name), "INFERENCE_NUM_THREADS": threads}
        compiled = compile_part(core, folder / f"{part.name}.onnx", chosen)
        runs[part.name] = _run(part, compiled, folder)
    return Session(spec, runs)


def write_settings(folder: Path, settings: Settings) -> None:
    """Write `openvino.json`."""
    text = json.dumps(asdict(settings), sort_keys=True)
    (folder / SETTINGS).write_text(text + "\n", encoding="utf-8")


def read_settings(folder: Path) -> Settings:
    """The settings of an artifact.

    Raises:
        ArtifactError: the file is missing, or says something else.
    """
    try:
        found = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        groups = {str(part): int(size) for part, size in found["groups"].items()}
        return Settings(PRECISIONS[PRECISIONS.index(found["precision"])], groups)
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{SETTINGS}: missing or damaged: {error}") from None


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
        feed = {name: real_pairs(given[name]) for name in names}
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
