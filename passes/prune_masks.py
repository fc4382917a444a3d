"""Heads and hidden units by masks that are learned over whole trajectories (EcoDiff, METHODS 3.3).

A candidate's score is σ(λ / 0.83), the mean over its atoms: how far its gate stays open.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from effuse.distill_data import Step, sampler
from effuse.distill_masks import TEMPERATURE, Gate, MaskRecipe, learn_masks
from effuse.distill_network import Network
from effuse.dump import dump
from effuse.errors import PassError
from effuse.passes.base import Work
from effuse.passes.prune_axes import Atoms, rank
from effuse.passes.prune_candidates import (
    CONVS,
    Candidate,
    Site,
    group_of,
    grouped,
    readers,
    site_candidates,
)
from effuse.passes.prune_cost import tell_cost, timed_forward
from effuse.passes.prune_scores import driven
from effuse.passes.resume import Store, key_of
from effuse.plan import Role
from effuse.program import Part, Program
from effuse.watch import Watch

FORWARDS = 4  # what a step of an update costs: sampled, run again, and twice for its gradient

Array = np.ndarray[Any, Any]
Values = Mapping[str, Tensor]

aten = torch.ops.aten


class Starts(Watch):
    """Keeps the inputs that trajectories start from: noise, prompts, and what else there is."""

    def __init__(self, most: int) -> None:
        self._most = most
        self.found: list[Values] = []

    def begin(self, values: Values, index: int | None) -> None:
        """A call at step `index`."""
        if index == 0 and len(self.found) < self._most:
            self.found.append({name: value.clone() for name, value in values.items()})


def gates_of(part: Part, site: Site) -> tuple[Gate, ...]:
    """Where gates take a site out: what an attention gives by heads, else what layers read."""
    nodes = {node.name: node for node in part.graph.nodes}
    places = [(name, axis) for name, axis in site.labels if axis == 1
              and nodes[name].target is aten.scaled_dot_product_attention.default]  # fmt: skip
    found = {place: site.labels[place] for place in places} or dict(_read(part, site))
    return tuple(Gate(node, axis, site.count, atoms) for (node, axis), atoms in found.items())


def _read(part: Part, site: Site) -> list[tuple[tuple[str, int], Atoms]]:
    found = []
    for layer in readers(part, site):
        source, weight, *_ = layer.args
        assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
        axis = 1 if layer.target in CONVS else rank(source) - 1
        found.append(((source.name, axis), site.labels[weight.name, 1]))
    return found


def by_masks(
    program: Program, sites: Sequence[Site], groups: int, openness: Mapping[str, Array]
) -> tuple[list[Candidate], Array]:
    """The sites' candidates and scores; hidden units whose gates are alike go together.

    Args:
        openness: σ(λ / 0.83) of each atom, by the site's kind and name.
    """
    candidates: list[Candidate] = []
    scores: list[float] = []
    for site in sites:
        found = openness[key(site)]
        names = group_of(found, site.count if site.kind == "head" else groups)
        candidates += site_candidates(program, grouped(site, names))
        scores += (np.bincount(names, found) / np.bincount(names)).tolist()
    return candidates, np.array(scores)


def key(site: Site) -> str:
    """What a site's figures are kept under."""
    return f"{site.kind} {site.name}"


def learned(
    program: Program, sites: Sequence[Site], recipe: MaskRecipe, calls: int, work: Work,
    store: Store | None,
) -> dict[str, Array]:  # fmt: skip
    """How far the gate of each atom stays open, 0 to 1, by the site's kind and name.

    Args:
        calls: trajectories at most, from calibration's first inputs.
        store: keeps what is learned, all together.

    Raises:
        PassError: there is no schedule, or calibration never starts at its first step.
    """
    samples, step = starts(program, calls, work), sampler_of(program, work)
    base = _base(program, sites, samples, step, recipe) if store else ""
    found = store.read(base) if store else None
    if found is None:
        found = _learned(program, sites, samples, step, recipe, work)
        if store:
            store.write(base, found)
    return {name: torch.sigmoid(each / TEMPERATURE).double().numpy()
            for name, each in found.items()}  # fmt: skip


def _learned(
    program: Program, sites: Sequence[Site], samples: Sequence[Values], step: Step,
    recipe: MaskRecipe, work: Work,
) -> dict[str, Tensor]:  # fmt: skip
    """λ of each atom: where several gates take it out, the one that is most needed."""
    part, times = program.part(program.plan.default), program.timesteps or ()
    gates = {key(site): gates_of(part, site) for site in sites}
    every = [gate for each in gates.values() for gate in each]
    count = len(times) * (len(samples) + FORWARDS * recipe.steps * recipe.batch)
    _, seconds = timed_forward(program, samples[0])
    what = f"{recipe.steps} updates of {len(every)} masks over {len(times)} steps"
    tell_cost(work, what, count, "forwards", seconds)
    found = learn_masks(
        Network(program), every, samples, times, step, recipe,
        lambda done, total, loss: work.progress("prune: masks", done, total),
    )  # fmt: skip
    return {name: torch.stack([found[gate] for gate in each]).amax(0)
            for name, each in gates.items()}  # fmt: skip


def _base(
    program: Program, sites: Sequence[Site], samples: Sequence[Values], step: Step,
    recipe: MaskRecipe,
) -> str:  # fmt: skip
    """What decides the masks; the sampler by what it makes of one latent."""
    part, times = program.part(program.plan.default), program.timesteps or ()
    one, other = torch.linspace(-1, 1, 8), torch.linspace(2, 0, 8)
    moves = [step(one, other, index) for index in range(len(times))]
    named = [(key(site), site.count) for site in sites]
    return key_of("prune: masks", dump(part.graph), program.weights, samples, times, moves, named,
                  recipe)  # fmt: skip


def starts(program: Program, calls: int, work: Work) -> list[Values]:
    """The inputs of at most `calls` trajectories' first steps.

    Raises:
        PassError: there is no schedule, or no call at its first step.
    """
    if not program.timesteps or not any(i.role is Role.LATENT for i in program.inputs):
        raise PassError(
            "prune: by='masks' samples whole trajectories, which needs the timesteps; hand compile "
            "a schedule, or choose by='loss'"
        )
    watch = Starts(calls)
    driven(program, watch, work)
    if not watch.found:
        raise PassError(
            "prune: by='masks' starts where calibration's trajectories start, and none of its "
            "calls was at the schedule's first step; hand compile a run that samples from noise"
        )
    return watch.found


def sampler_of(program: Program, work: Work) -> Step:
    """How a prediction moves the latent, by the schedule that was given."""
    return sampler(work.purpose.schedule, program.timesteps or ())
