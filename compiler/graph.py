"""The graph layer: the only code that makes, replaces and removes nodes.

A graph is a plain `torch.fx.Graph` over ATen and effuse ops. Placeholders are named values; a
`get_attr` node names a tensor in the program's weight store; the output is a tuple. Every node
carries its recorded fake value in `meta["val"]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from effuse.weights import Weights, WeightStore

Observer = Callable[[fx.Node, Any], Any]
Caller = Callable[[fx.Node, tuple[Any, ...], dict[str, Any]], Any]

INHERITED = ("nn_module_stack", "stack_trace")


def fake_mode(graph: fx.Graph) -> FakeTensorMode:
    """The fake mode that the graph's recorded values belong to."""
    for node in graph.nodes:
        if isinstance(value := node.meta.get("val"), FakeTensor):
            return value.fake_mode
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def typing(graph: fx.Graph) -> Iterator[None]:
    """Where a call on recorded values gives the shape and dtype of its result.

    The Python dispatcher keeps open sizes open in ops that torch implements by parts (upsampling).
    """
    with fake_mode(graph), enable_python_dispatcher(), torch.no_grad():
        yield


def value_of(node: fx.Node) -> Any:
    """The recorded fake value of a node."""
    return node.meta["val"]


def recorded(args: Any) -> Any:
    """`args` with every node replaced by its recorded fake value."""
    return fx.map_arg(args, value_of)


def emit(
    graph: fx.Graph, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any
) -> Any:
    """Append a call at the insertion point, typed by running it on the recorded fake values.

    `like` hands its module path and source line on to the new node.
    """
    with typing(graph):
        value = target(*recorded(args), **recorded(kwargs))
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    for key in INHERITED:
        if like is not None and key in like.meta:
            node.meta[key] = like.meta[key]
    return node


def cast(node: fx.Node, dtype: torch.dtype, like: fx.Node | None = None) -> fx.Node:
    """The value in this dtype: as it is, or made so at the insertion point."""
    if value_of(node).dtype == dtype:
        return node
    made: fx.Node = emit(node.graph, torch.ops.aten.to.dtype, node, dtype, like=like or node)
    return made


def emit_input(graph: fx.Graph, name: str, value: Any) -> fx.Node:
    """A new placeholder, behind the existing ones and before all else, with the fake `value`."""
    after = next((node for node in graph.nodes if node.op != "placeholder"), graph._root)
    with graph.inserting_before(after):
        node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def renew_input(node: fx.Node, value: Any) -> fx.Node:
    """A placeholder in the place of another, of its name, with the fake `value`."""
    with node.graph.inserting_before(node):
        new = node.graph.placeholder(str(node.target))
    new.meta["val"] = value
    substitute(node, new)
    node.graph.erase_node(node)
    return new


def emit_weight(graph: fx.Graph, weights: WeightStore, name: str, tensor: Any) -> fx.Node:
    """A node that reads the weight `name`, which is stored as `tensor`."""
    weights[name] = tensor
    node = graph.get_attr(name)
    mode = fake_mode(graph)
    if isinstance(tensor, torch.Tensor):
        node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
    else:  # made when it is read
        with mode:
            node.meta["val"] = torch.empty(tensor.like.shape, dtype=tensor.like.dtype)
    return node


def move(graph: fx.Graph, device: torch.device) -> None:
    """Let every recorded value, and every device that a call is told, be `device`."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to(device)
        return device if isinstance(value, torch.device) else value

    with typing(graph):
        for node in graph.nodes:
            node.args = pytree.tree_map(moved, node.args)
            node.kwargs = pytree.tree_map(moved, node.kwargs)
            if "val" in node.meta:
                node.meta["val"] = pytree.tree_map(moved, node.meta["val"])


def unused_name(weights: Weights, name: str) -> str:
    """`name`, or the first of `name.1`, `name.2`, … that no weight has yet."""
    names = (name, *(f"{name}.{number}" for number in range(1, len(weights) + 1)))
    return next(each for each in names if each not in weights)


def substitute(old: fx.Node, new: fx.Node) -> None:
    """Let every user of `old`, the graph's output included, read `new` instead."""
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def eliminate(graph: fx.Graph) -> int:
    """Remove every node that no longer reaches the output, inputs excepted; return their number."""
    dead = 0
    for node in reversed(list(graph.nodes)):
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
            dead += 1
    return dead


