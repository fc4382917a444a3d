"""Figures as text, and tables of strings, for the terminal and the page."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.metrics import CEILING_DB

if TYPE_CHECKING:
    pass

Manifest = Mapping[str, Any]
Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Table:
    """A table of strings; a cell may hold several lines."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def duration(milliseconds: float) -> str:
    """A time as `240 ms` or `2.41 s`."""
    short = milliseconds < 1000
    return f"{milliseconds:.0f} ms" if short else f"{milliseconds / 1000:.2f} s"


def seconds(milliseconds: float) -> str:
    """A time in s with three digits: `6.00`, `29.1`."""
    return f"{milliseconds / 1000:#.3g}".rstrip(".")


def quantity(number: float) -> str:
    """A count with three digits: `4.03 M`."""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:g}"


def megabytes(size: float) -> str:
    """Bytes in MB (10⁶ bytes)."""
    return f"{size / 1e6:.2f}"


def gigaflops(operations: float) -> str:
    """Operations in 10⁹, three digits."""
    return f"{operations / 1e9:.3g}"


def percent(share: float, digits: int = 0) -> str:
    """A share (0 to 1) as `42 %`."""
    return f"{100 * share:.{digits}f}\N{NO-BREAK SPACE}%"


def decibels(value: float | None) -> str:
    """A ratio in dB, or in words where it is no number."""
    if value is None:
        return "–"
    if abs(value) >= CEILING_DB:
        return "equal to the bit" if value > 0 else "not finite"
    return f"{value:.1f}"


def to_decibels(value: float) -> str:
    """`to 33.1 dB`, or `to the bit`."""
    return "to the bit" if value >= CEILING_DB else f"to {value:.1f} dB"


def listed(items: Mapping[str, Any]) -> str:
    """`name value` in one line, without the empty ones."""
    found = {key: value for key, value in items.items() if value not in (None, [], "")}
    return ", ".join(f"{key} {value}" for key, value in found.items())


def counted(counts: Mapping[str, int]) -> str:
    """One line each, the most frequent first: `61 × identity`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(unbroken(f"{count} × {name}") for name, count in ordered)


def without_empty(table: Table) -> Table:
    """The table without the columns that are empty in every row."""
    keep = [any(column) for column in zip(*table.rows, strict=True)]
    rows = [tuple(itertools.compress(row, keep)) for row in table.rows]
    return Table(table.title, tuple(itertools.compress(table.columns, keep)), rows)


def unbroken(text: str) -> str:
    """Text whose units stay on the line of their figures."""
    return re.sub(r"(?<=\d) (?=ms|s\b|MB|dB|×)|(?<=×) ", "\N{NO-BREAK SPACE}", text)
