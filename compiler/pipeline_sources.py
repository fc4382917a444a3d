"""Where the inputs of a pipeline's components come from: two watched runs compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from effuse.errors import InputError
from effuse.pipeline_calls import labelled
from effuse.pipeline_watch import Call, Log

Array = np.ndarray[Any, Any]


@dataclass
class Pair:
    """What a pipeline did in two runs, and the recipe's constants so far."""

    first: Log
    second: Log
    folders: Mapping[tuple[str, str], str]  # of what is compiled
    texts: Mapping[str, tuple[str, str]]  # `prompt`, `negative`: as each run was given them
    guidance: float | None
    seed: int
    constants: dict[str, Array] = field(default_factory=dict)
    values: list[tuple[str, Array, Array]] = field(default_factory=list)
    read: list[tuple[int, str, Array, Array]] = field(default_factory=list)  # not among these yet

    def let_in(self, calls: int) -> None:
        """Put what was read before a call among the values, the latest first."""
        for each in [each for each in self.read if each[0] <= calls]:
            self.read = [other for other in self.read if other is not each]
            self.values.insert(0, each[1:])

    def keep(self, name: str, value: Array) -> str:
        """Keep an array by a name of its own."""
        label = f"{name}.{len(self.constants)}"
        self.constants[label] = value
        return label


def arrays(tensors: Any) -> list[Array]:
    """Tensors as numpy's, bfloat16 in float32."""
    return [(each.float() if each.dtype == torch.bfloat16 else each).numpy() for each in tensors]


def close(one: Array, other: Array) -> bool:
    """Whether two arrays are equal but for rounding."""
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-5, atol=1e-6)


def explain_all(pair: Pair, one: Call, other: Call, but: Sequence[str] = ()) -> dict[str, Any]:
    """A source for each input of a call, but for some."""
    first, second = labelled(one.arguments)[0], labelled(other.arguments)[0]
    name = ".".join(filter(None, one.key))
    return {label: explain(pair, f"{name}: {label}", *arrays((first[label], second[label])))
            for label in first if label not in but}  # fmt: skip


def explain(pair: Pair, label: str, one: Array, other: Array) -> dict[str, Any]:
    """An input's source: what is equal in both runs as it is, the rest in blocks of known values.

    Raises:
        InputError: a row of it is nothing that is known.
    """
    if one.shape != other.shape:
        raise InputError(f"{label} is of another shape with another prompt")
    deep = one.reshape(one.shape[0], -1, one.shape[-1]) if one.ndim > 1 else one.reshape(1, 1, -1)
    base, blocks = np.array(one), []
    rows = base.reshape(deep.shape)
    for row in range(len(deep)):
        pieces = (deep[row], other.reshape(deep.shape)[row])
        if close(*pieces):
            continue
        found = covered(pair, *pieces)
        if found is None:
            raise InputError(f"{label} depends on the prompt in a way that is not known")
        blocks += [{**each, "at": [row, *each["at"]]} for each in found]
        for each in found:
            top, left = each["at"]
            height, width = each.pop("size")
            rows[row, top : top + height, left : left + width] = 0
    for block in blocks:
        block.pop("size", None)
    return {"base": pair.keep("base", base), "rows": list(deep.shape), "blocks": blocks}


def covered(pair: Pair, one: Array, other: Array) -> list[dict[str, Any]] | None:
    """A matrix (tokens, features) in bands of known values side by side, above each other."""
    found: list[dict[str, Any]] = []
    top = 0
    while top < len(one):
        band = band_of(pair, one[top:], other[top:])
        if band is None:
            return None
        found += [{**each, "at": [top, each["at"][1]]} for each in band]
        top += band[0]["size"][0]
    return found


def band_of(pair: Pair, one: Array, other: Array) -> list[dict[str, Any]] | None:
    """Known values side by side at the top; what is left of their rows is equal in both runs."""
    found: list[dict[str, Any]] = []
    left, height = 0, None
    while left < one.shape[1]:
        pieces = fitting(pair, one[:, left:], other[:, left:], height)
        if not pieces:
            break
        piece = max(pieces, key=lambda each: int(np.prod(each["size"])))
        found.append({**piece, "at": [0, left]})
        left, height = left + piece["size"][1], piece["size"][0]
    rest = slice(0, height), slice(left, None)
    return found if found and close(one[rest], other[rest]) else None


def fitting(pair: Pair, one: Array, other: Array, height: int | None) -> list[dict[str, Any]]:
    """The rows of known values that stand in the corner of a matrix, in both runs."""
    found = []
    for name, *values in pair.values:
        for row in range(len(values[0])):
            both = [each[row].reshape(-1, each.shape[-1]) for each in values]
            high, wide = both[0].shape
            if height not in (None, high) or high > len(one) or wide > one.shape[1]:
                continue
            if close(both[0], one[:high, :wide]) and close(both[1], other[:high, :wide]):
                found.append({"from": name, "row": row, "size": [high, wide]})
    return found


def names_in(told: Sequence[Mapping[str, Any]]) -> set[int]:
    """The numbers of the readings that sources name."""
    sources = [source for each in told for source in each.get("sources", {}).values()]
    names = [part for source in sources for block in source["blocks"]
             for part in block["from"].split("*")]  # fmt: skip
    return {int(name.split(".")[1]) for name in names if name.startswith("reading.")}
