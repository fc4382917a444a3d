"""One safetensors file for the weights of many ONNX models, referenced as external data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from effuse.errors import require
from effuse.resume import Journal
from effuse.tensor_file import Stored, write_tensors

INLINE_BYTES = 1024  # smaller tensors stay inside the model
KEY = "effuse.key"  # of a tensor that is read when it is written: what decides its bytes

DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float64": "F64",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "bool": "BOOL",
    "float8_e4m3fn": "U8",
    "int4": "U8",  # two in a byte
    "float4_e2m1fn": "U8",
}


class Store:
    """Collects the large initializers of models, each content once, by its SHA-256.

    Those that are inputs too are stored whatever their size, each under its own name.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, tuple[str, Any]] = {}  # digest -> name, ir tensor
        self._uses: list[tuple[Any, str]] = []  # initializer value, digest
        self._offsets: dict[str, tuple[int, int]] = {}
        self._file = ""

    def take(self, model: Any) -> None:
        """Note the large initializers of an onnx_ir model."""
        for name, value in sorted(model.graph.initializers.items()):
            tensor = value.const_value
            swappable = value.is_graph_input()
            if tensor is None or (tensor.nbytes < INLINE_BYTES and not swappable):
                continue
            data = tensor.metadata_props.get(KEY, "").encode() or tensor.tobytes()
            kind = f"{tensor.dtype.name}{tuple(tensor.shape)}{name if swappable else ''}"
            digest = hashlib.sha256(kind.encode() + data).hexdigest()
            taken = {known for known, _ in self._tensors.values()}
            unique = name if name not in taken else f"{name}.{digest[:8]}"
            self._tensors.setdefault(digest, (unique, tensor))
            self._uses.append((value, digest))

    def add(self, name: str, tensor: Any) -> None:
        """Store an ir tensor that no model reads."""
        digest = hashlib.sha256(name.encode() + tensor.tobytes()).hexdigest()
        self._tensors[digest] = (name, tensor)

    def write(
        self, path: Path, journal: Journal | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:  # fmt: skip
        """Write the file, one tensor at a time; what the journal has is there already."""
        order = sorted(self._tensors.items(), key=lambda item: item[1][0])
        stored = [_stored(name, digest, tensor) for digest, (name, tensor) in order]
        offsets = write_tensors(path, stored, journal, progress)
        self._offsets = {digest: offsets[name] for digest, (name, _) in order}
        self._file = path.name

    def save(self, model: Any, path: Path) -> None:
        """Write a model whose large initializers point into the file."""
        ir = require("onnx_ir")
        for value, digest in self._uses:
            if value.graph is not model.graph:
                continue
            offset, size = self._offsets[digest]
            inner = value.const_value
            value.const_value = ir.ExternalTensor(
                self._file, offset, size, inner.dtype, shape=inner.shape, name=inner.name,
                base_dir=path.parent,
            )  # fmt: skip
        proto = ir.to_proto(model)
        path.write_bytes(proto.SerializeToString(deterministic=True))


def _stored(name: str, key: str, tensor: Any) -> Stored:
    shape = tuple(map(int, tensor.shape)) if tensor.dtype.bitwidth >= 8 else (tensor.nbytes,)
    kind = DTYPES[str(np.dtype(tensor.dtype.numpy()))]
    return Stored(name, kind, shape, tensor.nbytes, key, tensor.tobytes)
