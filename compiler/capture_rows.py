"""Rows of a tensor that are chosen by data, computed with as all rows and which of them count.

`x[start:end]` with ends that follow from a tensor's values has a size that no graph can hold. What
is computed row by row can be computed for all rows, and those that were not chosen left out where
the rows come together again: a sum adds 0 for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

Tensor = torch.Tensor
Function = Callable[..., Any]

# What adds rows to those of another tensor: (into, dim, index, source).
SUMS = ("scatter_reduce", "scatter_reduce_", "scatter_add", "scatter_add_", "index_add",
        "index_add_")  # fmt: skip
SAMPLES = (4, 11)  # rows that an operator is tried on
MANY = 1_000_003  # rows that its sizes are looked at with: cuts up to fewer are seen
CLOSE = 1e-6  # of a row alone and among others: products of other sizes round otherwise


class UnsupportedError(Exception):
    """Something that cannot be computed with chosen rows, or that only looks as if it could."""


@dataclass(eq=False)
class Memory:
    """What several chosen rows may lie in, how often it was written into, and whether it may be."""

    locked: bool = False
    writes: int = 0


@dataclass(eq=False)
class Rows:
    """The rows `base[rows]` where `valid`; no tensor, so that nothing is computed unnoticed."""

    base: Tensor
    valid: Tensor
    rows: Tensor | None = None
    memory: Memory = field(default_factory=Memory)

    def __post_init__(self) -> None:
        self._seen = self._versions()

    def _versions(self) -> tuple[int, int]:
        return self.base._version, self.memory.writes

    def __getattr__(self, name: str) -> Any:
        if name in ("dtype", "device", "is_cuda", "layout", "requires_grad"):
            return getattr(self.base, name)
        if name in ("shape", "ndim") or name.startswith("__"):
            raise UnsupportedError(f"the number of the chosen rows is asked for ({name})")
        method = getattr(Tensor, name)
        if not callable(method):
            raise UnsupportedError(f"a property of the chosen rows is asked for ({name})")
        return partial(computed, method, self)

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return computed(function, *args, **(kwargs or {}))

    def __bool__(self) -> bool:
        raise UnsupportedError("whether chosen rows are true is asked for")

    def dim(self) -> int:
        """The number of dimensions."""
        return self.base.dim()

    def size(self, axis: int) -> int:
        """A size, but that of the rows."""
        if axis in (0, -self.base.dim()):
            raise UnsupportedError("the number of the chosen rows is asked for")
        return self.base.shape[axis]

    def fresh(self) -> Tensor:
        """What rows are chosen of, if it is what it was when they were."""
        if self._seen != self._versions():
            raise UnsupportedError("what rows are chosen of is written into")
        return self.base

    def dense(self) -> Tensor:
        """All rows, those that were not chosen too."""
        return self.fresh() if self.rows is None else self.fresh()[self.rows]

    def write(self, other: Rows) -> None:
        """Have another's values; what else lies in the same memory is not read any more."""
        if self.memory.locked:
            raise UnsupportedError("what rows are cut of is written into with them")
        self.memory.writes += 1
        self.base, self.rows = other.base, other.rows
        self._seen = self._versions()

    def only(self) -> Tensor:
        """All rows, with 0 for those that were not chosen."""
        every = self.dense()
        valid = self.valid.view(-1, *(1 for _ in range(every.dim() - 1)))
        return torch.where(valid, every, torch.zeros_like(every))


def _operator(name: str) -> Function:
    def call(self: Any, *others: Any) -> Any:
        return computed(getattr(Tensor, name), self, *others)

    return call


def _updating(name: str) -> Function:
    def call(self: Any, other: Any) -> Any:
        return updated(getattr(Tensor, name), (self, other), {})

    return call


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv",
              "mod", "pow", "neg", "matmul", "getitem", "lt", "le", "gt", "ge", "and",
              "or", "invert", "eq", "ne"):  # fmt: skip
    setattr(Rows, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or"):
    setattr(Rows, f"__i{_name}__", _updating(f"__{_name}__"))


def computed(function: Function, *args: Any, **kwargs: Any) -> Any:
    """A call some of whose arguments are chosen rows.

    Raises:
        UnsupportedError: it needs to know how many rows there are, or mixes them.
    """
    name = function.__name__
    if name in SUMS:
        return summed(function, args, kwargs)
    if name in ("__getitem__", "index_select") and not isinstance(args[0], Rows):
        return gathered(name, args)
    if name.endswith("_") and not name.endswith("__"):
        return updated(getattr(Tensor, name[:-1]), args, kwargs)
    return row_by_row(function, args, kwargs)


def summed(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Rows added to those of a tensor, 0 for those that were not chosen."""
    whole = len(args) > 3 and args[1] == 0 and isinstance(args[0], Tensor)
    pair = args[2:4]
    if not whole or not all(isinstance(each, Rows) and each.valid is pair[0].valid
                            for each in pair):  # fmt: skip
        raise UnsupportedError(f"{function.__name__} of chosen rows and of others")
    (reduce,) = args[4:] or (kwargs.get("reduce", "sum"),)
    if (reduce, kwargs.get("include_self", True)) != ("sum", True):
        raise UnsupportedError(f"{function.__name__} of chosen rows is no sum")
    return function(args[0], 0, pair[0].only(), pair[1].only(), *args[4:], **kwargs)  # type: ignore[no-any-return]


def gathered(name: str, args: tuple[Any, ...]) -> Rows:
    """table[rows]; what is computed of it row by row can be computed before it is gathered."""
    table, index = args[0], args[-1]
    plain = name == "__getitem__" or args[1] == 0
    if not plain or not isinstance(index, Rows) or index.dim() != 1 or index.dtype is torch.bool:
        raise UnsupportedError(f"{name} with chosen rows and more")
    places = index.only()
    if sizes(table)[0] > sizes(places)[0]:  # fewer rows are computed with when they are gathered
        return Rows(table[places], index.valid)
    return Rows(table, index.valid, places)


def updated(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rows:
    """Chosen rows written into."""
    target = args[0]
    if not isinstance(target, Rows):
        raise UnsupportedError("chosen rows are written into a tensor")
    result = row_by_row(function, args, kwargs)
    if result.dtype is not target.dtype or result.base.shape[1:] != target.base.shape[1:]:
        raise UnsupportedError("chosen rows are written into in another dtype or size")
    target.write(result)
    return target


def row_by_row(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call that computes each row of its own: of all rows."""
    found = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Rows)]
    first = found[0]
    if any(each.valid is not first.valid for each in found):
        raise UnsupportedError(f"{function.__name__} of rows that were chosen otherwise")
    check_row_by_row(function, args, kwargs)
    alike = all(each.rows is first.rows for each in found)
    values = [each.fresh() if alike else each.dense() for each in found]
    taken = dict(zip(map(id, found), values, strict=True))
    plain = partial(pytree.tree_map_only, Rows, lambda each: taken[id(each)])
    result = function(*plain(args), **plain(kwargs))
    rows = first.rows if alike else None

    def wrapped(each: Tensor) -> Rows:
        own = (one.memory for one, value in zip(found, values, strict=True) if alias(each, value))
        return Rows(each, first.valid, rows, next(own, None) or Memory())

    return pytree.tree_map(wrapped, result)


