"""Experts that take the tokens that were routed to them: counted, sorted and cut by counts.

The counts are of a tensor's values, and loops over them ask for numbers. Here they get symbols:
what is cut by these is computed for all rows (capture_rows.py), so that the routing stays in the
graph. A test for an empty cut is answered with no: of no rows nothing comes together.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from effuse.capture_inputs import copied
from effuse.capture_rows import Memory, Rows, UnsupportedError, computed
from effuse.verify import exact_bound, relative_error

Tensor = torch.Tensor
aten = torch.ops.aten

# What chooses places along an axis, as `Forced` can -> its argument that is the axis, and the axis.
PLACES = {"topk": (2, -1), "argmax": (1, None)}
# What gives the same whole numbers again.
SAME = frozenset({
    "view", "reshape", "flatten", "contiguous", "to", "long", "int", "cpu", "detach", "clone",
    "squeeze", "unsqueeze", "transpose", "permute", "t", "__getitem__", "unbind", "chunk",
})  # fmt: skip
COPIES = frozenset({"cpu", "to", "long", "int", "detach", "clone", "contiguous"})


class Count:
    """A number of rows: a sum of how often each value was found, for a symbol of Python's."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, value: Tensor, terms: Mapping[tuple[int, int], int]) -> None:
        self.value, self.terms = value, {key: times for key, times in terms.items() if times}

    def __add__(self, other: Any) -> Any:
        return self._with(other, 1)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self._with(other, -1)

    def __rsub__(self, other: Any) -> Any:
        return -self + other

    def _with(self, other: Any, sign: int) -> Any:
        if isinstance(other, Count):
            terms = dict(self.terms)
            for key, times in other.terms.items():
                terms[key] = terms.get(key, 0) + sign * times
            return Count(self.value + sign * other.value, terms)
        if isinstance(other, int) and other == 0:
            return self
        raise UnsupportedError("other numbers are added to counts of rows")

    def __bool__(self) -> bool:
        return self > 0

    def __gt__(self, other: Any) -> bool:
        """Whether there are more: taken for true where there cannot be fewer."""
        if (self - other).counts():
            return True
        raise UnsupportedError("counts of rows are compared for more than being empty")

    def __lt__(self, other: Any) -> bool:
        return bool(-(self - other) > 0)

    def __neg__(self) -> Count:
        return Count(-self.value, {key: -times for key, times in self.terms.items()})

    def __eq__(self, other: object) -> bool:
        difference = self - other
        if isinstance(difference, Count) and (difference.counts() or (-difference).counts()):
            return False
        raise UnsupportedError("counts of rows are compared for more than being empty")

    def __ne__(self, other: object) -> bool:
        return not self == other

    def counts(self) -> bool:
        """Whether it is a sum of counts, and so no less than 0."""
        return bool(self.terms) and all(times > 0 for times in self.terms.values())

    def __index__(self) -> int:
        raise UnsupportedError("a count of rows is asked for as a number")

    __int__ = __float__ = __index__


