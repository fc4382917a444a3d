"""Smooth: range moves from a layer's inputs into its weight before quantization; exact.

    W x  =  (W s) (x / s),        s_c = max|X_c|^α / max|W_c|^β       per input channel c

Outliers in a few channels of x otherwise set the step of all (SmoothQuant; METHODS 0.6, 1.8, 1.12
step 1). Layers that read one x share s, as do all uses of one weight, in every variant. The
exponents are those under which the quantized layers' own outputs err least on probes of the
calibration run. 1 / s goes into what computes x, found by structure (passes/smooth_fold.py), or is
multiplied to x where that pays twice.

Static ranges then fit every channel tightly, so calibration has to be as wide as use: a value that
it did not see is cut off in any channel, not in the loud ones alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from effuse.errors import ConfigError, PassError
from effuse.graph import (
    calls,
    clone,
    eliminate,
    emit,
    module_path,
    substitute,
    value_of,
)
from effuse.kernels.formats import parse
from effuse.passes.base import Pass, Work
from effuse.passes.smooth_fold import MARK, Divider, Fold, Search
from effuse.passes.smooth_search import (
    CHANNELS,
    Samples,
    Site,
    Trial,
    grouped,
    sampled,
    seen_by,
    unfit,
)
from effuse.passes.smoothing import CANDIDATES, Exponents, best_smoothing
from effuse.program import Program, prune_weights
from effuse.statistics import Calibration, Key, Needs
from effuse.weights import copied

aten = torch.ops.aten

RULE = "smooth"


@dataclass(frozen=True)
class Smooth(Pass):
    """Scale each channel of a layer's input against its weight, for `format`'s rounding; exact.

    Args:
        alpha: the input's share, 0 to 1 (the weight's is 1 - alpha), or `search`.
        format: the format whose error counts (`effuse.kernels.formats`), as Quantize is given it.
        min_gain_db: what a layer's quantized output has to gain, dB; twice this where x itself has
            to be multiplied at run time.
        rank: of the branches that LowRank will put beside the layers; candidates are judged with
            them (SVDQuant). 0 without LowRank.
    """

    name: ClassVar[str] = "smooth"
    exact: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    alpha: float | Literal["search"] = "search"
    format: str = "w8a8"
    min_gain_db: float = 0.5
    rank: int = 0

    def __post_init__(self) -> None:
        parse(self.format)
        if self.rank < 0:
            raise ConfigError(f"rank: expected 0 or more, came {self.rank!r}")
        if self.alpha != "search" and not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha: expected 0 to 1, or 'search', came {self.alpha!r}")

    @property
    def needs(self) -> Needs:
        """The greatest magnitude of every channel."""
        return Needs(channels=True)

    @property
    def candidates(self) -> tuple[Exponents, ...]:
        """The exponents to try; no smoothing is the first."""
        if self.alpha == "search":
            return CANDIDATES
        return (0.0, 0.0), (self.alpha, 1 - self.alpha)

    def run(self, program: Program, work: Work) -> Program:
        """Choose the scales of every group of layers, then write them into all variants."""
        if work.calibration is None:
            raise PassError(
                "smooth needs calibration: hand compile(calibration=run) a function that samples "
                "with the model it is given, or leave calibration=None with a schedule"
            )
        groups = grouped(self._sites(program, work))
        samples = sampled(program, groups, work.calibration)
        chosen = []
        for number, group in enumerate(groups, start=1):
            found = self._choose(group, program.weights, work.calibration, samples)
            if isinstance(found, str):
                for _ in group:
                    work.log.reject(RULE, found)
            elif work.log.spend(found.rule):
                chosen.append(found)
            work.progress("smooth", number, len(groups))
        if not chosen:
            return program
        work.log.note(summary(chosen, self.format))
        return prune_weights(written(program, chosen))

    def _sites(self, program: Program, work: Work) -> list[Site]:
        found = []
        for part in program.variants:
            for node in calls(part.graph, *CHANNELS):
                reason = self.unwanted(module_path(node)) or refused(node, program)
                if reason:
                    work.log.reject(RULE, reason)
                else:
                    found.append(Site(part, node))
        return found

    def _choose(
        self, group: list[Site], weights: Mapping[str, torch.Tensor], calibration: Calibration,
        samples: Samples,
    ) -> Choice | str:  # fmt: skip
        """The scale of a group and where it goes, or why the group stays as it is."""
        seen = seen_by(group, calibration)
        if not seen:
            return "its input was never seen in calibration"
        if reason := unfit(group[0].node, parse(self.format)):
            return reason
        trial = Trial(group, weights, seen, samples, parse(self.format), self.rank)
        plain = trial.error(0.0, 0.0)
        exponents, least = best_smoothing(trial.error, self.candidates)
        gain = 10 * math.log10(plain / least) if least else 0.0
        folds = found_folds(group)
        reasons = [fold for fold in folds.values() if isinstance(fold, str)]
        if exponents == (0.0, 0.0) or gain < self.min_gain_db:
            return "the gain is under min_gain_db"
        if reasons and gain < 2 * self.min_gain_db:
            return f"the gain is under twice min_gain_db, and {reasons[0]}"
        return Choice(group, trial.scale(*exponents), folds, gain)


@dataclass(frozen=True)
class Choice:
    """The scale of layers that share it, and how each of their inputs is divided."""

    group: list[Site]
    scale: torch.Tensor
    folds: Mapping[Key, Fold | str]  # or why x has to be multiplied
    gain: float  # dB

    @property
    def rule(self) -> str:
        """What the log counts it as."""
        return "multiply" if any(isinstance(f, str) for f in self.folds.values()) else "fold"


def refused(node: fx.Node, program: Program) -> str | None:
    """Why a layer cannot be smoothed, or None."""
    weight: Any = node.args[1]
    if weight.op != "get_attr" or not program.weights[weight.target].is_floating_point():
        return "its weight is computed"
    if MARK in str(weight.target):
        return "it is smooth already"
    if len(node.args) > 6 and node.args[6] != 1:
        return "a grouped convolution"
    return None


def found_folds(group: list[Site]) -> dict[Key, Fold | str]:
    """For each value that the layers read, how it is divided where it is computed, or why not."""
    readers: dict[Key, list[Site]] = {}
    for site in group:
        readers.setdefault(site.source, []).append(site)
    return {key: _fold(sites) for key, sites in readers.items()}


def _fold(sites: list[Site]) -> Fold | str:
    site = sites[0]
    shape = tuple(value_of(site.x).shape)
    search = Search(shape, shape[site.axis])
    return search.find(site.x, site.axis, [each.node for each in sites])


def written(program: Program, chosen: Collection[Choice]) -> Program:
    """The program with every choice written into every variant."""
    weights, known = copied(program.weights), dict[Any, str]()
    factors = dict(program.factors)
    parts = []
    for part in program.parts:
        graph, mapping = clone(part.graph)
        divider = Divider(graph, weights, known, mapping, factors)
        for choice in chosen:
            _write(divider.of(choice.group[0].weight, choice.scale), choice, part.name)
        eliminate(graph)
        parts.append(replace(part, graph=graph))
    return replace(program, parts=tuple(parts), weights=weights, factors=factors)


def _write(divider: Divider, choice: Choice, part: str) -> None:
    """W s and x / s for the layers of one part."""
    divided: dict[Key, fx.Node] = {}
    for site in (each for each in choice.group if each.part.name == part):
        old = divider.mapping[site.node]
        if site.source not in divided:
            fold = choice.folds[site.source]
            whole = Fold(site.x, site.axis) if isinstance(fold, str) else fold
            divided[site.source] = divider.divided(whole, old.args[0], old)
        with divider.graph.inserting_before(old):
            columns = divider.stored(old.args[1], _columns(old), choice.scale)  # type: ignore[arg-type]
            args = (divided[site.source], columns, *old.args[2:])
            new = emit(divider.graph, old.target, *args, like=old)
        substitute(old, new)
        divider.mapping[site.node] = new


def _columns(layer: fx.Node) -> int:
    """The axis of a weight's input channels, from the end."""
    return 1 - value_of(layer.args[1]).dim()  # type: ignore[arg-type, no-any-return]


def summary(chosen: Collection[Choice], format: str) -> str:
    """How much the layers gain, for the report."""
    gains = sorted(choice.gain for choice in chosen)
    layers = len({site.weight for choice in chosen for site in choice.group})
    return (
        f"{layers} layers smoothed in {len(gains)} groups; the error of a group in {format} falls "
        f"by {gains[0]:.1f} to {gains[-1]:.1f} dB, {gains[len(gains) // 2]:.1f} dB in the middle"
    )
