"""Wrappers around a network: seen through by structure, so that names and signature are its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from effuse.method import as_network, is_method

ORIGINAL = "_orig_mod"  # where torch.compile keeps the module that it was given
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


class _Echo(nn.Module):
    """In the place of a child: what it was called with, and one answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.answer = object()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call."""
        self.calls.append((args, kwargs))
        return self.answer


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside `torch.compile`, DataParallel, and whatever else only calls it.

    A method that is bound to a network is the forward of one.
    """
    model = as_network(model) if is_method(model) else model
    while isinstance(model, nn.Module) and (inner := wrapped_by(model)) is not None:
        model = inner
    return model


def wrapped_by(model: nn.Module) -> nn.Module | None:
    """The child, or child's child, that a module hands its arguments to and answers for; or None.

    A wrapper is tried on objects that nothing can be computed with: what comes through unchanged
    was touched by no arithmetic.
    """
    outer = model
    while (name := only_child(outer)) is not None:
        child: Any = outer._modules[name]
        if name == ORIGINAL or passes_on(model, outer, name):
            return child  # type: ignore[no-any-return]
        outer = child
    return None


def only_child(module: nn.Module) -> str | None:
    """The name of the one child of a module that has nothing else: no weights, no hooks."""
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if isinstance(module, torch.jit.ScriptModule) or own or any(getattr(module, h) for h in HOOKS):
        return None
    names = [name for name, _ in module.named_children()]
    return names[0] if len(names) == 1 else None


def passes_on(model: nn.Module, parent: nn.Module, name: str) -> bool:
    """Whether `model` gives the child `name` of `parent` its arguments, and gives its answer."""
    echo, args, kwargs = _Echo(), (object(), object()), {"context": object()}
    kept = parent._modules[name]
    parent._modules[name] = echo
    try:
        answer = model.forward(*args, **kwargs)
    except Exception:  # it asks for other arguments, or computes: so it is no mere wrapper
        return False
    finally:
        parent._modules[name] = kept
    return answer is echo.answer and echo.calls == [(args, kwargs)]


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Where what `torch.compile` has wrapped within a network runs as it was written."""
    places = [
        (parent, name, inner)
        for parent in model.modules()
        for name, child in parent.named_children()
        if (inner := child._modules.get(ORIGINAL)) is not None
    ]
    kept = [(parent, name, parent._modules[name]) for parent, name, _ in places]
    for parent, name, inner in places:
        parent._modules[name] = inner
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for parent, name, child in kept:
            parent._modules[name] = child


def parameter_names(model: nn.Module) -> set[str]:
    """The names that the parameters have in a captured program."""
    with uncompiled(model):
        return {name for name, _ in model.named_parameters()}
