"""Quantize: linear and convolution layers in the numbers of a format (kernels/formats.py).

Static activations: x̂ = (clamp(round(x/s)+z) - z)·s with one (s, z) per tensor over the whole
trajectory, or one per group of timesteps (`activations="step"`; METHODS 0.2, 1.3). Where weights
have a scale per output channel the arithmetic is integer: the bias becomes int32 at the products'
scale, and a convolution's output is quantized too, because integer convolutions write 8 bits; a
linear's is not. Dynamic: the activation's range is found at run time. Transposed convolutions are
quantized in integers alone, as convolutions of sub-pixels (passes/transposed.py).
The programs that run once a picture keep float activations: small storage is all there is to gain.

Every layer is measured on probes of the calibration run before it is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import fx

from effuse.errors import PassError
from effuse.graph import calls, clone, eliminate, inputs, module_path, substitute, value_of
from effuse.kernels.formats import Format, parse
from effuse.passes.activation_scales import Ranges
from effuse.passes.base import Pass, Work
from effuse.passes.lent_ranges import lend_ranges
from effuse.passes.quantize_measure import Quality, measure
from effuse.passes.quantize_sites import (
    KINDS,
    Recipe,
    first_layers,
    kept,
    last_layers,
    misfit,
    recipe,
    sites,
    stored,
)
from effuse.passes.quantize_writer import DYNAMIC, Rounded, Writer
from effuse.passes.reconstruct import Recipe as Learning
from effuse.passes.reconstruct_units import rounded_by_reconstruction
from effuse.passes.rounded import rounded_by_gptq, searched, weight_name
from effuse.passes.scores import quantize_scores
from effuse.passes.transposed import Turned, turned, unfit
from effuse.plan import STEP_INPUT, Depends, Rate
from effuse.program import Layer, Part, Program, prune_weights
from effuse.statistics import Calibration, Needs, Statistics
from effuse.step_groups import planned_groups
from effuse.weights import Weights, WeightStore, copied

aten, ops = torch.ops.aten, torch.ops.effuse

QUANTIZED = (ops.quantize.default, ops.dequantize.default, ops.unpack.default,
             ops.fake_quantize.default, ops.widen.default, *DYNAMIC)  # fmt: skip
KEPT_KINDS = tuple(set(KINDS.values()))
DB_PER_BIT = 3.0  # of the bound: half of what a bit is worth
BLIND = {"rounding": "nearest", "correct_bias": False}  # options, as they are without calibration


@dataclass(frozen=True)
class Quantize(Pass):
    """Linear and convolution layers of the step program in few bits, where they are faithful.

    Args:
        format: a name (`w8a8`, `w8a16`, `w4a16`, `w4a8`, `w4a4`, `fp8`, `nvfp4`, `mxfp4`), or
            `<weights>:<activations>` as `int3/group32:uint6/tensor/asymmetric`.
        activations: when ranges are found: as the `format` says, `static` (calibrated), `step`
            (calibrated by group of timesteps) or `dynamic` (at run time).
        ranges: of static activations: `minmax`, `mse`, `percentile` or `entropy`.
        weight_ranges: of weights: `minmax` or `mse` (searched).
        rounding: `nearest`; `gptq`, which makes up for each column's error in the next; or
            `reconstruct`, which learns from there, block by block, what keeps its output.
        iterations: of learning each block.
        resume: a folder that keeps learned blocks, so that a build that was interrupted goes on.
        scores: bits of attention scores in powers of two, 2 to 8; 0 leaves them in float.
        correct_bias: whether the mean error of each output channel is taken off the bias.
        min_sqnr_db: a layer whose own output falls under this (dB, on the probes) stays in float;
            for 8 bits, and 3 dB less for each bit fewer.
        edges: whether the first and the last layer are quantized too.
        layers: formats of single layers by module path, or `float`; the others have `format`.
    """

    name: ClassVar[str] = "quantize"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True

    format: str = "w8a8"
    activations: Literal["format", "static", "step", "dynamic"] = "format"
    ranges: Literal["minmax", "mse", "percentile", "entropy"] = "minmax"
    weight_ranges: Literal["minmax", "mse"] = "minmax"
    rounding: Literal["nearest", "gptq", "reconstruct"] = "nearest"
    correct_bias: bool = False
    min_sqnr_db: float = 20.0
    edges: bool = False
    layers: tuple[tuple[str, str], ...] = ()
    iterations: int = 500
    resume: str = field(default="", metadata={"recorded": False})
    scores: int = 0

    def __post_init__(self) -> None:
        for name in (self.format, *(each for _, each in self.layers if each != "float")):
            parse(name)

    @property
    def needs(self) -> Needs:
        """Histograms, where ranges are searched."""
        return Needs(histograms=self.ranges != "minmax")

    def requires(self, program: Program) -> str | None:
        """No quantization yet, and a schedule where ranges go by step."""
        if any(calls(part.graph, *QUANTIZED) for part in program.parts):
            return "the program is quantized already"
        if self.activations == "step" and not program.timesteps:
            return "activations='step' looks ranges up by timestep: compile with schedule="
        if self.scores and not 2 <= self.scores <= 8:
            return f"scores: expected 0 or 2 to 8 bits, came {self.scores}"
        if self.iterations < 1:
            return f"iterations: expected 1 or more, came {self.iterations}"
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Quantize every part, measured on the calibration's probes."""
        if work.calibration is None:
            self._check_blind(program)
        seen = work.calibration or unseen_run(program)
        program, convs, seen = turned(program, partial(self._turns, program.weights), seen)
        seen, lent = lend_ranges(program, seen)
        for name in lent:
            work.log.note(f"{name}: never run in calibration; ranges are the default variant's")
        job = Job(self, program, work, seen, copied(program.weights), convs)
        default = program.plan.default
        order = sorted(program.parts, key=lambda part: part.name != default)
        done = {part.name: job.part(part) for part in order}  # others share the default's weights
        layers = [
            each
            for part in program.parts
            if part.rate < Rate.STEP or part.name == default
            for each in done[part.name][1]
        ]
        for part in program.variants:
            if part.name != default:
                work.log.note(f"{part.name}: {summary(done[part.name][1])}")
        self._check(layers)
        parts = tuple(done[part.name][0] for part in program.parts)
        result = replace(program, parts=parts, weights=job.weights, layers=tuple(layers))
        return prune_weights(result)

    def _check_blind(self, program: Program) -> None:
        """See that nothing is asked for that takes calibration.

        Raises:
            PassError: something is.
        """
        part = program.part(program.plan.default)
        asked = [name for name, plain in BLIND.items() if getattr(self, name) != plain]
        for site in sites(part, program.weights):
            how = recipe(site, self.format_of(site), part.rate, self.activations)
            if how.activation is not None and how.activation.ranges != "dynamic":
                kind = "linear layers" if site.target is aten.linear.default else "convolutions"
                asked.append(f"format={how.format!r}, whose {kind} read calibrated ranges,")
                break
        if asked:
            raise PassError(
                f"quantize: {asked[0]} needs calibration: hand compile(calibration=run) a function "
                "that samples with the model it is given, or leave calibration=None with a "
                "schedule; in a build with stream=True, which cannot calibrate, format='w4a16' and "
                "'w8a16' with nearest rounding are what is left"
            )

    def _check(self, layers: Sequence[Layer]) -> None:
        """See that the format's groups fit at least one of the layers."""
        reasons = [each.reason for each in layers]
        unfit = [reason for reason in reasons if "groups of" in reason]
        if unfit and all(reasons):
            raise PassError(f"no layer can be quantized: {unfit[0]}")
        asked = {path for path, name in self.layers if name != "float"}
        never = [
            each for each in layers if each.name in asked and each.reason.startswith(KEPT_KINDS)
        ]
        if never:
            raise PassError(f"layers: {never[0].name!r} is a {never[0].reason}")
        unknown = [path for path, _ in self.layers if path not in {each.name for each in layers}]
        if unknown:
            raise PassError(
                f"layers: no linear or convolution is at {unknown[0]!r}; `effuse report` lists "
                "the layers by module path"
            )

    def reason(self, site: fx.Node, part: Part, program: Program, how: Recipe) -> str | None:
        """Why a layer stays in float whatever its numbers, or None."""
        path = module_path(site)
        if unwanted := self.unwanted(path):
            return unwanted
        if (path, "float") in self.layers:
            return "asked for in float"
        if part.rate is Rate.STEP and not self.edges:
            if site in first_layers(part, program):
                return "first layer"
            if site in last_layers(part, program):
                return "last layer"
        return misfit(site, how)

    def _turns(self, weights: Weights, part: Part, node: fx.Node) -> bool:
        """Whether a transposed convolution would be one of sub-pixels, in integers."""
        if unfit(node) or not stored(node, weights):
            return False
        return recipe(node, self.format_of(node), part.rate, self.activations).integer

    def format_of(self, site: fx.Node) -> Format:
        """The format of a layer."""
        named = dict(self.layers).get(module_path(site), self.format)
        return parse(self.format if named == "float" else named)


