"""Names of blocks, from the paths of the modules in them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

MOST_BLOCKS = 48  # rows that a picture of the plan has room for
WORD = re.compile(r"[^.]+(?:\.\d+)*")  # a module's name with its number: resnets.1


def block_names(paths: Sequence[str], most: int = MOST_BLOCKS) -> dict[str, str]:
    """Module path -> its block: the smallest modules of which there are not too many.

    Where the outermost modules are too many already, numbered neighbours become one block.
    """
    deepest = max((1, *(len(WORD.findall(path)) for path in paths)))
    for level in range(deepest, 0, -1):
        found = {path: ".".join(WORD.findall(path)[:level]) for path in paths}
        if len(set(found.values())) <= most:
            return found
    names = list(dict.fromkeys(found.values()))
    joined = dict(_joined(names, -(-len(names) // most)))
    return {path: joined[name] for path, name in found.items()}


def _joined(names: Iterable[str], size: int) -> Iterator[tuple[str, str]]:
    """Each name, and that of the run of up to `size` numbered neighbours that it is in."""
    for stem, group in groupby(names, lambda name: name.rstrip("0123456789")):
        run = list(group)
        for start in range(0, len(run), size):
            ends = run[start : start + size]
            last = ends[-1].removeprefix(stem)
            label = ends[0] if len(ends) == 1 else f"{ends[0]}\N{EN DASH}{last}"
            yield from ((name, label) for name in ends)
