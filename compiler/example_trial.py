"""A network tried on example inputs: how far it gets, and what stops it.

A trial runs on fake tensors, and where these do not do on real numbers, and tells how many calls it
got through, the shapes of the call that failed, and the source lines that led there.
"""

from __future__ import annotations

import copy
import linecache
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from effuse.example_rows import is_time

REAL = 1 << 27  # parameters of a network that is tried on real numbers, where fake ones do not do
OPAQUE = (DataDependentOutputException, DynamicOutputShapeException)
LAYERS: Mapping[Any, Callable[[torch.Tensor], int]] = {
    torch.nn.functional.linear: lambda weight: weight.shape[-1],
    torch.nn.functional.layer_norm: lambda weight: weight.shape[-1],
    torch.conv1d: lambda weight: weight.shape[1],
    torch.conv2d: lambda weight: weight.shape[1],
    torch.conv3d: lambda weight: weight.shape[1],
    torch.conv_transpose1d: lambda weight: weight.shape[0],
    torch.conv_transpose2d: lambda weight: weight.shape[0],
    torch.conv_transpose3d: lambda weight: weight.shape[0],
}


@dataclass(frozen=True)
class Failure:
    """How far a network got, and what stopped it."""

    error: Exception
    progress: tuple[int, ...]  # calls of torch's functions until then, forward's line, the type
    shapes: tuple[tuple[int, ...], ...]  # of the tensors that this one was given
    wanted: int | None  # the width that the layer takes, if it is one
    conv: bool  # whether that is a convolution
    lines: tuple[str, ...]  # statements of the network's source that led there, innermost first

    @property
    def reason(self) -> str:
        """The first line of what torch said."""
        text = next((line for line in str(self.error).splitlines() if line.strip()), "no message")
        return f"{type(self.error).__name__}: {text[:300]}"


class _Watch(TorchFunctionMode):
    """Counts torch's functions, and keeps the tensors of the first that fails."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.failed: tuple[Any, tuple[torch.Tensor, ...]] | None = None

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.calls += 1
        try:
            return function(*args, **(kwargs or {}))
        except Exception:
            if self.failed is None:
                leaves = pytree.tree_leaves((args, kwargs or {}))
                tensors = (each for each in leaves if isinstance(each, torch.Tensor))
                self.failed = function, tuple(tensors)
            raise


def trial(model: nn.Module) -> Callable[[Mapping[str, Any]], Failure | None]:
    """What says why forward does not take inputs, or None; on fake tensors, without weights.

    A network that reads its tensors' values is tried on real numbers, if it is small.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    copied = weightless(model, mode).eval()
    before = kept(copied)

    def run(inputs: Mapping[str, Any]) -> Failure | None:
        watch = _Watch()
        try:
            with mode, torch.no_grad(), _silent():
                fakes = pytree.tree_map_only(
                    torch.Tensor, lambda each: mode.from_tensor(each).to(device), dict(inputs)
                )
                with watch:
                    copied(**fakes)
        except OPAQUE:
            return real_trial(model, inputs)
        except Exception as error:
            restore(before)
            return failure(error, watch)
        return real_trial(model, inputs) if indexing(inputs) else None

    return run


def indexing(inputs: Mapping[str, Any]) -> bool:
    """Whether some inputs are indices: that a table ends before them shows on real numbers only."""
    others = {name: value for name, value in inputs.items() if not is_time(name)}
    return any(torch.is_tensor(each) and each.dim() and each.dtype in (torch.int64, torch.bool)
               for each in pytree.tree_leaves(others))  # fmt: skip


def real_trial(model: nn.Module, inputs: Mapping[str, Any]) -> Failure | None:
    """The same with the network's own weights; None where it has none, or too many to try."""
    count = sum(each.numel() for each in model.parameters())
    if model.training or count > REAL or any(each.is_meta for each in model.parameters()):
        return None  # capture tells where
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    given = pytree.tree_map_only(torch.Tensor, lambda each: each.clone().to(device), dict(inputs))
    watch = _Watch()
    try:
        with torch.no_grad(), watch:
            model(**given)
    except Exception as error:
        return failure(error, watch)
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """Without torch's own account of calls that fail: here they are meant to."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def weightless(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the network whose parameters and buffers are fake; no value is copied.

    So is what a module has computed of them and keeps, as weight_norm does.
    """
    kept = [each for module in model.modules() for each in vars(module).values()
            if isinstance(each, torch.Tensor)]  # fmt: skip
    tensors = (*model.parameters(), *model.buffers(), *kept)
    return copy.deepcopy(model, {id(each): mode.from_tensor(each) for each in tensors})


def kept(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """What the modules hold, as it is before a call."""
    return [(module, _copied(vars(module))) for module in model.modules()]


def restore(before: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    """Let the modules hold what they held: a call that fails leaves its caches behind."""
    for module, values in before:
        vars(module).clear()
        vars(module).update(_copied(values))


def _copied(values: Mapping[str, Any]) -> dict[str, Any]:
    plain = (dict, list, set, OrderedDict)
    return {name: each.copy() if type(each) in plain else each for name, each in values.items()}


def failure(error: Exception, watch: _Watch) -> Failure:
    """What a trial tells about an error."""
    function, tensors = watch.failed or (None, ())
    shapes = tuple(tuple(int(size) for size in each.shape) for each in tensors)
    wanted = LAYERS[function](tensors[1]) if function in LAYERS and len(tensors) > 1 else None
    conv = "conv" in getattr(function, "__name__", "")
    progress = watch.calls, line_of_forward(error), not isinstance(error, TypeError)
    return Failure(error, progress, shapes, wanted, conv, statements(error))


def line_of_forward(error: Exception) -> int:
    """The line that the network's own forward had come to."""
    frames = traceback.extract_tb(error.__traceback__)
    own = (each.lineno for each in frames if each.name == "forward" and not is_torch(each))
    return next(own, 0) or 0


def is_torch(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is of torch itself."""
    return "/torch/" in frame.filename.replace("\\", "/")


def statements(error: Exception) -> tuple[str, ...]:
    """The source's statements that led to an error, innermost first, torch's own left out."""
    found = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if is_torch(frame) or frame.lineno is None:
            continue
        last = frame.end_lineno or frame.lineno
        lines = (linecache.getline(frame.filename, n) for n in range(frame.lineno, last + 1))
        found.append(" ".join(line.strip() for line in lines))
    return tuple(found)
