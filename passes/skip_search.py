"""Which blocks Skip leaves out, by measured sensitivity (METHODS 2.5).

The loss of a block in a stretch of the schedule is the relative squared error of the network's
output without this one block, on calibration inputs. The sets then have the least sum of losses
that saves the budget (an integer program), or take the blocks by loss per operation saved (greedy).
Sums of losses are an approximation: the loss of the sets together is measured too.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.errors import CalibrationError, PassError, require
from effuse.graph import calls, eliminate, emit_input, evaluate, substitute, value_of
from effuse.passes.base import Work
from effuse.passes.skip_blocks import Block, part_flops, remaining, without
from effuse.plan import PlanStep
from effuse.program import Part, Program
from effuse.watch import Watch

PROBES = 2  # inputs that a block's loss is measured on, of each stretch and variant


class Stretches:
    """A program's steps in at most `most` equal stretches of the schedule."""

    def __init__(self, program: Program, most: int) -> None:
        steps = range(len(program.timesteps or ()))
        self.entries: list[PlanStep] = [program.plan.at(step) for step in steps]
        self.count = min(most, len(steps))
        self.cells: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
        for step in steps:  # (stretch, variant) -> the steps of the stretch that run the variant
            self.cells[self.of(step), self.entries[step].variant].append(step)

    def of(self, step: int) -> int:
        """The stretch that a step is in."""
        return step * self.count // len(self.entries)


@dataclass(frozen=True)
class Probe:
    """A variant's inputs at one step, and the share of all steps that it stands for."""

    stretch: int
    step: int
    variant: str
    weight: float
    values: Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Sensitivity:
    """By stretch and block: the loss (averaged over all steps) and the operations saved."""

    losses: np.ndarray[Any, Any]
    saved: np.ndarray[Any, Any]
    probes: tuple[Probe, ...]


class Recorded(Watch):
    """Keeps the inputs of planned variants: of each step, the first time that it is run."""

    def __init__(self, stretches: Stretches) -> None:
        self._entries = stretches.entries
        self._wanted = {
            step for steps in stretches.cells.values() for step in spread(steps, PROBES)
        }
        self._index: int | None = None
        self.values: dict[int, dict[str, torch.Tensor]] = {}

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """A call at step `index`."""
        self._index = index

    def enter(self, part: Part, values: Mapping[str, torch.Tensor]) -> None:
        """Keep the inputs, if it is the planned variant of a wanted step."""
        step = self._index
        if step not in self._wanted or step in self.values:
            return
        if part.name == self._entries[step].variant:
            self.values[step] = {name: values[name].clone() for name in part.inputs}


