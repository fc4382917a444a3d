"""Ranges of a variant that calibration never ran: those of the same layers in the default variant.

A plan's other variants run when calls follow one another as a sampler's do. Calibration data that
are single calls, one from each picture, never get there; the variant reuses what the default one
computes, so its layers read nearly the same values.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from torch import fx

from effuse.passes.quantize_sites import sites
from effuse.program import Part, Program
from effuse.statistics import Calibration, Key
from effuse.weights import Weights


def lend_ranges(program: Program, calibration: Calibration) -> tuple[Calibration, list[str]]:
    """The calibration with ranges for variants that it never ran, and these variants' names."""
    statistics = calibration.statistics
    ran = {part for part, _ in statistics.ranges}
    default = program.part(program.plan.default)
    lent: dict[Key, Key] = {}
    names = []
    for part in program.variants:
        known = default.name in ran and part.name not in ran
        if known and (found := pairs(part, default, program.weights)):
            lent |= found
            names.append(part.name)
    if not names:
        return calibration, []
    return replace(calibration, statistics=statistics.lent(lent)), names


def pairs(part: Part, default: Part, weights: Weights) -> dict[Key, Key]:
    """What layers of a part read and give -> the same of the default's layer of the same weight.

    A weight that several layers of the default share tells none of them.
    """
    theirs = sites(default, weights)
    counts = Counter(_weight(site) for site in theirs)
    twins = {_weight(site): site for site in theirs if counts[_weight(site)] == 1}
    found: dict[Key, Key] = {}
    for site in sites(part, weights):
        twin = twins.get(_weight(site))
        if twin is not None:
            own = (site.all_input_nodes[0], site)
            known = (twin.all_input_nodes[0], twin)
            for one, other in zip(own, known, strict=True):
                found[part.name, one.name] = (default.name, other.name)
    return found


def _weight(site: fx.Node) -> str:
    return str(site.args[1].target)  # type: ignore[union-attr]
