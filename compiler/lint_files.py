"""Reading what is linted: an ONNX file, a model in memory, the files of an artifact."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from effuse.artifact import MANIFEST, Opened, is_pipeline
from effuse.errors import ArtifactError, require
from effuse.lint_onnx import ONNX_DOMAINS, Model, Version

LARGEST = (1 << 31) - 1  # bytes of a protobuf message


def read(model: Any, version: Version) -> Model:
    """A model, indexed: from a path, an onnx.ModelProto or an onnx_ir.Model.

    Raises:
        ArtifactError: the file is missing, damaged or no ONNX model.
    """
    onnx, ir = require("onnx"), require("onnx_ir")
    if isinstance(model, ir.Model):
        return Model(typed(model.clone()), version)
    if isinstance(model, onnx.ModelProto):
        return Model(typed(deserialized(model, "the model")), version, None, model)
    if not isinstance(model, (str, os.PathLike)):
        kind = type(model).__name__
        raise ArtifactError(f"model: expected a path, onnx.ModelProto or onnx_ir.Model, got {kind}")
    path = Path(model)
    proto = load(path)
    made = deserialized(proto, str(path))
    ir.external_data.set_base_dir(made.graph, path.parent)
    check_external(made, path)
    return Model(typed(made), version, path, proto)


def load(path: Path) -> Any:
    """The onnx.ModelProto of a file, its external data left where they are.

    Raises:
        ArtifactError: there is no such file, or it holds no whole ONNX model.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ArtifactError(
                f"{path}: {size / 1e9:.2f} GB, and no reader takes 2 GiB and more; save the model "
                "with its weights as external data"
            )
        data = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror or error}") from None
    if not data:
        raise ArtifactError(f"{path}: the file is empty; export or copy it again")
    proto = require("onnx").ModelProto()
    try:
        proto.ParseFromString(data)
    except require("google.protobuf.message").DecodeError as error:
        raise ArtifactError(
            f"{path}: no ONNX model, or one that is cut off ({error}); export or copy it again"
        ) from None
    return proto


def deserialized(proto: Any, name: str) -> Any:
    """A proto as an onnx_ir model.

    Raises:
        ArtifactError: it has no graph, or its operators' version is unknown.
    """
    check_opsets(proto, name)
    try:
        return require("onnx_ir").serde.deserialize_model(proto)
    except Exception as error:  # whatever a malformed graph makes the library raise
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ArtifactError(f"{name}: the graph is malformed: {reason}") from error


def check_opsets(proto: Any, name: str) -> None:
    """See that a model says which operators it means.

    Raises:
        ArtifactError: it names none, a version from the future, or uses a domain without naming it.
    """
    if not proto.HasField("graph") or not proto.opset_import:
        raise ArtifactError(f"{name}: no ONNX model: it has no graph, or names no opset")
    opsets = {each.domain: each.version for each in proto.opset_import}
    newest = require("onnx").defs.onnx_opset_version()
    asked = max(opsets.get(domain, 0) for domain in ONNX_DOMAINS)
    if asked > newest:
        raise ArtifactError(
            f"{name}: opset {asked} is unknown; the onnx library here knows up to {newest}: update "
            "it, or export to an older opset"
        )
    used = {node.domain for node in proto.graph.node} - set(ONNX_DOMAINS)
    if unknown := sorted(used - set(opsets)):
        raise ArtifactError(
            f"{name}: operators of the domain {unknown[0]!r}, which is not imported"
        )


def check_external(model: Any, path: Path) -> None:
    """See that every file of external data is there; a rule names those of other folders.

    Raises:
        ArtifactError: one is missing.
    """
    external = require("onnx_ir").ExternalTensor
    tensors = (v.const_value for g in model.graphs() for v in g.initializers.values())
    for tensor in tensors:
        if not isinstance(tensor, external):
            continue
        location = PurePath(str(tensor.location))
        inside = not location.is_absolute() and ".." not in location.parts
        if inside and not Path(tensor.path).is_file():
            raise ArtifactError(
                f"{path}: its external data {str(tensor.location)!r} are missing; copy them into "
                "the model's folder"
            )


def typed(model: Any) -> Any:
    """The model with the types and shapes that ONNX infers; it is changed."""
    passes = require("onnx_ir.passes.common")
    logger = logging.getLogger("onnx_ir.passes.common.shape_inference")
    level = logger.level
    logger.setLevel(logging.ERROR)  # where inference fails, the rule `valid` says why
    try:
        return passes.ShapeInferencePass(check_type=False, strict_mode=False)(model).model
    finally:
        logger.setLevel(level)


@contextmanager
def opened(path: Path) -> Iterator[tuple[Path, ...]]:
    """The ONNX files that a path stands for: itself, or those of an artifact's folder or zip.

    Raises:
        ArtifactError: it is missing, an artifact that is damaged, or has none.
    """
    if not path.is_dir() and not zipfile.is_zipfile(path):
        yield (path,)
        return
    whole = is_pipeline(path)
    known = whole or path.is_file() or (path / MANIFEST).is_file()
    holder = Opened(path) if known else None
    files = "*/*.onnx" if whole else "*.onnx"
    found = tuple(sorted((holder.folder if holder else path).glob(files)))
    if not found:
        raise ArtifactError(f"{path}: no ONNX file in it; compile with --backend onnx")
    yield found
