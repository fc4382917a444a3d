"""Weights that stay in files, for networks that are larger than memory.

A FileWeights reads a tensor when it is asked for and forgets it again. What passes compute from
weights alone (`derive`) is computed when it is read, straight into the artifact; what else they put
in goes to a temporary file without a name, which the system removes with the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from effuse.errors import ConfigError, InputError
from effuse.resume import Journal
from effuse.tensor_file import Entry, Stored, open_tensors, write_tensors

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
    digest: str = ""  # of the stored bytes, where they have been read

    def read(self) -> Tensor:
        """A tensor of its own."""
        found = self.mapped().to(self.dtype)
        return found.clone() if self.dtype == self.stored else found

    def mapped(self) -> Tensor:
        """The tensor as it is stored, in pages of the file that are read when they are used."""
        count = math.prod(self.shape) * self.stored.itemsize
        if not count:
            return torch.empty(self.shape, dtype=self.stored)
        # writable to this process alone: torch knows no tensor that is read only
        try:
            raw = np.memmap(self.file, np.uint8, "c", self.offset, (count,))
        except ValueError as error:
            raise ConfigError(
                f"{self.file}: ends inside a tensor; it changed while it was read, copy it again"
            ) from error
        return torch.from_numpy(raw).view(self.stored).reshape(self.shape)

    def peek(self) -> Tensor:
        """Shape and dtype only, on the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def key(self) -> str:
        """A hash of all that decides the tensor."""
        return _hash(self.digest or content(self.mapped()), self.stored, self.dtype, self.shape)


@dataclass(frozen=True, eq=False)
class Work:
    """A computation on weights alone; `latest` keeps the one result of all that was last used."""

    label: str  # the function with its options, and nothing else of the like is called so
    function: Callable[..., Any]
    sources: tuple[Tensor | Place | Made, ...]
    latest: list[Any]

    def run(self) -> Any:
        """What the function gives for the sources."""
        if not self.latest or self.latest[0] is not self:
            self.latest.clear()
            result = self.function(*map(_read, self.sources))
            self.latest[:] = (self, result)
        return self.latest[1]


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that is computed when it is read: a work's result, or one of its results."""

    work: Work
    like: Tensor  # shape and dtype, on the meta device
    index: int | None = None

    def read(self) -> Tensor:
        """The tensor."""
        if self.index is None:  # not kept: another's parts may be wanted next
            found: Tensor = self.work.function(*map(_read, self.work.sources))
            return found
        return self.work.run()[self.index]  # type: ignore[no-any-return]

    def peek(self) -> Tensor:
        """Shape and dtype only, on the meta device."""
        return self.like

    def key(self) -> str:
        """A hash of all that decides the tensor."""
        return _hash(self.work.label, self.index, *map(_key, self.work.sources))


Held = Tensor | Place | Made


def _read(held: Held) -> Tensor:
    return held if isinstance(held, Tensor) else held.read()


def _peek(held: Held) -> Tensor:
    return held if isinstance(held, Tensor) else held.peek()


def _key(held: Held) -> str:
    if isinstance(held, Tensor):
        return _hash(content(held), held.dtype, held.dtype, tuple(held.shape))
    return held.key()


def _hash(*data: Any) -> str:
    return hashlib.sha256(repr(data).encode()).hexdigest()


def content(tensor: Tensor) -> str:
    """The SHA-256 of a tensor's bytes."""
    return hashlib.sha256(as_bytes(tensor)).hexdigest()


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes; no copy is made where it lies in one piece."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


