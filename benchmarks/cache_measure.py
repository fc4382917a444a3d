"""Whole runs of the cache benchmark, timed in turns with their baseline, and their figures."""

from __future__ import annotations

import contextlib
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
from cache_bench import Bench, Sampler
from cache_rows import Row

import effuse
from effuse.evaluate import picture_db
from effuse.tape import Trace


@dataclass
class Subject:
    """A configuration ready to be measured."""

    row: Row
    model: Any
    sample: Sampler
    more: dict[str, Any] = field(default_factory=dict)  # for its result


def measure(
    bench: Bench, base: Subject, subjects: Sequence[Subject]
) -> list[tuple[Subject, list[Trace], list[float]]]:
    """Whole runs in rounds, the baseline before and after each round.

    A run's time is the sum of the network's calls. A run is compared with the mean of the two
    baseline runs around it; every other round goes backwards.
    """
    if not subjects:
        return []
    for each in (base, *subjects):
        warm_up(each)
    traces: dict[int, list[Trace]] = {index: [] for index in range(len(subjects))}
    times = [seconds(Trace(base.model).sample(base.sample))]
    for turn in range(bench.arguments.rounds):
        for index in list(traces)[:: 1 if turn % 2 == 0 else -1]:
            each = subjects[index]
            traces[index].append(Trace(each.model).sample(each.sample))
        times.append(seconds(Trace(base.model).sample(base.sample)))
    around = [statistics.mean(pair) for pair in itertools.pairwise(times)]
    return [(each, traces[index], around) for index, each in enumerate(subjects)]


class Enough(Exception):
    """A warm-up has seen every variant."""


def warm_up(subject: Subject) -> None:
    """Sample from the start until every variant has run twice."""
    plan = getattr(getattr(subject.model, "session", None), "spec", SimpleNamespace(plan=None)).plan
    reading = [n for n, step in enumerate(plan.steps) if step.reads] if plan else []
    last = max(2, *reading[:2]) if reading else 2

    def on_step(index: int, *_: Any) -> None:
        if index >= last:
            raise Enough

    with contextlib.suppress(Enough):
        Trace(subject.model).sample(lambda model, _: subject.sample(model, on_step))


def seconds(trace: Trace) -> float:
    """Time of a whole run inside the network."""
    return sum(trace.seconds.values())


def keep(bench: Bench, found: Sequence[tuple[Subject, list[Trace], list[float]]]) -> None:
    """Add what was measured to the results."""
    for subject, traces, around in found:
        bench.results[subject.row.name] = result(bench, subject, traces, around)


def named(row: Row) -> dict[str, Any]:
    """What a result says of its configuration."""
    passes = effuse.Config(passes=row.passes).data()["passes"]
    plain = {"name": row.name, "family": row.family, "label": row.label, "kind": row.kind}
    return {**plain, **({} if row.kind == "package" else {"passes": passes})}


def result(
    bench: Bench, subject: Subject, traces: Sequence[Trace], around: Sequence[float]
) -> dict[str, Any]:
    """The figures of one configuration."""
    row, times = subject.row, [seconds(trace) for trace in traces]
    ratios = [base / own for base, own in zip(around, times, strict=True)]
    pictures = traces[0].pictures
    found = {
        **named(row),
        "speedup": statistics.median(ratios),
        "speedup_rounds": ratios,
        "ms_per_run": 1000 * statistics.median(times),
        "baseline_ms": 1000 * statistics.median(around),
        **psnrs(bench.reference, pictures),
        "repeats": all(np.array_equal(trace.pictures, pictures) for trace in traces),
        "full_steps": full_steps(subject, traces[0]),
        "variants": dict(traces[0].variants),
        **subject.more,
    }
    if row.kind == "package":
        found["speedup_exact"] = bench.results["exact"]["ms_per_run"] / found["ms_per_run"]
    if row.kind == "steps" and row.steps == bench.arguments.steps:
        bench.own[row.solver] = pictures
    elif row.solver in bench.own:
        found["psnr_own_db"] = picture_db(bench.own[row.solver], pictures)
    return found


def psnrs(expected: Any, pictures: Any) -> dict[str, Any]:
    """PSNR (dB) of all pictures together, of the worst, and of each."""
    each = [picture_db(one, other) for one, other in zip(expected, pictures, strict=True)]
    return {
        "psnr_db": picture_db(expected, pictures),
        "psnr_worst_db": min(each),
        "psnr_each": each,
    }


def full_steps(subject: Subject, trace: Trace) -> str:
    """How many steps ran in full, of how many; those of a package by its interval."""
    total = len(trace.timesteps)
    if subject.row.kind == "package":
        return f"{-(-total // subject.row.interval)} of {total}"
    return f"{trace.variants.get('full', total)} of {total}"
