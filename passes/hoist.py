"""Hoist: what changes slower than the latent leaves the step program (DESIGN 2, programs by rate).

Values of the timestep alone become tables over the known schedule, read by step index; without a
schedule they come from a program that runs once a step. Values of the prompt come from a program
that runs once a picture; values of both, from a third. Temporal features as tables are TFMQ's
cache (METHODS 1.3); here they follow from dataflow, with no code per network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from effuse.graph import (
    calls,
    drop_unused_inputs,
    eliminate,
    emit,
    emit_input,
    emit_weight,
    evaluate,
    fake_mode,
    inputs,
    module_path,
    outputs,
    set_outputs,
    substitute,
    value_of,
)
from effuse.passes.base import Pass, Work
from effuse.passes.quantize_sites import sites
from effuse.plan import STEP_INPUT, Adapter, Depends, Rate, Role
from effuse.program import Part, Program, prune_weights
from effuse.rates import dependences
from effuse.verify import exact_bound, relative_error
from effuse.weights import WeightStore, copied

aten = torch.ops.aten

NAMES = {
    Depends.TIMESTEP: "schedule",
    Depends.PROMPT: "prompt",
    Depends.TIMESTEP | Depends.PROMPT: "conditioning",
}
# Ops that only repeat what they read: the small value crosses the boundary, the copy is made there.
ENLARGING = (aten.expand.default, aten.repeat.default, aten.repeat_interleave.self_int)


@dataclass(frozen=True)
class Hoist(Pass):
    """Split the step program by rate; exact."""

    name: ClassVar[str] = "hoist"

    def requires(self, program: Program) -> str | None:
        """A program that is still in one part."""
        return None if len(program.parts) == 1 else "the program is in parts already"

    def run(self, program: Program, work: Work) -> Program:
        """Split, then tabulate the schedule where it is known."""
        split_program = split(program, work)
        if program.timesteps is None:
            work.log.note("no schedule was given: the schedule program runs once a step")
            return split_program
        return tabulate(split_program, work)

    def ensures(self, program: Program) -> str | None:
        """The step program computes nothing from slower inputs alone, but copies."""
        for part in program.variants:
            found = dependences(part.graph, program.sources)
            for node, depends in found.items():
                slow = node.op == "call_function" and depends != Depends.NOTHING
                if slow and depends.rate < Rate.STEP and not _copies(node):
                    return f"{node} changes at {depends.rate.name.lower()} rate in {part.name}"
        return None


def _copies(node: fx.Node) -> bool:
    return node.target in (*ENLARGING, aten.index_select.default, aten.squeeze.dim)


def split(program: Program, work: Work) -> Program:
    """The program cut where values of a slower rate flow into a faster one."""
    full = program.part(program.plan.default)
    depends = dependences(full.graph, program.sources)
    homes = {node: NAMES.get(found, full.name) for node, found in depends.items()}
    moving = [n for n in full.graph.nodes if n.op == "call_function" and homes[n] != full.name
              and depends[n] != Depends.NOTHING]  # fmt: skip
    if not moving or not work.log.spend("split"):
        return program
    crossing = exports(full.graph, homes, depends)
    parts = []
    for kind, name in NAMES.items():
        if crossing[name]:
            graph = extract(full.graph, name, crossing[name], homes, depends)
            parts.append(Part(name, kind, graph, tuple(_label(n, homes) for n in crossing[name])))
    rest = extract(full.graph, full.name, outputs(full.graph), homes, depends)
    parts.append(replace(full, graph=rest))
    for part in parts[:-1]:
        work.log.note(f"{part.name}: {len(part.outputs)} values leave the step program")
    return program.with_parts(*parts)


def _label(node: fx.Node, homes: dict[fx.Node, str]) -> str:
    return f"{homes[node]}_{node.name}"


def _stays(
    node: fx.Node, home: str, homes: dict[fx.Node, str], depends: dict[Any, Depends]
) -> bool:
    """Whether part `home` computes the node itself rather than being handed its value."""
    if node.op != "call_function" or homes[node] == home or depends[node] == Depends.NOTHING:
        return True
    return node.target in ENLARGING


def needed(
    roots: Iterable[fx.Node], home: str, homes: dict[fx.Node, str], depends: dict[Any, Depends]
) -> tuple[set[fx.Node], set[fx.Node]]:
    """What part `home` computes to reach `roots`, and what it is handed from slower parts."""
    own: set[fx.Node] = set()
    handed: set[fx.Node] = set()
    queue = list(roots)
    while queue:
        node = queue.pop()
        if node in own or node in handed:
            continue
        if not _stays(node, home, homes, depends):
            handed.add(node)
            continue
        own.add(node)
        queue += node.all_input_nodes
    return own, handed


def exports(
    graph: fx.Graph, homes: dict[fx.Node, str], depends: dict[Any, Depends]
) -> dict[str, list[fx.Node]]:
    """For each slower part, the nodes whose values faster parts read, in the graph's order."""
    full = homes[graph.output_node()]
    wanted: dict[str, set[fx.Node]] = {name: set() for name in NAMES.values()}
    roots: dict[str, Iterable[fx.Node]] = {full: outputs(graph)}
    for name in (full, *reversed(NAMES.values())):
        for node in needed(roots.get(name, wanted.get(name, ())), name, homes, depends)[1]:
            wanted[homes[node]].add(node)
    order = {node: index for index, node in enumerate(graph.nodes)}
    return {name: sorted(nodes, key=order.__getitem__) for name, nodes in wanted.items()}


