"""The reference back end: eager PyTorch with the ops' references. The oracle for all others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from effuse.errors import InputError
from effuse.graph import evaluate
from effuse.plan import Input, Role
from effuse.program import Part, Program
from effuse.runtime import Run, Session

Observe = Callable[[Part, Any, Any], Any]


class TorchArrays:
    """torch tensors in the graphs; torch or numpy from the caller, given back in kind."""

    def take(self, value: Any, item: Input) -> torch.Tensor:
        """`value` as a tensor of the input's dtype."""
        tensor = value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))
        dtype = getattr(torch, item.dtype)
        if tensor.dtype != dtype:
            cast = tensor.to(dtype)
            if item.role is not Role.TIMESTEP or not torch.equal(cast.double(), tensor.double()):
                raise InputError(f"{item.label}: expected {item.dtype}, got {tensor.dtype}")
            tensor = cast
        return tensor.detach()

    def give(self, value: Any, like: Any) -> Any:
        """numpy where the caller handed numpy in."""
        return value if isinstance(like, torch.Tensor) else value.numpy()

    def same(self, one: Any, other: Any) -> bool:
        """Equal in shape and in every element."""
        return torch.equal(one, other)

    def keep(self, value: Any) -> Any:
        """A copy."""
        return value.clone()

    def index(self, step: int) -> Any:
        """The step index as a tensor."""
        return torch.tensor([step])


def available() -> str | None:
    """Always there."""
    return None


def session(
    program: Program,
    observe: Observe | None = None,
    begin: Callable[[Mapping[str, Any], int | None], None] | None = None,
) -> Session:
    """A Session over the program's graphs; `observe(part, node, value)` sees every value."""
    runs = {part.name: _runner(program, part, observe) for part in program.parts}
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


def _runner(program: Program, part: Part, observe: Observe | None) -> Run:
    watch = None if observe is None else (lambda node, value: observe(part, node, value))

    def run(values: Mapping[str, Any]) -> tuple[Any, ...]:
        with torch.no_grad():
            return evaluate(part.graph, program.weights, values, watch)

    return run
