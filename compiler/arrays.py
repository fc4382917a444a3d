"""How arrays are read and made: a back end's own inside, the caller's kind outside (no torch)."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from effuse.errors import InputError
from effuse.plan import Input, Role


class Arrays(Protocol):
    """How a back end's arrays are read and made."""

    def take(self, value: Any, item: Input) -> Any:
        """`value` as the back end's array in the input's dtype, or an InputError."""

    def give(self, value: Any, like: Any) -> Any:
        """An output in the kind of array that the caller handed in as `like`."""

    def same(self, one: Any, other: Any) -> bool:
        """Whether two arrays hold the same values."""

    def keep(self, value: Any) -> Any:
        """A copy that the caller cannot change."""

    def floats(self, value: Any) -> np.ndarray[Any, Any]:
        """The values as a float32 numpy array."""

    def array(self, value: np.ndarray[Any, Any], dtype: str = "") -> Any:
        """A numpy array as the back end's, in `dtype` if one is named."""

    def where(self, rows: np.ndarray[Any, Any], one: Any, other: Any) -> Any:
        """The rows (axis 0) of `one` where the mask `rows` is true, else those of `other`."""


class NumpyArrays:
    """numpy in the graphs; numpy or torch tensors from the caller, given back in kind."""

    def take(self, value: Any, item: Input) -> Any:
        """`value` as a contiguous numpy array of the input's dtype."""
        detached = value.detach().cpu() if hasattr(value, "detach") else value
        try:
            array = np.asarray(detached)
        except (TypeError, ValueError):  # a tensor of a type that numpy has not, a ragged list
            kind = getattr(value, "dtype", type(value).__name__)
            raise InputError(f"{item.label}: expected {item.dtype}, got {kind}") from None
        wanted = np.dtype(item.dtype)
        if array.dtype != wanted:
            array = _cast(array, wanted, item)
        return np.ascontiguousarray(array).reshape(array.shape)

    def give(self, value: Any, like: Any) -> Any:
        """A torch tensor where the caller handed one in, else the numpy array."""
        if not hasattr(like, "detach"):
            return value
        import torch  # the caller has it: a tensor came in

        return torch.from_numpy(value).to(like.device)

    def same(self, one: Any, other: Any) -> bool:
        """Equal in shape and in every element."""
        return one.shape == other.shape and bool(np.array_equal(one, other))

    def keep(self, value: Any) -> Any:
        """A copy."""
        return value.copy()

    def floats(self, value: Any) -> np.ndarray[Any, Any]:
        """The values in float32."""
        return np.asarray(value, dtype=np.float32)

    def array(self, value: np.ndarray[Any, Any], dtype: str = "") -> Any:
        """The array itself, or a copy in `dtype`."""
        return value.astype(dtype, copy=False) if dtype else value

    def where(self, rows: np.ndarray[Any, Any], one: Any, other: Any) -> Any:
        """Row by row."""
        return np.where(rows.reshape(-1, *[1] * (one.ndim - 1)), one, other)


def real_pairs(array: Any) -> Any:
    """Complex numbers as pairs in a last axis, anything else as it is."""
    if array.dtype.kind != "c":
        return array
    return array.reshape(-1).view(array.real.dtype).reshape(*array.shape, 2)


def _cast(array: Any, wanted: Any, item: Input) -> Any:
    """Timesteps of another number type: to floats by rounding, to integers if nothing is lost."""
    if array.dtype.kind in "biuf" and item.role is Role.TIMESTEP:
        with np.errstate(all="ignore"):
            cast = array.astype(wanted)
        if wanted.kind == "f" or np.array_equal(cast.astype(np.float64), array.astype(np.float64)):
            return cast
    raise InputError(
        f"{item.label}: expected {item.dtype}, got {array.dtype}; convert it before the call, "
        f"or compile the network with example inputs of that type"
    )
