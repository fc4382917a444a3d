"""LowRank: a thin branch in float carries what few bits hold worst; exact before quantization.

    W x + b   =   (W - U D) x + b  +  U (D x)

The remainder W - U D is an ordinary layer, which Quantize then writes in few bits, with any
rounding; the branch is made of ops that it leaves alone (SVDQuant, METHODS 1.12). U and D are for
the rounding of `format`, found by turns on the inputs of the calibration run (low_rank_factors.py).
Layers that read one x share one D. Of a convolution, D is a convolution with `rank` channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effuse.errors import ConfigError, PassError
from effuse.graph import calls, clone, eliminate, emit, emit_weight, module_path, substitute
from effuse.kernels.formats import parse
from effuse.kernels.low_rank import BRANCH
from effuse.kernels.quantizers import Quantizer, round_trip
from effuse.passes.base import Pass, Work
from effuse.passes.branch import emit_down, emit_up
from effuse.passes.low_rank_factors import Factors, decompose, metric_of
from effuse.passes.quantize_sites import (
    SITES,
    VOLUME,
    Recipe,
    first_layers,
    last_layers,
    misfit,
    recipe,
    sites,
)
from effuse.passes.quantize_writer import options_of
from effuse.passes.resume import Store, key_of
from effuse.passes.rounded import hessians_by_chunk, weight_name
from effuse.plan import Rate
from effuse.program import Part, Program, prune_weights
from effuse.weights import WeightStore, copied, derive

aten = torch.ops.aten

RULE = "low_rank"
ROWS = 256
MOST_SHARED = 4  # layers to a D: of the text, or of the timestep, a hundred layers may read


@dataclass(frozen=True)
class LowRank(Pass):
    """Give the layers that Quantize(format) will put in few bits a branch of `rank`.

    Args:
        rank: of the branch; at most min(out, in), which is the whole layer.
        format: the format whose rounding the branch makes up for, as Quantize is given it.
        rounds: at most this many turns of decomposition and rounding; it stops when the error of
            the layer's output rises.
        shared: whether layers that read one input share the half that reads it.
        inputs: whether errors are weighed by the layers' inputs in calibration.
        exact_svd: LAPACK's decomposition in place of the randomised one.
        seed: of the randomised decomposition.
        edges: whether the first and the last layer get one too, as in Quantize.
        resume: a folder that keeps finished branches, so that a build that was interrupted goes on.
        half: whether branches are stored in float16; what that rounds off goes to the remainder.
    """

    name: ClassVar[str] = "low_rank"
    exact: ClassVar[bool] = True
    calibrates: ClassVar[bool] = True

    rank: int = 32
    format: str = "w4a8"
    rounds: int = 8
    shared: bool = True
    inputs: bool = True
    exact_svd: bool = False
    seed: int = 0
    edges: bool = False
    half: bool = True
    resume: str = field(default="", metadata={"recorded": False})

    def __post_init__(self) -> None:
        parse(self.format)
        for name in ("rank", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected 1 or more, came {getattr(self, name)!r}")

    def requires(self, program: Program) -> str | None:
        """No branch yet."""
        if any(calls(part.graph, *BRANCH) for part in program.parts):
            return "the program has low-rank branches already"
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Decompose every layer's weight, then write the branches into all variants."""
        if self.inputs and work.calibration is None:
            raise PassError(
                "low_rank weighs errors by the layers' inputs: hand compile(calibration=run) a "
                "function that samples with the model, or give inputs=False"
            )
        found_groups = self._groups(program, work)
        total = sum(map(len, found_groups.values()))
        branches: dict[str, Branch] = {}
        errors: list[tuple[float, ...]] = []
        for number, (group, metric) in enumerate(self._weighed(program, found_groups, work), 1):
            if work.log.spend(RULE):
                found, each = self._branches(group, program.weights, metric)
                branches |= found
                errors.append(each)
            work.progress("low-rank branches", number, total)
        if not branches:
            return program
        work.log.note(summary(branches, errors, self.format))
        return prune_weights(written(program, branches))

    def _groups(self, program: Program, work: Work) -> dict[str, list[list[fx.Node]]]:
        """By part, layers to decompose together, each weight once: those that read one input.

        The parts that run once a picture are quantized too; other variants share the default's.
        """
        found: dict[str, list[list[fx.Node]]] = {}
        seen: set[str] = set()
        for part in program.parts:
            if part.rate is Rate.STEP and part.name != program.plan.default:
                continue
            grouped: dict[Any, list[fx.Node]] = {}
            edges = set() if self.edges else ends(part, program)
            for site in sites(part, program.weights):
                reason = self._refused(site, part, edges)
                if reason:
                    work.log.reject(RULE, reason)
                elif weight_name(site) not in seen:
                    seen.add(weight_name(site))
                    alone = not self.shared or site.target is not aten.linear.default
                    grouped.setdefault(site if alone else site.args[0], []).append(site)
            found[part.name] = [each for group in grouped.values() for each in small(group)]
        return found

    def _refused(self, site: fx.Node, part: Part, edges: set[fx.Node]) -> str | None:
        if reason := self.unwanted(module_path(site)):
            return reason
        if site in edges:
            return "the first or the last layer"
        if site.target is VOLUME:
            return "a three-dimensional convolution"
        if site.target is not aten.linear.default and options_of(site)[3] != 1:
            return "a grouped convolution"
        return misfit(site, self._recipe(site, part.rate))

    def _recipe(self, site: fx.Node, rate: Rate) -> Recipe:
        return recipe(site, parse(self.format), rate, "format")

    def _weighed(
        self, program: Program, groups: Mapping[str, list[list[fx.Node]]], work: Work
    ) -> Iterator[tuple[list[fx.Node], Tensor | None]]:
        """The groups with C of their inputs, or None where errors are not weighed."""
        if not self.inputs or work.calibration is None:
            yield from ((group, None) for each in groups.values() for group in each)
            return
        for name, each in groups.items():
            of = {group[0]: group for group in each}  # the others read the same
            probes, graph = work.calibration.probes[name], program.part(name).graph
            for chunk, found in hessians_by_chunk(graph, program.weights, list(of), probes):
                for site in chunk:
                    yield of[site], metric_of(found.pop(weight_name(site)).value / 2)

    def _branches(
        self, group: Sequence[fx.Node], weights: Mapping[str, Tensor], metric: Tensor | None
    ) -> tuple[dict[str, Branch], tuple[float, ...]]:
        """The branches of layers that share D, and their output's error by round."""
        stored = {weight_name(site): weights[weight_name(site)] for site in group}
        rows = [each.float().flatten(1) for each in stored.values()]
        whole = torch.cat(rows) if len(rows) > 1 else rows[0]
        factors = self._factors(whole, self._recipe(group[0], Rate.STEP).weight, metric)
        ups = torch.split(factors.up, [len(each) for each in rows])
        key = weight_name(group[0])
        like = next(iter(stored.values()))
        down = self._stored(factors.down, like)
        found = {
            name: Branch(key, self._stored(up, like), down)
            for name, up in zip(stored, ups, strict=True)
        }
        return found, factors.errors

    def _factors(self, rows: Tensor, how: Quantizer, metric: Tensor | None) -> Factors:
        """The factors of weights one under another, (out, in); finished ones from `resume`."""
        options = (self.rank, self.rounds, self.exact_svd, self.seed)
        store = Store.of(self.resume)
        key = key_of(rows, metric, str(how), options) if store else ""
        if store and (kept := store.read(key)):
            return Factors(kept["up"], kept["down"], tuple(kept["errors"].tolist()))
        found = decompose(
            rows, self.rank, partial(round_trip, quantizer=how),
            metric=metric, rounds=self.rounds, exact=self.exact_svd, seed=self.seed,
            by_rows=how.granularity in ("group", "channel") and how.scale != "e4m3",
        )  # fmt: skip
        if store:
            errors = torch.tensor(found.errors, dtype=torch.float64)
            store.write(key, {"up": found.up, "down": found.down, "errors": errors})
        return found

    def _stored(self, factor: Tensor, like: Tensor) -> Tensor:
        """A factor in the dtype that it is kept in: `like`'s, where float16 cannot hold it."""
        half = factor.half() if self.half else factor
        fits = half.dtype.itemsize < like.dtype.itemsize and half.isfinite().all()
        return half if fits else factor.to(like)


