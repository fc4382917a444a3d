"""Text of graphs, and the difference of two texts in which every node has moved.

Nodes are numbered by position, so one new node renumbers all that follow. Lines are aligned without
their numbers, and then each aligned pair is checked: both have to read the same aligned nodes.
"""

from __future__ import annotations

import difflib
import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from effuse.artifact import Opened
from effuse.errors import ArtifactError, ConfigError, nearest

NUMBER = re.compile(r"%\d+")
CONTEXT = 3  # unchanged lines shown around a change
GRAPHS = "graphs.txt.gz"
STYLES = {"-": "red", "+": "green", " ": ""}


@dataclass(frozen=True)
class Row:
    """One line of a difference; `tag` is " ", "-" or "+", the places count from 1."""

    tag: str
    text: str
    left: int
    right: int


def graph_text(target: str) -> str:
    """The text of an artifact's graphs, or of a text file.

    Raises:
        ArtifactError: the target is neither.
    """
    path = Path(target)
    if path.is_dir() or path.suffix == ".zip":
        return artifact_text(Opened(path))
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such artifact or text file") from None
    except (OSError, UnicodeDecodeError):
        return artifact_text(Opened(path))


def artifact_text(opened: Opened) -> str:
    """The text of an opened artifact's graphs."""
    _ = opened.network  # a pipeline's artifact has graphs in its parts only, and is refused
    path = opened.folder / GRAPHS
    if not path.is_file():
        raise ArtifactError(f"{opened.folder}: holds no {GRAPHS}; compile it again")
    return gzip.decompress(path.read_bytes()).decode()


def sections(text: str) -> dict[str, list[str]]:
    """Part -> its lines; lines before the first heading belong to the part ""."""
    found: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if line.startswith("# "):
            name = line[2:].strip()
            found[name] = []
        elif line.strip():
            found.setdefault(name, []).append(line)
    return found


def one_part(text: str, part: str) -> str:
    """The text of one part.

    Raises:
        ConfigError: there is no such part.
    """
    found = sections(text)
    if part not in found:
        raise ConfigError(f"no part is called {part!r}{nearest(part, found)}")
    return "\n".join((f"# {part}", *found[part])) + "\n"


def difference(left: str, right: str) -> Iterator[tuple[str, list[Row]]]:
    """The hunks in which two texts differ, as (heading, rows)."""
    one, other = sections(left), sections(right)
    for part in dict.fromkeys((*one, *other)):
        for rows in hunks(align(one.get(part, []), other.get(part, []))):
            yield heading(part, rows), rows


def align(left: Sequence[str], right: Sequence[str]) -> list[Row]:
    """All lines of both sides, in order; a line that only got other numbers is unchanged."""
    one, other = ([NUMBER.sub("%", line) for line in lines] for lines in (left, right))
    codes = difflib.SequenceMatcher(None, one, other, autojunk=False).get_opcodes()
    images = _images(left, right, codes)
    known = set(images.values())
    rows: list[Row] = []
    for tag, i1, i2, j1, j2 in codes:
        if tag != "equal":
            rows += [Row("-", left[i], i + 1, j1 + 1) for i in range(i1, i2)]
            rows += [Row("+", right[j], i2 + 1, j + 1) for j in range(j1, j2)]
            continue
        for i, j in zip(range(i1, i2), range(j1, j2), strict=True):
            if _reads_the_same(left[i], right[j], images, known):
                rows.append(Row(" ", left[i], i + 1, j + 1))
            else:
                rows += [Row("-", left[i], i + 1, j + 1), Row("+", right[j], i + 2, j + 1)]
    return rows


def _images(
    left: Sequence[str], right: Sequence[str], codes: Sequence[tuple[str, int, int, int, int]]
) -> dict[str, str]:
    """Number on the left -> number on the right, for the nodes that are aligned."""
    found = {}
    for tag, i1, i2, j1, j2 in codes:
        if tag == "equal":
            for one, other in zip(left[i1:i2], right[j1:j2], strict=True):
                if one.startswith("%"):
                    found[NUMBER.findall(one)[0]] = NUMBER.findall(other)[0]
    return found


def _reads_the_same(left: str, right: str, images: dict[str, str], known: set[str]) -> bool:
    """Whether two lines read aligned nodes, or a node that went and a node that came instead."""
    numbers = zip(NUMBER.findall(left), NUMBER.findall(right), strict=True)
    return all(
        images[one] == other if one in images else other not in known for one, other in numbers
    )


def hunks(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """The runs of rows that hold changes, with context around them."""
    start = stop = 0
    for place, row in enumerate(rows):
        if row.tag == " ":
            continue
        if stop and place - CONTEXT > stop:
            yield list(rows[start:stop])
            stop = 0
        if not stop:
            start = max(0, place - CONTEXT)
        stop = min(len(rows), place + CONTEXT + 1)
    if stop:
        yield list(rows[start:stop])


def heading(part: str, rows: Sequence[Row]) -> str:
    """`@@ full -12,7 +12,9 @@`: the part, and the first line and number of lines of either side."""
    left = sum(row.tag != "+" for row in rows)
    right = sum(row.tag != "-" for row in rows)
    return f"@@ {part or 'text'} -{rows[0].left},{left} +{rows[0].right},{right} @@"


def show_difference(console: Console, left: str, right: str) -> bool:
    """Print how the graphs of two artifacts or text files differ, and tell whether they do."""
    found = list(difference(graph_text(left), graph_text(right)))
    if found:
        console.print(f"--- {left}\n+++ {right}", markup=False, style="bold")
    for title, rows in found:
        console.print(title, style="cyan", markup=False)
        show_rows(console, rows)
    if not found:
        console.print("no difference", style="dim")
    return bool(found)


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """Lines of a difference, red what went and green what came."""
    for row in rows:
        line = f"{row.tag}{row.text}"
        console.print(line, style=STYLES[row.tag], markup=False, soft_wrap=True)
