"""Evaluate: compiled networks against the original, by sampling with each from the same noise.

Each step's error is measured like with like: the original's own inputs, recorded along its
trajectory, go into every network (teacher-forced), since one network's error moves the next input.
Pictures come from each network's own trajectory, where errors do add up. The time that counts is
that of a whole run, since a network that reuses features has quick steps and slow ones.
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from effuse.errors import InputError, require
from effuse.metrics import CEILING_DB, psnr_db, sqnr_db
from effuse.tape import Call, Model, Sampler, Tape, Trace

Progress = Callable[[str, int, int], None]

CPUINFO = Path("/proc/cpuinfo")  # Linux: the processor's name, which platform does not know


@dataclass(frozen=True, eq=False)
class Run:
    """What one network did: time, size, pictures, and its distance from the reference."""

    name: str
    ms_per_step: float  # median
    ms_per_run: float  # of all steps: the sum of each one's median
    megabytes: float
    pictures: np.ndarray[Any, Any]  # uint8, (n, h, w, 3)
    psnr_db: float  # of all pictures together; 200 where no pixel differs
    psnr_each: tuple[float, ...]  # dB, one a picture
    step_sqnr_db: tuple[float | None, ...]  # one a step; None where it is not known
    variants: Mapping[str, int] = field(default_factory=dict)  # calls while sampling, by variant

    def to_json(self) -> dict[str, Any]:
        """The figures, without the pixels."""
        return {
            "name": self.name,
            "ms_per_step": self.ms_per_step,
            "ms_per_run": self.ms_per_run,
            "megabytes": self.megabytes,
            "psnr_db": self.psnr_db,
            "psnr_each": list(self.psnr_each),
            "step_sqnr_db": list(self.step_sqnr_db),
            "variants": dict(self.variants),
        }


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Several networks against one reference, on the same noise and prompts."""

    reference: Run
    runs: tuple[Run, ...]  # without the reference
    prompts: tuple[str, ...]  # one a picture
    timesteps: tuple[float, ...]
    machine: Mapping[str, Any]

    def speedup(self, run: Run) -> float:
        """How many times as fast as the reference the whole of `run` is."""
        return self.reference.ms_per_run / run.ms_per_run

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON's own types, without the pixels."""
        runs = [{**run.to_json(), "speedup": self.speedup(run)} for run in self.runs]
        return {
            "reference": self.reference.to_json(),
            "runs": runs,
            "prompts": list(self.prompts),
            "timesteps": list(self.timesteps),
            "machine": dict(self.machine),
        }


def evaluate(
    models: Mapping[str, tuple[Model, float]],
    sample: Sampler,
    prompts: Sequence[str],
    *,
    rounds: int = 2,
    keep: int = 1000,
    memory: float = 2e9,
    progress: Progress | None = None,
) -> Evaluation:
    """Sample with every model from the same noise, and compare with the first.

    Args:
        models: name -> (called like a diffusers denoiser, its size in megabytes), reference first.
        sample: runs the whole loop with the model that it is handed, from the same noise each
            time; calls on_step(index, timestep, output) after each step; gives the final pictures
            in [-1, 1], (n, 3, h, w).
        prompts: one a picture.
        rounds: how often the models are timed on the reference's inputs, taking turns call by
            call: a machine that gets busy does so for all. Sampling has warmed them up.
        keep: the most steps whose inputs are kept for the comparison step by step. Where there are
            more they are evenly spaced; the time of a run is then that of the network's own
            trajectory, and networks whose steps differ are not compared step by step.
        memory: the most bytes of inputs and outputs that are kept.
        progress: progress(what, done, total) as the work goes on.

    Raises:
        InputError: no models or rounds, or a sampler that does not do what `sample` says.
    """
    if not models or min(rounds, keep) < 1:
        raise InputError("evaluate: at least one model, one round and one step to keep are needed")
    show = progress or (lambda what, done, total: None)
    tape = Tape(keep, memory)
    with require("torch").no_grad():
        traces = sample_all(models, sample, tape, show)
        for name, found in traces.items():
            check(name, found, prompts)
        replays = replay_all(models, tape, rounds, show)
        if tape.stride > 1:
            complete_runs(models, sample, replays, rounds, show)
    reference = next(iter(traces.values()))
    first, *others = (
        make_run(name, found, models[name][1], reference.pictures, replays[name], tape)
        for name, found in traces.items()
    )
    return Evaluation(first, tuple(others), tuple(prompts), tuple(reference.timesteps), machine())


