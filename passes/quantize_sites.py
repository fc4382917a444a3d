"""Which layers may be quantized, and how each one of them would be."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from effuse.errors import ConfigError
from effuse.graph import calls, value_of
from effuse.kernels.formats import Format
from effuse.kernels.low_rank import BRANCH
from effuse.kernels.quantizers import Quantizer, check_group
from effuse.passes.transposed import TRANSPOSED, unfit
from effuse.plan import Depends, Rate
from effuse.program import Part, Program
from effuse.rates import dependences
from effuse.weights import Weights, peek

aten = torch.ops.aten

VOLUME = aten.conv3d.default
CONVS = (aten.conv2d.default, VOLUME)
SITES = (*CONVS, aten.linear.default)
KINDS: dict[Any, str] = {
    aten.linear.default: "linear layer", aten.conv1d.default: "convolution",
    **dict.fromkeys(CONVS, "convolution"), **dict.fromkeys(TRANSPOSED, "transposed convolution"),
}  # fmt: skip
LAYERS = (*KINDS, *BRANCH)  # a path through a branch goes through a layer


@dataclass(frozen=True)
class Recipe:
    """How one layer is quantized; `activation` None leaves its input in float."""

    format: str
    weight: Quantizer
    activation: Quantizer | None

    @property
    def integer_weight(self) -> bool:
        """Whether integer arithmetic takes the weight: a scale for each output channel."""
        how = self.weight
        return how.grid.kind == "int" and how.granularity == "channel" and how.symmetric

    @property
    def integer(self) -> bool:
        """Whether the layer can be computed in 8-bit integers: uint8 under one scale."""
        how = self.activation
        fits = how is not None and str(how.grid) == "uint8" and how.granularity == "tensor"
        return fits and how is not None and not how.symmetric and self.integer_weight

    @property
    def bits(self) -> int:
        """Of the narrower of the two."""
        return min(each.grid.bits for each in (self.weight, self.activation) if each)


def recipe(site: fx.Node, format: Format, rate: Rate, activations: str) -> Recipe:
    """How a format quantizes a layer of a part that runs at `rate`.

    `activations` overrides when ranges are found: `static`, `dynamic`, `step`, or `format`.
    """
    conv = site.target is not aten.linear.default
    weight = format.conv_weight if conv else format.weight
    activation = format.conv_activation if conv else format.activation
    if rate < Rate.STEP:
        return Recipe(f"w{weight.grid.bits}", weight, None)
    if activation is not None and activations not in ("format", activation.ranges):
        fixed = {} if activations == "dynamic" else {"granularity": "tensor", "group": 0}
        activation = replace(activation, ranges=activations, **fixed)  # type: ignore[arg-type]
    return Recipe(format.name, weight, activation)


def channel_axis(site: fx.Node, dims: int) -> int:
    """Where the channels of a layer's input and output of so many dimensions are."""
    weight = value_of(site.args[1])  # type: ignore[arg-type]
    return dims - 1 if site.target is aten.linear.default else dims - weight.dim() + 1


def misfit(site: fx.Node, how: Recipe) -> str | None:
    """Why the layer's shape does not take the recipe, or None."""
    weight = value_of(site.args[1])  # type: ignore[arg-type]
    try:
        check_group(weight[0].numel(), how.weight)
        if how.activation is not None:
            check_group(value_of(site.args[0]).shape[-1], how.activation)  # type: ignore[arg-type]
    except ConfigError as error:
        return str(error)
    return None


def sites(part: Part, weights: Weights) -> list[fx.Node]:
    """The linear and convolution calls whose weight is stored and in floating point."""
    return [node for node in calls(part.graph, *SITES) if stored(node, weights)]


def stored(node: fx.Node, weights: Weights) -> bool:
    """Whether a layer's weight is stored, and in floating point."""
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return False
    return peek(weights, str(weight.target)).is_floating_point()


def kept(part: Part, weights: Weights) -> dict[fx.Node, str]:
    """The other layers, which stay in float, and why: nobody shall look for them in vain."""
    found = set(sites(part, weights))
    others = (node for node in calls(part.graph, *KINDS) if node.users and node not in found)
    return {node: f"{KINDS[node.target]}: {_why(node)}" for node in others if _floating(node)}


def _floating(node: fx.Node) -> bool:
    return isinstance(node.args[1], fx.Node) and value_of(node.args[1]).is_floating_point()


def _why(node: fx.Node) -> str:
    reason = unfit(node) if node.target in TRANSPOSED else "its weight is computed"
    return reason or "in 8-bit integers alone it is computed as a convolution of sub-pixels"


def first_layers(part: Part, program: Program) -> set[fx.Node]:
    """The layers that the latent alone reaches before any other layer.

    A latent that is added to what a layer made of it is no latent any more: where a shortcut leads
    around the first layer, all layers of the residual stream would be first ones.
    """
    depends = dependences(part.graph, program.sources)
    given = {item.name for item in program.inputs}  # a slot's past has been through layers
    fresh: set[fx.Node] = set()  # computed from the latent, by no layer so far
    first: set[fx.Node] = set()
    for node in part.graph.nodes:
        moving = [each for each in node.all_input_nodes
                  if depends[each] & Depends.LATENT and not is_size(each)]  # fmt: skip
        if node.op == "placeholder" and node.target in given and depends[node] & Depends.LATENT:
            fresh.add(node)
        elif not is_size(node) and moving and all(each in fresh for each in moving):
            (first if node.target in LAYERS else fresh).add(node)
    return first.intersection(calls(part.graph, *SITES))


def is_size(node: fx.Node) -> bool:
    """Whether it is a size, left open, of a tensor: it says nothing of the tensor's values."""
    return isinstance(node.meta.get("val"), (int, torch.SymInt))


def last_layers(part: Part, program: Program) -> set[fx.Node]:
    """The layers whose result reaches an output of the network through no other layer."""
    (values,) = part.graph.output_node().args
    named = zip(part.outputs, values, strict=True)  # type: ignore[arg-type]
    results = {node for name, node in named if name in program.outputs}  # no slot to be filled
    open_nodes: set[fx.Node] = set()
    last: set[fx.Node] = set()
    for node in reversed(part.graph.nodes):
        if node in results or (
            not is_size(node) and any(user in open_nodes for user in node.users)
        ):
            (last if node.target in LAYERS else open_nodes).add(node)
    return last.intersection(calls(part.graph, *SITES))
