"""Wrappers around a network: seen through by structure, so that names and signature are its own."""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from effuse.method import as_network, is_method

ORIGINAL = "_orig_mod"  # where torch.compile keeps the module that it was given
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
DEVICES = ("cpu", "cuda")  # whose autocasts a wrapper may switch on
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class _Echo(nn.Module):
    """In the place of a child: what it was called with, and one answer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.answer = object()
        self.outside = _autocasts()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Note the call."""
        self.calls.append((args, kwargs))
        return self.answer if _autocasts() == self.outside else None


def _autocasts() -> tuple[bool, ...]:
    return tuple(torch.is_autocast_enabled(device) for device in DEVICES)


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
    signature = inspect.signature(model.forward)
    if any(each.kind in VARIADIC for each in signature.parameters.values()):
        args, kwargs = (object(), object()), {"context": object()}
        return echoed(model, parent, name, args, kwargs) == (args, kwargs)
    inner = inspect.signature(unwrapped(parent._modules[name]).forward)  # type: ignore[arg-type]
    if not same_beginning(signature.parameters, inner.parameters):
        return False
    every, needed = (
        {key: object() for key, each in signature.parameters.items()
         if all_of_them or each.default is each.empty} for all_of_them in (True, False)
    )  # fmt: skip
    return all(named_alike(model, parent, name, given) for given in (every, needed))


def named_alike(
    model: nn.Module, parent: nn.Module, name: str, given: Mapping[str, object]
) -> bool:
    """Whether the child is called with these arguments by the names that the model has for them."""
    outer = inspect.signature(model.forward)
    inner = inspect.signature(unwrapped(parent._modules[name]).forward)  # type: ignore[arg-type]
    call = inspect.BoundArguments(outer, OrderedDict(given))
    found = echoed(model, parent, name, call.args, call.kwargs)
    if found is None:
        return False
    try:
        heard, said = inner.bind(*found[0], **found[1]), inner.bind(*call.args, **call.kwargs)
    except TypeError:
        return False
    heard.apply_defaults()
    said.apply_defaults()
    return heard.arguments == said.arguments


def same_beginning(
    outer: Mapping[str, inspect.Parameter], inner: Mapping[str, inspect.Parameter]
) -> bool:
    """Whether a call by position or by name means the same to both, defaults included."""
    pairs = list(zip(outer.values(), inner.values(), strict=False))
    return len(pairs) == len(outer) and all(
        (one.name, one.kind) == (other.name, other.kind)
        and (one.default is other.default or repr(one.default) == repr(other.default))
        for one, other in pairs
    )


def echoed(
    model: nn.Module, parent: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """What the child is called with, if it is called once and `model` gives its answer; or None."""
    echo, kept = _Echo(), parent._modules[name]
    parent._modules[name] = echo
    try:
        answer = model.forward(*args, **kwargs)
    except Exception:  # it asks for other arguments, or computes: so it is no mere wrapper
        return None
    finally:
        parent._modules[name] = kept
    return echo.calls[0] if answer is echo.answer and len(echo.calls) == 1 else None


@contextmanager
def by_name(model: nn.Module) -> Iterator[None]:
    """Where forward takes by name what it takes by position only."""
    forward = model.forward
    signature = inspect.signature(forward)
    only, free = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    if all(each.kind is not only for each in signature.parameters.values()):
        yield
        return
    opened = [each.replace(kind=free) if each.kind is only else each
              for each in signature.parameters.values()]  # fmt: skip
    named = signature.replace(parameters=opened)

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = named.bind(*args, **kwargs)
        given.apply_defaults()
        return forward(*given.args, **given.kwargs)

    call.__signature__ = named  # type: ignore[attr-defined]
    with forward_as(model, call):
        yield


@contextmanager
def forward_as(model: nn.Module, call: Callable[..., Any]) -> Iterator[None]:
    """Where a module's forward is another."""
    own = vars(model).get("forward")
    model.forward = call
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


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
