"""A graph as JSON and back: only ops of an allow-list are ever looked up, nothing is executed."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from effuse.errors import ArtifactError
from effuse.graph import set_outputs

SPACES = ("aten", "effuse", "prims")
OPERATORS = {
    f"operator.{name}": getattr(operator, name)
    for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg")
}
NAMES = {function: name for name, function in OPERATORS.items()}
TORCH_TYPES = (torch.dtype, torch.device, torch.layout, torch.memory_format)


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """The nodes in order; arguments refer to earlier nodes by position.

    Raises:
        ArtifactError: a node calls something outside the allow-list.
    """
    places = {node: index for index, node in enumerate(graph.nodes)}
    return [
        {
            "op": node.op,
            "target": _target_to_json(node.target),
            "args": _to_json(node.args, places),
            "kwargs": _to_json(node.kwargs, places),
        }
        for node in graph.nodes
    ]


def _target_to_json(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, str):
        return target
    if target not in NAMES:
        raise ArtifactError(f"an artifact cannot hold a call of {target!r}")
    return NAMES[target]


def _to_json(value: Any, places: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return {"node": places[value]}
    if isinstance(value, (list, tuple)):
        return [_to_json(item, places) for item in value]
    if isinstance(value, dict):
        return {key: _to_json(item, places) for key, item in value.items()}
    if isinstance(value, TORCH_TYPES):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, float):
        return {"float": value.hex()}
    return value


def graph_from_json(nodes: list[dict[str, Any]]) -> fx.Graph:
    """The inverse of `graph_to_json`; recorded values are not kept.

    Raises:
        ArtifactError: a node names an op outside the allow-list.
    """
    graph = fx.Graph()
    made: list[fx.Node] = []
    for item in nodes:
        args = _from_json(item["args"], made)
        if item["op"] == "output":
            set_outputs(graph, args[0])
        elif item["op"] == "placeholder":
            made.append(graph.placeholder(str(item["target"])))
        elif item["op"] == "get_attr":
            made.append(graph.get_attr(str(item["target"])))
        else:
            target = _target_from_json(item["target"])
            made.append(graph.call_function(target, tuple(args), _from_json(item["kwargs"], made)))
    return graph


def _target_from_json(name: str) -> Any:
    if name in OPERATORS:
        return OPERATORS[name]
    space, *rest = name.split(".")
    if space not in SPACES or len(rest) != 2:
        raise ArtifactError(f"the op {name!r} is not one that an artifact may call")
    try:
        op = getattr(getattr(getattr(torch.ops, space), rest[0]), rest[1])
    except AttributeError:
        raise ArtifactError(f"the op {name!r} is unknown here; update torch or effuse") from None
    if not _is_function(op):
        raise ArtifactError(f"the op {name!r} is not one that an artifact may call")
    return op


def _is_function(op: Any) -> bool:
    """An op that gives values and does nothing else: `aten::save` would write a file."""
    if not isinstance(op, torch._ops.OpOverload):
        return False
    schema = op._schema
    files = any(argument.name == "filename" for argument in schema.arguments)
    waits = any("Future" in str(argument.type) for argument in schema.arguments)
    return bool(schema.returns) and not (schema.is_mutable or files or waits)


def _from_json(value: Any, made: list[fx.Node]) -> Any:
    if isinstance(value, list):
        return [_from_json(item, made) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {"node"}:
        return made[value["node"]]
    if set(value) == {"float"}:
        return float.fromhex(value["float"])
    if set(value) == {"torch"}:
        return _torch_value(value["torch"])
    return {key: _from_json(item, made) for key, item in value.items()}


def _torch_value(name: str) -> Any:
    found = getattr(torch, name, None)
    if isinstance(found, TORCH_TYPES):
        return found
    try:
        return torch.device(name)
    except RuntimeError:
        raise ArtifactError(f"{name!r} is no type, layout or device of torch") from None
