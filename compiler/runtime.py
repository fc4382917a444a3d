"""The Session: runs a compiled program as the network it replaces. Imports no torch.

A part is a pure function of named values, so the rule of execution is one sentence: a part runs
again only when one of its inputs has changed. Values of the schedule come from tables inside the
graphs (by step index) or from the schedule part; values of the prompt are kept while the prompt is
the same; the step program runs every time.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from effuse.errors import InputError, nearest
from effuse.plan import STEP_INPUT, Input, PartSpec, PlanStep, ProgramSpec, Rate, Role

Run = Callable[[Mapping[str, Any]], Sequence[Any]]

KEPT_RESULTS = 4  # per part: guidance as two calls alternates between two prompts


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

    def index(self, step: int) -> Any:
        """The step index as the graphs take it: int64, shape (1,)."""


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

    def index(self, step: int) -> Any:
        """The step index as an array."""
        return np.array([step], dtype=np.int64)


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


class Output(Mapping[str, Any]):
    """The outputs by name, by attribute and by position, as diffusers' ModelOutput gives them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: Any) -> Any:
        return self._values[key] if isinstance(key, str) else tuple(self._values.values())[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class _Memory:
    """The last few results of one part, each with copies of the inputs that gave it."""

    entries: OrderedDict[int, tuple[dict[str, Any], Sequence[Any]]] = field(
        default_factory=OrderedDict
    )
    runs: int = 0


class Session:
    """A compiled program, called like the network it replaces.

    Args:
        spec: what the program takes, gives and runs, and when.
        runs: for each part, the function that runs it.
        arrays: the back end's kind of array.
    """

    def __init__(
        self, spec: ProgramSpec, runs: Mapping[str, Run], arrays: Arrays | None = None
    ) -> None:
        self.spec = spec
        self._runs = runs
        self.arrays = arrays or NumpyArrays()
        self._memory = {part.name: _Memory() for part in spec.parts if part.rate < Rate.STEP}

    @property
    def runs(self) -> dict[str, int]:
        """How often each part below the step's rate has really run so far."""
        return {name: memory.runs for name, memory in self._memory.items()}

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run one step; takes and returns what the network's forward does.

        Raises:
            InputError: an input is missing, unknown, of the wrong shape or dtype, or a timestep
                that the schedule does not have.
        """
        given = bind(self.spec, args, kwargs)
        values = {i.name: self.arrays.take(given[i.name], i) for i in self.spec.inputs}
        values |= spread_timesteps(self.spec, values)
        check_shapes(self.spec, values)
        check_static(self.spec, values)
        found = self.step(values)
        like = next(given[item.name] for item in self.spec.inputs if item.role is Role.LATENT)
        results = [self.arrays.give(found[name], like) for name in self.spec.outputs]
        if "return_dict" in self.spec.parameters[: len(args)]:
            return_dict = args[self.spec.parameters.index("return_dict")]
        return self._result(results, return_dict)

    def step(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run one step on the back end's own arrays, by the inputs' names; the outputs by name."""
        index = self.step_index(values)
        env = dict(values)
        env[STEP_INPUT] = self.arrays.index(index or 0)
        entry = self.spec.plan.at(index)
        for part in self.spec.parts:
            if part.rate < Rate.STEP:
                env.update(zip(part.outputs, self._recall(part, env), strict=True))
        self._run_variant(entry, env)
        return {name: env[name] for name in self.spec.outputs}

    def step_index(self, values: Mapping[str, Any]) -> int | None:
        """Which step of the schedule a timestep is; None when there is no schedule.

        Raises:
            InputError: the schedule has no such timestep, or the batch holds several.
        """
        times = [values[item.name] for item in self.spec.inputs if item.role is Role.TIMESTEP]
        if self.spec.timesteps is None or not times:
            return None
        found = {float(time) for time in times[0].reshape(-1)}
        if len(found) != 1:
            raise InputError(
                "timestep: this program was compiled for a schedule, one timestep for the whole "
                f"batch, got {len(found)} different ones; compile with schedule=None for that"
            )
        time = found.pop()
        if time in self.spec.timesteps:
            return self.spec.timesteps.index(time)
        close = min(self.spec.timesteps, key=lambda known: abs(known - time))
        raise InputError(
            f"timestep: {time:g} is not one of the {len(self.spec.timesteps)} timesteps that this "
            f"program was compiled for (nearest: {close:g}); set the scheduler to the same steps, "
            "or compile with schedule=None"
        )

    def _recall(self, part: PartSpec, env: Mapping[str, Any]) -> Sequence[Any]:
        """The part's outputs, from memory where its inputs are the same as in an earlier run."""
        memory = self._memory[part.name]
        needed = {name: env[name] for name in part.inputs}
        for key, (known, result) in memory.entries.items():
            if all(self.arrays.same(known[name], needed[name]) for name in needed):
                memory.entries.move_to_end(key)
                return result
        result = self._runs[part.name](needed)
        memory.entries[memory.runs] = (
            {name: self.arrays.keep(value) for name, value in needed.items()},
            result,
        )
        memory.runs += 1
        while len(memory.entries) > KEPT_RESULTS:
            memory.entries.popitem(last=False)
        return result

    def _run_variant(self, entry: PlanStep, env: dict[str, Any]) -> None:
        part = self.spec.part(entry.variant)
        found = self._runs[part.name]({name: env[name] for name in part.inputs})
        env.update(zip(part.outputs, found, strict=True))

    def _result(self, flat: list[Any], return_dict: bool) -> Any:
        if "return_dict" not in self.spec.parameters:
            return _unflatten(self.spec.result, flat)
        if not return_dict:
            return tuple(flat)
        names = field_names(self.spec.result, len(flat))
        return Output(dict(zip(names, flat, strict=True)))


def field_names(result: Any, count: int) -> list[str]:
    """The outputs' names, where they were captured with names, else `sample`, `output_1`, …"""
    captured = result.get("dict", {}) if isinstance(result, Mapping) else {}
    places = {index: name for name, index in captured.items() if isinstance(index, int)}
    usual = ("sample", *(f"output_{index}" for index in range(1, count)))
    return [places.get(index, name) for index, name in enumerate(usual)]


def _unflatten(shape: Any, flat: Sequence[Any]) -> Any:
    if isinstance(shape, int):
        return flat[shape]
    if "dict" in shape:
        return {key: _unflatten(item, flat) for key, item in shape["dict"].items()}
    return tuple(_unflatten(item, flat) for item in shape["tuple"])


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
        child = None
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
