"""Arguments that are objects with tensors in their attributes, as caches of keys and values are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@contextmanager
def opened(inputs: Mapping[str, Any]) -> Iterator[None]:
    """Where such objects are nested like mappings: their tensors are inputs, by attribute.

    torch.export takes no others; what was registered is forgotten afterwards.
    """
    kinds: dict[type, None] = {}
    holds(dict(inputs), kinds, set())
    done = []
    try:
        for kind in kinds:
            register(kind)
            done.append(kind)
        yield
    finally:
        for kind in done:
            pytree._deregister_pytree_node(kind)


def holds(value: Any, kinds: dict[type, None], seen: set[int]) -> bool:
    """Whether there is a tensor in a value; the kinds of objects that hold one are noted."""
    if isinstance(value, torch.Tensor):
        return True
    leaves = pytree.tree_leaves(value)
    if len(leaves) != 1 or leaves[0] is not value:
        return any([holds(leaf, kinds, seen) for leaf in leaves])
    if id(value) in seen or callable(value) or isinstance(value, (type, nn.Module)):
        return False
    seen.add(id(value))
    found = [holds(each, kinds, seen) for each in getattr(value, "__dict__", {}).values()]
    if any(found):
        kinds[type(value)] = None
    return any(found)


def register(kind: type) -> None:
    """Let pytrees open objects of a kind, in Python alone."""
    pytree._private_register_pytree_node(
        kind,
        lambda each: (list(vars(each).values()), tuple(vars(each))),
        partial(remade, kind),
        flatten_with_keys_fn=lambda each: (
            [(pytree.MappingKey(name), value) for name, value in vars(each).items()],
            tuple(vars(each)),
        ),
        serialized_type_name=f"{kind.__module__}.{kind.__qualname__}",
    )


def remade(kind: Any, values: Any, names: Any) -> Any:
    """An object of these attributes, made without its constructor."""
    made = kind.__new__(kind)
    vars(made).update(zip(names, values, strict=True))
    return made
