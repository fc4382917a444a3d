"""What the verbs share: consoles, sizes for people, `key=value` arguments, files written whole."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from effuse.errors import ArtifactError, EffuseError

PLAIN_WIDTH = 120  # columns, where there is no terminal to ask
LIBRARIES = ("numpy", "onnxruntime", "openvino", "torch", "onnx", "onnxscript", "diffusers",
             "typer")  # fmt: skip


def out() -> Console:
    """Standard output: colours and the window's width on a terminal, plain text elsewhere."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def complain(error: EffuseError) -> None:
    """One message in red on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"[red bold]error:[/] [red]{escape(str(error))}[/]")
    if getattr(error, "__notes__", None):
        console.print("add --debug to see where in the graph", style="dim")


def table(*columns: str, right: Sequence[str] = ()) -> Table:
    """A table with these columns, those in `right` aligned to the right."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    for name in columns:
        made.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return made


def size_text(count: float) -> str:
    """Bytes as `812 B`, `1.5 kB`, `36.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count_text(count: float) -> str:
    """A count as `812`, `1.5 k`, `36.2 M`, `11.9 G`."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.1f} {unit}" if unit else f"{count:.0f}"
        count /= 1000
    return f"{count:.1f} T"


def shape_text(shape: Sequence[Any]) -> str:
    """`2x3x32x32`, `batch x3x32x32` with open sizes by name, and `scalar` for no dimensions."""
    return "×".join(str(size) for size in shape) or "scalar"


def pairs(given: Sequence[str], option: str) -> dict[str, str]:
    """`key=value` arguments as a mapping; anything else is wrong usage."""
    found = {}
    for item in given:
        key, equals, value = item.partition("=")
        if not (key and equals and value):
            raise typer.BadParameter(f"{option}: expected name=value, got {item!r}")
        found[key.strip()] = value.strip()
    return found


def values(given: Sequence[str], option: str) -> dict[str, Any]:
    """`key=value` arguments, the values as JSON where they are, else as text."""
    return {key: _value(text) for key, text in pairs(given, option).items()}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def ranges(given: Sequence[str], option: str) -> dict[str, tuple[int, int]]:
    """`batch=1:8` arguments as bounds."""
    found = {}
    for key, text in pairs(given, option).items():
        low, _, high = text.partition(":")
        if not (low.isdecimal() and high.isdecimal() and int(low) <= int(high)):
            raise typer.BadParameter(f"{option}: expected {key}=low:high, got {key}={text}")
        found[key] = (int(low), int(high))
    return found


def sizes(given: Sequence[str], option: str) -> dict[str, int]:
    """`batch=4` arguments as numbers."""
    found = pairs(given, option)
    for key, text in found.items():
        if not text.isdecimal():
            raise typer.BadParameter(f"{option}: expected {key}=number, got {key}={text}")
    return {key: int(text) for key, text in found.items()}


def shapes(given: Sequence[str], option: str) -> list[dict[str, int]]:
    """`height=64,width=96` arguments as numbers."""
    return [sizes([each.strip() for each in text.split(",")], option) for text in given]


def scaled(given: Sequence[str]) -> dict[Path, float]:
    """`style.safetensors:0.8` arguments as files with their scales, 1 where none is given."""
    found = {}
    for text in given:
        name, _, scale = text.rpartition(":")
        try:
            found[Path(name or text)] = float(scale) if name else 1.0
        except ValueError:  # the colon belongs to the name
            found[Path(text)] = 1.0
    return found


def numbers(text: str, option: str) -> list[float]:
    """`999,899,…` as numbers, whole ones as int."""
    try:
        found = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = []
    if not found:
        message = f"{option}: expected numbers separated by commas, got {text!r}"
        raise typer.BadParameter(message)
    whole = all(number.is_integer() for number in found)
    return [int(number) for number in found] if whole else found


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when all of it is written.

    Raises:
        ArtifactError: the place cannot be written.
    """
    check_place(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as holder:
        staged = Path(holder) / path.name
        try:
            yield staged
            staged.replace(path)
        except OSError as error:
            raise ArtifactError(f"{path}: cannot be written: {error.strerror or error}") from error


def check_place(path: Path | None) -> None:
    """Refuse a place that cannot be written, before any work is done.

    Raises:
        ArtifactError: its folder does not exist or may not be written, or it is itself a folder.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ArtifactError(
            f"{path}: the folder {str(path.parent)!r} does not exist; create it first"
        )
    if path.is_dir():
        raise ArtifactError(f"{path}: a folder is there; choose another path")
    if not os.access(path.parent, os.W_OK):
        raise ArtifactError(f"{path}: no permission to write into {str(path.parent)!r}")


def versions() -> dict[str, str]:
    """Python's version, and those of the libraries that are installed."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
