"""Rounding by reconstruction: the units of a part one after another, each against its own output.

A unit's inputs come from the network whose weights are quantized so far, mixed with the float
network's (QDrop, share ½); its targets are what it gives in float on the float inputs. Activations
are in float while weights are learned, before the unit and within. Learning goes on from GPTQ's
rounding, under scales that stay, and what does not lower the unit's loss is not taken.
METHODS 0.3; the loss is in `passes/reconstruct.py`.

In memory are the values between one unit and the next, twice for each probe.

A unit's loss falls on the probes; other prompts need not gain. Of a small transformer at w4a8 with
calibration's 4 probes, GPTQ left 26.2 dB on the probes and 21.4 dB on other prompts (4 steps). On
others over 6 steps it left 22.2 dB, learning 22.2 dB after 100 iterations and 21.8 dB after 300:
with so few values, prefer GPTQ.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from effuse.graph import evaluate, inputs
from effuse.kernels.quantizers import Quantizer, round_trip
from effuse.passes.adaround import Rounding
from effuse.passes.gptq import compensated
from effuse.passes.quantize_sites import Recipe
from effuse.passes.quantize_writer import Rounded, plain
from effuse.passes.reconstruct import Example, reconstruct
from effuse.passes.reconstruct import Recipe as Learning
from effuse.passes.resume import Store, key_of
from effuse.passes.rounded import rounded_by_gptq, weight_name
from effuse.passes.units import Frontier, Unit, piece, units
from effuse.program import Part, Program

Progress = Callable[[str, int, int], None]
SHARE = "loss / GPTQ's"  # the name of this figure beside the weights in a finished unit's file


@dataclass(frozen=True)
class Learned:
    """The learned weights by name, and of each unit its loss over that of GPTQ's rounding."""

    rounded: dict[str, Rounded]
    shares: tuple[float, ...]


def rounded_by_reconstruction(
    part: Part, program: Program, weights: Mapping[str, Tensor], start: Mapping[str, Rounded],
    recipes: Mapping[fx.Node, Recipe], probes: Sequence[Mapping[str, Tensor]],
    progress: Progress, learning: Learning, resume: str = "",
) -> Learned:  # fmt: skip
    """Learn how the weights of `recipes` are rounded, unit by unit.

    Args:
        weights: of the program, in float.
        start: the scales of some weights; those of the others are their greatest magnitudes'.
        recipes: of the layers; a weight that several have is learned where it comes first.
        probes: inputs of the part.
        learning: iterations, rates and seed.
        resume: a folder that keeps finished units, so that a run that was interrupted goes on.

    Raises:
        PassError: the folder cannot be written.
    """
    first = dict(start)
    first |= rounded_by_gptq(
        part.graph, weights, start, recipes, probes, progress, settle=compensated
    )
    chosen = {weight_name(site): recipe for site, recipe in recipes.items()}
    begin = {n: first.get(n) or plain(weights[n], recipe) for n, recipe in chosen.items()}
    how = {name: recipe.weight for name, recipe in chosen.items()}
    run = _Run(weights, begin, how, learning, Store.of(resume))
    found = units(part, program, list(recipes))
    shares = tuple(run.learn(part.graph, found, probes, progress))
    return Learned(run.rounded, shares)


