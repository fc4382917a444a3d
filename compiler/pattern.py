"""The pattern core: rules as data, matches that say why they failed.

A pattern is a small function in the op vocabulary: it is traced once into a graph, whose inputs
bind to any node. Arguments that are not given in the pattern match anything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from effuse.dump import target_text
from effuse.graph import calls, eliminate, emit, substitute
from effuse.log import Log


@dataclass(frozen=True)
class Pat:
    """A node of a pattern: a call of `target`, or (with no target) a name that binds anything."""

    name: str
    target: Any = None
    args: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Match:
    """A match and what its names are bound to; falsy, with a reason, when there is none."""

    bound: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()
    reason: str = ""

    def __bool__(self) -> bool:
        return not self.reason


Emit = Callable[..., Any]


@dataclass(frozen=True)
class Rule:
    """`pattern(op, *names)` becomes `rewrite(emit, **bound)` unless `where` gives a reason."""

    name: str  # a word
    doc: str  # the equation, and its source
    pattern: Callable[..., Pat]
    rewrite: Callable[..., Any]
    where: Callable[..., str | None] = lambda **_: None


class Ops:
    """`op.conv2d(x, …)` in a pattern: a call of any overload of aten's (or effuse's) `conv2d`."""

    def __getattr__(self, name: str) -> Callable[..., Pat]:
        spaces = (torch.ops.aten, torch.ops.effuse)
        packet = next((getattr(space, name) for space in spaces if hasattr(space, name)), None)
        if packet is None:
            raise AttributeError(f"neither aten nor effuse has an op {name!r}")
        return lambda *args: Pat(name, packet, args)


def root(rule: Rule) -> Pat:
    """The rule's pattern as a tree."""
    names = list(inspect.signature(rule.pattern).parameters)[1:]
    return rule.pattern(Ops(), *(Pat(name) for name in names))


def match(pat: Pat, value: Any) -> Match:
    """Match `value`, the last node of a candidate, against a pattern tree."""
    bound: dict[str, Any] = {}
    nodes: list[fx.Node] = []
    reason = _match(pat, value, bound, nodes, top=True)
    return Match(bound, tuple(nodes), reason)


def _match(pat: Any, value: Any, bound: dict[str, Any], nodes: list[fx.Node], top: bool) -> str:
    if not isinstance(pat, Pat):
        shown = "a computed value" if isinstance(value, fx.Node) else repr(value)
        return "" if pat == value else f"{shown} is not {pat!r}"
    if pat.target is None:
        if pat.name in bound and bound[pat.name] != value:
            return f"{pat.name} stands for two different values"
        bound[pat.name] = value
        return ""
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return f"an operand is not a call of {pat.name}"
    if getattr(value.target, "overloadpacket", None) is not pat.target:
        return f"{target_text(value.target)} is not {pat.name}"
    if not top and len(value.users) > 1:
        return f"the {pat.name} has other users"
    nodes.append(value)
    given = (*value.args, *(None for _ in range(len(pat.args) - len(value.args))))
    for each, arg in zip(pat.args, given, strict=False):
        if reason := _match(each, arg, bound, nodes, top=False):
            return reason
    return ""


def rewrite(graph: fx.Graph, rules: tuple[Rule, ...], log: Log) -> int:
    """Apply each rule wherever it matches; every match and non-match is counted in `log`."""
    count = 0
    for rule in rules:
        pat = root(rule)
        for node in calls(graph):
            if getattr(node.target, "overloadpacket", None) is not pat.target:
                continue
            found = match(pat, node)
            reason = found.reason or rule.where(**found.bound)
            if reason:
                log.reject(rule.name, reason)
            elif log.spend(rule.name):
                with graph.inserting_before(node):
                    new = rule.rewrite(_emitter(graph, node), **found.bound)
                substitute(node, new)
                _erase(graph, found.nodes)
                count += 1
        eliminate(graph)
    return count


def _erase(graph: fx.Graph, matched: tuple[fx.Node, ...]) -> None:
    """Remove what a rewrite left without users, lest it counts as a user in a later match."""
    for node in dict.fromkeys(matched):  # users before what they use
        if not node.users:
            graph.erase_node(node)


def _emitter(graph: fx.Graph, like: fx.Node) -> Emit:
    return lambda target, *args, **kwargs: emit(graph, target, *args, like=like, **kwargs)
