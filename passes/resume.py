"""Finished pieces of long work in a folder, so that a build that was interrupted goes on."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from effuse.errors import PassError


class Store:
    """A folder of finished units: one safetensors file each, named by what decides its content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, folder: str) -> Store | None:
        """The store in `folder`, which is made if there is none; None for an empty name.

        Raises:
            PassError: it cannot be made.
        """
        if not folder:
            return None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PassError(
                f"resume: expected a folder that can be written, came {folder!r} "
                f"({error.strerror}); name another, or none"
            ) from error
        return cls(Path(folder))

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """A finished unit; None if it is not there or its file is damaged."""
        try:
            return load_file(self._path(key))
        except (FileNotFoundError, SafetensorError):
            return None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a finished unit; its file is there as a whole or not at all."""
        with tempfile.TemporaryDirectory(prefix=".writing.", dir=self.folder) as holder:
            staged = Path(holder) / "unit"
            save_file({name: each.contiguous() for name, each in tensors.items()}, staged)
            staged.replace(self._path(key))


def key_of(*data: Any) -> str:
    """The SHA-256 of tensors, of what holds them, and of plain values: what decides a result."""
    hash = hashlib.sha256()
    _feed(hash, data)
    return hash.hexdigest()


def _feed(hash: Any, data: Any) -> None:
    """Take tensors, and what holds them, into a hash."""
    if isinstance(data, Tensor):
        hash.update(f"{data.dtype} {tuple(data.shape)}".encode())
        hash.update(data.detach().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(data, Mapping):
        for name, value in data.items():
            hash.update(name.encode())
            _feed(hash, value)
    elif isinstance(data, list | tuple):
        for value in data:
            _feed(hash, value)
    else:
        hash.update(repr(data).encode())
