"""The reference back end: eager PyTorch with the ops' references. The oracle for all others."""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from effuse.errors import InputError
from effuse.graph import evaluate
from effuse.kernels import dynamic as dynamic  # registers the ops
from effuse.plan import Input, ProgramSpec, Role, factor_axes
from effuse.program import Part, Program
from effuse.runtime import Run, Session
from effuse.serial import graph_from_json, graph_to_json
from effuse.weights import FileWeights, Weights

Observe = Callable[[Part, Any, Any], Any]


class TorchArrays:
    """torch tensors in the graphs; torch or numpy from the caller, given back in kind."""

    def take(self, value: Any, item: Input) -> torch.Tensor:
        """`value` as a tensor of the input's dtype."""
        try:
            tensor = value if torch.is_tensor(value) else torch.as_tensor(np.asarray(value))
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise InputError(f"{item.label}: expected {item.dtype}, got {kind}") from None
        dtype = getattr(torch, item.dtype)
        if tensor.dtype == dtype:
            return tensor.detach()
        cast = tensor.detach().to(dtype)
        lossless = torch.equal(cast.double(), tensor.double())
        if item.role is not Role.TIMESTEP or not (dtype.is_floating_point or lossless):
            got = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{item.label}: expected {item.dtype}, got {got}; convert it before the call, or "
                "compile the network with example inputs of that type"
            )
        return cast

    def give(self, value: Any, like: Any) -> Any:
        """numpy where the caller handed numpy in."""
        return value if isinstance(like, torch.Tensor) else value.numpy()

    def same(self, one: Any, other: Any) -> bool:
        """Equal in shape and in every element."""
        return torch.equal(one, other)

    def keep(self, value: Any) -> Any:
        """A copy."""
        return value.clone()

    def floats(self, value: Any) -> np.ndarray[Any, Any]:
        """The values as a float32 numpy array."""
        return np.asarray(value.float())

    def array(self, value: np.ndarray[Any, Any], dtype: str = "") -> Any:
        """A numpy array as a tensor."""
        tensor = torch.from_numpy(value)
        return tensor.to(getattr(torch, dtype)) if dtype else tensor

    def where(self, rows: np.ndarray[Any, Any], one: Any, other: Any) -> Any:
        """Row by row."""
        mask = torch.from_numpy(rows).reshape(-1, *[1] * (one.ndim - 1))
        return torch.where(mask.to(one.device), one, other)


def absent(target: str | None) -> str | None:
    """Why what was built for `target` does not run here: it does."""
    return None


def available() -> str | None:
    """Always there."""
    return None


def session(
    program: Program,
    observe: Observe | None = None,
    begin: Callable[[Mapping[str, Any], int | None], None] | None = None,
    enter: Callable[[Part, Mapping[str, Any]], None] | None = None,
) -> Session:
    """A Session over the program's graphs.

    `observe(part, node, value)` sees every value, `begin(inputs, index)` every call of the
    network, `enter(part, inputs)` every run of a part.
    """
    runs = {part.name: _runner(part, program.weights, (), observe, enter) for part in program.parts}
    if begin is None:
        return Session(program.spec(), runs, TorchArrays())
    return _Watched(program, runs, begin)


class _Watched(Session):
    def __init__(
        self,
        program: Program,
        runs: Mapping[str, Run],
        begin: Callable[[Mapping[str, Any], int | None], None],
    ) -> None:
        super().__init__(program.spec(), runs, TorchArrays())
        self._begin = begin

    def step(self, values: Mapping[str, Any]) -> dict[str, Any]:
        self._begin(values, self.step_index(values))
        return super().step(values)


def _runner(
    part: Part,
    weights: Weights,
    swappable: Collection[str] = (),
    observe: Observe | None = None,
    enter: Callable[[Part, Mapping[str, Any]], None] | None = None,
) -> Run:
    watch = None if observe is None else (lambda node, value: observe(part, node, value))

    def run(values: Mapping[str, Any]) -> tuple[Any, ...]:
        if enter is not None:
            enter(part, values)
        swapped = {name: values[name] for name in swappable if name in values}
        stored: Weights = ChainMap(swapped, weights)  # type: ignore[arg-type]  # only read
        with torch.no_grad():
            return evaluate(part.graph, stored, values, watch)

    return run


def build(
    program: Program, folder: Path, progress: Any = lambda what, done, total: None,
    target: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the graphs as JSON and the weights as safetensors."""
    graphs = {part.name: graph_to_json(part.graph) for part in program.parts}
    text = json.dumps(graphs, sort_keys=True, separators=(",", ":"))
    (folder / "graphs.json").write_text(text, encoding="utf-8")
    if isinstance(program.weights, FileWeights):
        program.weights.write(folder / "weights.safetensors", progress)
    else:
        tensors = {name: tensor.contiguous() for name, tensor in program.weights.items()}
        save_file(untied(tensors), folder / "weights.safetensors")
    progress("write", 1, 1)
    return {}


def untied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of the tensors that share memory with another, which safetensors does not take."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return found


def load_session(spec: ProgramSpec, folder: Path) -> Session:
    """A Session over the written graphs and weights."""
    graphs = json.loads((folder / "graphs.json").read_text(encoding="utf-8"))
    weights = load_file(folder / "weights.safetensors")
    runs = {}
    for part in spec.parts:
        graph = graph_from_json(graphs[part.name])
        whole = Part(part.name, part.depends, graph, part.outputs)
        runs[part.name] = _runner(whole, weights, factor_axes(spec.adapters))
    return Session(spec, runs, TorchArrays())
