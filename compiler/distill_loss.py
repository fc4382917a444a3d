"""What a student is compared with its teacher by: outputs, and features that both still have.

    L = a · ‖y_S - y‖²  +  b · ‖ε_S - ε_T‖²  +  c · Σ_l ‖f_T - f_S‖² / ‖f_T‖²

The first two are means over elements; y are targets, where the data have some. Features are the
outputs of self-attention (KOALA, METHODS 3.4), each relative to its own size so that none outweighs
the others (LAPTOP-Diff's normalised distillation, METHODS 3.1). Where the networks share none,
the sums of their residual spans stand in.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from effuse.distill_network import Network
from effuse.graph import calls, module_path, value_of
from effuse.structure import Structure

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
PROJECTIONS = (
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
)
# The loss's parts and their weights a, b, c. Features are many, and relative; errors of the output
# are small at most steps. Measured on a transformer of 4.5 M parameters that had lost
# two of its twelve blocks (19.8 dB), after 200 updates: c = 1 and b = 1, 10, 100, 1000 gave 26.2,
# 27.2, 27.6, 27.5 dB; c = 0 and b = 100: 27.1 dB. As gradients are clipped, the scale counts too:
# b = 1 and c = 0.01 gave 27.1 dB.
SHARES: Mapping[str, float] = {"task": 100.0, "output": 100.0, "features": 1.0}


# ---- features ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matched:
    """Features that two networks share: the nodes that give them, by the features' names."""

    kind: str  # "self-attention", "residual span", or "" where there are none
    student: Mapping[str, str]
    teacher: Mapping[str, str]

    @property
    def names(self) -> tuple[str, ...]:
        """The features, in the student's order."""
        return tuple(self.student.values())


def match_features(student: Network, teacher: Network) -> Matched:
    """The self-attention outputs of the same place and shape in both; else residual sums."""
    kinds: tuple[tuple[str, Callable[[Network], dict[str, fx.Node]]], ...] = (
        ("self-attention", attention_outputs),
        ("residual span", residual_sums),
    )
    for kind, find in kinds:
        mine, theirs = find(student), find(teacher)
        shared = [name for name in mine if name in theirs and _alike(mine[name], theirs[name])]
        if shared:
            return Matched(
                kind,
                {mine[name].name: name for name in shared},
                {theirs[name].name: name for name in shared},
            )
    return Matched("", {}, {})


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return [str(size) for size in value_of(one).shape] == [
        str(size) for size in value_of(other).shape
    ]


def attention_outputs(network: Network) -> dict[str, fx.Node]:
    """What the layers behind self-attentions give; heads that are gone do not change its shape."""
    found: dict[fx.Node, None] = {}
    for node in calls(network.full.graph, ATTENTION):
        if is_self_attention(node):
            found |= dict.fromkeys(_nearest([node], lambda each: each.users) or [node])
    return _by_place(found)


def is_self_attention(node: fx.Node) -> bool:
    """Whether queries, keys and values are projections of the same values."""
    read = [
        {layer.args[0] for layer in _nearest([each], lambda at: at.all_input_nodes)}
        for each in node.args[:3]
        if isinstance(each, fx.Node)
    ]
    return len(read) == 3 and bool(read[0]) and read[0] == read[1] == read[2]


def residual_sums(network: Network) -> dict[str, fx.Node]:
    """The sums of residual spans, by the last layers of their branches."""
    places: dict[fx.Node, fx.Node] = {}
    for span in Structure(network.full, network.program).spans:
        layers = _nearest([span.inner], lambda each: each.all_input_nodes)
        places[span.join] = layers[0] if layers else span.join
    names = _by_place(places.values())
    order = {layer: name for name, layer in names.items()}
    return {order[layer]: join for join, layer in places.items() if layer in order}


def _nearest(
    start: list[fx.Node], following: Callable[[fx.Node], Iterable[fx.Node]]
) -> list[fx.Node]:
    """The first layers on the ways from `start` on, itself included, the nearest first."""
    queue, seen, found = list(start), set(start), []
    for node in queue:  # grows as it is walked
        if node.target in PROJECTIONS:
            found.append(node)
        elif node.target is not ATTENTION or node in start:
            new = [each for each in following(node) if each not in seen]
            queue += new
            seen |= set(new)
    return found


def _by_place(nodes: Iterable[fx.Node]) -> dict[str, fx.Node]:
    """The nodes by where they are in the user's network; several at one place are numbered."""
    groups: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in dict.fromkeys(nodes):
        groups[place(node)].append(node)
    return {
        f"{path}[{number} of {len(group)}]" if len(group) > 1 else path: node
        for path, group in groups.items()
        for number, node in enumerate(group, start=1)
    }


def place(node: fx.Node) -> str:
    """The node's module path; of a graph from a file, that of its weight; else its own name."""
    weight = next((each for each in node.all_input_nodes if each.op == "get_attr"), None)
    path = module_path(node)
    if not path and weight is not None:
        path = str(weight.target).rpartition(".")[0]
    return path or node.name


# ---- the loss ------------------------------------------------------------------------------------


def output_loss(student: Iterable[Tensor], teacher: Iterable[Tensor]) -> Tensor:
    """The mean squared difference, summed over outputs."""
    pairs = zip(student, teacher, strict=True)
    return torch.stack([(mine - theirs).square().mean() for mine, theirs in pairs]).sum()


def feature_loss(student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
    """Σ ‖f_T - f_S‖² / ‖f_T‖²; 0 where there are no features."""
    terms = [
        (theirs - student[name]).square().sum()
        / theirs.square().sum().clamp_min(torch.finfo(theirs.dtype).tiny)
        for name, theirs in teacher.items()
    ]
    return torch.stack(terms).sum() if terms else torch.zeros(())