def alias(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors lie in the same memory."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


@dataclass(frozen=True)
class Given:
    """One thing that a call is given: a tensor of some shape, or anything else as it is."""

    kind: str
    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    value: Any = field(default=None, compare=False)

    def sample(self, generator: torch.Generator) -> Any:
        """Random numbers in a tensor's place."""
        if self.dtype is None:
            return self.value
        if self.dtype.is_floating_point:
            return torch.randn(self.shape, dtype=torch.float64, generator=generator)
        low = int(self.dtype is not torch.bool)  # no division by 0
        return torch.randint(low, low + 2, self.shape, generator=generator).to(self.dtype)

    def empty(self) -> Any:
        """A tensor in a tensor's place, with very many rows."""
        if self.dtype is None:
            return self.value
        shape = (MANY, *self.shape[1:]) if self.kind == "rows" else self.shape
        return torch.empty(shape, dtype=self.dtype)


def described(leaf: Any) -> Given:
    """A leaf of a call's arguments; chosen rows as few of them."""
    if isinstance(leaf, Rows):
        return Given("rows", (max(SAMPLES), *sizes(leaf.base)[1:]), leaf.base.dtype)
    if isinstance(leaf, Tensor):
        return Given("tensor", sizes(leaf), leaf.dtype)
    return Given(repr(leaf), value=leaf)


def sizes(tensor: Tensor) -> tuple[int, ...]:
    """The shape, of open sizes that of the example: none is fixed by looking."""
    return tuple(size if isinstance(size, int) else size.node.hint for size in tensor.shape)


def check_row_by_row(function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Try a call on a few random rows, once for all calls that are alike.

    Raises:
        UnsupportedError: a row of what it gives depends on other rows.
    """
    leaves, spec = pytree.tree_flatten((args, kwargs))
    given = tuple(map(described, leaves))
    tried(function, spec, given)
    sized(function, spec, given)


@lru_cache(maxsize=256)
def tried(function: Function, spec: Any, leaves: tuple[Given, ...]) -> None:
    """A call on samples gives the same for some rows as for these among all."""
    with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        given = [leaf.sample(generator) for leaf in leaves]

        def run(chosen: list[int]) -> list[Any]:
            taken = [each[chosen] if leaf.kind == "rows" else each
                     for leaf, each in zip(leaves, given, strict=True)]  # fmt: skip
            return call(function, spec, taken)

        for every in (list(range(count)) for count in SAMPLES):
            for chosen in (every[1::2], every[::-1], [2]):
                alike = partial(same_rows, chosen, len(every))
                if not all(map(alike, run(every), run(chosen))):
                    raise UnsupportedError(f"{function.__name__} mixes the chosen rows")


@lru_cache(maxsize=256)
def sized(function: Function, spec: Any, leaves: tuple[Given, ...]) -> None:
    """A call gives as many rows as it gets, also where these are very many."""
    with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
        given = [leaf.empty() for leaf in leaves]
        for each in call(function, spec, given):
            if not torch.is_tensor(each) or each.shape[:1] != (MANY,):
                raise UnsupportedError(f"{function.__name__} gives another number of rows")


def call(function: Function, spec: Any, leaves: list[Any]) -> list[Any]:
    """What a call gives, in one list."""
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    try:
        return pytree.tree_leaves(function(*args, **kwargs))
    except Exception as error:
        reason = f"{function.__name__} of chosen rows: {error}"
        raise UnsupportedError(reason) from error


def same_rows(chosen: list[int], count: int, every: Any, some: Any) -> bool:
    """Whether these rows among all are the same as alone."""
    if not torch.is_tensor(every) or every.shape[:1] != (count,):
        return False
    one, other = every[chosen], some
    if one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=CLOSE, atol=CLOSE, equal_nan=True)
