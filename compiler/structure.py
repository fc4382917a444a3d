"""Structure of a denoiser's graph: long skips, residual spans, repeated blocks.

Everything is found in the dataflow. A long skip is a concatenation of two values of which one is
computed from the other. A residual span is a sum of two values of which one is computed from the
other, or both from a third one and one of them by a projection only. No class or module name
counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from effuse.cost import node_flops
from effuse.graph import calls, module_path, outputs, value_of
from effuse.plan import Depends
from effuse.program import Part, Program
from effuse.rates import dependences

aten = torch.ops.aten

LAYERS = (
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.scaled_dot_product_attention.default,
)
SCALED = (aten.div.Tensor, aten.mul.Tensor)


@dataclass(frozen=True)
class LongSkip:
    """cat(deep, skip): `deep` is what was computed from `skip` through all deeper layers."""

    join: fx.Node
    deep: fx.Node
    skip: fx.Node


@dataclass(frozen=True)
class Span:
    """`join` = shortcut + branch, the branch computed from `entry`.

    `shortcut` is `entry` itself or a projection of it; `inner` is the branch before a gate that
    changes slower than the latent (DiT's adaLN), or the branch itself where there is none.
    """

    entry: fx.Node
    shortcut: fx.Node
    branch: fx.Node
    inner: fx.Node
    join: fx.Node

    @property
    def name(self) -> str:
        """Where the branch's last layer is in the user's network, or the join's own name."""
        return module_path(self.inner) or self.join.name


@dataclass(frozen=True)
class Chain:
    """Consecutive spans on one stream: each one's join is the next one's entry."""

    spans: tuple[Span, ...]

    @property
    def entry(self) -> fx.Node:
        """The stream before the first span."""
        return self.spans[0].entry

    @property
    def exit(self) -> fx.Node:
        """The stream after the last span."""
        return self.spans[-1].join

    @property
    def name(self) -> str:
        """The module that all its branches are in, or the first of them."""
        paths = [span.name.split(".") for span in self.spans]
        common: list[str] = []
        for words in zip(*paths, strict=False):
            if len(set(words)) > 1:
                break
            common.append(words[0])
        return ".".join(common) or self.spans[0].name


class Structure:
    """Long skips, spans and chains of one variant's graph."""

    def __init__(self, part: Part, program: Program) -> None:
        self.part = part
        self.depends = dependences(part.graph, program.sources)
        self.order = {node: index for index, node in enumerate(part.graph.nodes)}
        self._sources: dict[fx.Node, int] = {}
        for node in part.graph.nodes:  # ancestors as bit sets: 7,000 nodes take 6 MB
            found = 1 << self.order[node]
            for source in node.all_input_nodes:
                found |= self._sources[source]
            self._sources[node] = found

    def computed_from(self, node: fx.Node, source: fx.Node) -> bool:
        """Whether `source` is an ancestor of `node`."""
        return node is not source and bool(self._sources[node] >> self.order[source] & 1)

    def fresh(self, node: fx.Node) -> bool:
        """Whether the node's value changes with the latent."""
        return bool(self.depends[node] & Depends.LATENT)

    @cached_property
    def skips(self) -> tuple[LongSkip, ...]:
        """The long skips, the shallowest (that is, the last to be joined) first."""
        return tuple(reversed(list(self._skips())))

    def _skips(self) -> Iterator[LongSkip]:
        for join in calls(self.part.graph, aten.cat.default):
            values: Any = join.args[0]
            if len(values) == 2 and all(self.fresh(value) for value in values):
                one, other = values
                if self.computed_from(one, other):
                    yield LongSkip(join, one, other)
                elif self.computed_from(other, one):
                    yield LongSkip(join, other, one)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every residual span whose branch holds a layer, in the order of their joins."""
        found = (self._span(node) for node in calls(self.part.graph, aten.add.Tensor))
        return tuple(span for span in found if span is not None)

    def _span(self, join: fx.Node) -> Span | None:
        one, other = join.args
        if not isinstance(one, fx.Node) or not isinstance(other, fx.Node) or join.kwargs:
            return None
        if not (self.fresh(one) and self.fresh(other)) or not _same_shape(join, one, other):
            return None
        for shortcut, branch in ((one, other), (other, one)):
            entry = shortcut
            if not self.computed_from(branch, entry):
                entry = self._projected(shortcut) or shortcut
            if self.computed_from(branch, entry) and self._layers(branch, entry):
                return Span(entry, shortcut, branch, self._before_gate(branch), join)
        return None

    def _projected(self, node: fx.Node) -> fx.Node | None:
        """What a single layer on the shortcut projects, or None."""
        while node.op == "call_function" and node.target not in LAYERS:
            sources = [each for each in node.all_input_nodes if self.fresh(each)]
            if len(sources) != 1:
                return None
            node = sources[0]
        source = node.args[0] if node.op == "call_function" else None
        return source if isinstance(source, fx.Node) else None

    def _layers(self, branch: fx.Node, entry: fx.Node) -> bool:
        """Whether there is a layer between the two."""
        return any(node.target in LAYERS for node in self.between(entry, branch))

    def between(self, entry: fx.Node, end: fx.Node) -> list[fx.Node]:
        """The nodes on the ways from `entry` to `end`, which is included."""
        found = self._sources[end]
        nodes = list(self.order)[self.order[entry] + 1 : self.order[end] + 1]
        return [node for node in nodes
                if found >> self.order[node] & 1 and self.computed_from(node, entry)]  # fmt: skip

    def _before_gate(self, branch: fx.Node) -> fx.Node:
        node = branch
        while node.target in SCALED:
            fresh = [each for each in node.all_input_nodes if self.fresh(each)]
            if len(fresh) != 1 or not _same_shape(node, fresh[0]):
                break
            node = fresh[0]
        return node

    @cached_property
    def units(self) -> tuple[Span, ...]:
        """The spans that hold no other span: attention, feed-forward, convolution branches."""
        joins = [span.join for span in self.spans]
        return tuple(span for span in self.spans if not any(
            self.order[span.entry] < self.order[join] < self.order[span.join]
            and self.computed_from(span.branch, join) and self.computed_from(join, span.entry)
            for join in joins
        ))  # fmt: skip

    @cached_property
    def layers(self) -> tuple[Span, ...]:
        """The spans that stand in no other span: ResBlocks, whole transformers."""
        return tuple(span for span in self.spans if not any(
            self.computed_from(other.branch, span.join)
            and self.computed_from(span.branch, other.entry) | (span.entry is other.entry)
            for other in self.spans if other is not span
        ))  # fmt: skip

    @cached_property
    def chains(self) -> tuple[Chain, ...]:
        """The layers in runs: one's join is the next one's shortcut; a projection starts anew."""
        runs: list[list[Span]] = []
        for span in self.layers:
            last = next((run for run in runs if run[-1].join is span.shortcut), None)
            if last is None:
                runs.append([span])
            else:
                last.append(span)
        return tuple(Chain(tuple(run)) for run in runs)

    @cached_property
    def blocks(self) -> tuple[Chain, ...]:
        """The chains, one that repeats itself cut into its periods: a transformer's blocks."""
        return tuple(block for chain in self.chains for block in self.periods(chain))

    def periods(self, chain: Chain) -> list[Chain]:
        """The repeated pieces of a chain; the whole of it if nothing longer than a span repeats."""
        kinds = [self._kind(span) for span in chain.spans]
        count = len(kinds)
        for period in range(2, count // 2 + 1):
            if count % period == 0 and kinds == kinds[:period] * (count // period):
                groups = range(0, count, period)
                return [Chain(chain.spans[start : start + period]) for start in groups]
        return [chain]

    def _kind(self, span: Span) -> tuple[Any, ...]:
        """What a span computes, whatever its weights: its layers' ops and shapes."""
        found = (node for node in self.between(span.entry, span.branch) if node.target in LAYERS)
        return tuple((str(node.target), _shape(node)) for node in found)

    def stack(self) -> Chain | None:
        """The chain with the most arithmetic in it, if there is any chain."""
        return max(self.chains, key=self._chain_flops, default=None)

    def _chain_flops(self, chain: Chain) -> int:
        return sum(map(node_flops, self.between(chain.entry, chain.exit)))


def reused_share(part: Part, cached: Sequence[fx.Node]) -> float:
    """The share of a graph's arithmetic that is not needed once `cached` are given (0 to 1)."""
    total = sum(map(node_flops, calls(part.graph)))
    needed: set[fx.Node] = set()
    queue = [node for node in outputs(part.graph) if node not in cached]
    while queue:
        node = queue.pop()
        if node not in needed:
            needed.add(node)
            queue += [source for source in node.all_input_nodes if source not in cached]
    return 1 - sum(map(node_flops, needed)) / total if total else 0.0


def module_outputs(part: Part, path: str) -> list[fx.Node]:
    """The values that leave the module at `path`: those that something outside of it reads."""
    inside = {node: _inside(node, path) for node in calls(part.graph)}
    leaving = {node for node in inside if not all(inside.get(user) for user in node.users)}
    return [node for node in inside if inside[node] and node in leaving]


def _inside(node: fx.Node, path: str) -> bool:
    found = module_path(node)
    return found == path or found.startswith(f"{path}.")


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(size) for size in value_of(node).shape)


def _same_shape(*nodes: fx.Node) -> bool:
    shapes = [_shape(node) for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    return len(shapes) == len(nodes) and len(set(shapes)) == 1


def modules(part: Part) -> Mapping[str, None]:
    """Every module path of the graph, the enclosing ones included, in order."""
    found: dict[str, None] = {}
    for node in calls(part.graph):
        words = module_path(node).split(".")
        for count in range(1, len(words) + 1):
            found[".".join(words[:count])] = None
    return found