def small(group: list[fx.Node]) -> list[list[fx.Node]]:
    """Queries, keys, values and a gate share D; what the whole network reads is shared by none."""
    return [group] if len(group) <= MOST_SHARED else [[site] for site in group]


def ends(part: Part, program: Program) -> set[fx.Node]:
    """The first and the last layers of what runs every step."""
    if part.rate is not Rate.STEP:
        return set()
    return first_layers(part, program) | last_layers(part, program)


@dataclass(frozen=True)
class Branch:
    """U (out, r) and D (r, in · kernel) of one weight; layers with the same `key` share D."""

    key: str
    up: Tensor
    down: Tensor


def written(program: Program, branches: Mapping[str, Branch]) -> Program:
    """The program with every weight's branch wherever it is read."""
    weights = copied(program.weights)
    parts = []
    for part in program.parts:
        graph, _ = clone(part.graph)
        halves: dict[tuple[fx.Node, str], fx.Node] = {}
        for site in calls(graph, *SITES):
            branch = branches.get(weight_name(site))
            if branch is not None:
                _write(graph, weights, site, branch, halves)
        eliminate(graph)
        parts.append(replace(part, graph=graph))
    return replace(program, parts=tuple(parts), weights=weights)


def _write(
    graph: fx.Graph, weights: WeightStore, site: fx.Node, branch: Branch,
    halves: dict[tuple[fx.Node, str], fx.Node],
) -> None:  # fmt: skip
    """One layer as the remainder, plus the branch."""
    x, weight, *rest = site.args
    name = str(weight.target)  # type: ignore[union-attr]
    halves_of = (f"{name}.branch.up", f"{name}.branch.down")
    for each, factor in zip(halves_of, (branch.up, branch.down), strict=True):
        weights[each] = factor
    remainder = derive(weights, [name, *halves_of], _remainder, "low-rank remainder")
    with graph.inserting_before(site):
        less = emit_weight(graph, weights, f"{name}.rest", remainder)
        new = emit(graph, site.target, x, less, *rest, like=site)
        key: Any = (x, branch.key)
        if key not in halves:
            halves[key] = emit_down(graph, weights, site, f"{branch.key}.down", branch.down)
        made = emit_up(graph, weights, halves[key], f"{name}.up", branch.up)
        both = emit(graph, aten.add.Tensor, new, made)
    substitute(site, both)


def _remainder(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """W - U D, rounded once; by blocks, since float64 of a whole weight is large."""
    rows, down = weight.flatten(1), down.double()
    blocks = zip(torch.split(rows, ROWS), torch.split(up, ROWS), strict=True)
    found = torch.cat([(each.double() - up.double() @ down).to(rows) for each, up in blocks])
    return found.reshape(weight.shape)


def summary(
    branches: Mapping[str, Branch], errors: Sequence[tuple[float, ...]], format: str
) -> str:
    """What the branches cost and gain, for the report."""
    numbers = sum(each.up.numel() for each in branches.values())
    numbers += sum(each.numel() for each in {b.key: b.down for b in branches.values()}.values())
    gains = sorted(20 * math.log10(each[0] / min(each)) if min(each) else 0.0 for each in errors)
    return (
        f"{len(branches)} layers, {numbers / 1e6:.2f} M numbers in their branches; after the first "
        f"round, the error in {format} fell by {gains[len(gains) // 2]:.1f} dB more in the middle"
    )