@dataclass
class Job:
    """One run of the pass over a program's parts, which share weights and how they are rounded."""

    options: Quantize
    program: Program
    work: Work
    calibration: Calibration
    weights: WeightStore
    convs: Mapping[str, Sequence[Turned]]  # by part, what were transposed convolutions
    rounded: dict[str, Rounded] = field(default_factory=dict)

    def part(self, part: Part) -> tuple[Part, list[Layer]]:
        """The quantized part, and what became of each layer."""
        ranges = self._ranges(part)
        recipes = {
            site: recipe(site, self.options.format_of(site), part.rate, self.options.activations)
            for site in sites(part, self.weights)
        }
        reasons = {
            site: self.options.reason(site, part, self.program, how) or unseen(site, how, ranges)
            for site, how in recipes.items()
        }
        wanted = {site: how for site, how in recipes.items() if fits(site, how, ranges)}
        self._round(part, {site: how for site, how in wanted.items() if not reasons[site]})
        quality = self._measure(part, wanted, ranges, {})
        shifts = self._shifts(quality)
        if shifts:
            quality = self._measure(part, wanted, ranges, shifts)
        graph, mapping = clone(part.graph)
        writer = Writer(graph, self.weights, ranges, self.rounded, shifts)
        layers, convs = [], {each.conv: each for each in self.convs[part.name]}
        for number, (site, how) in enumerate(recipes.items(), start=1):
            ratio = quality.get(site.name)
            settled = self._settle(site, how, reasons[site], ratio, writer, mapping)
            layers.append(as_it_was(settled, convs[site], mapping) if site in convs else settled)
            self.work.progress("quantize layers", number, len(recipes))
        for site, why in kept(part, self.weights).items():
            self.work.log.reject("quantize", why.split(":")[0])
            layers.append(layer(site, "float", None, why))
        if self.options.scores and part.rate is Rate.STEP:
            quantize_scores(graph, self.program.sources, self.options.scores, self.work.log)
        eliminate(graph)
        by_step = any(node.target == STEP_INPUT for node in inputs(graph))
        depends = part.depends | Depends.TIMESTEP if by_step else part.depends
        return replace(part, graph=graph, exact=False, depends=depends), layers

    def _ranges(self, part: Part) -> Ranges:
        groups = self.calibration.statistics.groups
        return Ranges(
            part.name,
            self.calibration.statistics,
            self.options.ranges,
            len(self.program.timesteps or ()),
            planned_groups(self.program, part.name, groups),
        )

    def _round(self, part: Part, recipes: Mapping[fx.Node, Recipe]) -> None:
        """Add the weights that are not simply rounded to nearest, but those that are there."""
        new = {site: how for site, how in recipes.items() if weight_name(site) not in self.rounded}
        if self.options.weight_ranges == "mse":
            for number, (site, how) in enumerate(new.items(), start=1):
                name = weight_name(site)
                self.rounded[name] = searched(self.weights[name], how.weight)
                self.work.progress("search scales", number, len(new))
        if self.options.rounding == "gptq":
            self.rounded |= rounded_by_gptq(
                part.graph, self.weights, self.rounded, new, self.calibration.probes[part.name],
                self.work.progress,
            )  # fmt: skip
        elif self.options.rounding == "reconstruct":
            self._reconstruct(part, new)

    def _reconstruct(self, part: Part, recipes: Mapping[fx.Node, Recipe]) -> None:
        found = rounded_by_reconstruction(
            part, self.program, self.weights, self.rounded, recipes,
            self.calibration.probes[part.name], self.work.progress,
            Learning(iterations=self.options.iterations), self.options.resume,
        )  # fmt: skip
        self.rounded |= found.rounded
        if found.shares:
            middle = sorted(found.shares)[len(found.shares) // 2]
            self.work.log.note(
                f"{part.name}: {len(found.shares)} blocks learned, {middle:.2f} of GPTQ's loss "
                "in the middle"
            )

    def _measure(
        self, part: Part, recipes: Mapping[fx.Node, Recipe], ranges: Ranges,
        shifts: Mapping[str, torch.Tensor],
    ) -> dict[str, Quality]:  # fmt: skip
        write = partial(Writer, ranges=ranges, rounded=self.rounded, shifts=shifts)
        probes = self.calibration.probes[part.name]
        return measure(part.graph, self.weights, recipes, write, probes, self.work.progress)

    def _shifts(self, quality: Mapping[str, Quality]) -> dict[str, torch.Tensor]:
        if not self.options.correct_bias:
            return {}
        return {name: each.mean_error for name, each in quality.items()}

    def _settle(
        self, site: fx.Node, how: Recipe, reason: str | None, quality: Quality | None,
        writer: Writer, mapping: Mapping[fx.Node, fx.Node],
    ) -> Layer:  # fmt: skip
        """Quantize one layer, or say why not."""
        ratio = None if quality is None else quality.sqnr_db
        bound = self.options.min_sqnr_db - DB_PER_BIT * (8 - min(8, how.bits))
        reason = reason or too_noisy(ratio, bound)
        if reason:
            self.work.log.reject("quantize", reason.split(":")[0])
        elif self.work.log.spend("quantize"):
            node = mapping[site]
            substitute(node, writer.quantized(node, how))
        else:
            reason = "out of fuel"
        return layer(site, how.format, ratio, reason)


def unseen_run(program: Program) -> Calibration:
    """What is known without calibration: nothing."""
    return Calibration(Statistics(), {part.name: () for part in program.parts}, 0)


def fits(site: fx.Node, how: Recipe, ranges: Ranges) -> bool:
    """Whether the layer can be measured: its shape fits, and its ranges were seen."""
    return misfit(site, how) is None and unseen(site, how, ranges) is None


def unseen(site: fx.Node, how: Recipe, ranges: Ranges) -> str | None:
    """Why calibration does not have the ranges that the layer needs, or None."""
    if how.activation is None or how.activation.ranges == "dynamic":
        return None
    needed = site.all_input_nodes[:1]
    if how.integer and site.target is not aten.linear.default:
        needed.append(site)  # integer convolutions write 8 bits
    return None if all(ranges.seen(node) for node in needed) else "never seen in calibration"


def too_noisy(ratio: float | None, bound: float) -> str | None:
    """Why a measured layer stays in float, or None."""
    if ratio is None or ratio >= bound:
        return None
    return f"under the bound: {ratio:.1f} dB, the bound is {bound:g} dB"


def layer(site: fx.Node, format: str, ratio: float | None, reason: str | None) -> Layer:
    """The line of the report for one layer."""
    return Layer(
        name=module_path(site) or site.name,
        op=operator(site),
        format="float" if reason else format,
        parameters=parameters(site),
        sqnr_db=None if ratio is None else round(ratio, 2),
        reason=reason or "",
    )


def as_it_was(layer: Layer, made: Turned, mapping: Mapping[fx.Node, fx.Node]) -> Layer:
    """The line of a transposed convolution, which it is again if it was not quantized."""
    if layer.reason:
        substitute(mapping[made.result], mapping[made.node])
    return replace(layer, op=operator(made.node), parameters=parameters(made.node))


def operator(site: fx.Node) -> str:
    """What a layer is called in the report."""
    return str(site.target).removeprefix("aten.").removesuffix(".default")


def parameters(site: fx.Node) -> int:
    """The size of a layer's weight."""
    return math.prod(value_of(site.args[1]).shape)  # type: ignore[arg-type]


def summary(layers: Sequence[Layer]) -> str:
    """How many layers of another variant are in 8 bits, and the worst of them."""
    changed = [layer for layer in layers if not layer.reason]
    worst = min((layer.sqnr_db for layer in changed if layer.sqnr_db is not None), default=None)
    quality = "" if worst is None else f", {worst:.1f} dB at worst"
    return f"{len(changed)} of {len(layers)} layers in 8 bits{quality}"