class Routing(TorchFunctionMode):
    """Counts of routed rows as symbols, and what is cut by them as all rows."""

    def __init__(self) -> None:
        super().__init__()
        # Each with the version of the tensor it holds for: not after something is written into it.
        self._limits: Any = WeakTensorKeyDictionary()  # whole numbers -> what they are below
        self._counted: Any = WeakTensorKeyDictionary()  # counts -> the terms of each
        self._number = 0
        self._valid: dict[Any, Tensor] = {}

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        leaves = pytree.tree_leaves((args, kwargs))
        if name == "bincount" and len(leaves) < 3:
            return self.bincount(*args, **kwargs)
        if any(isinstance(each, Tensor) and each in self._counted for each in leaves):
            return self.of_counts(function, name, args, kwargs)
        if name == "__getitem__" and cut(args[1]) and isinstance(args[0], Tensor):
            return self.rows(args[0], args[1].start, args[1].stop)
        if any(isinstance(each, Rows) for each in leaves):
            return computed(function, *args, **kwargs)
        result = function(*args, **kwargs)
        self.limit(name, args, kwargs, result)
        return result

    def limit(self, name: str, args: Any, kwargs: Any, result: Any) -> None:
        """Note of whole numbers what they are below."""
        if name in PLACES:
            place, default = PLACES[name]
            axis = kwargs.get("dim", args[place] if len(args) > place else default)
            if axis is not None:
                places = result[1] if isinstance(result, tuple) else result
                self._limits[places] = (args[0].shape[axis], places._version)
        elif name in SAME and isinstance(args[0], Tensor):
            limit = known(self._limits, args[0])
            for each in pytree.tree_leaves(result) if limit else ():
                self._limits[each] = (*limit, each._version)

    def bincount(self, places: Tensor, weights: None = None, minlength: int = 0) -> Tensor:
        """How often each number is found, for all that there can be."""
        limits = known(self._limits, places)
        if not limits or weights is not None:
            raise UnsupportedError("bincount of numbers that may be of any size")
        (limit,) = limits
        self._number += 1
        values = torch.arange(max(limit, minlength), device=places.device)
        found = (places.unsqueeze(1) == values).sum(dim=0)
        terms = [{(self._number, place): 1} for place in range(found.shape[0])]
        self._counted[found] = (terms, minlength >= limit, found._version)
        return found

    def of_counts(self, function: Any, name: str, args: Any, kwargs: Any) -> Any:
        """A call on counts: copies and sums of them, and numbers read of them, are symbols."""
        counts = args[0]
        if not isinstance(counts, Tensor) or counts not in self._counted:
            raise UnsupportedError(f"{name} of counts of rows and of others")
        if not (found := known(self._counted, counts)):
            raise UnsupportedError(f"{name} of counts that were written into")
        terms, whole = found
        if name == "numpy":
            numbers = [Count(each, own) for each, own in zip(counts.unbind(), terms, strict=True)]
            return np.array(numbers, dtype=object)
        if name not in COPIES and name != "cumsum" and not whole:
            raise UnsupportedError(f"{name} of counts, of which eager may have fewer")
        result = function(*args, **kwargs)
        if name in COPIES:
            self._counted[result] = (terms, whole, result._version)
        elif name == "cumsum":
            sums = [dict(each) for each in accumulate(terms, merged)]
            self._counted[result] = (sums, whole, result._version)
        return result

    def rows(self, base: Tensor, start: Any, stop: Any) -> Rows:
        """base[start:stop]."""
        for end in (start, stop):
            if not (end is None or (isinstance(end, int) and end == 0)
                    or (isinstance(end, Count) and end.counts())):  # fmt: skip
                raise UnsupportedError("rows are cut by other numbers than sums of counts")
        key = (str(base.shape[0]), *(key_of(end) for end in (start, stop)))
        if key not in self._valid:
            self._valid[key] = between(base, start, stop)
        return Rows(base, self._valid[key], memory=Memory(locked=True))


def known(table: Any, tensor: Tensor) -> tuple[Any, ...]:
    """What is known of a tensor; nothing if it, or a view of it, was written into since."""
    *found, version = table.get(tensor, (None,))
    return tuple(found) if version == tensor._version else ()


def merged(one: Mapping[Any, int], other: Mapping[Any, int]) -> dict[Any, int]:
    """The terms of a sum."""
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}


def cut(index: Any) -> bool:
    """Whether an index is a slice with the end or the beginning of some count."""
    ends = (index.start, index.stop) if isinstance(index, slice) and index.step is None else ()
    return any(isinstance(end, Count) for end in ends)


def key_of(end: Any) -> Any:
    """What two equal ends have in common."""
    return frozenset(end.terms.items()) if isinstance(end, Count) else end


def between(base: Tensor, start: Any, stop: Any) -> Tensor:
    """Which rows lie from `start` up to `stop`."""
    places = torch.arange(base.shape[0], device=base.device)
    first, last = (end.value if isinstance(end, Count) else end for end in (start, stop))
    after = torch.ones_like(places, dtype=torch.bool) if first is None else places >= first
    return after if last is None else after & (places < last)


class Forced(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Where every choice is of the first expert for all tokens, or of the last."""

    def __init__(self, last: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._last = last

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten.argmax.default and len(args) > 1:
            return self._chosen(result, args[0].shape[args[1]])
        if func is not aten.topk.default:
            return result
        axis = args[2] if len(args) > 2 else -1
        places = self._chosen(result[1], args[0].shape[axis])
        return args[0].gather(axis, places), places

    def _chosen(self, places: Tensor, count: int) -> Tensor:
        return torch.full_like(places, count - 1 if self._last else 0)


def check_routing(model: nn.Module, inputs: Mapping[str, Any], exported: ExportedProgram) -> None:
    """Compare with eager where one expert has all tokens, and the others have none.

    Raises:
        UnsupportedError: it differs, so what is done for no tokens is not nothing.
    """
    for last in (False, True):
        with torch.no_grad(), Forced(last):
            outputs = [pytree.tree_leaves(each(**copied(inputs)))
                       for each in (exported.module(), model)]  # fmt: skip
        found, expected = ([v for v in each if isinstance(v, Tensor)] for each in outputs)
        if not relative_error(found, expected) <= exact_bound(expected[0].dtype):
            raise UnsupportedError("experts without tokens do something nevertheless")
