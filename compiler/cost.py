"""Cost: floating-point operations and bytes of graph nodes, and both by rate.

An operation is a multiplication or an addition, so a multiply-add counts two. Only products of
matrices and convolutions count; open sizes count at the value that they had at capture.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from math import prod
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry

from effuse.graph import calls, module_path
from effuse.naming import block_names
from effuse.plan import Depends, Rate
from effuse.program import Part, Program, used_weights
from effuse.rates import dependences
from effuse.weights import Weights, peek

Shape = tuple[int, ...]


aten = torch.ops.aten


def matmul_flops(x: Shape, *_: Any, out_val: Shape, **__: Any) -> int:
    """Each output element is a sum over the last axis of x."""
    return 2 * prod(out_val) * x[-1]


def conv_flops(x: Shape, weight: Shape, *_: Any, out_val: Shape, **__: Any) -> int:
    """Each output element is a sum over a filter of (in / groups, *kernel)."""
    return 2 * prod(out_val) * prod(weight[1:])


def _conv_transpose(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Each input element is spread over a filter of (out / groups, *kernel)."""
    return 2 * prod(x) * prod(weight[1:])


def _attention(query: Shape, key: Shape, *_: Any, out_val: Shape, **__: Any) -> int:
    """Scores over the query's width, then a sum over the keys; a mask saves nothing."""
    return 2 * prod(out_val[:-1]) * key[-2] * (query[-1] + out_val[-1])


# What torch.utils.flop_counter has no formula for, since it counts below these ops.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten.linear: matmul_flops,
    aten.matmul: matmul_flops,
    aten.conv1d: conv_flops,
    aten.conv2d: conv_flops,
    aten.conv3d: conv_flops,
    aten.conv_transpose1d: _conv_transpose,
    aten.conv_transpose2d: _conv_transpose,
    aten.conv_transpose3d: _conv_transpose,
    aten.scaled_dot_product_attention: _attention,
}  # effuse's own ops add theirs where they are defined


def node_flops(node: fx.Node) -> int:
    """Operations of one call on its recorded shapes; 0 for what is no matrix product."""
    packet = getattr(node.target, "overloadpacket", None)
    formula = FORMULAS.get(packet) or flop_registry.get(packet)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), _sized)
    return int(formula(*args, out_val=_sized(node), **kwargs))


def node_bytes(node: fx.Node) -> int:
    """Bytes of the tensors that a call reads, and of those that it writes."""
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return sum(prod(_shape(tensor)) * tensor.element_size() for tensor in tensors)


def _sized(node: fx.Node) -> Any:
    """A node's value with shapes for tensors and numbers for open sizes."""
    return pytree.tree_map(_size_or_shape, node.meta.get("val"))


def _size_or_shape(value: Any) -> Any:
    return _shape(value) if isinstance(value, torch.Tensor) else _size(value)


def _shape(tensor: torch.Tensor) -> Shape:
    return tuple(_size(size) for size in tensor.shape)


def _size(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def rate_costs(
    program: Program, parameter_names: set[str] | None = None
) -> dict[str, dict[str, int]]:
    """Rate -> `parameters` and `flops`, by binding-time analysis; the program need not be hoisted.

    A parameter counts once, at the rate of the fastest call that reads it; a view or a cast of it
    is still the parameter. Flops are of one run of each slower part and of the default step.
    `parameter_names` tells parameters from buffers; without it every weight counts.
    """
    costs = {rate.name.lower(): {"parameters": 0, "flops": 0} for rate in Rate}
    fastest: dict[str, Rate] = {}
    for part in program.parts:
        depends = dependences(part.graph, program.sources)
        for name, rate in weight_rates(part.graph, depends).items():
            fastest[name] = max(rate, fastest.get(name, Rate.CONST))
        if part.rate is not Rate.STEP or part.name == program.plan.default:
            for node in calls(part.graph):
                costs[depends[node].rate.name.lower()]["flops"] += node_flops(node)
    for name, rate in fastest.items():
        if parameter_names is None or name in parameter_names:
            costs[rate.name.lower()]["parameters"] += peek(program.weights, name).numel()
    return costs


def weight_rates(graph: fx.Graph, depends: Mapping[fx.Node, Depends]) -> dict[str, Rate]:
    """For each weight that the graph reads, the rate of the fastest call that reads it."""
    read: dict[fx.Node, Rate] = {}
    found: dict[str, Rate] = {}
    for node in reversed(graph.nodes):
        stored = depends[node] == Depends.NOTHING and (node.op == "get_attr" or _is_view(node))
        users = (read[user] for user in node.users)
        read[node] = max(users, default=Rate.CONST) if stored else depends[node].rate
        if node.op == "get_attr":
            name = str(node.target)
            found[name] = max(read[node], found.get(name, Rate.CONST))
    return found


def _is_view(node: fx.Node) -> bool:
    """Whether a call only hands on what it reads: a view, a cast, or one of several results."""
    if node.target in (getitem, aten._to_copy.default):
        return True
    schema = getattr(node.target, "_schema", None)
    return schema is not None and any(each.alias_info is not None for each in schema.returns)


def part_costs(part: Part, weights: Weights) -> dict[str, int]:
    """Calls, stored elements, bytes of weights, and operations of one part, for reports."""
    stored = [peek(weights, name) for name in used_weights(part)]
    return {
        "nodes": len(calls(part.graph)),
        "parameters": sum(tensor.numel() for tensor in stored),
        "weight_bytes": sum(tensor.numel() * tensor.element_size() for tensor in stored),
        "flops": sum(node_flops(node) for node in calls(part.graph)),
    }


def plan_costs(program: Program) -> dict[str, Any]:
    """The plan's arithmetic: FLOPs of each block in each variant, of the plan, and of full steps.

    Blocks are modules, in the default variant's order. Empty where the plan lists no step, and
    where a variant is chosen at run time each step counts as planned.
    """
    steps = Counter(step.variant for step in program.plan.steps)
    if not steps:
        return {}
    default = program.plan.default
    parts = sorted(program.variants, key=lambda part: part.name != default)
    flops = {part.name: module_flops(part) for part in parts}
    blocks = block_names([path for found in flops.values() for path in found])
    variants: dict[str, Counter[str]] = {name: Counter() for name in flops}
    for name, found in flops.items():
        for path, count in found.items():
            variants[name][blocks[path]] += count
    rows = list(dict.fromkeys(blocks.values()))
    totals = {name: counts.total() for name, counts in variants.items()}
    return {
        "blocks": rows,
        "variants": {name: [counts[row] for row in rows] for name, counts in variants.items()},
        "flops": sum(count * totals[name] for name, count in steps.items()),
        "full_flops": steps.total() * totals[default],
    }


def module_flops(part: Part) -> Counter[str]:
    """FLOPs by module path, in the graph's order, of the modules that have any."""
    counts: Counter[str] = Counter()
    for node in calls(part.graph):
        if flops := node_flops(node):
            counts[module_path(node)] += flops
    return counts
