"""A stable text of a graph: numbered by position, shape and dtype on every line, fit for diffs."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effuse.graph import module_path


def type_text(value: Any) -> str:
    """`float32[2x320x64x64]` for a tensor, the bare type for anything else."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype}[{'x'.join(str(size) for size in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(type_text(item) for item in value)})"
    return type(value).__name__ if value is not None else "none"


def target_text(target: Any) -> str:
    """`aten.conv2d.default` for an op, `operator.mul` for a Python operator."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", "").lstrip("_")
    return f"{module}.{getattr(target, '__name__', target)}"


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_argument(item, names) for item in value)}]"
    if isinstance(value, float):
        return repr(value)  # the shortest text that names this float and no other
    return str(value).removeprefix("torch.")


def node_text(node: fx.Node, names: dict[fx.Node, str]) -> str:
    """One line for one node."""
    if node.op == "output":
        return f"return {_argument(node.args[0], names)}"
    head = f"{names[node]}: {type_text(node.meta.get('val'))} = "
    if node.op == "placeholder":
        return f"{head}input {node.target}"
    if node.op == "get_attr":
        return f"{head}weight {node.target}"
    parts = [_argument(arg, names) for arg in node.args]
    parts += [f"{key}={_argument(item, names)}" for key, item in sorted(node.kwargs.items())]
    path = module_path(node)
    return f"{head}{target_text(node.target)}({', '.join(parts)})" + (f"  # {path}" if path else "")


def dump(graph: fx.Graph) -> str:
    """The whole graph, a line a node; byte-identical for equal graphs."""
    names = {node: f"%{index}" for index, node in enumerate(graph.nodes)}
    return "\n".join(node_text(node, names) for node in graph.nodes) + "\n"


def around(node: fx.Node, lines: int = 10) -> str:
    """The dump of `lines` nodes either side of `node`, which is marked."""
    nodes = list(node.graph.nodes)
    names = {each: f"%{index}" for index, each in enumerate(nodes)}
    here = nodes.index(node)
    window = nodes[max(0, here - lines) : here + lines + 1]
    return "\n".join(f"{'>' if each is node else ' '} {node_text(each, names)}" for each in window)
