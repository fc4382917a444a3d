"""Example inputs put right by trial: what the first layer that fails wants is what it is given.

A trial runs the network on fake tensors and tells how many calls it got through. What is proposed
in place of an input follows from the shapes of the call that failed and from the names in the
source lines that led there; a proposal is kept if the network gets further with it.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from effuse.example_network import FRAMES, Network
from effuse.example_rows import control, guess_row, guessed, is_time
from effuse.example_shapes import (
    SAMPLES,
    Inputs,
    alone,
    counted,
    leaves,
    lengthened,
    patched,
    placed,
    repeated,
    reshaped,
    resized,
    rows,
    several,
)
from effuse.example_trial import Failure
from effuse.roles import LATENT_NAMES

TRIALS = 100  # at most, for one network
LARGEST = 1 << 24  # elements of an input that is tried in another's place


def repaired(
    run: Callable[[Mapping[str, Any]], Failure | None], net: Network, inputs: Inputs,
    trials: int = TRIALS,
) -> tuple[Inputs, Failure | None]:  # fmt: skip
    """The inputs with which the network runs, or gets furthest, and what stops it then."""
    failed, left = run(inputs), trials
    if failed is not None:
        failed = run(inputs)  # again: what a network keeps from its first call is no progress
    while failed is not None:
        for proposal in itertools.islice(proposals(failed, net, inputs), left):
            left -= 1
            again = run(proposal)
            if again is None or again.progress > failed.progress:
                inputs, failed = proposal, again and run(proposal)
                break
        else:
            break
    return inputs, failed


RANKS = re.compile(r"unpack|[Ee]xpected \dD|out of range|too many indices")
UNKNOWN_NUMBER = re.compile(r"'NoneType' and '(int|float)'|'(int|float)' and 'NoneType'")
SIZES_TOLD = 12  # proposals of sizes at most, for one failure


def proposals(failed: Failure, net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """Inputs that may fare better, likely ones first."""
    names = blamed(failed, net, inputs)
    yield from widths(failed, names, inputs)
    if failed.wanted and not failed.conv:
        yield from patched(failed.wanted, failed.shapes[0][-1], names, inputs)
    yield from integers(failed, names, inputs)
    if isinstance(failed.error, IndexError):
        yield from longer(names, inputs)
    timed = any(map(is_time, words_of(failed, 3)))
    if timed:
        yield from times(net, inputs)
    told = RANKS.search(str(failed.error)) is not None
    if told:
        for proposal in ranks(names[:2], net, inputs):
            yield proposal
            yield from widened(failed, names[:2], proposal)
    defaults = {name: each.default for name, each in net.parameters.items()}
    yield from several(str(failed.error), words_of(failed), defaults, inputs)
    yield from steered(inputs)
    yield from additions(failed, net, inputs)
    if not timed:
        yield from times(net, inputs)
    yield from alone(str(failed.error), net.batch, inputs)
    yield from counted(str(failed.error), names, inputs)
    yield from repeated(failed.shapes, net.batch, names, inputs)
    yield from removals(failed, net, inputs)
    yield from lengthened(names, inputs)
    yield from rows(failed.shapes, names, inputs)
    if unequal(failed) and torch.is_tensor(inputs[names[0]]):  # a list holds samples of any size
        yield from ranks(names[:1], net, inputs)
    yield from itertools.islice(sizes(failed, names, inputs), SIZES_TOLD)
    yield from ranks(names[2:] if told else names, net, inputs)


def unequal(failed: Failure) -> bool:
    """Whether what does not fit each other has other numbers of axes."""
    return failed.wanted is None and len({len(shape) for shape in failed.shapes if shape}) > 1


def widened(failed: Failure, names: list[str], inputs: Inputs) -> Iterator[Inputs]:
    """With the channels that a convolution wants, where it was given another rank as well."""
    for name in names if failed.conv and failed.wanted else ():
        for path, leaf in leaves(inputs, name):
            if leaf.dim() > 3 and leaf.shape[1] != failed.wanted:
                yield placed(inputs, path, resized(leaf, 1, failed.wanted or 0))


def widths(failed: Failure, names: list[str], inputs: Inputs) -> Iterator[Inputs]:
    """The width that a layer wants, for what is as wide as that which it was given."""
    if failed.wanted is None or not failed.shapes:
        return
    shape = failed.shapes[0]
    given = shape[1] if failed.conv and len(shape) > 2 else shape[-1:]
    surplus = (given if isinstance(given, int) else sum(given)) - failed.wanted
    if not failed.conv:
        yield from channels_last(failed.wanted, failed.wanted + surplus, names, inputs)
    for exact in (True, False):  # or what is concatenated before the layer is too wide
        for name in names:
            for path, leaf in leaves(inputs, name):
                for axis in range(leaf.dim() - 1, 0, -1):
                    size = leaf.shape[axis]
                    same = size == failed.wanted + surplus
                    likely = same if exact else axis == channel_axis(leaf) and not same
                    if surplus and size > surplus and likely:
                        yield placed(inputs, path, resized(leaf, axis, size - surplus))
    for name in names:  # or it is multiplied before the layer
        for path, leaf in leaves(inputs, name):
            if not leaf.dim():
                continue
            axis = channel_axis(leaf)
            size, rest = divmod(leaf.shape[axis] * failed.wanted, failed.wanted + surplus)
            if surplus and size and not rest:
                yield placed(inputs, path, resized(leaf, axis, size))


def channels_last(wanted: int, given: int, names: list[str], inputs: Inputs) -> Iterator[Inputs]:
    """Pictures and videos whose channels are their last axis, as many as a layer wants."""
    for name in names:
        for path, leaf in leaves(inputs, name):
            if leaf.dim() > 3:
                last = leaf.movedim(1, -1).contiguous()
                size, rest = divmod(leaf.shape[-1] * wanted, given)
                yield placed(inputs, path, last if rest else resized(last, last.dim() - 1, size))


def channel_axis(leaf: torch.Tensor) -> int:
    """Where the channels are: second in a picture, last in a sequence."""
    return 1 if leaf.dim() > 3 else leaf.dim() - 1


def blamed(failed: Failure, net: Network, inputs: Inputs) -> list[str]:
    """The inputs' names, those first that the statements speak of, from the innermost outwards."""
    words = words_of(failed)
    return list(dict.fromkeys([*(word for word in words if word in inputs), *inputs]))


