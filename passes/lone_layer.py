"""A layer by itself, as Quantize writes it: its noise and its time are measured on this, so that a
format is judged by what will really run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from effuse.errors import PassError
from effuse.graph import evaluate, set_outputs
from effuse.passes.base import Work
from effuse.passes.quantize import Quantize
from effuse.plan import Input, Plan, Rate, Role
from effuse.program import Part, Program, used_weights
from effuse.statistics import Calibration

FLOAT = "float"
ROLES = {Rate.STEP: Role.LATENT, Rate.PROMPT: Role.PROMPT, Rate.SCHEDULE: Role.TIMESTEP}


@dataclass(frozen=True)
class Lone:
    """One layer of a part in one format: a part with one output, and the weights that it reads.

    Its inputs have the names of the nodes that the layer reads in the network.
    """

    format: str
    part: Part
    weights: Mapping[str, torch.Tensor]

    def __call__(self, values: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The layer's output on `values`, by the inputs' names."""
        found: torch.Tensor = evaluate(self.part.graph, self.weights, values)[0]
        return found


def lone_layer(
    program: Program, part: Part, site: fx.Node, format: str, calibration: Calibration
) -> Lone | str:
    """A layer of `part` alone in `format` (`float`: as it is), or why it cannot be had so."""
    apart = _apart(program, part, site)
    if format != FLOAT:
        blind = replace(calibration, probes={part.name: ()})  # the pass measures by itself
        try:
            apart = written(format).run(apart, Work(calibration=blind))
        except PassError as error:
            return str(error)
        if reason := apart.layers[0].reason:
            return reason
    (changed,) = apart.parts
    return Lone(format, changed, {name: apart.weights[name] for name in used_weights(changed)})


def written(format: str, layers: tuple[tuple[str, str], ...] = ()) -> Quantize:
    """The pass that writes layers in their formats, whatever their noise."""
    return Quantize(format, edges=True, min_sqnr_db=-math.inf, layers=layers)


def _apart(program: Program, part: Part, site: fx.Node) -> Program:
    """A program of this layer only: what it reads from others are its inputs.

    Nodes keep their names, by which calibration's statistics are found.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for source in sorted(site.all_input_nodes, key=lambda node: node.op == "get_attr"):
        if source.op == "get_attr":
            copies[source] = graph.node_copy(source)
        else:
            copies[source] = graph.placeholder(source.name)
            copies[source].meta = {"val": source.meta["val"]}
    copies[site] = graph.node_copy(site, copies.__getitem__)
    set_outputs(graph, [copies[site]])
    alone = Part(part.name, part.depends, graph, (site.name,))
    role = ROLES.get(part.rate, Role.STATIC)
    return Program(
        inputs=tuple(Input(name, role, (), "float32", (name,)) for name in alone.inputs),
        parameters=(),
        constants={},
        result=0,
        outputs=alone.outputs,
        parts=(alone,),
        weights=program.weights,
        plan=Plan(default=part.name),
        timesteps=program.timesteps,
    )
