"""StartToken: the prompt's first token goes around the keys' and values' layers, in float.

    W · c  =  W · (c - e₀ k) + e₀ (W · k),        k the first token's states, e₀ the first row

Text encoders that attend backwards give every prompt the same states k for its first token, and
these are far greater than the others (MixDQ, METHODS 1.9a). W · k is computed here, in float; what
is left for the layer is exactly zero in the first row, so that a quantizer's range is that of the
other tokens. The sheet cuts the row off instead; this form stays right where a prompt starts
otherwise (zeros in place of an empty prompt), and all layers of one prompt read one value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from effuse.graph import (
    calls,
    clone,
    emit,
    emit_weight,
    inputs,
    module_path,
    substitute,
    unused_name,
    value_of,
)
from effuse.passes.base import Pass, Work
from effuse.passes.canonicalize import CASTS, IDENTITIES, LAYOUTS, RESHAPES
from effuse.plan import Depends
from effuse.program import Part, Program, output_values
from effuse.rates import dependences
from effuse.statistics import Key
from effuse.verify import exact_bound, relative_error
from effuse.watch import Watch
from effuse.weights import WeightStore, copied

aten = torch.ops.aten

RULE = "start"
LAST = torch.iinfo(torch.int64).max  # the end of a slice, as torch.export writes it
MOVES = (  # between a layer and its attention: heads apart, keys beside values, a scale
    *CASTS, *IDENTITIES, *LAYOUTS, *RESHAPES, getitem, aten.view.default, aten.unflatten.int,
    aten.flatten.using_ints, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.unbind.int,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default,
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar,
)  # fmt: skip
ATTENTION = {  # where attention takes keys and values
    aten.scaled_dot_product_attention.default: (1, 2),
    aten.matmul.default: (1,),
    aten.bmm.default: (1,),
    aten.baddbmm.default: (2,),
}


@dataclass(frozen=True)
class StartToken(Pass):
    """Keys and values of the prompt's first token as constants, if all prompts share it; exact."""

    name: ClassVar[str] = "start_token"

    def run(self, program: Program, work: Work) -> Program:
        """Rewrite the layers whose text states start alike in every prompt of the calibration."""
        found = {part.name: self._sites(program, part, work) for part in program.parts}
        sources = {(part, _source(site).name) for part, sites in found.items() for site in sites}
        if not sources:
            return program
        states = FirstTokens(sources)
        if work.drive is not None:
            work.drive(program, states)
        weights = copied(program.weights)
        parts = tuple(
            rewritten(part, found[part.name], states, weights, work) for part in program.parts
        )
        return replace(program, parts=parts, weights=weights)

    def _sites(self, program: Program, part: Part, work: Work) -> list[fx.Node]:
        depends = dependences(part.graph, program.sources)
        sites = []
        for site in calls(part.graph, aten.linear.default):
            reason = self.unwanted(module_path(site)) or refused(program, part, site, depends)
            if reason:
                work.log.reject(RULE, reason)
            else:
                sites.append(site)
        return sites


def _source(site: fx.Node) -> fx.Node:
    node: Any = site.args[0]
    return node  # type: ignore[no-any-return]


def _stored(site: fx.Node) -> list[fx.Node]:
    """The weight, and the bias if there is one."""
    return [each for each in site.args[1:] if isinstance(each, fx.Node)]


def refused(
    program: Program, part: Part, site: fx.Node, depends: dict[fx.Node, Depends]
) -> str | None:
    """Why a linear layer does not make keys or values of text states, or None."""
    states = _source(site)
    if depends[states] != Depends.PROMPT:
        return "its input is not the prompt's alone"
    if any(each.op != "get_attr" for each in _stored(site)):
        return "its weight or its bias is computed"
    if value_of(states).dim() != 3:
        return "its input is no sequence of states"
    if value_of(states).shape[1] == 1:
        return "its input has a single token"
    if not any(attended(program, part, site)):
        return "no attention reads it as keys or values"
    return None


def attended(program: Program, part: Part, node: fx.Node) -> Iterator[bool]:
    """For each use of a value, wherever it leads, whether attention takes it as keys or values."""
    for user in node.users:
        if user.target in ATTENTION:
            yield any(user.args[place] is node for place in ATTENTION[user.target])
        elif user.target in MOVES and user.args[0] is node:
            yield from attended(program, part, user)
        elif user.op == "output":
            names = {name for name, value in output_values(part).items() if value is node}
            for other in program.parts:
                for place in inputs(other.graph):
                    if place.target in names:
                        yield from attended(program, other, place)


