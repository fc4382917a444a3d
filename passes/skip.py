"""Skip: residual blocks left out at chosen steps, as variants and a plan (METHODS 2.5).

A block adds to a stream; left out, the stream passes by it. In the graph each of its joins,
shortcut + branch, becomes the shortcut: the value itself, or its projection where a ResBlock
changes the number of channels (AutoDiffusion). Each distinct set of blocks makes one variant of
every variant that the plan has at its steps, so a cache's fills and reads stay as they are.

Which blocks: as listed, or by sensitivity. The loss of a block in a stretch of the schedule is the
relative squared error of the network's output without this one block, on calibration inputs; the
sets then have the least sum of losses that saves the budget (an integer program), or take the
blocks by loss per operation saved (greedy). Sums of losses are an approximation: the loss of the
sets together is measured too.
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import fx

from effuse.cost import node_flops
from effuse.errors import CalibrationError, ConfigError, PassError, nearest, require
from effuse.graph import (
    calls,
    clone,
    drop_unused_inputs,
    eliminate,
    emit,
    emit_input,
    evaluate,
    substitute,
    value_of,
)
from effuse.log import Log
from effuse.passes.base import Pass, Work
from effuse.passes.cut import sizes_from_inputs
from effuse.plan import PlanStep, Rate
from effuse.program import Part, Program
from effuse.structure import Chain, Structure
from effuse.watch import Watch

What = Literal["layer", "unit", "block"]
Search = Literal["knapsack", "greedy"]
Key = int | str | tuple[int, int]
Patterns = str | tuple[str, ...]

aten = torch.ops.aten

KEY = re.compile(r"\d+|\d*:\d*")
PROBES = 2  # inputs that a block's loss is measured on, of each stretch and variant


@dataclass(frozen=True)
class Skip(Pass):
    """Leave residual blocks out at some steps; lossy.

    Args:
        steps: step, or range "first:end", -> patterns over the names of the blocks that it leaves
            out; or one entry of patterns for each step. A name is the path of the branch's last
            layer; the path of a module stands for all blocks in it.
        what: a block is a `layer` (outermost residual branch: a ResBlock, a whole transformer), a
            `unit` (innermost: attention, feed-forward), or a `block` (chain of layers that repeats
            itself: a transformer's block).
        budget: share of the arithmetic of all steps to save (0 to 1), where no steps are listed;
            which blocks then follows from measured losses.
        search: the least sum of losses (`knapsack`), or least loss per operation first (`greedy`).
        max_variants: at most so many distinct sets of blocks; with `budget`, the schedule is cut
            into so many equal stretches with one set each.
    """

    name: ClassVar[str] = "skip"
    exact: ClassVar[bool] = False

    steps: dict[Key, Patterns] | tuple[Patterns, ...] | None = None
    what: What = "layer"
    budget: float | None = None
    search: Search = "knapsack"
    max_variants: int = 4

    def __post_init__(self) -> None:
        _choice("what", self.what, get_args(What))
        _choice("search", self.search, get_args(Search))
        if (self.steps is None) == (self.budget is None):
            raise ConfigError("skip: give either steps=… (which blocks, when) or budget=…")
        if self.budget is not None and not 0 < self.budget < 1:
            raise ConfigError(f"skip: budget={self.budget!r}: a share between 0 and 1")
        if self.max_variants < 1:
            raise ConfigError(f"skip: max_variants={self.max_variants!r}: at least 1")
        if self.steps is not None:
            object.__setattr__(self, "steps", by_range(self.steps))

    def requires(self, program: Program) -> str | None:
        """A known schedule."""
        if program.timesteps is None:
            return "the steps have to be known: compile with schedule=scheduler, timesteps set"
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Choose each step's blocks, make the variants without them, and plan those."""
        blocks = self.blocks(program)
        listed = self.steps is not None
        sets = self.listed(program, blocks) if listed else self.searched(program, blocks, work)
        return skipping(program, sets, work.log)

    def blocks(self, program: Program) -> tuple[Block, ...]:
        """The blocks of the default variant that may be left out, in the graph's order.

        Raises:
            PassError: there is none.
        """
        found = find_blocks(program, self.what)
        if not found:
            raise PassError(f"skip: the network has no residual {self.what}; try another what=")
        wanted = tuple(block for block in found if self.unwanted(block.name) is None)
        if not wanted:
            names = ", ".join(block.name for block in found)
            raise PassError(f"skip: include and exclude leave none of {names}")
        return wanted

    def listed(self, program: Program, blocks: Sequence[Block]) -> list[frozenset[Block]]:
        """Each step's blocks, as `steps` lists them.

        Raises:
            PassError: a pattern names no block, or the schedule has no such step, or there are
                more distinct sets than `max_variants`.
        """
        count = len(program.timesteps or ())
        sets: list[frozenset[Block]] = [frozenset()] * count
        for key, patterns in by_range(self.steps or ()).items():
            chosen = frozenset().union(*(_matching(blocks, pattern) for pattern in patterns))
            for step in step_range(key, count):
                sets[step] |= chosen
        distinct = len(set(sets) - {frozenset()})
        if distinct > self.max_variants:
            raise PassError(
                f"skip: steps list {distinct} distinct sets of blocks, and each makes a variant; "
                f"list fewer, or allow them: max_variants={distinct}"
            )
        return sets

    def searched(
        self, program: Program, blocks: Sequence[Block], work: Work
    ) -> list[frozenset[Block]]:
        """Each step's blocks, by measured sensitivity, to save `budget` of the plan's arithmetic.

        Raises:
            PassError: all blocks together hold less than that.
            CalibrationError: calibration never ran a part of the schedule.
        """
        stretches = Stretches(program, self.max_variants)
        found = measure(program, blocks, stretches, work)
        losses, saved = found.losses.ravel().tolist(), found.saved.ravel().tolist()
        total = plan_flops(program, len(stretches.entries))
        need = math.ceil((self.budget or 0) * total)
        if sum(saved) < need:
            raise PassError(
                f"skip: budget={self.budget}: without all {len(blocks)} blocks "
                f"{sum(saved) / total:.1%} of the arithmetic is saved (what fills a cache's slots "
                "is still computed); lower it, or try another what="
            )
        picked = SEARCHES[self.search](losses, saved, need)
        chosen: defaultdict[int, set[Block]] = defaultdict(set)
        for item in picked:
            stretch, block = divmod(item, len(blocks))
            chosen[stretch].add(blocks[block])
        sets = [frozenset(chosen[stretches.of(step)]) for step in range(len(stretches.entries))]
        together = measure_sets(program, sets, found.probes)
        work.log.note(
            "relative squared error of a step's output, averaged over the steps: "
            f"{sum(losses[item] for item in picked):.2e} as the sum of single blocks' losses, "
            f"{together:.2e} measured without all of them"
        )
        return sets


# ---- blocks, and variants without them ----------------------------------------------------------


@dataclass(frozen=True)
class Join:
    """A node shortcut + branch, by name, and which of its arguments the shortcut is."""

    node: str
    shortcut: int


@dataclass(frozen=True)
class Block:
    """What can be left out: the joins that become their shortcuts, in the graph's order."""

    name: str
    joins: tuple[Join, ...]


def find_blocks(program: Program, what: What) -> tuple[Block, ...]:
    """The residual blocks of the default variant, in the graph's order."""
    structure = Structure(program.part(program.plan.default), program)
    if what == "block":
        return tuple(map(_block, structure.blocks))
    spans = structure.units if what == "unit" else structure.layers
    return tuple(_block(Chain((span,))) for span in spans)


def _block(chain: Chain) -> Block:
    joins = (Join(span.join.name, span.join.args.index(span.shortcut)) for span in chain.spans)
    return Block(chain.name, tuple(joins))


def without(part: Part, name: str, blocks: Iterable[Block]) -> Part:
    """The variant with its joins of `blocks` replaced by their shortcuts, and nothing unneeded."""
    graph, _ = clone(part.graph)
    places = {join.node: join.shortcut for block in blocks for join in block.joins}
    for node in reversed(calls(graph, aten.add.Tensor)):  # a shortcut may be a join itself
        if node.name in places:
            substitute(node, _typed(graph, node, node.args[places[node.name]]))
    sizes_from_inputs(graph)
    eliminate(graph)
    drop_unused_inputs(graph)
    return replace(part, name=name, graph=graph, exact=False)


def _typed(graph: fx.Graph, join: fx.Node, shortcut: Any) -> fx.Node:
    """The shortcut in the join's dtype."""
    dtype = value_of(join).dtype
    if value_of(shortcut).dtype == dtype:
        return shortcut  # type: ignore[no-any-return]
    with graph.inserting_before(join):
        return emit(graph, aten.to.dtype, shortcut, dtype, like=join)  # type: ignore[no-any-return]


def remaining(part: Part, blocks: Iterable[Block]) -> frozenset[str]:
    """The joins of `blocks` that the variant still computes, by name."""
    names = {node.name for node in calls(part.graph, aten.add.Tensor)}
    return frozenset(join.node for block in blocks for join in block.joins) & names


def part_flops(part: Part) -> int:
    """Operations of one run of a part."""
    return sum(map(node_flops, calls(part.graph)))


def skipping(program: Program, sets: Sequence[frozenset[Block]], log: Log) -> Program:
    """The program whose step i leaves the blocks `sets[i]` out; the rest of its plan stays."""
    variants = {part.name: part for part in program.variants}
    first = 1 + sum("_skip" in name for name in variants)
    numbers = {blocks: number for number, blocks in enumerate(_distinct(sets), start=first)}
    made: dict[tuple[str, frozenset[str]], Part | None] = {}
    entries = []
    for index, blocks in enumerate(sets):
        entry = program.plan.at(index)
        base = variants[entry.variant]
        key = (base.name, remaining(base, blocks))
        if key not in made:
            spent = bool(key[1]) and log.spend("skip")
            name = f"{base.name}_skip{numbers.get(blocks)}"
            made[key] = without(base, name, blocks) if spent else None
        entries.append(replace(entry, variant=(made[key] or base).name))
    new = [part for part in made.values() if part is not None]
    if not new:
        log.note("no step leaves a block out")
        return program
    used = {program.plan.default, *(entry.variant for entry in entries)}
    parts = [part for part in (*program.parts, *new) if part.rate < Rate.STEP or part.name in used]
    result = program.with_parts(*parts, plan=replace(program.plan, steps=tuple(entries)))
    log.note(summary(program, result, sets))
    return result


def summary(before: Program, after: Program, sets: Sequence[frozenset[Block]]) -> str:
    """How much a plan saves, and which blocks its steps leave out."""
    counts = Counter(name for blocks in sets for name in sorted(block.name for block in blocks))
    saved = 1 - plan_flops(after, len(sets)) / (plan_flops(before, len(sets)) or 1)
    most = ", ".join(f"{name} ({count})" for name, count in counts.most_common(3))
    return (
        f"{len(after.variants) - 1} variants beside {after.plan.default}; {saved:.1%} of the "
        f"arithmetic is saved at {sum(map(bool, sets))} of {len(sets)} steps; left out most often: "
        f"{most}"
    )


def plan_flops(program: Program, count: int) -> int:
    """Operations of `count` steps as planned, at the rate of steps."""
    flops = {part.name: part_flops(part) for part in program.variants}
    return sum(flops[program.plan.at(index).variant] for index in range(count))


def _distinct(sets: Iterable[frozenset[Block]]) -> list[frozenset[Block]]:
    return [blocks for blocks in dict.fromkeys(sets) if blocks]


# ---- sensitivity --------------------------------------------------------------------------------


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


SEARCHES = {"greedy": greedy, "knapsack": knapsack}


# ---- what people write ---------------------------------------------------------------------------


def by_range(steps: Mapping[Key, Patterns] | Sequence[Patterns]) -> dict[Any, Any]:
    """Lists of patterns by step or range, as TOML can write it: "3" or "10:20" -> patterns.

    Raises:
        ConfigError: a key is neither, or there are no steps but only a pattern.

    >>> by_range({(10, 20): "mid_block", 3: ("a", "b")})
    {'10:20': ('mid_block',), '3': ('a', 'b')}
    """
    if isinstance(steps, str):
        raise ConfigError(f"skip: steps={steps!r}: at which steps? e.g. {{'10:20': {steps!r}}}")
    pairs = steps.items() if isinstance(steps, Mapping) else enumerate(steps)
    found: dict[str, tuple[str, ...]] = {}
    for key, value in pairs:
        text = ":".join(map(str, key)) if isinstance(key, tuple) else str(key)
        if not KEY.fullmatch(text):
            raise ConfigError(f'skip: steps={key!r}: expected a step or a range as "10:20"')
        patterns = (value,) if isinstance(value, str) else tuple(value)
        found[text] = (*found.get(text, ()), *patterns)
    return found


def step_range(key: str, count: int) -> range:
    """The steps that a key stands for, of a schedule of `count` steps.

    Raises:
        PassError: the schedule has no such steps.

    >>> step_range("5:", 8)
    range(5, 8)
    """
    low, colon, high = key.partition(":")
    first = int(low or 0)
    end = int(high or count) if colon else first + 1
    if not first < end <= count:
        raise PassError(f"skip: steps={key!r}: the schedule has the steps 0 to {count - 1}")
    return range(first, end)


def _matching(blocks: Sequence[Block], pattern: str) -> frozenset[Block]:
    """The blocks that a pattern, or the path of a module that they are in, names."""
    names = {pattern, f"{pattern}.*", pattern.removesuffix(".*")}
    found = frozenset(block for block in blocks
                      if any(fnmatch.fnmatchcase(block.name, name) for name in names))  # fmt: skip
    if not found:
        known = [block.name for block in blocks]
        raise PassError(f"skip: {pattern!r} names no block{nearest(pattern, known)}")
    return found


def _choice(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ConfigError(f"skip: {name}={value!r} is unknown{nearest(str(value), known)}")