def words_of(failed: Failure, count: int | None = None) -> list[str]:
    """The words of the statements that led to a failure, of the innermost `count` or of all."""
    return [word for line in failed.lines[:count] for word in re.findall(r"\w+", line)]


def times(net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """One timestep, one a sample or one a frame, as numbers or indices."""
    names = [name for name, value in inputs.items() if is_time(name) and torch.is_tensor(value)]
    own = (inputs[name].dtype for name in names)
    videos = (each for each in inputs.values() if torch.is_tensor(each) and each.dim() == 5)
    frames = dict.fromkeys((FRAMES, *(size for each in videos for size in each.shape[1:3])))
    shapes = ((), (net.batch,), *((net.batch, count) for count in frames))
    for dtype in dict.fromkeys((*own, torch.float32, torch.int64)):
        for shape in shapes:
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
                    signed = leaf.dtype is not torch.bool
                    value = leaf > 0 if dtype is torch.bool else leaf.abs() if signed else leaf
                    yield placed(inputs, path, value.to(dtype))


def additions(failed: Failure, net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """One more argument, of those that the statements speak of; numbers where one is missed."""
    absent = [name for name in dict.fromkeys(words_of(failed))
              if name in net.parameters and name not in inputs]  # fmt: skip
    values = {name: guessed(net, name, missed=True) for name in absent}
    if UNKNOWN_NUMBER.search(str(failed.error)):
        absent.sort(key=lambda name: not isinstance(values[name], (int, float)))
    for name in absent:
        if values[name] is not None:
            yield inputs | {name: values[name]}


def steered(inputs: Inputs) -> Iterator[Inputs]:
    """What steers in the latent's own shape, for one network or for a list of one."""
    latents = (each for name, each in inputs.items() if name in LATENT_NAMES)
    latent = next((each for each in latents if torch.is_tensor(each)), None)
    for name, value in inputs.items():
        if latent is not None and guess_row(name) is control:
            if torch.is_tensor(value) and value.shape != latent.shape:
                yield inputs | {name: latent.clone()}
            yield inputs | {name: [latent.clone()]}


def longer(names: list[str], inputs: Inputs) -> Iterator[Inputs]:
    """One more tensor in a list: layers take theirs by number."""
    for name in names:
        value = inputs[name]
        if isinstance(value, list) and value and all(map(torch.is_tensor, value)):
            yield inputs | {name: [*value, value[-1]]}


def removals(failed: Failure, net: Network, inputs: Inputs) -> Iterator[Inputs]:
    """Without an argument that forward has a default for, of those that the statements speak of."""
    for name in dict.fromkeys(words_of(failed)):
        if name in inputs and net.parameters[name].default is not inspect.Parameter.empty:
            yield {other: value for other, value in inputs.items() if other != name}


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
                        large = leaf.numel() // max(leaf.shape[axis], 1) * size > LARGEST
                        if size not in (1, leaf.shape[axis]) and not large:
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
            yield inputs | {name: [value] * len(value)}
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
        yield (shape[0], shape[2], shape[1])
        yield (shape[0], shape[2], *net.sides)
        yield (shape[0], 1, *shape[1:])
        yield (net.batch, *shape)
        yield (shape[0], SAMPLES)
    elif len(shape) == 4:
        yield (*shape[:2], FRAMES, *shape[2:])
        yield (*batch, FRAMES, *shape[1:])
        yield (*batch, shape[2] * shape[3], shape[1])
        yield (*batch, shape[1], shape[2] * shape[3])
        yield (*batch, *shape[2:])
    elif len(shape) == 5:
        yield (*batch, *shape[1:2], *shape[3:])
        yield (*shape[:2], 1, *shape[3:])
        yield (*batch, shape[2], shape[1], *shape[3:])
        yield (*batch, *shape[2:], shape[1])
        yield (*batch, shape[2] * shape[3] * shape[4], shape[1])
        yield (*batch, shape[1], shape[2] * shape[3] * shape[4])