def sample_all(
    models: Mapping[str, tuple[Model, float]], sample: Sampler, tape: Tape, show: Progress
) -> dict[str, Trace]:
    """Every model's trace; the reference's calls, which come first, go on the tape."""
    traces: dict[str, Trace] = {}
    show("sample", 0, len(models))
    for name, (model, _) in models.items():
        traces[name] = Trace(model, None if traces else tape).sample(sample)
        show("sample", len(traces), len(models))
    return traces


def check(name: str, trace: Trace, prompts: Sequence[str]) -> None:
    """Refuse what a sampler must not do.

    Raises:
        InputError: no step was announced, the model was not called, or there are not as many
            pictures as prompts.
    """
    shape = trace.pictures.shape
    if len(shape) != 4 or shape[1] != 3 or shape[0] != len(prompts):
        raise InputError(
            f"evaluate: with {name}, sample returned shape {shape}; expected ({len(prompts)}, 3, "
            "height, width), one picture for each prompt"
        )
    if not trace.timesteps or not trace.seconds:
        raise InputError(
            f"evaluate: with {name}, sample did not call the model that it was handed, or not "
            "on_step(index, timestep, output) after it"
        )


@dataclass
class Replay:
    """One model on the reference's inputs: seconds and SQNR (dB) by step."""

    seconds: dict[int, list[float]] = field(default_factory=dict)  # of each round
    errors: dict[int, float] = field(default_factory=dict)

    @property
    def typical(self) -> list[float]:
        """The median seconds of each step."""
        return [statistics.median(rounds) for rounds in self.seconds.values()]


def replay_all(
    models: Mapping[str, tuple[Model, float]], tape: Tape, rounds: int, show: Progress
) -> dict[str, Replay]:
    """Every model at every step of the tape, in turns; every other step in reverse order.

    Each model meets the steps in their order, so what it keeps between steps is right.
    """
    replays = {name: Replay() for name in models}
    total = rounds * len(tape.steps)
    for turn in range(total):
        step, calls = list(tape.steps.items())[turn % len(tape.steps)]
        for name in list(models)[:: 1 if turn % 2 == 0 else -1]:
            seconds, replays[name].errors[step] = repeat_step(models[name][0], calls)
            replays[name].seconds.setdefault(step, []).append(seconds)
        show("time and compare", turn + 1, total)
    return replays


def complete_runs(
    models: Mapping[str, tuple[Model, float]],
    sample: Sampler,
    replays: Mapping[str, Replay],
    rounds: int,
    show: Progress,
) -> None:
    """Time every step by sampling again, where the tape does not hold them all."""
    for turn in range(rounds):
        for name, (model, _) in models.items():
            seconds = Trace(model).sample(sample).seconds
            known = replays[name].seconds if turn else {}
            replays[name].seconds = {n: [*known.get(n, ()), found] for n, found in seconds.items()}
        show("time complete runs", turn + 1, rounds)


def repeat_step(model: Model, calls: Sequence[Call]) -> tuple[float, float]:
    """Seconds, and SQNR (dB), over all the calls of one step."""
    expected = [call.output.ravel() for call in calls]
    seconds, found = zip(*(call.repeat(model) for call in calls), strict=True)
    outputs = np.concatenate([output.ravel() for output in found])
    return sum(seconds), sqnr_db(np.concatenate(expected), outputs)


def make_run(
    name: str,
    trace: Trace,
    megabytes: float,
    reference: np.ndarray[Any, Any],
    replay: Replay,
    tape: Tape,
) -> Run:
    """The figures of one model."""
    pictures, steps, typical = trace.pictures, len(trace.timesteps), replay.typical
    comparable = tape.stride == 1 or len(trace.variants) <= 1
    pairs = zip(reference, pictures, strict=True)
    return Run(
        name=name,
        ms_per_step=1000 * statistics.median(typical),
        ms_per_run=1000 * sum(typical),
        megabytes=megabytes,
        pictures=to_pixels(pictures),
        psnr_db=picture_db(reference, pictures),
        psnr_each=tuple(picture_db(expected, found) for expected, found in pairs),
        step_sqnr_db=tuple(replay.errors.get(n) if comparable else None for n in range(steps)),
        variants=dict(trace.variants),
    )


def picture_db(expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """PSNR (dB) of pixels in [-1, 1]; -200 where a pixel is not finite."""
    return psnr_db(expected, found) if np.isfinite(found).all() else -CEILING_DB


def to_pixels(pictures: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(n, 3, h, w) in [-1, 1] as uint8 (n, h, w, 3); grey where a pixel is not finite."""
    scaled = (np.nan_to_num(pictures) + 1) * 127.5
    pixels: np.ndarray[Any, Any] = scaled.round().astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1)


def machine() -> dict[str, Any]:
    """What the times were measured on."""
    torch = require("torch")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "torch": torch.__version__,
    }


def processor() -> str:
    """The processor's name, or its architecture where the system does not tell."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
