"""What the parity benchmark measures: agreement over a trajectory, time in turns, size."""

from __future__ import annotations

import functools
import importlib
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cpu_job import first_line
from cpu_run import clean
from parity_networks import NETWORKS, Data, Step
from parity_rows import NOT_TIMED, REFERENCE, TARGETS, TENSORRT, Cell, baseline

import effuse
from effuse.errors import BackendError, ConfigError, EffuseError, MissingExtra, PassError
from effuse.metrics import sqnr_db
from effuse.plan import spec_from_json

REFUSALS = (BackendError, ConfigError, MissingExtra, PassError)  # others fail the run
DEFECT = "defect"  # of a lowering, as its error says: no refusal
Outputs = list[np.ndarray[Any, Any]]  # one a step


@dataclass
class Study:
    """A network, and what its cells are compared with, each made when it is first asked for."""

    network: str
    steps: int
    rounds: int
    threads: int
    folder: Path  # of artifacts; temporary
    _models: dict[Cell, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    _outputs: dict[Cell, Outputs] = field(default_factory=dict)

    @functools.cached_property
    def data(self) -> Data:
        """The network and its inputs."""
        return NETWORKS[self.network](self.steps)

    @functools.cached_property
    def original(self) -> Outputs:
        """What the network itself gives."""
        return run(self.data.module, self.data.judged)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """The cell's figures, or why it has none."""
        try:
            return {**named(cell), **self._figures(cell)}
        except Exception as error:  # the other cells are worth keeping
            reason = clean(first_line(error))
            if isinstance(error, REFUSALS) and DEFECT not in str(error):
                return {**named(cell), "reason": reason.partition(": ")[2]}
            return {**named(cell), "reason": f"failed: {reason}", "error": reason}

    def _figures(self, cell: Cell) -> dict[str, Any]:
        model, told = self.model(cell)
        found = self.outputs(cell)
        return {
            "original_db": worst_db(self.original, found),
            "reference_db": self._agreement(cell, found),
            **self._time(cell, model),
            **told,
        }

    def _agreement(self, cell: Cell, found: Outputs) -> float | None:
        """dB against the reference back end; None where there is none, or it is this one."""
        reference = Cell(cell.network, cell.preset, REFERENCE)
        if cell == reference:
            return None
        try:
            return worst_db(self.outputs(reference), found)
        except EffuseError:  # which its own cell tells
            return None

    def _time(self, cell: Cell, model: Any) -> dict[str, Any]:
        if cell.backend in NOT_TIMED:
            return {"speedup": None, "remark": NOT_TIMED[cell.backend]}
        base, _ = self.model(baseline(cell.network))
        ratios, seconds = turns(base, model, self.data.judged, self.rounds)
        return {"speedup": statistics.median(ratios), "speedup_rounds": ratios,
                "ms_per_step": 1000 * seconds / len(self.data.judged)}  # fmt: skip

    def outputs(self, cell: Cell) -> Outputs:
        """What a cell gives along the trajectory, a warm-up behind it."""
        if cell not in self._outputs:
            self._outputs[cell] = run(self.model(cell)[0], self.data.judged)
        return self._outputs[cell]

    def model(self, cell: Cell) -> tuple[Any, dict[str, Any]]:
        """A cell's model as a device loads it, and what is told of it; the last few are kept.

        Raises:
            EffuseError: the back end refuses.
        """
        if cell not in self._models:
            self._models = {k: v for k, v in self._models.items() if k == baseline(cell.network)}
            self._models[cell] = self._compiled(cell)
        return self._models[cell]

    def _compiled(self, cell: Cell) -> tuple[Any, dict[str, Any]]:
        start = time.perf_counter()
        backend = importlib.import_module(f"effuse.backends.{cell.backend}")
        if reason := backend.available():
            raise BackendError(f"not here: {reason}")
        config = effuse.Config(
            passes=cell.preset, backend=cell.backend, target=TARGETS.get(cell.backend)
        )
        compiled = effuse.compile(
            self.data.module, config, inputs=self.data.judged[0], progress=False,
            schedule=list(self.data.timesteps), calibration=self.data.calibration,
        )  # fmt: skip
        told = {**described(compiled), "compile_s": time.perf_counter() - start}
        path = compiled.save(self.folder / cell.name.replace(" ", "-"))
        if cell.backend == TENSORRT:
            return rehearsed(compiled), told
        return effuse.load(path, threads=self.threads), told


def rehearsed(compiled: effuse.Compiled) -> Any:
    """The ONNX files written for TensorRT, in ONNX Runtime.

    Raises:
        BackendError: it has no operator for one of their nodes.
    """
    spec = spec_from_json(compiled.manifest["program"])
    backend = importlib.import_module("effuse.backends.tensorrt")
    session = backend.rehearse(spec, compiled.folder)
    if session is None:
        raise BackendError("ONNX Runtime has no kernel for a node that TensorRT has")
    session.files = compiled  # its temporary folder lives as long as it does
    return session


def named(cell: Cell) -> dict[str, Any]:
    """What a result says of its cell."""
    return {"network": cell.network, "preset": cell.preset, "backend": cell.backend}


def described(compiled: effuse.Compiled) -> dict[str, Any]:
    """Size, arithmetic and layers, from the artifact."""
    layers, spec = compiled.manifest["layers"], spec_from_json(compiled.manifest["program"])
    return {
        "megabytes": compiled.size / 1e6,
        "native": compiled.manifest["native"],
        "layers": {"all": len(layers), "in float": sum(bool(each["reason"]) for each in layers)},
        "variants": sorted({step.variant for step in spec.plan.steps} | {spec.plan.default}),
    }


# ---- along the trajectory ------------------------------------------------------------------------


def run(model: Any, steps: Sequence[Step]) -> Outputs:
    """A model's outputs, step by step, in order."""
    return [output(model, step) for step in steps]


def output(model: Any, step: Mapping[str, Any]) -> np.ndarray[Any, Any]:
    """The first of a call's outputs."""
    with torch.no_grad():
        found = model(**{**step, "return_dict": False})[0]
    return np.asarray(found.detach().cpu().float().numpy())


def worst_db(expected: Outputs, found: Outputs) -> float:
    """The least SQNR (dB) over the steps."""
    return min(sqnr_db(one, other) for one, other in zip(expected, found, strict=True))


def turns(
    base: Any, model: Any, steps: Sequence[Step], rounds: int
) -> tuple[list[float], float]:  # fmt: skip
    """The baseline's time over the model's, a round each; the model's median (seconds).

    A run of the model is compared with the mean of the two of the baseline around it; the first
    run of each is not counted.
    """
    seconds(base, steps), seconds(model, steps)
    bases, times = [seconds(base, steps)], []
    for _ in range(rounds):
        times.append(seconds(model, steps))
        bases.append(seconds(base, steps))
    around = [statistics.mean(pair) for pair in itertools.pairwise(bases)]
    ratios = [one / own for one, own in zip(around, times, strict=True)]
    return ratios, statistics.median(times)


def seconds(model: Any, steps: Sequence[Step]) -> float:
    """Time of a run along the trajectory."""
    start = time.perf_counter()
    run(model, steps)
    return time.perf_counter() - start
