"""What can be pruned, found in the dataflow: residual spans, blocks, heads, hidden units, channels.

A span or a block goes as a whole: its joins become their shortcuts. Heads, hidden units and
channels are the atoms of a site: positions that lie between layers and that can only be cut
together, whose layers lose rows and columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import fx

from effuse.cost import node_flops
from effuse.graph import calls, module_path, value_of
from effuse.log import Log
from effuse.passes.prune_axes import FREE, Atoms, Untied, rank, size
from effuse.passes.prune_names import branch_path, distinct
from effuse.passes.prune_ties import Axis, Labels, closure, renamed
from effuse.passes.skip_blocks import Block, find_blocks
from effuse.program import Part, Program
from effuse.structure import Structure
from effuse.weights import peek

Kind = Literal["span", "block", "head", "unit", "channel"]

aten = torch.ops.aten

ACTIONS = {
    "head": "narrower projections",
    "unit": "a narrower hidden layer",
    "channel": "narrower convolutions, whole norm groups",
}
CONVS = (aten.conv2d.default,)
LINEARS = (aten.linear.default,)


@dataclass(frozen=True)
class Site:
    """Positions between layers that can be cut, and to which of `count` atoms each belongs.

    `labels` are by the value's name and its axis; `name` is the module path, with more behind it
    where several sites of the kind share that.
    """

    kind: Kind
    name: str
    path: str
    count: int
    labels: Mapping[tuple[str, int], Atoms]


@dataclass(frozen=True)
class Candidate:
    """One thing that can go.

    Args:
        name: the module path, and which of its atoms; no two of a kind share one.
        path: the module path, for `include` and `exclude`.
        kind: what it is.
        parameters: that go with it alone.
        flops: that go with it alone, of one call.
        action: what the surgery does, for people.
        block: the joins that become their shortcuts, of a span or a block.
        site: what loses `atom`, of all other kinds.
        atom: which of the site's.
    """

    name: str
    path: str
    kind: Kind
    parameters: int
    flops: int
    action: str
    block: Block | None = None
    site: Site | None = None
    atom: int = 0


def find_candidates(
    program: Program, kinds: Collection[Kind], log: Log, groups: int | None = None
) -> list[Candidate]:
    """The candidates of the default variant, in the graph's order; why others are none, in the log.

    All atoms of a site are candidates; which of them stays is for the caller to say.

    Args:
        program: captured and canonicalized.
        kinds: of candidates.
        log: takes the reasons.
        groups: at most so many atoms a site of hidden units or channels: those of like magnitude
            go together. All apart if None.
    """
    found: list[Candidate] = []
    for kind in ("span", "block"):
        if kind in kinds:
            found += residual_candidates(program, kind, log)
    for site in find_sites(program, kinds, log):
        if groups is not None and site.kind != "head":
            site = by_magnitude(program, site, groups)
        found += site_candidates(program, site)
    return found


# ---- residual spans ------------------------------------------------------------------------------


def residual_candidates(program: Program, kind: Any, log: Log) -> Iterator[Candidate]:
    """The innermost residual spans, or the chains of them that repeat."""
    part = program.part(program.plan.default)
    nodes = {node.name: node for node in part.graph.nodes}
    if kind == "span":
        _reject_sums(Structure(part, program), log)
    blocks = find_blocks(program, "unit" if kind == "span" else "block")
    for block, name in zip(blocks, block_names(blocks, nodes), strict=True):
        dead = [nodes[name] for name in nodes.keys() - live(part.graph, block)]
        gone = own_weights(part, block)
        parameters = sum(peek(program.weights, name).numel() for name in gone)
        flops = sum(map(node_flops, dead))
        action = _action(block, nodes)
        yield Candidate(name, block.name, kind, parameters, flops, action, block)


def block_names(blocks: Sequence[Block], nodes: Mapping[str, fx.Node]) -> list[str]:
    """The blocks' names, told apart by where their branches end."""
    held = [[branch_path(nodes[join.node], join.shortcut) for join in block.joins]
            for block in blocks]  # fmt: skip
    return distinct([block.name for block in blocks], held)


def own_weights(part: Part, block: Block) -> set[str]:
    """The names of the weights that nothing reads once the block is gone."""
    alive = live(part.graph, block)
    kept = weights_of(node for node in part.graph.nodes if node.name in alive)
    return weights_of(part.graph.nodes) - kept


def weights_of(nodes: Iterable[fx.Node]) -> set[str]:
    """The names of the weights that some of the nodes read out."""
    return {str(node.target) for node in nodes if node.op == "get_attr"}