def extract(
    graph: fx.Graph,
    home: str,
    roots: Iterable[fx.Node],
    homes: dict[fx.Node, str],
    depends: dict[Any, Depends],
) -> fx.Graph:
    """The part `home` as a graph of its own."""
    roots = tuple(roots)
    own, handed = needed(roots, home, homes, depends)
    part = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:  # the part's inputs stand first
        if node in handed:
            mapping[node] = emit_input(part, _label(node, homes), value_of(node))
        elif node in own and node.op == "placeholder":
            mapping[node] = part.node_copy(node)
    for node in graph.nodes:
        if node in own and node not in mapping:
            mapping[node] = part.node_copy(node, mapping.__getitem__)
    set_outputs(part, (mapping[node] for node in roots))
    sizes_from_slow_inputs(part, {mapping[node]: depends[node].rate for node in own | handed})
    return part


def sizes_from_slow_inputs(part: fx.Graph, rates: Mapping[fx.Node, Rate]) -> None:
    """A size -> read from the slowest input that has it: a part reruns when its inputs change."""
    places = {
        str(size): (node, axis)
        for node in sorted(inputs(part), key=rates.__getitem__, reverse=True)
        for axis, size in enumerate(value_of(node).shape)
    }
    for node in calls(part, aten.sym_size.int):
        source: Any = node.args[0]
        known = places.get(str(value_of(node)))
        if known and rates[known[0]] < rates[source]:
            with part.inserting_before(node):
                substitute(node, emit(part, aten.sym_size.int, *known, like=node))
    eliminate(part)
    drop_unused_inputs(part)


def tabulate(program: Program, work: Work) -> Program:
    """Replace the schedule program by tables, one row a timestep, read by the step index."""
    schedule = next((part for part in program.parts if part.name == "schedule"), None)
    if schedule is None or not program.examples:
        return program
    tables = compact(program, schedule)
    if isinstance(tables, str):
        work.log.reject("table", tables)
        work.log.note(f"the schedule program stays, and runs once a step: {tables}")
        return program
    if not work.log.spend("table"):
        return program
    weights = copied(program.weights)
    parts = []
    for part in program.parts:
        if part is not schedule:
            for name in part.inputs:
                if name in tables:
                    _read_table(part.graph, name, tables, weights)
            eliminate(part.graph)
            drop_unused_inputs(part.graph)
            parts.append(part)
    size = sum(table.numel() * table.element_size() for table in tables.values())
    work.log.note(
        f"{len(tables)} tables over {len(program.timesteps or ())} timesteps, {size / 1e3:.0f} kB"
    )
    gone = {module_path(site): _gone(site) for site in sites(schedule, program.weights)}
    adapters = tuple(each for path, each in gone.items() if path)
    return prune_weights(program.with_parts(*parts, weights=weights, adapters=adapters))


def _gone(site: fx.Node) -> Adapter:
    """What a LoRA for a layer of the schedule program finds."""
    shape = tuple(value_of(site.args[1]).shape)  # type: ignore[arg-type]
    return Adapter(module_path(site), shape, reason="Hoist has made tables of its values")


