"""Weights that stay in files, for networks that are larger than memory.

A FileWeights reads a tensor when it is asked for and forgets it again. What passes put in goes to a
temporary file without a name, which the system removes with the process, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from effuse.errors import ConfigError, InputError
from effuse.tensor_file import Entry, open_tensors

Weights = Mapping[str, Tensor]
WeightStore = MutableMapping[str, Tensor]
SPILL_BYTES = 1 << 16  # smaller tensors stay in memory
FILE = "diffusion_pytorch_model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a file, how it is stored there, and the dtype it is read as."""

    file: Path | IO[bytes]
    offset: int
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype

    def read(self) -> Tensor:
        """A tensor of its own."""
        count = math.prod(self.shape) * self.stored.itemsize
        if isinstance(self.file, Path):
            raw = np.fromfile(self.file, np.uint8, count, offset=self.offset)
        else:
            self.file.seek(self.offset)
            raw = np.fromfile(self.file, np.uint8, count)
        return torch.from_numpy(raw).view(self.stored).reshape(self.shape).to(self.dtype)

    def peek(self) -> Tensor:
        """Shape and dtype only, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class FileWeights(MutableMapping[str, Tensor]):
    """Tensors by name, those of 64 kB and more in files; used as a dict of tensors is."""

    def __init__(self, held: Mapping[str, Tensor | Place], spill: IO[bytes] | None = None) -> None:
        self._held = dict(held)
        self._spill = spill or tempfile.TemporaryFile(prefix="effuse-")  # noqa: SIM115

    def __getitem__(self, name: str) -> Tensor:
        found = self._held[name]
        return found.read() if isinstance(found, Place) else found

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._held[name] = self._written(tensor) if tensor.nbytes >= SPILL_BYTES else tensor

    def __delitem__(self, name: str) -> None:
        del self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    def peek(self, name: str) -> Tensor:
        """The tensor's shape and dtype, read from no file."""
        found = self._held[name]
        return found.peek() if isinstance(found, Place) else found

    def copy(self) -> FileWeights:
        """Another that changes apart from this one; the files are shared."""
        return FileWeights(self._held, self._spill)

    def only(self, names: Collection[str]) -> FileWeights:
        """A copy with these names."""
        kept = {name: found for name, found in self._held.items() if name in names}
        return FileWeights(kept, self._spill)

    def _written(self, tensor: Tensor) -> Place:
        raw = tensor.detach().cpu().contiguous()
        try:
            offset = self._spill.seek(0, 2)
            self._spill.write(raw.flatten().view(torch.uint8).numpy().data)
            self._spill.flush()
        except OSError as error:
            raise ConfigError(
                f"stream: the temporary file in {tempfile.gettempdir()} cannot be written "
                f"({error.strerror or error}); let TMPDIR name a folder with more room"
            ) from error
        trim_heap()
        return Place(self._spill, offset, tuple(raw.shape), raw.dtype, raw.dtype)


def trim_heap() -> None:
    """Hand freed memory back to the system.

    glibc keeps blocks under 32 MB: between small ones that live on, gigabytes of holes remain.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def peek(weights: Weights, name: str) -> Tensor:
    """A weight of which only shape and dtype are wanted."""
    return weights.peek(name) if isinstance(weights, FileWeights) else weights[name]


def copied(weights: Weights) -> MutableMapping[str, Tensor]:
    """A copy to change, of the same kind."""
    return weights.copy() if isinstance(weights, FileWeights) else dict(weights)


def only(weights: Weights, names: Collection[str]) -> MutableMapping[str, Tensor]:
    """A copy with these names, of the same kind."""
    if isinstance(weights, FileWeights):
        return weights.only(names)
    return {name: tensor for name, tensor in weights.items() if name in names}


def open_folder(folder: Path, dtype: torch.dtype) -> FileWeights:
    """The weights that save_pretrained wrote to a folder, floating point read as `dtype`.

    Raises:
        ConfigError: there are none, or a file is damaged.
    """
    index = folder / f"{FILE}.index.json"
    names = {FILE}
    if index.exists():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index}: no index of weights ({error}); copy it again") from error
    found: dict[str, Place] = {}
    for name in sorted(names):
        path = folder / Path(name).name
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected what save_pretrained writes")
        found |= places(path, dtype)
    return FileWeights(found)


def places(path: Path, dtype: torch.dtype) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies.

    Raises:
        ConfigError: the file is no safetensors file, or damaged.
    """
    try:
        entries = open_tensors(path).entries
    except InputError as error:
        raise ConfigError(str(error)) from error
    return {name: _place(path, name, entry, dtype) for name, entry in entries.items()}


def _place(path: Path, name: str, entry: Entry, dtype: torch.dtype) -> Place:
    if entry.dtype not in DTYPES:
        raise ConfigError(
            f"{path}: {name!r} is stored as {entry.dtype}; expected one of {', '.join(DTYPES)}"
        )
    stored = DTYPES[entry.dtype]
    read_as = dtype if stored.is_floating_point else stored
    return Place(path, entry.start, entry.shape, stored, read_as)
