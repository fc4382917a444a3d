"""What a cache with a threshold looks at, and how its change foretells the output's (TeaCache)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.decision import Floats, changes
from effuse.errors import PassError
from effuse.graph import inputs, outputs, value_of
from effuse.passes.cut import Target
from effuse.plan import PlanStep, Role
from effuse.program import Part, Program
from effuse.structure import Structure
from effuse.watch import Watch

DEGREE = 4  # of TeaCache's polynomials
LEAST_R2 = 0.5  # published fits range from .67 down to .09
LEAST_PAIRS = 4 * (DEGREE + 1)  # a fit through fewer says nothing

Pairs = tuple[Floats, Floats]  # relative changes of the signal and of the output, (count,) each


def signal_of(full: Part, program: Program) -> Target:
    """What the first block adds to its stream.

    Raises:
        PassError: the network has no stream of blocks.
    """
    stack = Structure(full, program).stack()
    if stack is None:
        raise PassError("cache: a threshold needs a stream of blocks, and this network has none")
    return Target(stack.first.name, stack.first.exit, stack.first.spans[0].shortcut)


def moved(targets: Sequence[Target], part: Part) -> list[Target]:
    """The same places in a copy of the part that they were found in."""
    named = {node.name: node for node in part.graph.nodes}
    return [
        Target(each.name, named[each.value.name], each.start and named[each.start.name])
        for each in targets
    ]


def check_rows(part: Part, targets: Sequence[Target], program: Program) -> None:
    """Refuse what is not one row (axis 0) a picture: rows are decided on, and put together.

    Raises:
        PassError: a cached value, the signal or an output has another first axis than the latent.
    """
    latent = next(item.name for item in program.inputs if item.role is Role.LATENT)
    first = {str(node.target): value_of(node).shape for node in inputs(part.graph)}
    batch = str(first[latent][0])
    given = dict(zip(part.outputs, outputs(part.graph), strict=True))
    places = {target.name: target.value for target in targets}
    for name, node in (given | places).items():
        shape = value_of(node).shape
        if not shape or str(shape[0]) != batch:
            sizes = ", ".join(map(str, shape))
            raise PassError(
                f"cache: a threshold needs one row a picture, but {name} has the shape ({sizes}) "
                f"where the batch is {batch}; use a schedule instead"
            )


def decided_steps(steps: int, warmup: int, names: tuple[str, ...]) -> tuple[PlanStep, ...]:
    """The first `warmup` steps and the last one in full; the Session decides on the others."""
    first = (PlanStep("full", fills=names),) * min(warmup, steps - 1)
    between = (PlanStep("reuse", reads=names),) * (steps - len(first) - 1)
    return (*first, *between, PlanStep("full"))


class Signals(Watch):
    """Relative changes of the signal and of the first output from one step to the next."""

    def __init__(self, part: Part, signal: str, output: str, after: int) -> None:
        named = dict(zip(part.outputs, outputs(part.graph), strict=True))
        self._part, self._after = part.name, after
        self._signal, self._output = named[signal].name, named[output].name
        self._index: int | None = None
        self._calls: Counter[int] = Counter()  # of each step: the n-th is the n-th picture's
        self._last: dict[int, tuple[int, Pairs]] = {}  # of each picture: step, signal and output
        self._now: dict[str, Floats] = {}
        self._pairs: list[Pairs] = []

    @property
    def pairs(self) -> Pairs:
        """All changes that were seen and are finite."""
        both = np.concatenate([np.empty((2, 0)), *map(np.stack, self._pairs)], axis=1)
        one, other = both[:, np.isfinite(both).all(axis=0)]
        return one, other

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """A call at step `index`."""
        self._index = index
        self._now = {}

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Compare with the picture's step before, once signal and output are there."""
        if part.name != self._part or self._index is None:
            return
        if node.name in (self._signal, self._output):
            self._now[node.name] = value.float().numpy().copy()
            if len(self._now) == 2:
                self._compare(self._index, (self._now[self._signal], self._now[self._output]))

    def _compare(self, index: int, now: Pairs) -> None:
        picture = self._calls[index]
        self._calls[index] += 1
        step, before = self._last.get(picture, (-1, now))
        if step == index - 1 >= self._after - 1 and before[0].shape == now[0].shape:
            self._pairs.append((changes(now[0], before[0]), changes(now[1], before[1])))
        self._last[picture] = (index, now)


def fitted_polynomial(pairs: Pairs) -> tuple[tuple[float, ...], float]:
    """The polynomial of the output's change over the signal's, highest power first, and its R².

    R² = 1 - Σ(y - P(x))² / Σ(y - ȳ)²; 0 for too few pairs, or outputs that all change alike.
    """
    x, y = pairs
    spread = float(((y - y.mean()) ** 2).sum()) if len(y) else 0.0
    if len(np.unique(x)) < LEAST_PAIRS or not spread:
        return (), 0.0
    found = np.polyfit(x, y, DEGREE)
    missed = float(((y - np.polyval(found, x)) ** 2).sum())
    return tuple(float(each) for each in found), 1 - missed / spread
