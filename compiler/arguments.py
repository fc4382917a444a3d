"""The arguments of a call, found and checked against what a program takes (imports no torch)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effuse.errors import InputError, nearest
from effuse.formula import evaluated
from effuse.plan import Input, ProgramSpec, Role


def spread_timesteps(spec: ProgramSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """One timestep as often as a network that takes a vector wants it, a constant vector as one.

    Raises:
        InputError: the network takes one timestep for the whole batch, and several are given.
    """
    sizes = {want: got for item in spec.inputs if item.role is not Role.TIMESTEP
             for want, got in zip(item.shape, values[item.name].shape, strict=False)}  # fmt: skip
    spread = {}
    for item in spec.inputs:
        flat = values[item.name].reshape(-1)
        if item.role is not Role.TIMESTEP or len(item.shape) > 1:
            continue
        if not item.shape and len({float(time) for time in flat}) > 1:
            raise InputError(
                f"{item.label}: expected one timestep, got {len(flat)} that differ; compile with "
                "an example timestep of shape (batch,)"
            )
        if not item.shape and len(flat):
            spread[item.name] = flat[:1].reshape(())
        elif item.shape and len(flat) == 1:
            want = item.shape[0]
            spread[item.name] = flat[[0] * (want if isinstance(want, int) else sizes.get(want, 1))]
    return spread


def bind(spec: ProgramSpec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs' values by name, from the arguments of a call.

    Raises:
        InputError: an argument is unknown, missing, or was not captured.
    """
    if len(args) > len(spec.parameters):
        raise InputError(f"expected at most {len(spec.parameters)} arguments, got {len(args)}")
    given = dict(zip(spec.parameters, args, strict=False))
    for name, value in kwargs.items():
        if name in given:
            raise InputError(f"{name}: given twice, by position and by name")
        if name not in spec.parameters and name not in spec.constants:
            raise InputError(f"no input is called {name!r}{nearest(name, spec.parameters)}")
        given[name] = value
    found = {}
    for item in spec.inputs:
        value = given
        for key in item.path:
            value = _child(value, key, item)
        found[item.name] = value
    for name, value in given.items():
        _check_nested(spec, (name,), value)
    _check_constants(spec, given)
    return found


def _child(value: Any, key: str, item: Input) -> Any:
    try:
        child = value[int(key)] if isinstance(value, (list, tuple)) else value[key]
    except (KeyError, IndexError, TypeError):
        child = getattr(value, "__dict__", {}).get(key)  # of an object, an attribute
    if child is None:
        raise InputError(
            f"{item.label}: missing; this program needs it, of shape {describe_shape(item.shape)} "
            f"and dtype {item.dtype}"
        )
    return child


def _check_nested(spec: ProgramSpec, path: tuple[str, ...], value: Any) -> None:
    """Refuse a tensor that stands in a mapping beside captured ones, but was not captured."""
    captured = [item.path for item in spec.inputs if item.path[: len(path)] == path]
    if isinstance(value, Mapping) and captured:
        for key, child in value.items():
            _check_nested(spec, (*path, str(key)), child)
    elif len(path) > 1 and not captured and hasattr(value, "shape"):
        known = [item.label for item in spec.inputs]
        raise InputError(f"no input is called {'.'.join(path)!r}{nearest('.'.join(path), known)}")


def _check_constants(spec: ProgramSpec, given: Mapping[str, Any]) -> None:
    captured = {item.path[0] for item in spec.inputs}
    for name, value in given.items():
        if name in captured or name == "return_dict" or value is None:
            continue
        if hasattr(value, "manual_seed"):  # a random generator: what draws numbers is not captured
            continue
        if name in spec.constants and _equal(spec.constants[name], value):
            continue
        was = f"captured as {spec.constants[name]!r}" if name in spec.constants else "not captured"
        raise InputError(
            f"{name}: {was}, got {type(value).__name__}; compile again with "
            f"inputs={{…, {name!r}: …}}"
        )


def _equal(captured: Any, given: Any) -> bool:
    """Whether an argument is what was captured; lists and tuples are one thing in a manifest."""
    if isinstance(captured, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(captured) == len(given) and all(map(_equal, captured, given))
    if isinstance(captured, Mapping) and isinstance(given, Mapping):
        return captured.keys() == given.keys() and all(_equal(captured[k], given[k]) for k in given)
    return not hasattr(given, "shape") and bool(captured == given)


def digest(value: Any) -> str:
    """SHA-256 of an array's values, in hex."""
    plain = value.float() if "bfloat16" in str(value.dtype) else value
    return hashlib.sha256(np.asarray(plain).tobytes()).hexdigest()


def check_static(spec: ProgramSpec, values: Mapping[str, Any]) -> None:
    """Refuse another value of a static input than the one that is part of the program.

    Raises:
        InputError: it differs.
    """
    for item in spec.inputs:
        if item.digest and digest(values[item.name]) != item.digest:
            raise InputError(
                f"{item.label}: its role is static, so its example value is part of the program, "
                'and this is another; pass that one, or compile with roles={"…": "prompt"}'
            )


def describe_shape(shape: Sequence[Any]) -> str:
    """`(batch, 3, 32, 32)`."""
    return f"({', '.join(str(size) for size in shape)}{',' if len(shape) == 1 else ''})"


def check_shapes(spec: ProgramSpec, values: Mapping[str, Any]) -> None:
    """Refuse shapes that the program was not compiled for.

    Raises:
        InputError: a size differs, is out of its bounds, or differs between two inputs.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for item in spec.inputs:
        shape = tuple(values[item.name].shape)
        expected = describe_shape(item.shape)
        if len(shape) != len(item.shape) or any(
            isinstance(want, int) and want != got
            for want, got in zip(item.shape, shape, strict=True)
        ):
            raise InputError(
                f"{item.label}: expected shape {expected}, got {shape}; compile with example "
                "inputs of that shape, or leave the size open with dynamic={…}"
            )
        for want, got in zip(item.shape, shape, strict=True):
            if isinstance(want, str):
                _check_size(want, got, item, sizes, spec)
    _check_derived(sizes)


def _check_derived(sizes: Mapping[str, tuple[int, str]]) -> None:
    """Refuse a size that has to follow from others, and does not."""
    known = {name: size for name, (size, _) in sizes.items()}
    for name, (size, where) in sizes.items():
        wanted = size if name.isidentifier() else evaluated(name, known)
        if wanted not in (None, size):
            raise InputError(f"{where}: expected a size of {wanted} ({name}), got {size}")


def _check_size(
    name: str,
    got: int,
    item: Input,
    sizes: dict[str, tuple[int, str]],
    spec: ProgramSpec,
) -> None:
    low, high = spec.bounds.get(name, (1, got))
    step = spec.steps.get(name, 1)
    if not low <= got <= high or (got - low) % step:
        by = f" in steps of {step}" if step > 1 else ""
        raise InputError(f"{item.label}: {name} must be {low} to {high}{by}, got {got}")
    known, where = sizes.setdefault(name, (got, item.label))
    if known != got:
        raise InputError(f"{item.label}: {name} is {got} here, but {known} in {where}")