def drop_unused_inputs(graph: fx.Graph) -> None:
    """Remove the placeholders that nothing reads."""
    for node in inputs(graph):
        if not node.users:
            graph.erase_node(node)


def inputs(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def calls(graph: fx.Graph, *targets: Any) -> list[fx.Node]:
    """The calls of any of `targets` (of every function when none is named), in order."""
    found = [node for node in graph.nodes if node.op == "call_function"]
    return [node for node in found if node.target in targets] if targets else found


def outputs(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The nodes that the graph returns."""
    return tuple(graph.output_node().args[0])  # type: ignore[arg-type]


def set_outputs(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Return `nodes` from the graph instead of what it returned."""
    if any(node.op == "output" for node in graph.nodes):
        graph.output_node().args = (tuple(nodes),)
    else:
        graph.output(tuple(nodes))


def clone(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy of the graph, and the map from the old nodes to the new."""
    copy = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = copy.node_copy(node, mapping.__getitem__)
    return copy, mapping


def module_path(node: fx.Node) -> str:
    """Where in the user's network a node comes from: `down_blocks.0.resnets.1.conv1`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).removeprefix("L['self'].").removeprefix("L['self']")


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's source that made a node, or an empty string."""
    lines = [line.strip() for line in str(node.meta.get("stack_trace") or "").splitlines()]
    files = [index for index, line in enumerate(lines) if line.startswith("File ")]
    return " ".join(lines[files[-1] : files[-1] + 2]) if files else ""


def call_target(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call of the node's function gives."""
    return node.target(*args, **kwargs)  # type: ignore[operator]


def evaluate(
    graph: fx.Graph, weights: Weights, values: Mapping[str, Any], observe: Observer | None = None,
    call: Caller = call_target,
) -> tuple[Any, ...]:  # fmt: skip
    """Run a graph on real tensors, one node at a time, dropping each value after its last use.

    `observe(node, value)` sees every computed value and may return another in its place; `call`
    computes the calls.
    """
    last = _last_uses(graph)
    env: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        env[node] = _run(node, env, weights, values, call)
        if observe is not None and node.op in ("placeholder", "call_function"):
            replaced = observe(node, env[node])
            env[node] = env[node] if replaced is None else replaced
        for source in last.get(node, ()):
            del env[source]
    return tuple(env[graph.output_node()])


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nothing needs once it has run; its own if nothing reads it."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen = {graph.output_node()}
    for node in reversed(graph.nodes):
        for source in (node, *node.all_input_nodes):
            if source not in seen:
                seen.add(source)
                last.setdefault(node, []).append(source)
    return last


def _run(node: fx.Node, env: Any, weights: Weights, values: Mapping[str, Any], call: Caller) -> Any:
    if node.op == "placeholder":
        return values[str(node.target)]
    if node.op == "get_attr":
        return weights[str(node.target)]
    args = fx.map_arg(node.args, env.__getitem__)
    if node.op == "output":
        return args[0]
    return call(node, args, fx.map_arg(node.kwargs, env.__getitem__))


def record(graph: fx.Graph, weights: Weights, values: Mapping[str, Any]) -> None:
    """Record the values of a graph that was read from a file, for inputs like `values`."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {name: mode.from_tensor(value) for name, value in values.items()}
    stored: dict[str, Any] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "get_attr" and name not in stored:
            stored[name] = mode.from_tensor(weights[name])

    def keep(node: fx.Node, value: Any) -> None:
        node.meta["val"] = value

    with mode, torch.no_grad():
        evaluate(graph, stored, fakes, keep)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = stored[str(node.target)]
