"""The time of a linear layer in ONNX Runtime: float32, 4 bits, 4 bits with a branch; in turns."""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from low_rank_layers import Layer
from low_rank_rows import RANK
from quantize_rows import NO_BOUND

import effuse
from effuse.passes import LowRank, Pass, Quantize

FLOAT = "fp32"
FORMATS = ("w4a16", "w4a8")
INPUTS = (1, 64, 256, 1024)  # rows of x
BRANCH = f" + rank {RANK}"

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """A layer that is handed so many rows."""

    layer: Layer

    @property
    def name(self) -> str:
        """Sizes, and the rows."""
        return f"{self.layer.name}, {self.layer.positions} rows"

    @property
    def named(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"name": self.name}

    @property
    def described(self) -> str:
        """What is timed."""
        return f"in turns: {', '.join(models())}"


def timings(smoke: bool, only: str) -> list[Timing]:
    """What is timed: two layers, at several numbers of rows; for a smoke test, a small one."""
    sizes, counts = ((128,), INPUTS[:2]) if smoke else ((1152, 3072), INPUTS)
    found = [Timing(Layer(size, size, positions=count)) for size in sizes for count in counts]
    return [each for each in found if re.search(only, each.name)]


def models() -> dict[str, tuple[Pass, ...]]:
    """The passes of every model. What a branch holds does not change its time: it is the first."""
    found: dict[str, tuple[Pass, ...]] = {FLOAT: ()}
    for format in FORMATS:
        quantize = Quantize(format, min_sqnr_db=NO_BOUND, edges=True)
        branch = LowRank(rank=RANK, format=format, inputs=False, rounds=1, edges=True)
        found |= {format: (quantize,), format + BRANCH: (branch, quantize)}
    return found


def timed(timing: Timing, arguments: argparse.Namespace) -> dict[str, Any]:
    """The median milliseconds of every model, by round too, in one process."""
    with tempfile.TemporaryDirectory() as folder:
        calls = {name: built(timing.layer, passes, Path(folder) / str(number), arguments.threads)
                 for number, (name, passes) in enumerate(models().items())}  # fmt: skip
        found = in_turns(calls, arguments.rounds, arguments.seconds)
    middle = {name: statistics.median(each) for name, each in found.items()}
    return {**timing.named, "ms": middle, "ms_rounds": found, "ratios": ratios(found)}


def built(layer: Layer, passes: tuple[Pass, ...], place: Path, threads: int) -> Call:
    """One call of the compiled layer, on numpy arrays."""
    x = torch.randn(layer.positions, layer.inner, generator=torch.Generator().manual_seed(0))
    compiled = effuse.compile(
        layer.module, effuse.Config(passes=passes, backend="onnx"), inputs={"x": x},
        calibration=[{"x": x}], progress=False,
    )  # fmt: skip
    session = effuse.load(compiled.save(place), threads=threads).session
    values: Mapping[str, np.ndarray[Any, Any]] = {"x": x.numpy()}
    return lambda: session.step(values)


def in_turns(calls: Mapping[str, Call], rounds: int, seconds: float) -> dict[str, list[float]]:
    """The median milliseconds of each turn; every other round goes backwards."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(turn(calls[name], seconds))
    return found


def turn(call: Call, seconds: float) -> float:
    """The median milliseconds of calls for so many seconds, at least three; one goes before."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def ratios(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The medians over the rounds: float32's time over each model's, and the branches' share."""
    faster = {f"{name}, × {FLOAT}": ratio(found[FLOAT], found[name]) for name in found
              if name != FLOAT}  # fmt: skip
    share = {f"{format}: branch, %": 100 * (ratio(found[format + BRANCH], found[format]) - 1)
             for format in FORMATS}  # fmt: skip
    return {**faster, **share}


def ratio(one: Sequence[float], other: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def table(results: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and lines."""
    done = [row for row in results if "ms" in row]
    if not done:
        return ("",), []
    columns = (*(f"{name}, ms" for name in done[0]["ms"]), *done[0]["ratios"])
    lines = [
        (row["name"], *(f"{value:.3f}" for value in row["ms"].values()),
         *(f"{value:.0f}" if "%" in name else f"{value:.2f}"
           for name, value in row["ratios"].items()))
        for row in done
    ]  # fmt: skip
    return ("", *columns), lines
