"""What the quantization benchmark measures: one network, its calibrations, the rows' figures."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from cache_bench import Bench
from cache_measure import psnrs
from quantize_rows import Row
from torch import fx

import effuse
from effuse.backends.reference import session
from effuse.build import capture_program
from effuse.calibrate import calibrate, drive, layer_values, needs_of
from effuse.evaluate import repeat_step
from effuse.graph import clone, eliminate, emit_weight, substitute, unused_name
from effuse.kernels.formats import round_trip
from effuse.kernels.quantizers import parse_quantizer
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Pass
from effuse.program import Program
from effuse.statistics import Calibration, Needs
from effuse.tape import Tape, Trace
from effuse.watch import Watch

CALIBRATION_SEED = 0  # pictures have cache_bench's NOISE_SEED
SKEW = 20  # ratio of the halves' ranges: 400 in squared error


@dataclass
class Study:
    """A network in float, its trajectory, and what rows have in common: rewrites, calibrations."""

    network: str
    arguments: argparse.Namespace
    known: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)
    _prepared: dict[tuple[Pass, ...], tuple[Program, float]] = field(default_factory=dict)
    _calibrations: list[tuple[Program, Needs, Calibration, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bench = Bench(self.network, self.arguments, Path())
        self.config = effuse.Config(backend="reference", seed=CALIBRATION_SEED)
        inputs = self.bench.pipe.example_inputs(self.arguments.prompts)
        given = capture_program(self.bench.original, inputs, self.bench.pipe.scheduler, self.config)
        self.program = run_passes(given, (Canonicalize(), Hoist()))
        self._prepared[()] = self.program, 0.0
        self.tape = Tape(self.arguments.steps)
        self.reference = self.pictures(session(folded(self.program)), self.tape)

    # ---- sampling --------------------------------------------------------------------------------

    def pictures(self, model: Any, tape: Tape | None = None) -> Any:
        """What a whole run ends in, from the noise of the evaluation."""
        sample = self.bench.sampler("ddim", self.arguments.steps)
        return Trace(model, tape).sample(sample).pictures

    def feed(self, model: Any) -> None:
        """The pipeline's own sampling of other prompts from other noise."""
        self.bench.set_solver("ddim", self.arguments.steps)
        setattr(self.bench.pipe, self.bench.place, model)
        self.bench.pipe.latents(self.bench.unseen, CALIBRATION_SEED)

    # ---- building --------------------------------------------------------------------------------

    def build(self, row: Row) -> tuple[Program, float, str]:
        """The quantized program, the seconds that it takes alone (less the capture), a remark."""
        program, seconds = self.prepared(row.before)
        result, more = self.run(program, (row.quantize,))
        return result, seconds + more, rewritten(program, row)

    def prepared(self, before: tuple[Pass, ...]) -> tuple[Program, float]:
        """The program after the passes in front of Quantize, and their seconds."""
        if before not in self._prepared:
            program, seconds = self.run(self.program, before)
            changed = program if has_changed(program, before) else self.program
            self._prepared[before] = changed, seconds
        return self._prepared[before]

    def run(self, program: Program, passes: tuple[Pass, ...]) -> tuple[Program, float]:
        """Run passes; the seconds are as if no other row had calibrated."""
        start, shared = time.perf_counter(), 0.0

        def calibrated(given: Program) -> Calibration:
            nonlocal shared
            began = time.perf_counter()
            found, seconds = self.calibration(given, needs_of(passes))
            shared += seconds - (time.perf_counter() - began)
            return found

        def driven(given: Program, watch: Watch) -> None:
            drive(given, self.feed, watch, seed=CALIBRATION_SEED)

        result = run_passes(program, passes, calibrated, drive=driven)
        return result, time.perf_counter() - start + shared

    def calibration(self, program: Program, needs: Needs) -> tuple[Calibration, float]:
        """What the pipeline's sampling shows of a program, and the seconds it took."""
        for known, kept, found, seconds in self._calibrations:
            if known is program and kept | needs == kept:
                return found, seconds
        start = time.perf_counter()
        found = calibrate(program, self.feed, layer_values, needs=needs, seed=CALIBRATION_SEED)
        seconds = time.perf_counter() - start
        self._calibrations.append((program, needs, found, seconds))
        return found, seconds

    # ---- figures ---------------------------------------------------------------------------------

    def measure(self, row: Row) -> dict[str, Any]:
        """A row's figures; two rows that come to the same program are measured once."""
        program, seconds, remark = self.build(row)
        key = (id(self.prepared(row.before)[0]), row.quantize)
        if key not in self.known:
            self.known[key] = {**self.figures(program), **of_layers(program)}
        remarks = "; ".join(each for each in (row.remark, remark) if each)
        return {**named(row), **self.known[key], "build_s": seconds, "remark": remarks}

    def figures(self, program: Program) -> dict[str, Any]:
        """SQNR by step on float's inputs, PSNR of the pictures, megabytes of weights."""
        model = session(folded(program))
        by_step = [repeat_step(model, calls)[1] for calls in self.tape.steps.values()]
        return {
            "sqnr_db": statistics.median(by_step),
            "sqnr_worst_db": min(by_step),
            "sqnr_steps_db": by_step,
            **psnrs(self.reference, self.pictures(model)),
            "megabytes": megabytes(program),
        }


