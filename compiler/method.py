"""A method of a network taken for a network: an autoencoder's `decode`, or its `encode`."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.utils import _pytree as pytree


def is_method(value: Any) -> TypeGuard[Callable[..., Any]]:
    """Whether this is a method of a network, bound to it."""
    return inspect.ismethod(value) and isinstance(value.__self__, nn.Module)


def as_network(method: Callable[..., Any]) -> nn.Module:
    """The network that a method is bound to, with that method as its forward.

    It shares weights, config and the modules' paths with the network, which stays as it is. Where
    the method gives a distribution, its mode stands in: samples are drawn outside of what is
    compiled.
    """
    owner, function = method.__self__, method.__func__  # type: ignore[attr-defined]

    @functools.wraps(function)  # by which forward has the method's signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = function(self, *args, **kwargs)
        return pytree.tree_map(lambda each: each.mode() if is_distribution(each) else each, found)

    kind = type(owner)
    found: nn.Module = copy.copy(owner)
    found.__class__ = type(f"{kind.__name__}.{function.__name__}", (kind,), {"forward": forward})
    return found


def is_distribution(value: Any) -> bool:
    """Whether a value is what a latent is drawn from, by what it can do."""
    return not isinstance(value, torch.Tensor) and callable(getattr(value, "mode", None))
