"""Artifacts in ORT format, for ONNX Runtime's small builds: models optimized when exported.

A session on `<part>.ort` starts without rewriting its graph, and a build of ONNX Runtime with
nothing but the operators in `required_operators.config` runs it. The format embeds weights: what
two parts share is stored twice (SessionOptions can replace an embedded tensor when a session
starts, but not leave it out of the file), and weights that ONNX Runtime only stores in few bits are
float in it. The manifest says how many bytes that takes.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effuse import artifact
from effuse.buckets import stored_specs
from effuse.devices import CPU, Device, device_of
from effuse.errors import ArtifactError, ConfigError, require
from effuse.ort import session_options
from effuse.plan import ProgramSpec
from effuse.tensor_file import open_tensors

OPERATORS = "required_operators.config"
WEIGHTS = "weights.safetensors"
BLOCKED_LAYOUT = "NchwcTransformer"  # blocks of the exporting machine's vectors: not portable
BUILD_ONLY = (OPERATORS,)  # files that the device does not get
SPARE = 1.1  # norms, biases, scales, and the layers that stay in float
LARGEST = 5


@dataclass(frozen=True)
class Exported:
    """What was written, and its sizes in bytes."""

    path: Path
    files: Mapping[str, int]
    shared: int  # models and weights of the artifact, whose parts share what they can

    @property
    def total(self) -> int:
        """What the device stores."""
        return sum(size for name, size in self.files.items() if name not in BUILD_ONLY)

    @property
    def duplicated(self) -> int:
        """Bytes that the format adds."""
        return sum(size for name, size in self.files.items() if name.endswith(".ort")) - self.shared


def export(source: Path, goal: Path, budget: int | None = None) -> Exported:
    """Write an ONNX artifact again in ORT format, as an artifact that `effuse.load` reads.

    Args:
        source: the artifact, built with backend="onnx".
        goal: the folder to write, or a zip if it ends in .zip.
        budget: most bytes of all files for the device; None: any number.

    Raises:
        ConfigError: the artifact is of another back end, or the files exceed the budget; nothing
            is written then.
        ArtifactError: the artifact is damaged, or the goal cannot be written.
    """
    artifact.check_target(goal)
    opened = artifact.Opened(source)
    manifest, specs = opened.network, _specs(opened.network, source)
    with tempfile.TemporaryDirectory(prefix="effuse-") as holder:
        folder = Path(holder)
        convert(specs, opened.folder, folder, device_of(manifest["target"]))
        if any(
            each.down for each in specs[0].adapters
        ):  # LoRAs are added to factors read from there
            (folder / WEIGHTS).write_bytes((opened.folder / WEIGHTS).read_bytes())
        shared = sum(_sizes(opened.folder, ".onnx", WEIGHTS).values())
        written = Exported(goal, _sizes(folder), shared)
        described = {"format": "ort", "shared": shared, "duplicated": written.duplicated}
        artifact.finish(folder, {**manifest, "export": described})
        written = Exported(goal, _sizes(folder), shared)
        check_budget(written, budget, opened.folder, manifest)
        artifact.save(folder, goal)
    return written


def _specs(manifest: Mapping[str, Any], source: Path) -> list[ProgramSpec]:
    if manifest["backend"] != "onnx" or "export" in manifest:
        built = "ORT format already" if "export" in manifest else f"backend {manifest['backend']!r}"
        raise ConfigError(f"{source}: {built}; ORT format is made from backend='onnx'")
    return stored_specs(manifest)


def _sizes(folder: Path, *ends: str) -> dict[str, int]:
    paths = sorted(folder.iterdir())
    return {each.name: each.stat().st_size for each in paths if each.name.endswith(ends or ("",))}


def convert(specs: Sequence[ProgramSpec], source: Path, folder: Path, device: Device) -> None:
    """Write `<part>.ort` for each part, and the operators that all of them need with their types.

    Raises:
        ArtifactError: onnxruntime does not convert a part.
    """
    runtime = require("onnxruntime")
    made = []
    for part in (part for spec in specs for part in spec.parts):
        path = folder / f"{part.name}.ort"
        options = session_options(device)
        options.optimized_model_filepath = str(path)
        options.add_session_config_entry("session.save_model_format", "ORT")
        if not device.is_cpu:  # another provider must still find the operators that it knows
            options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        model = str(source / f"{part.name}.onnx")
        try:
            runtime.InferenceSession(model, options, providers=[CPU],
                                     disabled_optimizers=[BLOCKED_LAYOUT])  # fmt: skip
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ArtifactError(
                f"{part.name}.onnx: not convertible to ORT format: {error}"
            ) from error
        made.append(path)
    write_operators(made, folder / OPERATORS)


def write_operators(models: Sequence[Path], path: Path) -> None:
    """Write the operators of models, with their types, as builds of ONNX Runtime read them."""
    tool = require("onnxruntime.tools.ort_format_model")
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)
    tool.create_config_from_models(models, path, True)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("#")]  # they name this machine's folders
    path.write_text("".join(kept), encoding="utf-8")


def check_budget(
    written: Exported, budget: int | None, source: Path, manifest: Mapping[str, Any]
) -> None:
    """See that the files for the device fit.

    Raises:
        ConfigError: they do not; it names the largest parts and tensors, and the presets that fit.
    """
    if budget is None or written.total <= budget:
        return
    parts = _listed({name: n for name, n in written.files.items() if name.endswith(".ort")})
    fitting = [name for name, size in estimates(manifest, written).items() if size <= budget]
    way = f"by estimate {', '.join(fitting)} would fit" if fitting else "no preset would fit"
    raise ConfigError(
        f"size budget: {written.total / 1e6:.2f} MB of {budget / 1e6:.2f} MB: {parts}; "
        f"the largest tensors: {_listed(tensors(source))}; {way} (as -c of effuse compile); "
        "or prune: Prune(parameters=…)"
    )


def _listed(sizes: Mapping[str, int]) -> str:
    order = sorted(sizes.items(), key=lambda item: -item[1])[:LARGEST]
    return ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in order)


def tensors(folder: Path) -> dict[str, int]:
    """Bytes of each stored tensor of an artifact."""
    entries = open_tensors(folder / WEIGHTS).entries
    return {name: each.stop - each.start for name, each in entries.items()}


def estimates(manifest: Mapping[str, Any], written: Exported) -> dict[str, float]:
    """Bytes that the artifact would take in the presets that quantize, by their bits per weight."""
    from effuse.kernels.formats import bits_per_value, parse
    from effuse.passes import PRESETS, Cache, Quantize

    device = device_of(manifest["target"])
    counts = sum(part["parameters"] for part in manifest["parts"].values())
    stored = sum(part["weight_bytes"] for part in manifest["parts"].values())
    rest = max(0, written.total - stored)  # graphs, manifest
    formats = {
        name: each.format
        for name, passes in PRESETS.items()
        for each in passes
        if isinstance(each, Quantize) and each.format in device.formats
        and not any(isinstance(other, Cache) for other in passes)
    }  # fmt: skip
    bits = {name: bits_per_value(parse(format).weight) for name, format in formats.items()}
    return {name: rest + SPARE * counts * each / 8 for name, each in bits.items()}
