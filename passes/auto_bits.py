"""AutoBits: a format for each layer, by its sensitivity and cost (METHODS 1.8, 1.9).

    minimise Σ_l error_l(f_l)    with Σ_l bytes_l(f_l) ≤ size, or Σ_l ms_l(f_l) ≤ time
    minimise Σ_l ms_l(f_l)       with Σ_l error_l(f_l) ≤ 10^(-SQNR / 10)

A layer's error is the noise power at the network's output with this layer alone quantized
(layer_noise.py); powers of small, independent noises add. Its time is measured alone in ONNX
Runtime (layer_cost.py). Quantize then writes what was chosen, and the whole is measured again.
MixDQ and ViDiT-Q give kinds of layers budgets of their own, by module names and image metrics; here
one metric ranks all.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from torch import fx

from effuse.errors import BackendError, ConfigError, PassError
from effuse.graph import calls, module_path
from effuse.kernels.formats import parse
from effuse.passes import layer_cost
from effuse.passes.base import Pass, Work
from effuse.passes.bits_solver import Budget, Option, choose, decibels, noise, total
from effuse.passes.layer_noise import Noises, latent_noise, output_noise, relative_noise, results
from effuse.passes.layer_options import Choices, drop_broken, drop_losers, tabulate
from effuse.passes.lone_layer import FLOAT, written
from effuse.passes.options import check_choice, check_sequence
from effuse.passes.quantize import QUANTIZED
from effuse.passes.quantize_sites import kept, sites
from effuse.passes.slow_layers import Slow, slow_formats
from effuse.plan import Rate
from effuse.program import Part, Program

Sensitivity = Literal["output", "latent"]
BUDGETS = ("size_mb", "milliseconds", "sqnr_db")
SECONDS = 0.6  # for timing a whole step, in float and as chosen


@dataclass(frozen=True)
class AutoBits(Pass):
    """A format for every layer: the most faithful within a budget, or the fastest for an error.

    At most one budget. Without any: the fastest that is no noisier than all layers in the first
    format. Times are of the plan's default variant, in ONNX Runtime on this machine where that is
    installed, and a cost model's elsewhere. Layers that run once a picture are stored in the first
    format where that is faithful.

    Args:
        formats: what layers can have beside float.
        size_mb: most megabytes (10^6 bytes) of all weights; the least error within it.
        milliseconds: most milliseconds of a step; the least error within it.
        sqnr_db: least predicted SQNR (dB) of the output; the least time with it.
        sensitivity: error of the network's `output`, or of the final `latent`, for which every
            layer and format takes a sampling run of its own.
    """

    name: ClassVar[str] = "auto_bits"
    exact: ClassVar[bool] = False
    calibrates: ClassVar[bool] = True

    formats: tuple[str, ...] = ("w8a8", "w4a8")
    size_mb: float | None = None
    milliseconds: float | None = None
    sqnr_db: float | None = None
    sensitivity: Sensitivity = "output"

    def __post_init__(self) -> None:
        check_sequence("auto_bits", "formats", self.formats, "formats' names")
        check_choice("auto_bits", "sensitivity", self.sensitivity, get_args(Sensitivity))
        if not self.formats:
            raise ConfigError("auto_bits: formats=(): name at least one, such as 'w8a8'")
        for name in self.formats:
            parse(name)
        given = {name: getattr(self, name) for name in BUDGETS if getattr(self, name) is not None}
        if len(given) > 1:
            raise ConfigError(f"auto_bits: give one budget at most, not {' and '.join(given)}")
        for name in ("size_mb", "milliseconds"):
            if name in given and not given[name] > 0:
                raise ConfigError(f"auto_bits: {name}={given[name]!r}: expected more than 0")

    def requires(self, program: Program) -> str | None:
        """No quantization yet: this pass has it done."""
        if any(calls(part.graph, *QUANTIZED) for part in program.parts):
            return "the program is quantized already; give AutoBits in Quantize's place"
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Measure the layers, choose, quantize, and measure the result."""
        if work.calibration is None:
            raise PassError(
                "auto_bits needs calibration: hand compile(calibration=run) a function that "
                "samples with the model it is given, or leave calibration=None with a schedule"
            )
        part = program.part(program.plan.default)
        probe = middle(part, work)
        with tempfile.TemporaryDirectory(prefix="effuse-") as folder:
            clock = Clock(probe, Path(folder))
            before = clock.run(program, "float")
            job = Job(self, program, part, probe, work)
            chosen = job.choose(before and layer_cost.in_turns([before], SECONDS)[0])
            result = job.write(chosen)
            after = clock.run(result, "chosen")
            pair = layer_cost.in_turns([before, after], SECONDS) if before and after else None
        return job.settle(result, pair)

    @property
    def timed(self) -> bool:
        """Whether time is the aim, and a format that is not faster no gain."""
        return self.size_mb is None

    def wanted(self, node: fx.Node) -> bool:
        """Whether a layer may be quantized; one without a path could not be named to Quantize."""
        path = module_path(node)
        return bool(path) and self.unwanted(path) is None


