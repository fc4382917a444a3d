"""Calls of a pipeline's components as data: arguments and results, taken apart and put together.

A value is described by an outline: a tensor by its number, a list or tuple by "tuple", a mapping by
"dict", an output class of diffusers or transformers by "class" beside its fields, another object of
theirs as "object", anything else that JSON has as "value". Imports no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from effuse.errors import InputError
from effuse.runtime import Output

PLAIN = (bool, int, float, str, type(None))
SMALL = 1 << 14  # numbers of a tensor that is kept as JSON
LIBRARIES = ("diffusers", "transformers")  # whose output classes are imported by name
OBJECTS = tuple(f"{library}.models." for library in LIBRARIES)  # where those lie that hold tensors


def is_plain(value: Any) -> bool:
    """Whether a value that pipelines read of a network is kept: plain, or a small tensor."""
    return isinstance(value, PLAIN) or (is_tensor(value) and value.numel() <= SMALL)


def is_tensor(value: Any) -> bool:
    """Whether it is a tensor, or an array."""
    return hasattr(value, "shape") and hasattr(value, "dtype")


def stored(value: Any) -> Any:
    """Such a value as JSON."""
    return {"tensor": value.tolist(), "dtype": dtype_of(value)} if is_tensor(value) else value


def restored(value: Any) -> Any:
    """The inverse of `stored`."""
    if not isinstance(value, Mapping):
        return value
    import torch

    return torch.tensor(value["tensor"], dtype=getattr(torch, value["dtype"]))


def outline(value: Any) -> tuple[Any, list[Any]]:
    """What a value is made of, as JSON, and its tensors in that order.

    Raises:
        InputError: it holds something that is neither a tensor nor plain data.
    """
    tensors: list[Any] = []
    return _outlined(value, tensors), tensors


def _outlined(value: Any, tensors: list[Any]) -> Any:
    if is_tensor(value):
        tensors.append(value)
        return len(tensors) - 1
    if isinstance(value, PLAIN):
        return {"value": value}
    if isinstance(value, Mapping):
        fields = {str(key): _outlined(item, tensors) for key, item in value.items()}
        home = type(value).__module__
        known = home.partition(".")[0] in LIBRARIES and not home.endswith("configuration_utils")
        named = {"class": f"{home}.{type(value).__qualname__}"} if known else {}
        return {"dict": fields, **named}
    if isinstance(value, (list, tuple)):
        return {"tuple": [_outlined(item, tensors) for item in value]}
    kind = type(value)
    if kind.__module__.startswith(OBJECTS) and hasattr(value, "__dict__"):
        fields = {key: _outlined(item, tensors) for key, item in vars(value).items()}
        return {"object": fields, "class": f"{kind.__module__}.{kind.__qualname__}"}
    raise InputError(f"a {kind.__name__} is neither a tensor nor plain data")


def rebuild(shape: Any, tensors: Sequence[Any]) -> Any:
    """The value of an outline with these tensors in it."""
    if isinstance(shape, int):
        return tensors[shape]
    if "value" in shape:
        return shape["value"]
    if "tuple" in shape:
        return tuple(rebuild(item, tensors) for item in shape["tuple"])
    if "object" in shape:
        return _object(shape["class"], {k: rebuild(v, tensors) for k, v in shape["object"].items()})
    fields = {key: rebuild(item, tensors) for key, item in shape["dict"].items()}
    return _instance(shape["class"], fields) if "class" in shape else fields


def _instance(name: str, fields: Mapping[str, Any]) -> Any:
    """An output class of a known library with these fields; effuse's own if it has gone."""
    found = class_of(name, Output)
    mapping = found is not Output and issubclass(found, Mapping)
    return found(**fields) if mapping else Output(fields)


def _object(name: str, fields: Mapping[str, Any]) -> Any:
    """An object of a class beside a known library's networks, such as a distribution, with these
    attributes; of no class that does something when it goes.
    """
    kind = class_of(name, Output)
    if kind is Output or not name.startswith(OBJECTS) or hasattr(kind, "__del__"):
        return Output(fields)
    found: Any = object.__new__(kind)
    vars(found).update(fields)
    return found


def class_of(name: str, otherwise: type) -> type:
    """The class that a known library defines there; of no other library is anything imported."""
    home, _, kind = name.rpartition(".")
    if home.partition(".")[0] not in LIBRARIES:
        return otherwise
    try:
        found = getattr(importlib.import_module(home), kind)
    except (ImportError, AttributeError):
        return otherwise
    return found if isinstance(found, type) and found.__module__ == home else otherwise


def labelled(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A call's tensors by label (`added_cond_kwargs.text_embeds`), and its plain data by label.

    What is None is left out, as an argument that is not given, and so are random generators: what
    draws numbers is not compiled.

    Raises:
        InputError: an argument is neither.
    """
    tensors: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        _label(name, value, tensors, plain)
    return tensors, plain


def _label(label: str, value: Any, tensors: dict[str, Any], plain: dict[str, Any]) -> None:
    if is_tensor(value):
        tensors[label] = value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _label(f"{label}.{key}", item, tensors, plain)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _label(f"{label}.{index}", item, tensors, plain)
    elif hasattr(value, "manual_seed"):
        return  # a random generator, of which what is compiled has no use
    elif not isinstance(value, PLAIN):
        raise InputError(f"{label}: a {type(value).__name__} is neither a tensor nor plain data")
    elif value is not None:
        plain[label] = value


def dtype_of(tensor: Any) -> str:
    """`float32`, of a tensor or an array."""
    return str(tensor.dtype).rpartition(".")[2]


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Shape and dtype of each tensor: by these, and by plain data, calls are told apart."""
    return {label: [list(each.shape), dtype_of(each)] for label, each in tensors.items()}
