"""Inputs with one tensor in another shape, and the shapes that a failed call asks for."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

Inputs = dict[str, Any]
SAMPLES = 4096  # of a signal
SINGLE = re.compile(r"'(int|float|bool)' object is not iterable")
MISCOUNTED = re.compile(r"shape '\[([\d, ]+)\]' is invalid for input of size (\d+)")


def counted(message: str, names: Sequence[str], inputs: Inputs) -> Iterator[Inputs]:
    """The size of an axis with which there are as many elements as a reshape wants."""
    told = MISCOUNTED.search(message)
    if told is None:
        return
    wanted, given = math.prod(map(int, told[1].split(","))), int(told[2])
    for name in names:
        for path, leaf in leaves(inputs, name):
            for axis in range(leaf.dim() - 1, 0, -1):
                size, rest = divmod(leaf.shape[axis] * wanted, given)
                if size and not rest:
                    yield placed(inputs, path, resized(leaf, axis, size))


def patched(wanted: int, given: int, names: Sequence[str], inputs: Inputs) -> Iterator[Inputs]:
    """The channels of pictures, where a layer was given patches of them of another width."""
    for name in names:
        for path, leaf in leaves(inputs, name):
            axis = 1 if len(path) == 1 else 0  # a list holds samples
            channels = leaf.shape[axis] if leaf.dim() > axis + 2 else 0
            if channels and given % channels == 0 and given != wanted:
                size, rest = divmod(channels * wanted, given)
                if size and not rest:
                    yield placed(inputs, path, resized(leaf, axis, size))


def repeated(
    shapes: Sequence[tuple[int, ...]], batch: int, names: Sequence[str], inputs: Inputs
) -> Iterator[Inputs]:
    """A prompt for every frame, where a call was given frames in place of samples."""
    rows = dict.fromkeys(shape[0] for shape in shapes if shape)
    times = [count // batch for count in rows if count > batch and count % batch == 0]
    for name in names:
        for path, leaf in leaves(inputs, name):
            if leaf.dim() == 3 and leaf.shape[0] == batch:
                for count in times:
                    yield placed(inputs, path, leaf.repeat_interleave(count, 0))


def lengthened(names: Sequence[str], inputs: Inputs) -> Iterator[Inputs]:
    """Signals of more samples, in one channel or in all, and videos of one frame more.

    Networks halve a signal again and again, and take a first frame apart from all others.
    """
    for name in names:
        for path, leaf in leaves(inputs, name):
            if leaf.dim() == 5:
                yield placed(inputs, path, resized(leaf, 2, leaf.shape[2] + 1))
            if leaf.dim() == 3 and leaf.shape[-1] < SAMPLES:
                longer = resized(leaf, 2, SAMPLES)
                yield placed(inputs, path, longer)
                yield placed(inputs, path, longer[:, :1].clone())


def rows(
    shapes: Sequence[tuple[int, ...]], names: Sequence[str], inputs: Inputs
) -> Iterator[Inputs]:
    """A row of indices for each token, where a table that they made has others than there are."""
    pairs = itertools.permutations(shapes[:2], 2)
    apart = [(mine, other) for one, two in pairs for mine, other in zip(one, two, strict=False)
             if mine != other and 1 not in (mine, other)]  # fmt: skip
    for name in names:
        for path, leaf in leaves(inputs, name):
            indexed = leaf.dim() == 2 and leaf.dtype == torch.int64
            for mine, other in apart if indexed else ():
                if leaf.shape[0] == mine and leaf.shape[1] != mine:
                    yield placed(inputs, path, resized(leaf, 0, other))


def alone(message: str, batch: int, inputs: Inputs) -> Iterator[Inputs]:
    """One sample, where a reshape is given each sample's elements once for every sample."""
    told = MISCOUNTED.search(message)

    def first(leaf: Any) -> Any:
        batched = isinstance(leaf, torch.Tensor) and leaf.dim() and leaf.shape[0] == batch
        return leaf[:1].clone() if batched else leaf

    if told and batch > 1 and int(told[2]) == batch * math.prod(map(int, told[1].split(","))):
        yield pytree.tree_map(first, inputs)


def several(
    message: str, words: Iterable[str], defaults: Mapping[str, Any], inputs: Inputs
) -> Iterator[Inputs]:
    """A list of one number, where a single one that the statements speak of is gone through."""
    told = SINGLE.search(message)
    for name in dict.fromkeys(words) if told else ():
        value = inputs.get(name, defaults.get(name))
        if type(value) in (int, float, bool) and type(value).__name__ == told[1]:  # type: ignore[index]
            yield inputs | {name: [value]}


def leaves(inputs: Inputs, name: str) -> list[tuple[Any, torch.Tensor]]:
    """The tensors of an argument, with their paths."""
    found = pytree.tree_flatten_with_path({name: inputs[name]})[0]
    return [(path, leaf) for path, leaf in found if isinstance(leaf, torch.Tensor)]


def placed(inputs: Inputs, path: Any, value: torch.Tensor) -> Inputs:
    """The inputs with another tensor in one place; of a list of equals, in all of them."""
    name = path[0].key
    old = next(leaf for where, leaf in leaves(inputs, name) if where == path)
    alike = isinstance(inputs[name], (list, tuple))

    def change(where: Any, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        same = where == path or (alike and leaf.shape == old.shape)
        return value.clone() if same else leaf

    changed: Inputs = pytree.tree_map_with_path(change, {name: inputs[name]})
    return inputs | changed


def resized(value: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """A tensor with another size of an axis: cut off, or repeated."""
    return value.index_select(axis, torch.arange(size) % max(value.shape[axis], 1))


def reshaped(value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The values over another shape: cut off, or repeated."""
    count = torch.Size(shape).numel()
    return value.flatten()[torch.arange(count) % max(value.numel(), 1)].reshape(shape)
