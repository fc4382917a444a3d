"""Read and write safetensors with numpy alone: a header is checked whole before a number is read.

A file is the header's size (8 bytes, little-endian), the header (JSON: by name a dtype, a shape and
the range of bytes in the data), and the data, which the ranges cover without a hole or an overlap.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from effuse.errors import InputError
from effuse.resume import Journal, room_for

HEADER_BYTES = 100 * 2**20  # the format's own limit
ALIGNMENT = 64  # bytes; the data start at a multiple of it

FLOATS = {"F16": "<f2", "BF16": "<u2", "F32": "<f4", "F64": "<f8"}
INTEGERS = {"I8": "<i1", "U8": "<u1", "I16": "<i2", "U16": "<u2", "I32": "<i4", "U32": "<u4",
            "I64": "<i8", "U64": "<u8", "BOOL": "?"}  # fmt: skip
DTYPES = FLOATS | INTEGERS

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: how it is stored, and where (bytes from the file's begin)."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorFile:
    """The checked header of a safetensors file."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def open_tensors(path: Path) -> TensorFile:
    """The names, shapes and metadata of a safetensors file.

    Raises:
        InputError: the file is missing, a pickle, no safetensors, or damaged.
    """
    try:
        with path.open("rb") as file:
            return _header(path, file)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_tensor(file: BinaryIO, entry: Entry) -> np.ndarray[Any, Any]:
    """One tensor as numpy, of the stored dtype (bfloat16 as float32).

    Raises:
        InputError: the file ends before the tensor does.
    """
    file.seek(entry.start)
    data = file.read(entry.stop - entry.start)
    if len(data) != entry.stop - entry.start:
        raise InputError(f"{file.name}: ends inside a tensor; it changed while it was read")
    array = np.frombuffer(data, DTYPES[entry.dtype]).reshape(entry.shape)
    if entry.dtype == "BF16":  # the upper half of a float32
        return (array.astype("<u4") << 16).view("<f4")
    return array


@dataclass(frozen=True)
class Stored:
    """A tensor to be written: `size` bytes that `read` gives; what decides them, hashed, `key`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    key: str
    read: Callable[[], Any]


def write_tensors(
    path: Path, tensors: Sequence[Stored], journal: Journal | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> dict[str, tuple[int, int]]:  # fmt: skip
    """Write a safetensors file, one tensor at a time in the order given.

    Returns each one's offset in the file, and its size in bytes. What the journal has stays.

    Raises:
        ArtifactError: the disk is full, or the file cannot be written.
    """
    head, places = _layout(tensors)
    end = len(head) + sum(each.size for each in tensors)
    again = journal is not None and path.exists()
    with room_for(path, end), path.open("r+b" if again else "w+b") as file:
        file.write(head)
        for number, each in enumerate(tensors, start=1):
            _put(file, each, places[each.name][0], journal)
            progress("write weights", number, len(tensors))
        file.truncate(end)
    return places


def _put(file: BinaryIO, each: Stored, offset: int, journal: Journal | None) -> None:
    """One tensor, if it is not there already."""
    if journal is not None and journal.holds(file, each.key, offset, each.size):
        return
    data = each.read()
    file.seek(offset)
    file.write(data)
    file.flush()
    if journal is not None:
        journal.note(file, each.key, offset, data)


def _layout(tensors: Sequence[Stored]) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The file's begin, and each tensor's offset in it and size."""
    header: dict[str, Any] = {}
    position = 0
    for each in tensors:
        span = [position, position + each.size]
        header[each.name] = {"dtype": each.dtype, "shape": list(each.shape), "data_offsets": span}
        position += each.size
    text = json.dumps(header, separators=(",", ":"), sort_keys=True).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    start = 8 + len(text)
    places = {name: start + value["data_offsets"][0] for name, value in header.items()}
    sizes = {each.name: each.size for each in tensors}
    return struct.pack("<Q", len(text)) + text, {n: (at, sizes[n]) for n, at in places.items()}


def _header(path: Path, file: BinaryIO) -> TensorFile:
    size = path.stat().st_size
    start, brace = file.read(8), file.read(1)  # a header's size may read like a pickle's begin
    if path.suffix.lower() in PICKLES or (brace != b"{" and start.startswith(PICKLE_STARTS)):
        raise InputError(
            f"{path}: expected a .safetensors file, got a pickle, which can run code and is never "
            "read; convert it once, where it may be trusted: "
            "safetensors.torch.save_file(torch.load(path, weights_only=True), 'out.safetensors')"
        )
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
    if not 2 <= length <= min(size - 8, HEADER_BYTES):
        raise InputError(
            f"{path}: not a safetensors file, or cut short: {size} bytes, of which its header "
            f"would take {length}; download it again, or convert it to safetensors"
        )
    header = _parse(path, brace + file.read(length - 1))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "__metadata__ is not an object of strings")
    base = 8 + length
    entries = {name: _entry(path, name, value, base) for name, value in header.items()}
    _check_cover(path, entries, base, size)
    return TensorFile(path, entries, {str(k): str(v) for k, v in metadata.items()})


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):  # json keeps the last one silently
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{path}: its header names {twice!r} twice")
        return found

    try:
        header = json.loads(text, object_pairs_hook=unique)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise _damaged(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _damaged(path, "its header is not a JSON object")
    return header


def _entry(path: Path, name: str, value: Any, base: int) -> Entry:
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, stop]} if all(
            type(number) is int and number >= 0 for number in (*shape, start, stop)
        ):
            entry = Entry(dtype, tuple(shape), base + start, base + stop)
        case _:
            raise _damaged(path, f"the header's entry {name!r} lacks a dtype, shape or range")
    if dtype in DTYPES and stop - start != prod(shape) * np.dtype(DTYPES[dtype]).itemsize:
        raise _damaged(path, f"{name!r}, {dtype} {entry.shape}, in {stop - start} bytes")
    return entry


def _check_cover(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    at = base
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at or entry.stop < entry.start:
            raise _damaged(path, f"{name!r} lies at byte {entry.start - base}, not at {at - base}")
        at = entry.stop
    if at != size:
        raise _damaged(path, f"its tensors take {at - base} bytes, it holds {size - base}")


def _damaged(path: Path, what: str) -> InputError:
    return InputError(f"{path}: damaged safetensors file: {what}; download or convert it again")