def middle(part: Part, work: Work) -> Mapping[str, Any]:
    """The step's inputs from the middle of the calibration run: one is enough to rank layers."""
    kept = work.calibration.probes.get(part.name, ()) if work.calibration else ()
    if not kept:
        raise PassError(f"auto_bits: calibration never ran the full step program, {part.name!r}")
    return kept[len(kept) // 2]


@dataclass(frozen=True)
class Clock:
    """Builds whole steps for timing, where ONNX Runtime can run them."""

    probe: Mapping[str, Any]
    folder: Path

    def run(self, program: Program, name: str) -> layer_cost.Run | None:
        """A run of the program's default variant, or None."""
        if layer_cost.measurable():
            return None
        part = program.part(program.plan.default)
        try:
            return layer_cost.step_run(program, part, self.probe, self.folder / name)
        except BackendError:
            return None


@dataclass
class Job:
    """One run of the pass: its choice, and what it has measured for the report."""

    options: AutoBits
    program: Program
    part: Part
    probe: Mapping[str, Any]
    work: Work

    def choose(self, step: float | None) -> dict[str, str]:
        """The layers' formats by module path; `step` is the milliseconds of a step in float."""
        every = sites(self.part, self.program.weights)
        found = [site for site in every if self.options.wanted(site)]
        choices = tabulate(self.program, self.part, found, self.options.formats, self.work)
        drop_losers(choices, self.options.timed, self.work.log)
        noises = self._noises(choices)
        drop_broken(choices, noises, self.work.log)
        slow = self._slow()
        table = [[choices.option(group, name, noises) for name in choices.formats(group)]
                 for group in choices.groups]  # fmt: skip
        table.append([self._rest(table, slow.saved, step)])
        picked = self._solve(table)
        self._note(choices, table, picked, step)
        others = kept(self.part, self.program.weights)  # there is nothing to choose for them
        paths = [module_path(site) for site in (*every, *others)]
        assigned = {path: FLOAT for path in paths if path}
        for group, row, place in zip(choices.groups, table, picked, strict=False):
            assigned |= {module_path(site): row[place].format for site in group}
        return slow.formats | assigned

    def _slow(self) -> Slow:
        weights, options = self.program.weights, self.options
        found = {part.name: [site for site in sites(part, weights) if module_path(site)]
                 for part in self.program.parts}  # fmt: skip
        wanted = {name: list(filter(options.wanted, each)) for name, each in found.items()}
        slow = slow_formats(self.program, wanted, options.formats[0], self.work)
        every = {module_path(site): FLOAT for part in self.program.parts
                 if part.rate < Rate.STEP for site in found[part.name]}  # fmt: skip
        return replace(slow, formats=every | slow.formats)

    def _noises(self, choices: Choices) -> Noises:
        lones = choices.low_bit()
        if self.options.sensitivity == "latent":
            return latent_noise(self.program, self.part, lones, self.work)
        return output_noise(self.program, self.part, lones, [self.probe], self.work)

    def _rest(self, table: Sequence[Sequence[Option]], saved: int, step: float | None) -> Option:
        """All that is no layer to choose for: what is left of the whole in float."""
        layers = total(table, [0] * len(table))
        size = sum(tensor.nbytes for tensor in self.program.weights.values())
        return Option("rest", 0.0, size - saved - layers.bytes,
                      0.0 if step is None else step - layers.milliseconds)  # fmt: skip

    def _solve(self, table: list[list[Option]]) -> tuple[int, ...]:
        """The best options; a size's budget is met without losing time, if it can be."""
        options = self.options
        try:
            if options.size_mb is not None:
                return self._within(table, options.size_mb)
            return choose(table, self._budget(table))
        except PassError as error:
            (name,) = (name for name in BUDGETS if getattr(options, name) is not None)
            value = getattr(options, name)
            raise PassError(f"auto_bits: {name}={value!r}: {error}") from None

    def _within(self, table: list[list[Option]], megabytes: float) -> tuple[int, ...]:
        size = megabytes * 1e6
        as_float = total(table, [0] * len(table)).milliseconds
        try:
            return choose(table, Budget("error", {"bytes": size, "milliseconds": as_float}))
        except PassError:
            found = choose(table, Budget("error", {"bytes": size}))
        self.work.log.note(f"within {megabytes:g} MB a step is slower than in float")
        return found

    def _budget(self, table: Sequence[Sequence[Option]]) -> Budget:
        if self.options.milliseconds is not None:
            return Budget("error", {"milliseconds": self.options.milliseconds})
        if self.options.sqnr_db is not None:
            return Budget("milliseconds", {"error": noise(self.options.sqnr_db)})
        all_first = total(table, uniform(table, self.options.formats[0]))
        return Budget("milliseconds", {"error": all_first.error})

    def _note(
        self, choices: Choices, table: Sequence[Sequence[Option]], picked: Sequence[int],
        step: float | None,
    ) -> None:  # fmt: skip
        """The table of the report: what was chosen, and what else there was."""
        note = self.work.log.note
        reason = choices.unmeasured
        note(f"time by a cost model, of the layers alone: {reason}" if reason else
             "time of single layers measured in ONNX Runtime"
             + ("" if step is None else f"; a step in float takes {step:.2f} ms"))  # fmt: skip
        rows = {"predicted, all in float": [0] * len(table)}
        rows |= {f"predicted, {name} where it wins": uniform(table, name)
                 for name in self.options.formats}  # fmt: skip
        rows["predicted, least size"] = list(choose(table, Budget("bytes", {})))
        rows["predicted, least time"] = list(choose(table, Budget("milliseconds", {})))
        rows["predicted, as chosen"] = list(picked)
        for title, places in rows.items():
            note(f"{title}: {total(table, places)}; {counted(table, places)}")

    def write(self, formats: Mapping[str, str]) -> Program:
        """The program with its layers in these formats."""
        bits = written(self.options.formats[0], tuple(sorted(formats.items())))
        bits = replace(bits, exclude=("",))  # layers without a path
        return bits.run(self.program, self.work)

    def settle(self, result: Program, pair: Sequence[float] | None) -> Program:
        """Note what was measured; give the float program back where the result is no faster."""
        part = result.part(self.part.name)
        truth = results(self.program, self.part, self.probe)
        error = relative_noise(truth, results(result, part, self.probe))
        size = sum(tensor.nbytes for tensor in result.weights.values())
        time = "" if pair is None else f", {pair[1]:.2f} ms (float in turns with it: {pair[0]:.2f})"
        figures = f"{decibels(error):.1f} dB, {size / 1e6:.3f} MB{time}"
        self.work.log.note(f"measured, as chosen: {figures}")
        if pair is None or pair[1] <= pair[0] or not self.options.timed:
            return result
        self.work.log.note("the step is not faster than in float as a whole: all layers stay float")
        every = {each.name: FLOAT for each in result.layers if each.name}
        return self.write(every)


def uniform(table: Sequence[Sequence[Option]], format: str) -> list[int]:
    """The format for every layer that can have it, float for the others."""
    return [next((place for place, each in enumerate(row) if each.format == format), 0)
            for row in table]  # fmt: skip


def counted(table: Sequence[Sequence[Option]], picked: Sequence[int]) -> str:
    """How many of the groups of layers have which format."""
    names = [row[place].format for row, place in zip(table, picked, strict=True)][:-1]
    return ", ".join(f"{count} in {name}" for name, count in Counter(names).most_common())