def compact(program: Program, schedule: Part) -> dict[str, torch.Tensor] | str:
    """Each value of the schedule over all timesteps, shape (timesteps, …), or why it cannot be.

    A size that only repeats one row (the batch) is stored once. Open sizes must be of that kind,
    which is checked at two sizes.
    """
    found = dict(zip(schedule.outputs, rows(program, schedule, grow=0), strict=True))
    places = dict(zip(schedule.outputs, outputs(schedule.graph), strict=True))
    tables = {}
    for name, value in found.items():
        sizes = value_of(places[name]).shape
        open_axes = {axis for axis, size in enumerate(sizes, start=1) if not isinstance(size, int)}
        for axis in range(1, value.dim()):
            first = value.narrow(axis, 0, 1)
            same = _agree if axis in open_axes else torch.equal
            if value.shape[axis] > 1 and same(first.expand_as(value), value):
                value = first
        if any(value.shape[axis] != 1 for axis in open_axes):
            return f"{name} depends on a size that is left open"
        tables[name] = value.contiguous().clone()
    if program.symbolic:
        for name, other in zip(schedule.outputs, rows(program, schedule, grow=1), strict=True):
            table = tables[name]
            for axis in range(1, table.dim()):
                other = other.narrow(axis, 0, table.shape[axis])
            if not _agree(other, table):
                return f"{name} changes with a size that is left open"
    return tables


def _agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal up to rounding: a matrix product adds in another order for another batch."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return relative_error([one], [other]) <= exact_bound(one.dtype)


def rows(program: Program, schedule: Part, grow: int) -> list[torch.Tensor]:
    """The schedule program at every timestep, stacked; open sizes enlarged by `grow`."""
    values = {item.name: _example(program, item, grow) for item in program.inputs}
    times = [item.name for item in program.inputs if item.role is Role.TIMESTEP]
    results = []
    for time in program.timesteps or ():
        step = {name: torch.full_like(values[name], time) for name in times}
        with torch.no_grad():
            results.append(evaluate(schedule.graph, program.weights, values | step))
    return [torch.stack(column) for column in zip(*results, strict=True)]


def _example(program: Program, item: Any, grow: int) -> torch.Tensor:
    example = program.examples[item.name]
    if not grow:
        return example
    shape = [
        size + grow if isinstance(name, str) else size
        for size, name in zip(example.shape, item.shape, strict=True)
    ]
    return torch.zeros(shape, dtype=example.dtype)


def _read_table(
    graph: fx.Graph, name: str, tables: Mapping[str, torch.Tensor], weights: WeightStore
) -> None:
    """placeholder `name` -> expand(index_select(table, 0, step_index)).

    Open sizes are read from inputs that stay.
    """
    place = next(node for node in inputs(graph) if node.target == name)
    step = next((node for node in inputs(graph) if node.target == STEP_INPUT), None)
    if step is None:
        index = torch.zeros(1, dtype=torch.int64)
        step = emit_input(graph, STEP_INPUT, fake_mode(graph).from_tensor(index))
    wanted = value_of(place).shape
    with graph.inserting_before(_first_call(graph)):
        stored = emit_weight(graph, weights, f"table.{name}", tables[name])
        row = emit(graph, aten.index_select.default, stored, 0, step, like=place)
        row = emit(graph, aten.squeeze.dim, row, 0, like=place)
        if [str(size) for size in value_of(row).shape] != [str(size) for size in wanted]:
            others = [node for node in inputs(graph) if node.target not in tables]
            sizes = [_size(graph, size, others) for size in wanted]
            row = emit(graph, aten.expand.default, row, sizes, like=place)
    substitute(place, row)


def _size(graph: fx.Graph, size: Any, places: list[fx.Node]) -> Any:
    """A number as it is, an open size as read from one of `places` that has it."""
    if isinstance(size, int):
        return size
    for node in places:
        for axis, other in enumerate(value_of(node).shape):
            if str(other) == str(size):
                return emit(graph, aten.sym_size.int, node, axis)
    raise AssertionError(f"no input has the size {size}")


def _first_call(graph: fx.Graph) -> fx.Node:
    node: fx.Node = next(node for node in graph.nodes if node.op != "placeholder")
    return node
