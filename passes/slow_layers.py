"""Layers of the programs that run once a picture: a format costs them error and gains size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from effuse.graph import module_path
from effuse.passes.base import Work
from effuse.passes.bits_solver import decibels
from effuse.passes.layer_noise import relative_noise, walk
from effuse.passes.layer_options import stored, together
from effuse.passes.lone_layer import FLOAT, Lone, lone_layer
from effuse.passes.quantize import Quantize
from effuse.plan import Rate
from effuse.program import Part, Program


@dataclass
class Slow:
    """The formats of such layers by module path, and the bytes that they save."""

    formats: dict[str, str] = field(default_factory=dict)
    saved: int = 0


def slow_formats(
    program: Program, layers: Mapping[str, Sequence[fx.Node]], format: str, work: Work
) -> Slow:
    """`format` for the `layers` of each part whose own output it leaves Quantize's SQNR, or float.

    What that does to the network's output is not measured.
    """
    found = Slow()
    shared = read_twice(program)
    for part in program.parts:
        if part.rate is Rate.STEP:
            continue
        lones = _faithful(program, part, layers.get(part.name, ()), format, work)
        for group in together(list(layers.get(part.name, ()))):
            low = all(site in lones for site in group)
            found.formats |= {module_path(site): format if low else FLOAT for site in group}
            if low:
                real = [lones[site][0] for site in group]
                few = [lones[site][1] for site in group]
                found.saved += stored(real, shared) - stored(few, shared)
    return found


def read_twice(program: Program) -> set[str]:
    """The weights that several parts read."""
    names = Counter(name for part in program.parts for name in _read(part))
    return {name for name, count in names.items() if count > 1}


def _read(part: Part) -> set[str]:
    return {str(node.target) for node in part.graph.nodes if node.op == "get_attr"}


def _faithful(
    program: Program, part: Part, sites: Sequence[fx.Node], format: str, work: Work
) -> dict[fx.Node, tuple[Lone, Lone]]:
    """The layers that the format suits, in float and in it."""
    assert work.calibration is not None  # the pass has checked it
    pairs: dict[fx.Node, tuple[Lone, Lone]] = {}
    for site in sites:
        real, low = (lone_layer(program, part, site, name, work.calibration)
                     for name in (FLOAT, format))  # fmt: skip
        if isinstance(real, Lone) and isinstance(low, Lone):
            pairs[site] = (real, low)
    good: dict[fx.Node, tuple[Lone, Lone]] = {}

    def visit(site: fx.Node, alive: Mapping[str, Any], _: int) -> None:
        ratio = decibels(relative_noise([alive[site.name]], [pairs[site][1](alive)]))
        if ratio >= Quantize.min_sqnr_db:
            good[site] = pairs[site]

    for probe in work.calibration.probes.get(part.name, ())[:1]:
        walk(part.graph, program.weights, probe, pairs, visit)
    return good
