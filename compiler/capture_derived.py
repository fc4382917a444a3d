"""Sizes of inputs that follow from those that people name: a rotary table's rows are a latent's
tokens.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from itertools import product
from typing import Any

from sympy import Eq
from torch import fx
from torch.export import ExportedProgram

from effuse.capture_checks import check_ranges, size_steps
from effuse.derived import conditions, equalities
from effuse.errors import CaptureError


def derived_sizes(graph: fx.Graph, symbols: Mapping[str, str]) -> dict[str, str]:
    """torch's symbol -> what it has to equal: `frames * (height // 2) * (width // 2)`.

    Args:
        symbols: torch's symbol -> the person's word, of the sizes that have one.
    """
    return {
        str(symbol): in_words(size, symbols)
        for symbol, size in equalities(graph)
        if str(symbol) not in symbols and {str(each) for each in size.free_symbols} <= set(symbols)
    }


def in_words(expression: Any, symbols: Mapping[str, str]) -> str:
    """An expression of sizes as Python, with the words for torch's symbols."""
    words = re.sub(r"\w+", lambda match: symbols.get(match[0], match[0]), str(expression))
    return ast.unparse(ast.parse(words, mode="eval"))


def checked_steps(
    exported: ExportedProgram, graph: fx.Graph, symbols: Mapping[str, str],
    dynamic: Mapping[str, tuple[int, int]],
) -> dict[str, int]:  # fmt: skip
    """For each open size, the step between those that the captured path is right for.

    Raises:
        CaptureError: the path is not right for all sizes within the bounds, in such steps.
    """
    check_ranges(exported, symbols, dynamic)
    steps = size_steps(graph, symbols, dynamic)
    check_together(graph, symbols, dynamic)
    return steps


def check_together(
    graph: fx.Graph, symbols: Mapping[str, str], dynamic: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse open sizes of which the network fixes a combination: a product of two, say.

    Raises:
        CaptureError: it does.
    """
    for guard in conditions(graph):
        places = {each: symbols.get(str(each), "") for each in guard.free_symbols}
        words = sorted(set(places.values()))  # two inputs may have a symbol each for one word
        if guard.func is not Eq or len(words) < 2 or "" in words:
            continue
        ends = (
            dict(zip(words, end, strict=True))
            for end in product(*(dynamic[word] for word in words))
        )
        if not all(guard.subs({each: end[places[each]] for each in places}) for end in ends):
            fixed = " and ".join(map(repr, words))
            raise CaptureError(
                f"dynamic: the network fixes {fixed} together (they have to meet "
                f"{in_words(guard.lhs, symbols)} = {in_words(guard.rhs, symbols)}); leave them "
                "out and compile one artifact for each size"
            )