def live(graph: fx.Graph, block: Block) -> set[str]:
    """The names of the nodes that still reach the output with the block's joins bypassed."""
    shortcuts = {join.node: join.shortcut for join in block.joins}
    seen: set[str] = set()
    todo = [graph.output_node()]
    while todo:
        node = todo.pop()
        if node.name in seen:
            continue
        seen.add(node.name)
        place = shortcuts.get(node.name)
        todo += node.all_input_nodes if place is None else [node.args[place]]  # type: ignore[list-item]
    return seen - shortcuts.keys()


def _action(block: Block, nodes: Mapping[str, fx.Node]) -> str:
    """What the joins become: the stream, or its projection."""
    last = block.joins[-1]
    shortcut: Any = nodes[last.node].args[last.shortcut]
    projects = shortcut.target in (*CONVS, *LINEARS) and len(block.joins) == 1
    return "the shortcut's projection stays" if projects else "identity"


def _reject_sums(structure: Structure, log: Log) -> None:
    """Say of each sum of two values that change with the latent why it joins no candidate."""
    units = {span.join for span in structure.units}
    spans = {span.join for span in structure.spans}
    for node in calls(structure.part.graph, aten.add.Tensor):
        operands = [each for each in node.args if isinstance(each, fx.Node)]
        if node in units or len(operands) < 2 or not all(map(structure.fresh, operands)):
            continue
        reason = "holds other spans: they go one by one, or with what='block'"
        if node not in spans:
            reason = "no residual sum: shapes differ, or neither operand is a shortcut of the other"
        log.reject("span", f"{module_path(node) or node.name}: {reason}")


# ---- sites: heads, hidden units, channels --------------------------------------------------------


def find_sites(program: Program, kinds: Iterable[Kind], log: Log) -> list[Site]:
    """The sites of the default variant, of which no two cut the same positions."""
    part = program.part(program.plan.default)
    structure = Structure(part, program)
    stream = {span.join for span in structure.spans}
    taken: dict[Axis, set[int]] = defaultdict(set)
    found: list[Site] = []
    wanted = [kind for kind in ("head", "unit", "channel") if kind in kinds]
    for kind in wanted:
        tried: set[Axis] = set()
        for seed, named in SEEDS[kind](part):
            if seed in tried or not structure.fresh(seed[0]) or taken[seed]:
                continue
            tried.add(seed)
            site = _site(kind, module_path(named) or named.name, seed, stream, taken, log)
            found += [] if site is None else [site]
    return named_apart(found, part)


def named_apart(sites: Sequence[Site], part: Part) -> list[Site]:
    """The sites, those of one kind at one path told apart by the weights that they cut."""
    targets = {node.name: str(node.target) for node in part.graph.nodes if node.op == "get_attr"}
    found: list[Site] = []
    for kind in dict.fromkeys(site.kind for site in sites):
        alike = [site for site in sites if site.kind == kind]
        labelled = [{name for name, _ in site.labels} for site in alike]
        cut = [[path for name, path in targets.items() if name in each] for each in labelled]
        names = distinct([site.path for site in alike], cut)
        found += [replace(site, name=name) for site, name in zip(alike, names, strict=True)]
    return found


def _site(
    kind: Any,
    name: str,
    seed: Axis,
    stream: Collection[fx.Node],
    taken: dict[Axis, set[int]],
    log: Log,
) -> Site | None:
    """The site around a seed, whose positions are then taken; or None, with a reason."""
    try:
        labels = closure(seed, tuple(range(size(*seed))), stream)
        count = 1 + max((atom for atoms in labels.values() for atom in atoms), default=FREE)
        _check_site(kind, labels, count, taken)
    except Untied as error:
        log.reject(kind, f"{name}: {error}")
        return None
    for key, atoms in labels.items():
        taken[key].update(place for place, atom in enumerate(atoms) if atom != FREE)
    named = {(node.name, axis): atoms for (node, axis), atoms in labels.items()}
    return Site(kind, name, name, count, named)


def _check_site(kind: str, labels: Labels, count: int, taken: Mapping[Axis, set[int]]) -> None:
    if count < 2:
        raise Untied("there is one only, or one norm group holds all")
    if not any(node.op == "get_attr" for node, _ in labels):
        raise Untied("no weight shrinks with them")
    for key, atoms in labels.items():
        if any(atom != FREE and place in taken.get(key, ()) for place, atom in enumerate(atoms)):
            raise Untied("another site cuts them already")


Seeds = Iterator[tuple[Axis, fx.Node]]  # where labels start, and the node that names the site


