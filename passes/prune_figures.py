"""Sizes of programs, and what Prune tells of its work: sentences, and figures as data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from effuse.graph import value_of
from effuse.log import Log
from effuse.passes.prune_candidates import Candidate
from effuse.passes.prune_scores import correlation, random_sets, together
from effuse.passes.skip_blocks import part_flops
from effuse.program import Program, used_weights
from effuse.weights import peek

Array = np.ndarray[Any, Any]

MEASURES = ("parameters", "flops")


def size_of(program: Program, measure: str) -> int:
    """The program's weights in numbers, or the arithmetic of a step."""
    if measure == "flops":
        return part_flops(program.part(program.plan.default))
    return sum(peek(program.weights, name).numel() for name in used_weights(*program.parts))


def hollow(program: Program) -> Program:
    """The program with weights of the right sizes that take no memory."""
    known = {name: peek(program.weights, name) for name in program.weights}
    fakes = {str(node.target): value_of(node) for part in program.parts
             for node in part.graph.nodes if node.op == "get_attr"}  # fmt: skip
    empty = {
        name: torch.zeros((), dtype=each.dtype, device=fakes[name].device).expand(each.shape)
        for name, each in known.items()
        if name in fakes
    }
    return replace(program, weights=empty)


def shares(before: Program, after: Program) -> dict[str, float]:
    """Of all weights, and of a step's arithmetic, the shares that `after` lacks."""
    return {each: 1 - size_of(after, each) / size_of(before, each) for each in MEASURES}


def rows(
    candidates: Sequence[Candidate], scores: Array, gone: Collection[int]
) -> list[dict[str, Any]]:
    """The candidates as data, a score that is not finite being None."""
    return [
        {
            "name": each.name,
            "kind": each.kind,
            "parameters": each.parameters,
            "flops": each.flops,
            "score": figure(score) if math.isfinite(score) else None,
            "gone": number in gone,
        }
        for number, (each, score) in enumerate(zip(candidates, scores.tolist(), strict=True))
    ]


def figure(value: float) -> float:
    """Six digits of it.

    >>> figure(0.123456789)
    0.123457
    """
    return float(f"{value:.6g}")


def additivity(
    program: Program, candidates: Sequence[Candidate], scores: Array,
    numbers: tuple[Sequence[int], Sequence[int]], probes: Sequence[Any], seed: int,
) -> dict[str, Any]:  # fmt: skip
    """How well sums of single losses predict the loss of what went, and of random sets."""
    offered, gone = numbers
    sets = [[offered[each] for each in chosen] for chosen in random_sets(len(offered), seed)]
    every = [*sets, list(gone)]
    measured = together(program, [[candidates[each] for each in one] for one in every], probes)
    predicted = [float(scores[one].sum()) for one in every]
    found = correlation(predicted[:-1], measured[:-1])
    return {
        "predicted": [figure(each) for each in predicted[:-1]],
        "measured": [figure(each) for each in measured[:-1]],
        "correlation": None if found is None else figure(found),
        "chosen": [figure(predicted[-1]), figure(measured[-1])],
    }


def tell_additivity(found: Mapping[str, Any], log: Log) -> None:
    """`additivity` in sentences."""
    predicted, measured = found["chosen"]
    log.note(
        f"relative squared error of the output: {predicted:.2e} as the sum of single losses, "
        f"{measured:.2e} measured without all of them"
    )
    if found["correlation"] is not None:
        sets = len(found["measured"])
        log.note(f"additivity: correlation {found['correlation']:.2f} over {sets} random sets")


def tell_time(step: int, sizes: Sequence[int], saved: tuple[int, float], log: Log) -> None:
    """What went in time: microseconds of a step and of each candidate, `saved` in sum and measured.

    `saved` are the sum in microseconds, and the share that was measured.
    """
    predicted, measured = saved[0] / step, saved[1]
    log.data["milliseconds"] = {
        "step": step / 1000,
        "candidates": [size / 1000 for size in sizes],
        "predicted": figure(predicted),
        "measured": figure(measured),
    }
    log.note(
        f"a step of {step / 1000:.3g} ms takes {measured:.1%} less as measured, {predicted:.1%} as "
        "the sum of what each candidate saves alone"
    )