class FileWeights(MutableMapping[str, Tensor]):
    """Tensors by name, those of 64 kB and more in files; used as a dict of tensors is."""

    def __init__(
        self, held: Mapping[str, Held], spill: IO[bytes] | None = None,
        latest: list[Any] | None = None, journal: Journal | None = None,
    ) -> None:  # fmt: skip
        self._held = dict(held)
        self.journal = journal  # of what has been written of them, so that a build goes on
        self._spill = spill or tempfile.TemporaryFile(prefix="effuse-")  # noqa: SIM115
        self._latest: list[Any] = [] if latest is None else latest

    def __getitem__(self, name: str) -> Tensor:
        return _read(self._held[name])

    def __setitem__(self, name: str, tensor: Tensor | Made) -> None:
        large = isinstance(tensor, Tensor) and tensor.nbytes >= SPILL_BYTES
        self._held[name] = self._written(tensor) if large else tensor  # type: ignore[arg-type]

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
        return _peek(self._held[name])

    def key(self, name: str) -> str:
        """A hash of all that decides the tensor: of what is computed, by what from what."""
        return _key(self._held[name])

    def held(self, name: str) -> Held:
        """The tensor itself where it is in memory, or how it is come by."""
        return self._held[name]

    def copy(self) -> FileWeights:
        """Another that changes apart from this one; the files are shared."""
        return FileWeights(self._held, self._spill, self._latest, self.journal)

    def only(self, names: Collection[str]) -> FileWeights:
        """A copy with these names."""
        kept = {name: found for name, found in self._held.items() if name in names}
        return FileWeights(kept, self._spill, self._latest, self.journal)

    def alias(self, name: str, other: str) -> None:
        """Let `name` be what `other` is."""
        self._held[name] = self._held[other]

    def note_digest(self, name: str, digest: str) -> None:
        """Remember the hash of a stored tensor's bytes."""
        self._held[name] = replace(self._held[name], digest=digest)  # type: ignore[type-var]

    def work(self, sources: Sequence[str], function: Callable[..., Any], label: str) -> Work:
        """A computation on these weights as they are now."""
        return Work(label, function, tuple(self._held[name] for name in sources), self._latest)

    def write(self, path: Path, progress: Callable[[str, int, int], None]) -> None:
        """Write them all to a safetensors file, one at a time.

        Raises:
            ArtifactError: the disk is full.
        """
        stored = [self._stored(name) for name in sorted(self._held)]
        write_tensors(path, stored, self.journal, progress)

    def _stored(self, name: str) -> Stored:
        like = self.peek(name)
        kind = next(each for each, dtype in DTYPES.items() if dtype == like.dtype)
        shape = tuple(like.shape)
        return Stored(name, kind, shape, like.nbytes, self.key(name), lambda: as_bytes(self[name]))

    def _written(self, tensor: Tensor) -> Place:
        raw = as_bytes(tensor)
        try:
            offset = self._spill.seek(0, 2)
            self._spill.write(raw)
            self._spill.flush()
        except OSError as error:
            raise ConfigError(
                f"stream: the temporary file in {tempfile.gettempdir()} cannot be written "
                f"({error.strerror or error}), where {len(raw)} bytes more are needed; let TMPDIR "
                "name a folder with more room"
            ) from error
        digest = hashlib.sha256(raw).hexdigest()
        trim_heap()
        shape, dtype = tuple(tensor.shape), tensor.dtype
        return Place(self._spill, offset, shape, dtype, dtype, digest)


def derive(
    weights: WeightStore, sources: Sequence[str], function: Callable[..., Tensor], label: str
) -> Any:
    """`function` of these weights: a tensor, or of weights in files how it is made, when read.

    Args:
        label: names the function and its options; two computations are the same if their labels
            and sources are.
    """
    if not isinstance(weights, FileWeights):
        return function(*(weights[name] for name in sources))
    like = function(*(_ghost(weights, name) for name in sources))
    return Made(weights.work(sources, function, label), like)


def derive_parts(
    weights: WeightStore, sources: Sequence[str], function: Callable[..., Any], label: str
) -> tuple[Any, ...]:
    """As `derive`, of a function that gives several tensors, or None in some places."""
    if not isinstance(weights, FileWeights):
        return tuple(function(*(weights[name] for name in sources)))
    like = function(*(_ghost(weights, name) for name in sources))
    work = weights.work(sources, function, label)
    return tuple(None if each is None else Made(work, each, i) for i, each in enumerate(like))


def _ghost(weights: FileWeights, name: str) -> Tensor:
    return weights.peek(name).to("meta")


def journal_of(weights: Weights) -> Journal | None:
    """Where what is written of these weights is noted, if anywhere."""
    return weights.journal if isinstance(weights, FileWeights) else None


def stand_in(weights: Weights, name: str) -> Tensor:
    """A weight for what looks at its shape and dtype alone: memory that is never touched."""
    if not isinstance(weights, FileWeights) or isinstance(weights.held(name), Tensor):
        return weights[name]
    found = weights.peek(name)
    return torch.empty(found.shape, dtype=found.dtype)


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
        ConfigError: there are none, a shard is missing, or a file is damaged.
    """
    index = folder / f"{FILE}.index.json"
    if not index.exists():
        return FileWeights(places(_there(folder, FILE), dtype))
    table = read_index(index)
    found: dict[str, Place] = {}
    for shard in sorted(set(table.values())):
        path = _there(folder, shard)
        held = places(path, dtype)
        wanted = [name for name, home in table.items() if home == shard]
        if missing := [name for name in wanted if name not in held]:
            raise ConfigError(
                f"{path}: {len(missing)} of the {len(wanted)} tensors that {index.name} expects in "
                f"it are not there, such as {missing[0]!r}; copy the folder again"
            )
        found |= {name: held[name] for name in wanted}
    return FileWeights(found)


def read_index(index: Path) -> dict[str, str]:
    """Of an index of shards, the tensors' names and the file that each is in.

    Raises:
        ConfigError: it is damaged, or names a file outside its folder.
    """
    try:
        table = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        found = {str(name): str(shard) for name, shard in table.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: no index of weights ({error}); copy it again") from error
    for shard in found.values():
        if Path(shard).name != shard:
            raise ConfigError(f"{index}: names {shard!r}, which is not in its folder")
    return found


def _there(folder: Path, name: str) -> Path:
    """A file of the folder.

    Raises:
        ConfigError: it is missing; with what is there instead.
    """
    path = folder / name
    if not path.is_file():
        others = sorted(each.name for each in folder.glob("*.safetensors"))
        there = f"; there are {', '.join(others[:4])}" if others else ""
        raise ConfigError(
            f"{path}: no such file; expected what save_pretrained writes{there}; copy the folder "
            "again, with all its shards"
        )
    return path


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