class _Run:
    """Learning in progress: `rounded` are on their grids, GPTQ's where no unit has come yet."""

    def __init__(
        self, weights: Mapping[str, Tensor], start: Mapping[str, Rounded],
        how: Mapping[str, Quantizer], learning: Learning, store: Store | None,
    ) -> None:  # fmt: skip
        self._weights, self._start, self._how = weights, start, how
        self._learning, self._store = learning, store
        self._open = set(start)
        self._fixed = dict(weights)  # as the network has them so far
        self.rounded: dict[str, Rounded] = {}
        for name, each in start.items():
            self._settle(name, round_trip(each.values, how[name], each.scale, each.zero))

    def learn(
        self, graph: fx.Graph, found: Sequence[Unit], probes: Sequence[Mapping[str, Tensor]],
        progress: Progress,
    ) -> Iterator[float]:  # fmt: skip
        """Each unit in turn; yields its loss over what it was."""
        frontier = Frontier(graph, [unit.givens for unit in found])
        named = {node.name: str(node.target) for node in inputs(graph)}
        exact = [{name: probe[given] for name, given in named.items()} for probe in probes]
        rounded = [dict(values) for values in exact]
        for number, unit in enumerate(found):
            before = frontier.advance()
            for values in exact:
                _advance(before, self._weights, values, frontier)
            for values in rounded:
                _advance(before, self._fixed, values, frontier)
            yield self._unit(unit, rounded, exact, _within(progress, number, len(found)))

    def _settle(self, name: str, values: Tensor) -> None:
        start = self._start[name]
        self.rounded[name] = Rounded(values.flatten(1), start.scale, start.zero)
        self._fixed[name] = self._shaped(name, values)

    def _shaped(self, name: str, values: Tensor) -> Tensor:
        like = self._weights[name]
        return values.view(like.shape).to(like.dtype)

    def _unit(
        self, unit: Unit, rounded: Sequence[Example], exact: Sequence[Example], progress: Progress
    ) -> float:
        names = [n for n in dict.fromkeys(map(weight_name, unit.layers)) if n in self._open]
        if not names:  # another unit has learned the weight
            return 1.0
        given = [node.name for node in unit.givens]
        examples, floats = ([{n: v[n] for n in given} for v in each] for each in (rounded, exact))
        graph = piece(unit.nodes, unit.outputs)
        targets = [evaluate(graph, self._weights, example) for example in floats]
        key = self._key(names, examples, floats, targets)
        done = self._store.read(key) if self._store else None
        if done is None:
            done = self._learned(graph, names, examples, floats, targets, progress)
            if self._store:
                self._store.write(key, done)
        progress("reconstruct", self._learning.iterations, self._learning.iterations)
        self._open.difference_update(names)
        for name in names:
            self._settle(name, done[name])
        return float(done[SHARE])

    def _learned(
        self, graph: fx.Graph, names: Sequence[str], examples: Sequence[Example],
        floats: Sequence[Example], targets: Sequence[tuple[Tensor, ...]], progress: Progress,
    ) -> dict[str, Tensor]:  # fmt: skip
        """A unit's weights on their grids, and its loss over GPTQ's."""

        def call(example: Example, learned: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
            own = {name: self._shaped(name, value) for name, value in learned.items()}
            return evaluate(graph, ChainMap(own, self._fixed), example)

        roundings = {name: self._rounding(name) for name in names}
        with torch.enable_grad():
            found = reconstruct(
                call, examples, targets, roundings, self._learning, floats, progress
            )
        share = found.after / found.before if found.before else 1.0
        return {**found.weights, SHARE: torch.tensor(share, dtype=torch.float64)}

    def _rounding(self, name: str) -> Rounding:
        start, how = self._start[name], self._how[name]
        values = start.values.view(self._weights[name].shape)
        return Rounding(values, start.scale, how.grid.levels(), how.group, start.zero)

    def _key(self, names: Collection[str], *data: Sequence[Any]) -> str:
        """What decides a unit's result: the recipe, the start, inputs and targets."""
        starts = {name: (str(self._how[name]), *_parts(self._start[name])) for name in names}
        return key_of(astuple(self._learning), starts, data)


def _parts(start: Rounded) -> tuple[Tensor | None, ...]:
    return start.values, start.scale, start.zero


def _advance(
    graph: fx.Graph, weights: Mapping[str, Tensor], values: dict[str, Any], frontier: Frontier
) -> None:
    """Compute what a frontier asks for; forget what nothing needs any more."""
    values |= zip(frontier.names, evaluate(graph, weights, values), strict=True)
    live = {node.name for node in frontier.at_hand}
    for name in set(values) - live:
        del values[name]


def _within(progress: Progress, number: int, total: int) -> Progress:
    """One unit's progress as a part of all units'."""
    return lambda what, done, each: progress(what, number * each + done, total * each)
