"""Skip: residual blocks left out at chosen steps, as variants and a plan (METHODS 2.5).

A block adds to a stream; left out, the stream passes by it. In the graph each of its joins,
shortcut + branch, becomes the shortcut: the value itself, or its projection where a ResBlock
changes the number of channels (AutoDiffusion). Each distinct set of blocks makes one variant of
every variant that the plan has at its steps, so a cache's fills and reads stay as they are.

Which blocks: as listed, or by measured sensitivity (skip_search).
"""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from effuse.errors import ConfigError, PassError, nearest
from effuse.log import Log
from effuse.passes.base import Pass, Work
from effuse.passes.options import check_choice
from effuse.passes.skip_blocks import Block, What, find_blocks, plan_flops, remaining, without
from effuse.passes.skip_search import SEARCHES, Stretches, measure, measure_sets
from effuse.plan import Rate
from effuse.program import Part, Program

Search = Literal["knapsack", "greedy"]
Key = int | str | tuple[int, int]
Patterns = str | tuple[str, ...]

KEY = re.compile(r"\d+|\d*:\d*")


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
        check_choice("skip", "what", self.what, get_args(What))
        check_choice("skip", "search", self.search, get_args(Search))
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


# ---- variants and the plan -----------------------------------------------------------------------


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


def _distinct(sets: Iterable[frozenset[Block]]) -> list[frozenset[Block]]:
    return [blocks for blocks in dict.fromkeys(sets) if blocks]


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
