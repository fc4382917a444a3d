"""Runs the parts of a lowered program: kernels from the artifact or the JIT, the rest by PyTorch.

For each set of input shapes a part is planned once: recorded, given an arena, and on a GPU captured
as a CUDA graph after a first run, which compiles and warms up what PyTorch's own calls need.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from effuse.backends.triton_plan import Arena, in_arena, native_of, plan_arena
from effuse.graph import call_target, evaluate, record, value_of
from effuse.kernels.launch import Launch, as_tuple
from effuse.weights import Weights

Launcher = Callable[[Launch], None]
KEPT_PLANS = 4  # of a part: sizes that alternate


class PartRun:
    """A part's graph on a device, called with its inputs by name; gives its outputs.

    Args:
        graph: of the lowered program; recorded values are not needed.
        weights: on the device.
        launch: what runs a kernel.
        swappable: names of weights that a call may bring along.
        graphs: whether to capture CUDA graphs.
    """

    def __init__(
        self, graph: fx.Graph, weights: Weights, device: torch.device, launch: Launcher,
        swappable: Collection[str] = (), graphs: bool = False,
    ) -> None:  # fmt: skip
        self._graph = on_device(graph, device)
        self._weights = weights
        self._device = device
        self._launch = launch
        self._swappable = frozenset(swappable)
        self._graphs = graphs
        self._plans: dict[Any, Callable[[Mapping[str, Any]], tuple[Any, ...]]] = {}

    def __call__(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """Copies of the outputs: the next call writes where these were computed."""
        swapped = {name: values[name] for name in self._swappable & values.keys()}
        given = {name: values[name] for name in values.keys() - swapped.keys()}
        key = (signature(given), tuple(sorted((n, id(t)) for n, t in swapped.items())))
        if key not in self._plans:
            while len(self._plans) >= KEPT_PLANS:
                del self._plans[next(iter(self._plans))]
            self._plans[key] = self._planned(given, {**self._weights, **swapped})
        with torch.no_grad():
            return tuple(each.clone() for each in self._plans[key](given))

    def _planned(
        self, given: Mapping[str, Any], weights: Weights
    ) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        record(self._graph, weights, given)
        planned = Planned(self._graph, weights, plan_arena(self._graph), self._device, self._launch)
        return Captured(planned, given) if self._graphs else planned


class Planned:
    """A graph with the places of its kernels' results."""

    def __init__(
        self, graph: fx.Graph, weights: Weights, arena: Arena, device: torch.device,
        launch: Launcher,
    ) -> None:  # fmt: skip
        self._graph, self._weights, self._launch = graph, weights, launch
        memory = torch.empty(arena.bytes, dtype=torch.uint8, device=device)
        self._natives = {node: native_of(node) for node in graph.nodes}
        self._results = {
            node: tuple(
                in_arena(memory, arena.offsets[node.name, number], tensor)
                if (node.name, number) in arena.offsets
                else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                for number, tensor in enumerate(as_tuple(value_of(node)))
            )
            for node in graph.nodes
            if self._natives[node] is not None
        }

    def __call__(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The outputs, in memory that the next call overwrites."""
        return evaluate(self._graph, self._weights, values, call=self._call)

    def _call(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if node not in self._results:
            return call_target(node, args, kwargs)
        results = self._results[node]
        native = self._natives[node]
        assert native is not None
        launch = native.launch(results, *args)
        if launch is not None:
            self._launch(launch)
        return results[0] if isinstance(value_of(node), torch.Tensor) else results


class Captured:
    """A plan as a CUDA graph: one launch a call, inputs copied to where it reads them."""

    def __init__(self, planned: Planned, values: Mapping[str, Any]) -> None:
        self._inputs = {name: value.clone() for name, value in values.items()}
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(stream):
            planned(self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._planned = planned  # owns the arena
        self._graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self._graph):
            self._outputs = planned(self._inputs)

    def __call__(self, values: Mapping[str, Any]) -> tuple[Any, ...]:
        """The outputs, in memory that the next call overwrites."""
        for name, value in values.items():
            self._inputs[name].copy_(value)
        self._graph.replay()
        return self._outputs


def signature(values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a plan depends on: shapes, strides and types by name."""
    return tuple(
        (name, tuple(values[name].shape), values[name].stride(), values[name].dtype)
        for name in sorted(values)
    )


def on_device(graph: fx.Graph, device: torch.device) -> fx.Graph:
    """Let every device that a call of the graph is told be `device`."""

    def moved(value: Any) -> Any:
        return device if isinstance(value, torch.device) else value

    for node in graph.nodes:
        node.args = pytree.tree_map(moved, node.args)
        node.kwargs = pytree.tree_map(moved, node.kwargs)
    return graph
