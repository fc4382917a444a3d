"""What it costs to prune each candidate alone, and sets of them together (METHODS 3.1, 3.2).

The losses of all candidates on one recorded input come from one run of the network: at the first
value that a candidate changes, the rest is computed without it, from the values at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from effuse.dump import dump
from effuse.errors import CalibrationError, PassError
from effuse.graph import evaluate
from effuse.passes.base import Work
from effuse.passes.prune_candidates import Candidate, energies, own_weights
from effuse.passes.prune_cost import counted, forwards, graph_flops, tell_cost, timed_forward
from effuse.passes.prune_surgery import masked, pruned
from effuse.passes.resume import Store, key_of
from effuse.passes.skip_blocks import without
from effuse.passes.skip_search import cut_before, output_loss
from effuse.plan import Role
from effuse.program import Part, Program
from effuse.statistics import Probes
from effuse.watch import Watch

SETS = 8  # random sets, to see how well losses add up

Values = Mapping[str, Tensor]


class Inputs(Watch):
    """Keeps a few of a variant's inputs, spread evenly over the calls."""

    def __init__(self, variant: str, calls: int) -> None:
        self._variant = variant
        self.probes = Probes(calls)

    def enter(self, part: Part, values: Values) -> None:
        """A part is about to run."""
        if part.name == self._variant:
            self.probes.add({name: values[name] for name in part.inputs})


def record_inputs(program: Program, calls: int, work: Work) -> tuple[Values, ...]:
    """At most `calls` inputs of the network along calibration's trajectories.

    Raises:
        PassError: there is no calibration.
    """
    watch = Inputs(program.plan.default, calls)
    driven(program, watch, work)
    return watch.probes.chosen()


def driven(program: Program, watch: Watch, work: Work) -> None:
    """Sample as calibration does, under the eyes of `watch`.

    Raises:
        PassError: there is no calibration.
    """
    if work.drive is None:
        raise PassError(
            "prune: by='loss' and by='latent' measure, which needs calibration; hand compile one, "
            "or choose by='magnitude' or by='random'"
        )
    work.drive(program, watch)


# ---- the loss of each candidate alone ------------------------------------------------------------


@dataclass(frozen=True)
class Rest:
    """What is left to compute without any one of some candidates.

    Args:
        candidates: their numbers; all of one site, or a single span or block.
        place: the name of the first node of the whole graph that the candidates change.
        graph: from there on; it reads values from before the place as inputs.
        needs: these inputs' names -> the nodes of the whole graph that give them.
        masks: the values of the inputs that mask a site, for each candidate.
    """

    candidates: tuple[int, ...]
    place: str
    graph: fx.Graph
    needs: Mapping[str, str]
    masks: tuple[Values, ...]


def rests(part: Part, candidates: Sequence[Candidate]) -> list[Rest]:
    """What is left to compute for all candidates, in the order of their places."""
    order = {node.name: index for index, node in enumerate(part.graph.nodes)}
    found = [_rest(part, candidates, each, order) for each in by_place(candidates)]
    return sorted(found, key=lambda rest: order[rest.place])