def _heads(part: Part) -> Seeds:
    for node in calls(part.graph, aten.scaled_dot_product_attention.default):
        if rank(node) == 4:
            yield (node, 1), node


def _units(part: Part) -> Seeds:
    """What linear layers read, piece by piece where it is a concatenation."""
    for node in calls(part.graph, *LINEARS):
        for source in _pieces(node.args[0], rank(node) - 1):
            yield (source, rank(source) - 1), source


def _channels(part: Part) -> Seeds:
    for node in calls(part.graph, *CONVS):
        sources = _pieces(node.args[0], 1)
        for source in sources:
            yield (source, 1), node if len(sources) == 1 else source


def _pieces(node: Any, axis: int) -> list[fx.Node]:
    if node.target is not aten.cat.default or _along(node) != axis:
        return [node]
    return [piece for each in node.args[0] for piece in _pieces(each, axis)]


def _along(node: fx.Node) -> int:
    return int(node.args[1] if len(node.args) > 1 else 0) % rank(node)  # type: ignore[arg-type]


SEEDS = {"head": _heads, "unit": _units, "channel": _channels}


def site_candidates(program: Program, site: Site) -> list[Candidate]:
    """Each atom of a site with what goes with it."""
    part = program.part(program.plan.default)
    nodes = {node.name: node for node in part.graph.nodes}
    parameters, flops = np.zeros(site.count), np.zeros(site.count)
    costs = {node: node_flops(node) for node in calls(part.graph)}
    for (name, axis), atoms in site.labels.items():
        node = nodes[name]
        shares = atom_counts(atoms, site.count) / len(atoms)
        if node.op == "get_attr":
            parameters += shares * value_of(node).numel()
            readers = [user for user in node.users if axis == 1 and user.args[1] is node]
            flops += shares * sum(costs[user] for user in readers if user.target in CONVS + LINEARS)
        elif node.op == "call_function" and axis in (1, rank(node) - 1):
            flops += shares * costs[node]
    return [
        Candidate(f"{site.name}[{site.kind} {atom}]", site.path, site.kind, round(parameters[atom]),
                  round(flops[atom]), ACTIONS[site.kind], None, site, atom)
        for atom in range(site.count)
    ]  # fmt: skip


def atom_counts(atoms: Atoms, count: int) -> Any:
    """How many positions each atom has along an axis."""
    return np.bincount(np.asarray(atoms)[np.asarray(atoms) != FREE], minlength=count)


def readers(part: Part, site: Site) -> list[fx.Node]:
    """The layers whose weights lose columns with the site."""
    cut = {name for name, axis in site.labels if axis == 1}
    layers: list[Any] = calls(part.graph, *LINEARS, *CONVS)
    return [node for node in layers if node.args[1].name in cut]


def by_magnitude(program: Program, site: Site, groups: int) -> Site:
    """The site with its atoms in at most `groups` of equal size, those of like Σ w² together.

    Where weights have no values, neighbours go together.
    """
    if groups >= site.count:
        return site
    return grouped(site, group_of(energies(program, site), groups))


def group_of(ranking: Any, groups: int) -> Any:
    """For each atom the number of its group, of at most `groups`: the lowest ranked come first.

    >>> group_of([3.0, 1.0, 2.0, 0.0], 2).tolist()
    [1, 0, 1, 0]
    """
    count = len(ranking)
    if groups >= count:
        return np.arange(count)
    found = np.empty(count, dtype=int)
    found[np.argsort(ranking, kind="stable")] = np.arange(count) * groups // count
    return found


def grouped(site: Site, numbers: Any) -> Site:
    """The site with its atoms put together by the groups' `numbers`."""
    names = dict(enumerate(numbers.tolist()))
    count = len(set(names.values()))
    return replace(site, count=count, labels=renamed(site.labels, names | {FREE: FREE}))


def energies(program: Program, site: Site) -> Any:
    """Σ w² of the weights that go with each atom; 0 where weights have no values."""
    part = program.part(program.plan.default)
    found = np.zeros(site.count)
    for node in part.graph.nodes:
        if node.op == "get_attr":
            for axis in range(rank(node)):
                if atoms := site.labels.get((node.name, axis)):
                    found += _energies(program.weights[str(node.target)], axis, atoms, site.count)
    return found


def _energies(weight: torch.Tensor, axis: int, atoms: Atoms, count: int) -> Any:
    if weight.is_meta:
        return 0.0
    others = [each for each in range(weight.dim()) if each != axis]
    squares = weight.double().square()
    squares = squares.sum(others) if others else squares
    used = np.asarray(atoms) != FREE
    return np.bincount(np.asarray(atoms)[used], squares.numpy()[used], minlength=count)
