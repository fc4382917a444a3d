"""Example inputs put right by trial: what the first layer that fails wants is what it is given.

A trial runs the network on fake tensors and tells how many calls it got through. What is proposed
in place of an input follows from the shapes of the call that failed and from the names in the
source lines that led there; a proposal is kept if the network gets further with it.
"""

from __future__ import annotations

import copy
import itertools
import linecache
import logging
import math
import re
import traceback
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

from effuse.example_rows import FRAMES, Network, guessed, is_time
from effuse.example_shapes import Inputs, counted, leaves, placed, repeated, reshaped, resized

TRIALS = 100  # at most, for one network
LARGEST = 1 << 24  # elements of an input that is tried in another's place
OPAQUE = (DataDependentOutputException, DynamicOutputShapeException)
LAYERS: Mapping[Any, Callable[[torch.Tensor], int]] = {
    torch.nn.functional.linear: lambda weight: weight.shape[-1],
    torch.nn.functional.layer_norm: lambda weight: weight.shape[-1],
    torch.conv1d: lambda weight: weight.shape[1],
    torch.conv2d: lambda weight: weight.shape[1],
    torch.conv3d: lambda weight: weight.shape[1],
}


@dataclass(frozen=True)
class Failure:
    """How far a network got, and what stopped it."""

    error: Exception
    progress: tuple[int, int]  # calls of torch's functions until then, and the line of forward
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
    """What says why forward does not take inputs, or None; on fake tensors, without weights."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    copied = weightless(model, mode).eval()

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
            return None  # not a matter of the inputs: capture tells where
        except Exception as error:
            return failure(error, watch)
        return None

    return run


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
    """A copy of the network whose parameters and buffers are fake; no value is copied."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(each): mode.from_tensor(each) for each in tensors})


def failure(error: Exception, watch: _Watch) -> Failure:
    """What a trial tells about an error."""
    function, tensors = watch.failed or (None, ())
    shapes = tuple(tuple(int(size) for size in each.shape) for each in tensors)
    wanted = LAYERS[function](tensors[1]) if function in LAYERS and len(tensors) > 1 else None
    conv = "conv" in getattr(function, "__name__", "")
    progress = watch.calls, line_of_forward(error)
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


def repaired(
    run: Callable[[Mapping[str, Any]], Failure | None], net: Network, inputs: Inputs,
    trials: int = TRIALS,
) -> tuple[Inputs, Failure | None]:  # fmt: skip
    """The inputs with which the network runs, or gets furthest, and what stops it then."""
    failed, left = run(inputs), trials
    while failed is not None:
        for proposal in itertools.islice(proposals(failed, net, inputs), left):
            left -= 1
            again = run(proposal)
            if again is None or again.progress > failed.progress:
                inputs, failed = proposal, again
                break
        else:
            break
    return inputs, failed


RANKS = re.compile(r"unpack|[Ee]xpected \dD|out of range|too many indices")
SIZES_TOLD = 12  # proposals of sizes at most, for one failure


