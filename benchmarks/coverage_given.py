"""Inputs that a row of coverage_inputs.json tells, for a class for which effuse derives none.

A list of sizes is noise of them, {"time": sizes} the timestep, {"table": numbers} whole numbers,
{"index": sizes} those from 0, {"ones": sizes} truth values, {"units": sizes} whole numbers 1,
{"turns": sizes} complex numbers of length 1, as a rotary table has, {"list": rows}, {"tuple": rows}
and {"dict": rows} several, {"object": {"class": where it is imported from, its attributes' rows}}
such a thing with these attributes, {"value": …} anything else as it is.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

KINDS: Mapping[str, Callable[[Any], Any]] = {
    "table": torch.tensor,
    "index": lambda sizes: torch.arange(math.prod(sizes)).reshape(sizes),
    "ones": lambda sizes: torch.ones(sizes, dtype=torch.bool),
    "units": lambda sizes: torch.ones(sizes, dtype=torch.long),
    "turns": lambda sizes: torch.polar(
        torch.ones(sizes), torch.linspace(0, 6, math.prod(sizes)).reshape(sizes)
    ),
    "value": lambda each: each,
}


def inputs_of(told: Mapping[str, Any], time: float) -> dict[str, Any]:
    """The inputs that a row tells, at a timestep; the same noise for the same row."""
    generator = torch.Generator().manual_seed(0)
    return {name: made(each, time, generator) for name, each in told.items()}


def made(told: Any, time: float, generator: torch.Generator) -> Any:
    """One input."""
    if isinstance(told, Sequence):
        return torch.randn(tuple(told), generator=generator)
    ((kind, value),) = told.items()
    if kind == "time":
        return torch.full(tuple(value), time)
    if kind in ("dict", "object"):
        several = {name: each if name == "class" else made(each, time, generator)
                   for name, each in value.items()}  # fmt: skip
        return several if kind == "dict" else told_object(**several)
    if kind in ("list", "tuple"):
        each_of = [made(each, time, generator) for each in value]
        return each_of if kind == "list" else tuple(each_of)
    return KINDS[kind](value)


def told_object(**attributes: Any) -> Any:
    """A thing of the class that `class` names, with the other attributes."""
    home, name = attributes.pop("class").rsplit(".", 1)
    kind = getattr(importlib.import_module(home), name)
    found = kind.__new__(kind)
    vars(found).update(attributes)
    return found
