"""Structure of a denoiser's graph: long skips, residual spans, repeated blocks.

Everything is found in the dataflow. A long skip is a concatenation of two values of which one is
computed from the other. A residual span is a sum of two values of which one is computed from the
other, or both from a third one, and one of them past a single layer at most. No class or module
name counts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import getitem
from typing import Any

import torch
from torch import fx

from effuse.cost import node_flops
from effuse.graph import calls, module_path, value_of
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
PIECES = (
    getitem,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
)


@dataclass(frozen=True)
class LongSkip:
    """cat(deep, skip): `deep` is what was computed from `skip` through all deeper layers."""

    join: fx.Node
    deep: fx.Node
    skip: fx.Node


@dataclass(frozen=True)
class Span:
    """`join` = shortcut + branch, the branch computed from `entry`.

    `shortcut` is `entry` itself, or what a projection or resampling makes of it; `inner` is the
    branch before a gate that changes slower than the latent (DiT's adaLN), or the branch itself
    where there is none.
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
    """Consecutive spans on one stream: each one's join is the next one's shortcut, and no more."""

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


@dataclass(frozen=True)
class Stack:
    """A stream behind its first block, as far as it goes: `exit` has the shape of `entry`."""

    first: Chain
    exit: fx.Node

    @property
    def entry(self) -> fx.Node:
        """The stream after the first block."""
        return self.first.exit

    @property
    def name(self) -> str:
        """Where in the user's network it starts."""
        return f"all after {self.first.name}"


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
                if self.computed_from(one, reshaped_from(other)):
                    yield LongSkip(join, one, other)
                elif self.computed_from(other, reshaped_from(one)):
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
            entry = self._entry(shortcut, branch)
            if entry is not None and self._own_layer(entry, branch, shortcut):
                return Span(entry, shortcut, branch, self._before_gate(branch), join)
        return None

    def _entry(self, shortcut: fx.Node, branch: fx.Node) -> fx.Node | None:
        """What both are computed from, with one layer on the shortcut at most; or None."""
        node, layers = shortcut, 0
        while not self.computed_from(branch, node):
            layers += node.target in LAYERS
            sources = [each for each in node.all_input_nodes if self.fresh(each)]
            if len(sources) != 1 or layers > 1:
                return None
            node = sources[0]
        return node

    def _own_layer(self, entry: fx.Node, branch: fx.Node, shortcut: fx.Node) -> bool:
        """Whether the branch has a layer of its own; the halves of a rotary embedding share it."""
        shared = self._sources[shortcut]
        return any(node.target in LAYERS and not shared >> self.order[node] & 1
                   for node in self.between(entry, branch))  # fmt: skip

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
        """The layers in runs; a projection starts anew, and so does a stream that others read."""
        runs: list[list[Span]] = []
        for span in self.layers:
            last = next((run for run in runs if self._continues(run[-1].join, span)), None)
            if last is None:
                runs.append([span])
            else:
                last.append(span)
        return tuple(Chain(tuple(run)) for run in runs)

    def _continues(self, stream: fx.Node, span: Span) -> bool:
        """Whether the span adds to the stream, and nothing else reads it (as a long skip does)."""
        return stream is span.shortcut and all(
            user is span.join or self.computed_from(span.join, user) for user in stream.users
        )

    @cached_property
    def blocks(self) -> tuple[Chain, ...]:
        """The chains, one that repeats itself cut into its periods: a transformer's blocks."""
        return tuple(block for chain in self.chains for block in self.periods(chain))

    def periods(self, chain: Chain) -> list[Chain]:
        """The shortest pieces that the chain repeats; the whole of it if nothing repeats."""
        spans, kinds = chain.spans, [self._kind(span) for span in chain.spans]
        period = next(
            each for each in range(1, len(spans) + 1)
            if len(spans) % each == 0 and kinds == kinds[:each] * (len(spans) // each)
        )  # fmt: skip
        return [Chain(spans[start : start + period]) for start in range(0, len(spans), period)]

    def _kind(self, span: Span) -> tuple[Any, ...]:
        """What a span computes, whatever its weights: its layers' ops and shapes."""
        found = (node for node in self.between(span.entry, span.branch) if node.target in LAYERS)
        return tuple((str(node.target), _shape(node)) for node in found)

    def stack(self) -> Stack | None:
        """Of the chains' streams, behind their first blocks, the one with the most arithmetic."""
        firsts = [self.periods(chain)[0] for chain in self.chains]
        found = ((first, self.stream_end(first.exit)) for first in firsts)
        stacks = [Stack(first, end) for first, end in found if end is not None]
        return max(stacks, key=self._stack_flops, default=None)

    def _stack_flops(self, stack: Stack) -> int:
        return sum(self._flops[node] for node in self.between(stack.entry, stack.exit))

    @cached_property
    def _flops(self) -> dict[fx.Node, int]:
        return {node: node_flops(node) for node in self.order}

    def stream_end(self, entry: fx.Node) -> fx.Node | None:
        """The last sum (or piece of one) of the entry's shape that every way to the output passes.

        A stream may meet another on the way, be joined to it and cut off again, as FLUX's are.
        """
        joins = {span.join for span in self.spans}
        ends = [node for node in self.bottlenecks(entry)
                if _same_shape(node, entry) and _uncut(node) in joins]  # fmt: skip
        return ends[-1] if ends else None

    def bottlenecks(self, entry: fx.Node) -> list[fx.Node]:
        """The values that every way from `entry` to the output passes, in order."""
        ways = [entry, *self.between(entry, self.part.graph.output_node())]
        inside, found, reached = set(ways), [], 0
        for node in ways:
            if reached <= self.order[node]:  # no way leads past it
                found.append(node)
            reached = max([reached, *(self.order[user] for user in node.users if user in inside)])
        return found[1:-1]


def _uncut(node: fx.Node) -> fx.Node:
    """What the node is a piece of, or the node itself."""
    while node.target in PIECES and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def reused_share(full: Part, reading: Part) -> float:
    """The share of a part's arithmetic that another one leaves out (0 to 1)."""
    total, left = (sum(map(node_flops, calls(part.graph))) for part in (full, reading))
    return 1 - left / total if total else 0.0


def module_outputs(part: Part, path: str) -> list[fx.Node]:
    """The tensors that leave the module at `path`: those that something outside of it reads."""
    inside: dict[fx.Node, bool] = {}
    for node in calls(part.graph):  # a member of a tuple leaves as the tuple does
        member = node.target is getitem and inside.get(node.args[0])  # type: ignore[arg-type]
        inside[node] = bool(member) or _inside(node, path)
    return [node for node in inside if inside[node] and isinstance(value_of(node), torch.Tensor)
            and not all(inside.get(user) for user in node.users)]  # fmt: skip


def _inside(node: fx.Node, path: str) -> bool:
    found = module_path(node)
    return found == path or found.startswith(f"{path}.")


def _shape(node: fx.Node) -> tuple[str, ...]:
    return tuple(str(size) for size in value_of(node).shape)


def reshaped_from(node: fx.Node) -> fx.Node:
    """The value that this is with axes of size 1 added: rows as images, for a concatenation."""
    while node.target is aten.unsqueeze.default:
        node = node.args[0]  # type: ignore[assignment]
    return node


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