def proposals(failed: Failure, net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """Inputs that may fare better, likely ones first."""
    names = blamed(failed, net, inputs)
    yield from widths(failed, names, inputs)
    yield from integers(failed, names, inputs)
    timed = any(is_time(word) for line in failed.lines[:3] for word in re.findall(r"\w+", line))
    if timed:
        yield from times(net, inputs)
    told = RANKS.search(str(failed.error)) is not None
    if told:
        yield from ranks(names[:2], net, inputs)
    yield from additions(failed, net, inputs)
    if not timed:
        yield from times(net, inputs)
    yield from counted(str(failed.error), names, inputs)
    yield from repeated(failed.shapes, net.batch, names, inputs)
    yield from itertools.islice(sizes(failed, names, inputs), SIZES_TOLD)
    yield from ranks(names[2:] if told else names, net, inputs)


def widths(failed: Failure, names: list[str], inputs: Inputs) -> Iterator[Inputs]:
    """The width that a layer wants, for what is as wide as that which it was given."""
    if failed.wanted is None or not failed.shapes:
        return
    shape = failed.shapes[0]
    given = shape[1] if failed.conv and len(shape) > 2 else shape[-1:]
    surplus = (given if isinstance(given, int) else sum(given)) - failed.wanted
    for exact in (True, False):  # or what is concatenated before the layer is too wide
        for name in names:
            for path, leaf in leaves(inputs, name):
                for axis in range(leaf.dim() - 1, 0, -1):
                    size = leaf.shape[axis]
                    same = size == failed.wanted + surplus
                    likely = same if exact else axis == channel_axis(leaf) and not same
                    if surplus and size > surplus and likely:
                        yield placed(inputs, path, resized(leaf, axis, size - surplus))


def channel_axis(leaf: torch.Tensor) -> int:
    """Where the channels are: second in a picture, last in a sequence."""
    return 1 if leaf.dim() > 3 else leaf.dim() - 1


def blamed(failed: Failure, net: Network, inputs: Inputs) -> list[str]:
    """The inputs' names, those first that the statements speak of, from the innermost outwards."""
    words = [word for line in failed.lines for word in re.findall(r"\w+", line)]
    return list(dict.fromkeys([*(word for word in words if word in inputs), *inputs]))


def times(net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """One timestep or one a sample, as numbers or indices."""
    names = [name for name, value in inputs.items() if is_time(name) and torch.is_tensor(value)]
    own = (inputs[name].dtype for name in names)
    for dtype in dict.fromkeys((*own, torch.float32, torch.int64)):
        for shape in ((), (net.batch,)):
            changed = {
                name: inputs[name].flatten()[0].to(dtype).expand(shape).clone() for name in names
            }
            if any(not same_type(changed[name], inputs[name]) for name in names):
                yield inputs | changed


def same_type(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors agree in shape and dtype."""
    return one.shape == other.shape and one.dtype == other.dtype


def integers(failed: Failure, names: list[str], inputs: Inputs) -> Iterator[Inputs]:
    """Indices or truth values in place of numbers."""
    text = str(failed.error).lower()
    kinds = {"indices": torch.int64, "long": torch.int64, "integer": torch.int64,
             "bool": torch.bool}  # fmt: skip
    for dtype in dict.fromkeys(kind for word, kind in kinds.items() if word in text):
        for name in names:
            for path, leaf in leaves(inputs, name):
                if leaf.dtype != dtype and not is_time(name):
                    value = (leaf > 0).to(dtype) if dtype is torch.bool else leaf.abs().to(dtype)
                    yield placed(inputs, path, value)


def additions(failed: Failure, net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """One more argument, of those that the statements speak of."""
    words = [word for line in failed.lines for word in re.findall(r"\w+", line)]
    for name in dict.fromkeys(words):
        if name in net.parameters and name not in inputs:
            value = guessed(net, name, missed=True)
            if value is not None:
                yield inputs | {name: value}


def sizes(failed: Failure, names: list[str], inputs: Inputs) -> Iterator[Inputs]:
    """Another size for an axis that is as long as one of the call that failed."""
    told = [int(word) for word in re.findall(r"\d+", str(failed.error)) if 0 < int(word) < 1 << 16]
    known = [size for shape in failed.shapes for size in shape]
    wanted = list(dict.fromkeys([*known, *told]))
    for name in names:
        for path, leaf in leaves(inputs, name):
            for axis in reversed(range(leaf.dim())):
                if leaf.shape[axis] in wanted and axis:
                    for size in wanted:
                        if size not in (1, leaf.shape[axis]):
                            yield placed(inputs, path, resized(leaf, axis, size))


def ranks(names: list[str], net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """Axes more or less: frames, tokens in place of a picture, a list in place of a batch."""
    for name in names:
        for path, leaf in leaves(inputs, name):
            alike = pictures_alike(name, leaf, inputs)
            others = [shapes_like(tuple(inputs[other].shape), net) for other in alike]
            for shape, *theirs in zip(shapes_like(tuple(leaf.shape), net), *others, strict=True):
                if math.prod(shape) > LARGEST:
                    continue
                changed = placed(inputs, path, reshaped(leaf, shape))
                if alike:
                    yield changed | {other: reshaped(inputs[other], own)
                                     for other, own in zip(alike, theirs, strict=True)}  # fmt: skip
                yield changed
        value = inputs[name]
        if torch.is_tensor(value) and value.dim() > 1:
            yield inputs | {name: list(value)}
            yield inputs | {name: [value]}
        elif isinstance(value, list) and value and all(map(torch.is_tensor, value)):
            yield inputs | {name: torch.stack(value)}
            yield inputs | {name: [torch.stack(value)]}


def pictures_alike(name: str, leaf: torch.Tensor, inputs: Inputs) -> list[str]:
    """The other inputs of a tensor's shape, but for channels: they get or lose frames with it."""

    def outline(each: torch.Tensor) -> tuple[int, ...]:
        channels = 1 if each.dim() > 3 else each.dim()
        return tuple(size for axis, size in enumerate(each.shape) if axis != channels)

    return [other for other, each in inputs.items() if other != name and torch.is_tensor(each)
            and leaf.dim() == each.dim() > 2 and outline(each) == outline(leaf)]  # fmt: skip


def shapes_like(shape: tuple[int, ...], net: Network) -> Iterator[tuple[int, ...]]:
    """Shapes of another rank that mean much the same."""
    batch = shape[:1]
    if len(shape) == 0:
        yield (net.batch,)
    elif len(shape) == 1:
        yield ()
        yield (*shape, 1)
    elif len(shape) == 2:
        yield batch
        yield (*batch, net.length, shape[1])
        yield (shape[1],)
    elif len(shape) == 3:
        yield batch
        yield (shape[0], shape[2])
        yield (shape[1], shape[2])
        yield (shape[0], shape[2], *net.sides)
        yield (shape[0], 1, *shape[1:])
    elif len(shape) == 4:
        yield (*shape[:2], FRAMES, *shape[2:])
        yield (*batch, FRAMES, *shape[1:])
        yield (*batch, shape[2] * shape[3], shape[1])
        yield (*batch, shape[1], shape[2] * shape[3])
    elif len(shape) == 5:
        yield (*batch, *shape[1:2], *shape[3:])
        yield (*batch, shape[2], shape[1], *shape[3:])
        yield (*batch, *shape[2:], shape[1])
        yield (*batch, shape[2] * shape[3] * shape[4], shape[1])
        yield (*batch, shape[1], shape[2] * shape[3] * shape[4])