def by_place(candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """The candidates' numbers, those of one site together."""
    found: dict[int, tuple[int, ...]] = {}
    for number, each in enumerate(candidates):
        key = -1 - number if each.site is None else id(each.site)
        found[key] = (*found.get(key, ()), number)
    return list(found.values())


def _rest(
    part: Part,
    candidates: Sequence[Candidate],
    numbers: tuple[int, ...],
    order: Mapping[str, int],
) -> Rest:
    first = candidates[numbers[0]]
    values: tuple[Values, ...] = ({},)
    if first.site:
        found = masked(part, first.site)
        graph, places = found.graph, list(found.layers.values())
        values = tuple(found.values({candidates[each].atom}) for each in numbers)
    else:
        joins = first.block.joins if first.block else ()
        graph = without(part, part.name, [first.block] if first.block else []).graph
        places = [join.node for join in joins]
    place = min(places, key=order.__getitem__)
    needs = cut_before(graph, order, order[place])
    return Rest(numbers, place, graph, needs, values)


def losses(
    program: Program,
    candidates: Sequence[Candidate],
    probes: Sequence[Values],
    work: Work,
    store: Store | None = None,
) -> np.ndarray[Any, Any]:
    """E‖ε(r) - ε‖² / ‖ε‖² of each candidate alone; not finite where the output is not.

    A `store` keeps what is finished, by candidate and input.
    """
    part = program.part(program.plan.default)
    every = rests(part, candidates)
    base = key_of("prune", dump(part.graph), program.weights) if store else ""
    sweep = Sweep(np.zeros(len(candidates)), len(every) * len(probes), work, store)
    todo = []
    for probe in probes:
        keys = [_key(base, probe, rest, candidates) if store else "" for rest in every]
        left = [(rest, key) for rest, key in zip(every, keys, strict=True)
                if not sweep.known(rest, key)]  # fmt: skip
        todo += [(probe, left)] if left else []
    what = f"losses of {counted(candidates)} on {len(probes)} input{'s' * (len(probes) > 1)}"
    count = sum(
        forwards(part, [candidates[each] for rest, _ in left for each in rest.candidates])
        for _, left in todo
    )
    for number, (probe, left) in enumerate(todo):
        exact, seconds = timed_forward(program, probe)
        if number == 0:
            tell_cost(work, what, count, "forwards", seconds)
        sweep.run(program, left, probe, exact)
    return sweep.total / len(probes)


def _key(base: str, probe: Values, rest: Rest, candidates: Sequence[Candidate]) -> str:
    named = [(candidates[each].name, candidates[each].kind) for each in rest.candidates]
    return key_of(base, probe, named, rest.masks)


@dataclass
class Sweep:
    """Adds up losses as they come, and keeps them in a store if there is one."""

    total: np.ndarray[Any, Any]
    count: int
    work: Work
    store: Store | None
    done: int = 0

    def known(self, rest: Rest, key: str) -> bool:
        """Take losses that an earlier build has finished."""
        found = self.store.read(key) if self.store else None
        if found is not None:
            self._add(rest, found["losses"].tolist())
        return found is not None

    def run(
        self, program: Program, left: Sequence[tuple[Rest, str]], values: Values,
        exact: Sequence[Tensor],
    ) -> None:  # fmt: skip
        """One input: what is before a place is computed once for all that come behind it."""
        keys = {rest.candidates: key for rest, key in left}

        def take(rest: Rest, given: Values) -> None:
            found = [output_loss(evaluate(rest.graph, program.weights, {**given, **mask}), exact)
                     for mask in rest.masks]  # fmt: skip
            if self.store:
                kept = torch.tensor(found, dtype=torch.float64)
                self.store.write(keys[rest.candidates], {"losses": kept})
            self._add(rest, found)

        stream(program, [rest for rest, _ in left], values, take)

    def _add(self, rest: Rest, found: Sequence[float]) -> None:
        self.total[list(rest.candidates)] += found
        self.done += 1
        self.work.progress("prune: losses", self.done, self.count)


def stream(
    program: Program, every: Sequence[Rest], values: Values, take: Callable[[Rest, Values], None]
) -> None:
    """Hand each rest the values that it reads; only what one to come needs is kept."""
    last = {node: rest.place for rest in every for node in rest.needs.values()}
    kept: dict[str, Any] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node.name in last:
            kept[node.name] = value
        for rest in every:
            if rest.place == node.name:
                take(rest, {**values, **{name: kept[it] for name, it in rest.needs.items()}})
        for name in [name for name in kept if last[name] == node.name]:
            del kept[name]

    evaluate(program.part(program.plan.default).graph, program.weights, values, observe)


def together(
    program: Program, sets: Sequence[Sequence[Candidate]], probes: Sequence[Values]
) -> list[float]:
    """The loss of each set pruned as a whole."""
    exact = [_outputs(program, probe) for probe in probes]
    found = []
    for chosen in sets:
        less = pruned(program, chosen)
        pairs = zip(probes, exact, strict=True)
        found.append(float(np.mean([output_loss(_outputs(less, p), each) for p, each in pairs])))
    return found


def _outputs(program: Program, values: Values) -> tuple[Tensor, ...]:
    return evaluate(program.part(program.plan.default).graph, program.weights, values)


def random_sets(count: int, seed: int) -> list[list[int]]:
    """A few sets of two candidates to half of them, by number; none of fewer than four.

    >>> all(2 <= len(each) <= 4 for each in random_sets(8, 0))
    True
    """
    random = np.random.default_rng(seed)
    sizes = np.linspace(2, count // 2, SETS).astype(int) if count >= 4 else ()
    return [sorted(random.choice(count, size, replace=False).tolist()) for size in sizes]


def correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Pearson's correlation; None where it is not defined."""
    if len(predicted) < 2 or not np.std(predicted) or not np.std(measured):
        return None
    return float(np.corrcoef(predicted, measured)[0, 1])


# ---- other criteria ------------------------------------------------------------------------------


class Ending(Watch):
    """Keeps where a trajectory ends: the latent of its last call, and what the network says of it.

    Of several trajectories, those of the last one's step count.
    """

    def __init__(self, program: Program) -> None:
        self._latents = [item.name for item in program.inputs if item.role is Role.LATENT]
        part = program.part(program.plan.default)
        self._returned = {node.name for node in part.graph.output_node().all_input_nodes}
        self._last = len(program.timesteps or ()) - 1
        self.values: dict[str, Tensor] = {}

    def begin(self, values: Values, index: int | None) -> None:
        """A call at step `index`; the last step's, or simply the last, is kept."""
        self._wanted = index is None or index == self._last
        if self._wanted:
            self.values |= {name: values[name].clone() for name in self._latents if name in values}

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Keep what the call returns."""
        if self._wanted and node.name in self._returned and torch.is_tensor(value):
            self.values[f"out.{node.name}"] = value.clone()


def ending(program: Program, work: Work, seed: int) -> list[Tensor]:
    """Where calibration's sampling ends with this program, from fixed seeds."""
    watch = Ending(program)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        driven(program, watch, work)
    found = [value.float() for value in watch.values.values() if value.is_floating_point()]
    if not found:
        raise CalibrationError("prune: calibration never came to the schedule's last step")
    return found


def shift(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """‖mean(Z) - mean(Z')‖ + ‖std(Z) - std(Z')‖ over channels and positions (LD-Pruner).

    The mean is over the batch, the deviation over all but it: a batch of one has no other. In no
    order of samples is it another number.
    """
    return sum(
        float((a.mean(0) - b.mean(0)).norm() + (_deviation(a) - _deviation(b)).norm())
        for a, b in zip(found, exact, strict=True)
    )


def _deviation(value: Tensor) -> Tensor:
    """By channel, over the batch and the positions."""
    return value.transpose(0, 1).flatten(1).std(1, correction=0) if value.dim() > 1 else value


def latent_shifts(
    program: Program, candidates: Sequence[Candidate], work: Work, seed: int, store: Store | None
) -> np.ndarray[Any, Any]:
    """How far each candidate alone moves the end of the trajectories."""
    begun = time.perf_counter()
    exact = ending(program, work, seed)
    seconds = time.perf_counter() - begun
    total = max(1, graph_flops(program.part(program.plan.default).graph))
    runs = sum(1 - each.flops / total for each in candidates)
    tell_cost(work, f"latents without {counted(candidates)}", runs, "sampling runs", seconds)
    base = key_of("prune", exact) if store else ""
    found = np.zeros(len(candidates))
    for number, each in enumerate(candidates):
        key = key_of(base, each.name, each.kind, seed) if store else ""
        kept = store.read(key) if store else None
        if kept is None:
            moved = shift(ending(pruned(program, [each]), work, seed), exact)
            kept = {"shift": torch.tensor(moved, dtype=torch.float64)}
            if store:
                store.write(key, kept)
        found[number] = kept["shift"].item()
        work.progress("prune: latents", number + 1, len(candidates))
    return found


def magnitudes(program: Program, candidates: Sequence[Candidate]) -> np.ndarray[Any, Any]:
    """Σ w² of the weights that go: by size, the mean squared weight."""
    sites = {id(each.site): energies(program, each.site) for each in candidates if each.site}
    part = program.part(program.plan.default)
    return np.array([
        _energy(program, part, each) if each.block else float(sites[id(each.site)][each.atom])
        for each in candidates
    ])  # fmt: skip


def _energy(program: Program, part: Part, candidate: Candidate) -> float:
    assert candidate.block is not None
    names = own_weights(part, candidate.block)
    return sum(float(program.weights[name].double().square().sum()) for name in names)