def spread(steps: Sequence[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly spread.

    >>> spread(range(10), 2)
    [2, 7]
    """
    count = min(count, len(steps))
    return [steps[(2 * each + 1) * len(steps) // (2 * count)] for each in range(count)]


def record_probes(program: Program, stretches: Stretches, work: Work) -> tuple[Probe, ...]:
    """Inputs of every stretch and variant along calibration's trajectories.

    Raises:
        PassError: there is no calibration.
        CalibrationError: it never ran some stretch as planned.
    """
    if work.drive is None:
        raise PassError("skip: budget=… measures the blocks, which needs calibration")
    record = Recorded(stretches)
    work.drive(program, record)
    probes = []
    for (stretch, variant), steps in stretches.cells.items():
        seen = [step for step in steps if step in record.values]
        if not seen:
            raise CalibrationError(
                f"skip: calibration never ran {variant} at any of the steps {steps[0]} to "
                f"{steps[-1]}; hand compile a calibration run that samples over the whole schedule"
            )
        weight = len(steps) / len(stretches.entries) / len(seen)
        probes += [Probe(stretch, step, variant, weight, record.values[step]) for step in seen]
    return tuple(probes)


def measure(
    program: Program, blocks: Sequence[Block], stretches: Stretches, work: Work
) -> Sensitivity:
    """The loss of each block alone in each stretch, and what it saves there.

    What several blocks share is saved only without all of them, and not counted.
    """
    probes = record_probes(program, stretches, work)
    losses = np.zeros((stretches.count, len(blocks)))
    saved = np.zeros((stretches.count, len(blocks)), dtype=np.int64)
    variants = {variant for _, variant in stretches.cells}
    tails = {name: find_tails(program.part(name), blocks) for name in variants}
    for (stretch, variant), steps in stretches.cells.items():
        for tail in tails[variant]:
            saved[stretch, tail.block] += len(steps) * tail.saved
    for number, probe in enumerate(probes):
        work.progress("sensitivity", number, len(probes))
        part = program.part(probe.variant)
        for block, loss in single_losses(part, tails[part.name], program, probe.values).items():
            losses[probe.stretch, block] += probe.weight * loss
    work.progress("sensitivity", len(probes), len(probes))
    broken = ~np.isfinite(losses)
    for block in np.nonzero(broken)[1].tolist():
        work.log.reject("skip", f"{blocks[block].name}: the output is not finite without it")
    return Sensitivity(np.where(broken, 0, losses), np.where(broken, 0, saved), probes)


@dataclass(frozen=True)
class Tail:
    """What is left to compute without one block, from the values before its first join on."""

    block: int
    join: str
    graph: fx.Graph
    needs: Mapping[str, str]  # input's name -> the node of the whole graph that gives it
    saved: int


def find_tails(part: Part, blocks: Sequence[Block]) -> list[Tail]:
    """A tail for each block that the variant still has, in the order of their joins."""
    order = {node.name: index for index, node in enumerate(part.graph.nodes)}
    flops = part_flops(part)
    tails = []
    for number, block in enumerate(blocks):
        joins = remaining(part, [block])
        if joins:
            less = without(part, part.name, [block])
            first = min(joins, key=order.__getitem__)
            saved = flops - part_flops(less)
            needs = cut_before(less.graph, order, order[first])
            tails.append(Tail(number, first, less.graph, needs, saved))
    return sorted(tails, key=lambda tail: order[tail.join])


def cut_before(graph: fx.Graph, order: Mapping[str, int], place: int) -> dict[str, str]:
    """Let the graph read, as inputs, the values that were computed before `place`.

    Returns:
        the nodes' names by the new inputs' names.
    """
    found = {}
    for node in calls(graph):
        early = order.get(node.name, place) < place
        if early and any(order.get(user.name, place) >= place for user in node.users):
            found[f"before.{node.name}"] = node.name
            substitute(node, emit_input(graph, f"before.{node.name}", value_of(node)))
    eliminate(graph)
    return found


def single_losses(
    part: Part, tails: Sequence[Tail], program: Program, values: Mapping[str, torch.Tensor]
) -> dict[int, float]:
    """The loss of each block alone, with what is before a block computed once for all."""
    by_join = {tail.join: tail for tail in tails}
    last = {node: tail.join for tail in tails for node in tail.needs.values()}
    kept: dict[str, Any] = {}
    found: dict[int, tuple[Any, ...]] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in last:
            kept[node.name] = value
        if tail := by_join.get(node.name):
            given = {name: kept[source] for name, source in tail.needs.items()}
            found[tail.block] = _outputs(part, tail.graph, program, {**values, **given})
            for name in [name for name in kept if last[name] == node.name]:
                del kept[name]

    exact = _outputs(part, part.graph, program, values, observe)
    return {block: output_loss(each, exact) for block, each in found.items()}


def _outputs(
    part: Part,
    graph: fx.Graph,
    program: Program,
    values: Mapping[str, Any],
    observe: Any = None,
) -> tuple[Any, ...]:
    """The network's outputs, without the slots that a variant fills."""
    found = zip(part.outputs, evaluate(graph, program.weights, values, observe), strict=True)
    return tuple(value for name, value in found if name in program.outputs)


def output_loss(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Σ|found - exact|² / Σ|exact|² over all outputs; not finite where `found` is not."""
    difference = sum(float((a.double() - b.double()).square().sum())
                     for a, b in zip(found, exact, strict=True))  # fmt: skip
    return difference / (sum(float(b.double().square().sum()) for b in exact) or 1.0)


def measure_sets(
    program: Program, sets: Sequence[frozenset[Block]], probes: Sequence[Probe]
) -> float:
    """The loss, averaged over the steps, with each step's blocks left out together."""
    total = 0.0
    for probe in probes:
        part = program.part(probe.variant)
        less = without(part, part.name, sets[probe.step])
        exact = _outputs(part, part.graph, program, probe.values)
        found = _outputs(less, less.graph, program, probe.values)
        total += probe.weight * output_loss(found, exact)
    return total


# ---- searches: which items save `need` with the least loss ---------------------------------------


def greedy(losses: Sequence[float], saved: Sequence[int], need: int) -> tuple[int, ...]:
    """Items of the least loss per operation saved, until they save `need`.

    >>> greedy([1.0, 3.0, 2.0], [10, 10, 10], 15)
    (0, 2)
    """
    useful = [item for item in range(len(saved)) if saved[item] > 0]
    picked: list[int] = []
    left = need
    for item in sorted(useful, key=lambda item: losses[item] / saved[item]):
        if left <= 0:
            break
        picked.append(item)
        left -= saved[item]
    return tuple(sorted(picked))


def knapsack(losses: Sequence[float], saved: Sequence[int], need: int) -> tuple[int, ...]:
    """The items with the least sum of losses that save `need`, as an integer program.

    >>> knapsack([1.0, 3.0, 3.5], [10, 10, 20], 20)
    (2,)
    """
    optimize: Any = require("scipy.optimize")
    start = greedy(losses, saved, need)
    unit, scale = max(saved, default=0) or 1, max(losses, default=0.0) or 1.0  # for the solver
    with quiet():
        found = optimize.milp(
            np.divide(losses, scale),
            integrality=np.ones(len(losses)),
            bounds=optimize.Bounds(0, np.greater(saved, 0).astype(float)),
            constraints=optimize.LinearConstraint(np.divide(saved, unit), lb=need / unit),
            options={"mip_rel_gap": 0.0},
        )
    picked = () if found.x is None else tuple(map(int, np.flatnonzero(found.x > 0.5)))
    enough = sum(saved[item] for item in picked) >= need  # in whole numbers: the solver rounds
    better = sum(losses[item] for item in picked) < sum(losses[item] for item in start)
    return picked if enough and better else start


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drop what the process writes to file descriptor 1: HiGHS prints from C++, told not to."""
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing to keep clean
        yield
        return
    _flush()
    with Path(os.devnull).open("wb") as nothing:
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        _flush()
        os.dup2(kept, 1)
        os.close(kept)


def _flush() -> None:
    """Write out what C's standard streams have buffered."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # a system without such a library
        ctypes.CDLL(None).fflush(None)


SEARCHES = {"greedy": greedy, "knapsack": knapsack}
