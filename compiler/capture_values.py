"""Values that forward reads out of tensors, recorded on the examples and repeated while capturing.

`if mask.any():`, `lengths.tolist()`, `x[mask]` and `x[:length]` make numbers, branches and sizes of
a tensor's values, which no graph can hold. Where these follow from inputs that are the same at
every call, the network run on the examples tells them: they become a part of the program, and the
inputs that they were read from static, so that a call with others is refused. What follows from
inputs that change is left open.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from effuse.capture_inputs import Leaf, copied, flatten_inputs

Tensor = torch.Tensor
Function = Callable[..., Any]

# What makes plain Python of a tensor's values: of one, or of all together.
SCALARS: frozenset[Any] = frozenset({
    Tensor.item, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__,
})  # fmt: skip
READS: frozenset[Any] = SCALARS | frozenset({
    Tensor.tolist, Tensor.numpy, torch.equal, Tensor.equal, torch.allclose, Tensor.allclose,
})  # fmt: skip
# What makes a tensor whose size depends on another's values.
SIZED: frozenset[Any] = frozenset({
    torch.nonzero, Tensor.nonzero, torch.unique, Tensor.unique, torch.unique_consecutive,
    Tensor.unique_consecutive, torch.bincount, torch.masked_select, Tensor.masked_select,
    torch.argwhere, Tensor.argwhere,
})  # fmt: skip
OPEN = object()  # in the place of a value that follows from what changes
INDEXED: frozenset[Any] = frozenset({Tensor.__getitem__, Tensor.__setitem__})


def is_read(function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether what a call gives, or its size, has to be known while capturing."""
    if function in READS or function in SIZED:
        return True
    if function in (torch.repeat_interleave, Tensor.repeat_interleave):
        return any(isinstance(each, Tensor) for each in (*args[1:], *kwargs.values()))
    return function is torch.where and len(args) + len(kwargs) == 1


def is_mask(part: Any) -> bool:
    """Whether a part of an index picks elements by truth values."""
    return isinstance(part, Tensor) and part.dtype is torch.bool and part.dim() > 0


def parts_of(function: Function, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call indexes by, axis by axis; nothing if it is no indexing."""
    if function not in INDEXED:
        return ()
    return args[1] if isinstance(args[1], tuple) else (args[1],)


def choosing(function: Function, args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors in an index of whose values a size is made: masks, and the ends of slices."""
    found: list[Tensor] = []
    for part in parts_of(function, args):
        found += [part] if is_mask(part) else []
        found += [end for end in ends(part) if isinstance(end, Tensor)]
    return found


def ends(part: Any) -> tuple[Any, ...]:
    """Where a slice begins and ends, and its step."""
    return (part.start, part.stop, part.step) if isinstance(part, slice) else ()


class Record(TorchFunctionMode):
    """Notes, in their order, the values that are read, and the inputs that these follow from."""

    def __init__(self, leaves: list[Leaf], changing: Collection[str] = ()) -> None:
        super().__init__()
        self.values: list[Any] = []
        self.labels: set[str] = set()
        self._changing = frozenset(changing)
        self._sources: Any = WeakTensorKeyDictionary()
        self._written: dict[Any, frozenset[str]] = {}  # memory that was written into
        for leaf in leaves:
            self._sources[leaf.tensor] = frozenset((leaf.label,))

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        read = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        sources = self._of(read)
        for each in choosing(function, args):
            value = each.nonzero(as_tuple=True) if is_mask(each) else int(each)
            self._note([value], self._of([each]))
        versions = [version(each) for each in read]
        result = function(*args, **kwargs)
        for each, before in zip(read, versions, strict=True):
            if sources and version(each) != before:
                self._write(each, sources)
        if is_read(function, args, kwargs):
            one_by_one = function is Tensor.tolist  # as torch.export asks for a list
            self._note(args[0].flatten().tolist() if one_by_one else [_kept(result)], sources)
        for each in pytree.tree_leaves(result):
            if isinstance(each, Tensor):
                self._sources[each] = sources | self._sources.get(each, frozenset())
        return result

    def _write(self, tensor: Tensor, sources: frozenset[str]) -> None:
        self._sources[tensor] = sources | self._sources.get(tensor, frozenset())
        if (place := memory(tensor)) is not None:
            self._written[place] = sources | self._written.get(place, frozenset())

    def _note(self, values: list[Any], sources: frozenset[str]) -> None:
        if sources & self._changing:
            self.values += [OPEN] * len(values)
        else:
            self.values += values
            self.labels |= sources

    def _of(self, tensors: Any) -> frozenset[str]:
        """What tensors follow from, by how they were made and by what was written into them."""
        found: frozenset[str] = frozenset()
        for each in tensors:
            found |= self._sources.get(each, frozenset())
            if self._written:
                found |= self._written.get(memory(each), frozenset())
        return found


def version(tensor: Tensor) -> object:
    """What is another after a write into the tensor or a view; always, where torch keeps none."""
    return object() if tensor.is_inference() else tensor._version


def memory(tensor: Tensor) -> StorageWeakRef | None:
    """What views of one tensor have in common; nothing for sparse ones and in torch.vmap."""
    try:
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
    except (NotImplementedError, RuntimeError):
        return None


def _kept(result: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda each: each.detach().clone(), result)


class Replay(TorchFunctionMode):
    """Gives the recorded values again, to each call of the network from the first on."""

    def __init__(self, values: list[Any]) -> None:
        super().__init__()
        self._values = values
        self._left: Iterator[Any] = iter(())

    def restart(self, *_: Any) -> None:
        """A call of the network begins."""
        self._left = iter(self._values)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_read(function, args, kwargs):
            return self._read(function, args, kwargs)
        found = [_kept(next(self._left)) for _ in choosing(function, args)]
        if found:
            args = (args[0], _indexed(parts_of(function, args), iter(found)), *args[2:])
        return function(*args, **kwargs)

    def _read(self, function: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        value = next(self._left)
        if value is OPEN:
            return function(*args, **kwargs)
        if function is not Tensor.tolist:
            return _kept(value)
        self._left = chain((value,), self._left)
        return self._nested(tuple(args[0].shape))

    def _nested(self, shape: tuple[int, ...]) -> Any:
        if not shape:
            return next(self._left)
        return [self._nested(shape[1:]) for _ in range(shape[0])]


def _indexed(chosen: tuple[Any, ...], found: Iterator[Any]) -> tuple[Any, ...]:
    """An index with the places of the true elements where truth values were, and plain ends."""
    parts: list[Any] = []
    for part in chosen:
        if isinstance(part, slice):
            parts.append(slice(*(_known(end, found) for end in ends(part))))
        elif is_mask(part):
            places = next(found)
            parts.extend((part,) if places is OPEN else places)
        else:
            parts.append(part)
    return tuple(parts)


def _known(end: Any, found: Iterator[Any]) -> Any:
    """The end of a slice as a number, where it is known."""
    value = next(found) if isinstance(end, Tensor) else end
    return end if value is OPEN else value


def recorded(model: nn.Module, inputs: Mapping[str, Any], changing: Collection[str] = ()) -> Record:
    """What forward reads out of tensors on these inputs, those `changing` left open."""
    given = copied(inputs)
    record = Record(flatten_inputs(given)[0], changing)
    with torch.no_grad(), record:
        model(**given)
    return record


@contextmanager
def replayed(model: nn.Module, values: list[Any]) -> Iterator[None]:
    """Where every call of the network reads the recorded values."""
    replay = Replay(values)
    hook = model.register_forward_pre_hook(replay.restart)
    try:
        with replay:
            yield
    finally:
        hook.remove()