@dataclass
class States:
    """The first prompt that was seen, (1, tokens, width), and how others compare with it."""

    prompt: torch.Tensor
    alike: bool = True  # they start with the same token
    several: bool = False  # and go on with others

    def add(self, value: torch.Tensor) -> None:
        """Take in a batch of prompts, (batch, tokens, width)."""
        for prompt in value[:, None]:
            self.alike &= agree(prompt[:, :1], self.prompt[:, :1])
            self.several |= not agree(prompt, self.prompt)

    @property
    def reason(self) -> str | None:
        """Why the first token cannot be taken for a constant, or None."""
        if not self.several:
            return "calibration has one prompt, which says nothing of others"
        if not self.alike:
            return "prompts start with different tokens"
        return None if self.prompt[:, :1].any() else "the first token's states are zero"


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to rounding: text encoders add in another order for another batch."""
    return relative_error([one], [other]) <= exact_bound(one.dtype)


class FirstTokens(Watch):
    """What calibration shows of text states."""

    def __init__(self, wanted: set[Key]) -> None:
        self._wanted = wanted
        self._seen: dict[Key, States] = {}

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Compare the value with those before."""
        key = (part.name, node.name)
        if key in self._wanted:
            self._seen.setdefault(key, States(value[:1].clone())).add(value)

    def start(self, part: Part, node: fx.Node) -> torch.Tensor | str:
        """The states that all prompts start with, (1, 1, width), or why there are none."""
        seen = self._seen.get((part.name, node.name))
        if seen is None:
            return "no calibration run shows how prompts start"
        return seen.reason or seen.prompt[:, :1].clone()


def rewritten(
    part: Part, sites: list[fx.Node], states: FirstTokens, weights: WeightStore,
    work: Work,
) -> Part:  # fmt: skip
    """The part with the first token led around each of the layers, where that is constant."""
    graph, mapping = clone(part.graph)
    writer = Writer(graph, weights)
    for site in sites:
        start = states.start(part, _source(site))
        if isinstance(start, str):
            work.log.reject(RULE, start)
        elif work.log.spend(RULE):
            writer.bypass(mapping[site], start)
    return replace(part, graph=graph)


@dataclass
class Writer:
    """Leads first tokens around the layers of one graph."""

    graph: fx.Graph
    weights: WeightStore
    rests: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def bypass(self, site: fx.Node, start: torch.Tensor) -> None:
        """linear(c, W, b) -> [y₀ + (W k + b); y₁… + b] with y = linear(c - e₀ k, W)."""
        weight, *bias = _stored(site)
        given = [self.weights[str(each.target)] for each in (weight, *bias)]
        with self.graph.inserting_before(site):
            constant = self._weight(f"{weight.target}.start", F.linear(start, *given))
            rest = self._rest(_source(site), start)
            product = self._emit(site, aten.linear.default, rest, weight)
            first = self._emit(site, aten.add.Tensor, self._rows(product, 0, 1), constant)
            others = self._rows(product, 1, LAST)
            for each in bias:
                others = self._emit(site, aten.add.Tensor, others, each)
            new = self._emit(site, aten.cat.default, [first, others], 1)
        substitute(site, new)
        self.graph.erase_node(site)

    def _rest(self, states: fx.Node, start: torch.Tensor) -> fx.Node:
        """c - e₀ k, which all layers on `states` read."""
        if states not in self.rests:
            known = self._weight(f"start.{states.name}", start)
            first = self._emit(states, aten.sub.Tensor, self._rows(states, 0, 1), known)
            pieces = [first, self._rows(states, 1, LAST)]
            self.rests[states] = self._emit(states, aten.cat.default, pieces, 1)
        return self.rests[states]

    def _rows(self, value: fx.Node, start: int, end: int) -> fx.Node:
        return self._emit(value, aten.slice.Tensor, value, 1, start, end)

    def _emit(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        node: fx.Node = emit(self.graph, target, *args, like=like)
        return node

    def _weight(self, name: str, tensor: torch.Tensor) -> fx.Node:
        """A weight node; variants store the same constant once."""
        known = self.weights.get(name)
        if known is None or not torch.equal(known, tensor):
            name = unused_name(self.weights, name)
        return emit_weight(self.graph, self.weights, name, tensor)