def folded(program: Program) -> Program:
    """The same numbers without computing a weight from its codes again at each call."""
    weights, parts = dict(program.weights), []
    for part in program.parts:
        graph, _ = clone(part.graph)
        for node, value in constants(graph, weights).items():
            with graph.inserting_before(node):
                name = unused_name(weights, f"folded.{part.name}.{node.name}")
                substitute(node, emit_weight(graph, weights, name, value))
        eliminate(graph)
        parts.append(replace(part, graph=graph))
    return replace(program, parts=tuple(parts), weights=weights)


def constants(graph: fx.Graph, weights: Mapping[str, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
    """What is computed from weights alone and read by anything else."""
    known: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            known[node] = weights[node.target]
        elif (
            node.op == "call_function"
            and node.all_input_nodes
            and all(each in known for each in node.all_input_nodes)
        ):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return {
        node: value
        for node, value in known.items()
        if node.op == "call_function"
        and torch.is_tensor(value)
        and any(user not in known for user in node.users)
    }


def named(row: Row) -> dict[str, Any]:
    """What a result says of its row."""
    passes = effuse.Config(passes=(*row.before, row.quantize)).data()["passes"]
    return {"name": row.name, "format": row.format, "method": row.method, "passes": passes}


def of_layers(program: Program) -> dict[str, Any]:
    """The mean of the layers' own SQNR (dB), and how many are quantized."""
    changed = [each for each in program.layers if not each.reason]
    measured = [each.sqnr_db for each in changed if each.sqnr_db is not None]
    mean = statistics.fmean(measured) if measured else None
    return {"layers_db": mean, "quantized": len(changed), "layers": len(program.layers)}


def megabytes(program: Program) -> float:
    """Of all stored tensors."""
    return sum(each.numel() * each.element_size() for each in program.weights.values()) / 1e6


def has_changed(program: Program, passes: tuple[Pass, ...]) -> bool:
    """Whether one of the last passes has rewritten anything."""
    return any(record.rewrites for record in program.records[len(program.records) - len(passes) :])


def rewritten(program: Program, row: Row) -> str:
    """How much the passes before Quantize have rewritten."""
    if not row.before:
        return ""
    names = {each.name for each in row.before}
    done = {record.name: sum(record.rewrites.values()) for record in program.records
            if record.name in names}  # fmt: skip
    return ", ".join(f"{name}: {count} rewrites" for name, count in done.items()) or (
        "rewrites nothing here"
    )


def skewed() -> str:
    """How much less the smaller half of a concatenation errs with a scale of its own (uint8)."""
    generator, how = torch.Generator().manual_seed(0), parse_quantizer("uint8/tensor/asymmetric")
    wide = torch.randn(4, 64, 32, 32, generator=generator)
    narrow = torch.randn(4, 64, 32, 32, generator=generator) / SKEW
    together = round_trip(torch.cat([wide, narrow], dim=1), how)[:, 64:]
    errors = [
        (each - narrow).square().mean().item() for each in (together, round_trip(narrow, how))
    ]
    return (
        f"skewed halves: of N(0, 1) beside N(0, 1/{SKEW}²), what is split errs "
        f"{errors[0] / errors[1]:.0f} times less (squared, uint8) in the smaller half"
    )
