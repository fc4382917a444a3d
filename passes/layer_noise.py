"""What one layer in a format does to what the network gives: relative noise powers, layer by layer.

    error = Σ |y - ŷ|² / Σ |y|²        ŷ with this layer alone quantized

`y` is the network's output on probes of the calibration run (MixDQ's SQNR, METHODS 1.9), or the
latent that enters the last step of sampled trajectories. Up to a layer the network is the same
whatever the layer's format, so it runs once, and only what comes behind the layer runs again.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from effuse.errors import PassError
from effuse.graph import eliminate, evaluate, set_outputs
from effuse.passes.base import Work
from effuse.passes.lone_layer import Lone
from effuse.passes.sensitivity import Finals, repeatable
from effuse.plan import Role
from effuse.program import Part, Program, output_values
from effuse.weights import Weights

Lones = Mapping[fx.Node, Sequence[Lone]]
Noises = dict[tuple[fx.Node, str], float]  # by layer and format
Values = Mapping[str, Any]


def output_noise(
    program: Program, part: Part, lones: Lones, probes: Sequence[Values], work: Work
) -> Noises:
    """The error of the network's outputs by each layer in each format, averaged over `probes`."""
    found: Noises = defaultdict(float)
    total = len(probes) * len(lones)
    for number, probe in enumerate(probes):
        truth = results(program, part, probe)

        def visit(site: fx.Node, alive: Values, done: int, truth: Sequence[Any] = truth) -> None:
            work.progress("sensitivity", done, total)
            for format, error in _errors(program, part, site, lones[site], alive, truth).items():
                found[site, format] += error / len(probes)

        walk(part.graph, program.weights, probe, lones, visit, number * len(lones))
    work.progress("sensitivity", total, total)
    return dict(found)


def results(program: Program, part: Part, probe: Values) -> tuple[Any, ...]:
    """The network's outputs, without what a part puts into slots."""
    found = dict(zip(part.outputs, evaluate(part.graph, program.weights, probe), strict=True))
    return tuple(found[name] for name in part.outputs if name in program.outputs)


def _errors(
    program: Program,
    part: Part,
    site: fx.Node,
    lones: Sequence[Lone],
    alive: Values,
    truth: Sequence[torch.Tensor],
) -> dict[str, float]:
    """By format, the outputs' error with the layer `site` in it; `alive` are the values so far."""
    wanted = [node for name, node in output_values(part).items() if name in program.outputs]
    rest = behind(part.graph, site, wanted)
    found = {}
    for lone in lones:
        moved = evaluate(rest, program.weights, {**alive, site.name: lone(alive)})
        found[lone.format] = relative_noise(truth, moved)
    return found


def walk(
    graph: fx.Graph,
    weights: Weights,
    values: Values,
    sites: Mapping[fx.Node, Any],
    visit: Callable[[fx.Node, Values, int], None],
    done: int = 0,
) -> None:
    """Run a graph; at each of the sites call `visit(site, alive, number)` with the values so far.

    `alive` holds, by the nodes' names, what the site reads and what something behind it reads.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    expiring: defaultdict[int, list[str]] = defaultdict(list)
    for node, place in order.items():
        expiring[max((order[user] for user in node.users), default=place)].append(node.name)
    alive: dict[str, Any] = {}
    numbers = iter(range(done, done + len(sites)))

    def observe(node: fx.Node, value: Any) -> None:
        alive[node.name] = value
        if node in sites:
            visit(node, alive, next(numbers))
        for name in expiring[order[node]]:
            alive.pop(name, None)

    evaluate(graph, weights, values, observe)


def behind(graph: fx.Graph, site: fx.Node, wanted: Sequence[fx.Node]) -> fx.Graph:
    """What computes `wanted` behind a node: a graph whose inputs are the values up to it."""
    rest = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    passed = False
    for node in graph.nodes:
        if node.op == "output":
            continue
        if passed or node.op == "get_attr":
            copies[node] = rest.node_copy(node, copies.__getitem__)
        else:
            with rest.inserting_before(next(iter(rest.nodes), rest._root)):
                copies[node] = rest.placeholder(node.name)
        passed = passed or node is site
    set_outputs(rest, [copies[node] for node in wanted])
    eliminate(rest)
    for node in list(rest.nodes):
        if node.op == "placeholder" and not node.users:
            rest.erase_node(node)
    return rest


def relative_noise(truth: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """Power of the difference over the power of the truth, over all tensors together.

    Infinite where something is not finite, or the truth is nothing and the difference is not.
    """
    pairs = zip(truth, found, strict=True)
    power = sum(each.double().square().sum().item() for each in truth)
    moved = sum((one.double() - other.double()).square().sum().item() for one, other in pairs)
    if moved == 0:
        return 0.0
    return moved / power if power and math.isfinite(moved) else math.inf


class Moved(Finals):
    """Samples with one layer of a part in a format."""

    def __init__(self, latent: str, steps: int, part: Part, site: fx.Node, lone: Lone) -> None:
        super().__init__(latent, steps)
        self._part, self._site, self._lone = part.name, site, lone
        self._values: dict[str, torch.Tensor] = {}

    def observe(self, part: Part, node: fx.Node, value: Any) -> Any:
        """The layer's output in its format, in place of the layer's."""
        if part.name != self._part:
            return None
        if node in self._site.all_input_nodes:
            self._values[node.name] = value
        return self._lone(self._values) if node is self._site else None


def latent_noise(program: Program, part: Part, lones: Lones, work: Work) -> Noises:
    """The error of the latent that enters the last step, by each layer in each of its formats.

    Every entry samples anew: as many calls of the network as calibration makes.

    Raises:
        PassError: there is no schedule, nothing to sample with, or samples are not repeatable.
    """
    steps = len(program.timesteps or ())
    if work.drive is None or steps < 2:
        raise PassError("auto_bits: sensitivity='latent' samples over a schedule; hand compile "
                        "schedule=…, or use sensitivity='output'")  # fmt: skip
    latent = next(item.name for item in program.inputs if item.role is Role.LATENT)
    plain = Finals(latent, steps)
    work.drive(program, plain)
    found: Noises = {}
    entries = [(site, lone) for site, each in lones.items() for lone in each]
    for number, (site, lone) in enumerate(entries):
        work.progress("sensitivity", number, len(entries))
        moved = Moved(latent, steps, part, site, lone)
        work.drive(program, moved)
        if not plain.last or not repeatable(plain, moved):
            raise PassError(
                "auto_bits: sensitivity='latent' needs a calibration run that samples the whole "
                "schedule from the same noise each time: seed its generator"
            )
        found[site, lone.format] = relative_noise(plain.last, moved.last)
    work.progress("sensitivity", len(entries), len(entries))
    return found
