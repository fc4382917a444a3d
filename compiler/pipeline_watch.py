"""A pipeline's run, watched: which component is called when, how, and with what.

Each component of the pipeline that is a network is stood in for by an object that hands calls and
reads on and takes them down. A network that is called between steps of the scheduler computes in
its first two only; its last results stand in afterwards, for what it is called with is all that
counts.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effuse.pipeline_calls import is_plain, labelled, shapes_of, stored

SERVED = {"config", "dtype", "device", "modules", "parameters"}  # by every compiled component
COMPUTED = 2  # steps in which a watched denoiser computes


@dataclass(frozen=True)
class Call:
    """One call of a component, or of something in it: `path` is "decode", or "" for itself."""

    component: str
    path: str
    arguments: Mapping[str, Any]
    result: Any
    step: int  # the scheduler's steps before it
    seconds: float

    @property
    def key(self) -> tuple[str, str]:
        """What was called."""
        return self.component, self.path


@dataclass(frozen=True)
class Step:
    """One step of the scheduler: x_{i+1} from the network's output and x_i."""

    output: torch.Tensor
    sample: torch.Tensor
    result: torch.Tensor


@dataclass(frozen=True)
class Reading:
    """A tokenizer at work: a text, or several, to numbers."""

    component: str
    text: Any
    options: Mapping[str, Any]
    tokens: Mapping[str, Any]
    pad: int  # the token that texts are filled up with
    calls: int  # of components before it


@dataclass
class Log:
    """What was seen of a run."""

    whole: bool = False  # let denoisers compute in every step
    calls: list[Call] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    reads: dict[str, dict[str, Any]] = field(default_factory=dict)  # plain attributes, by component
    uses: dict[str, set[str]] = field(default_factory=dict)  # what else no artifact has, likewise
    contexts: dict[str, set[str]] = field(default_factory=dict)
    result: Any = None
    scheduler: Any = None  # as it was before its first step

    def of(self, key: tuple[str, str]) -> list[Call]:
        """All calls of one thing."""
        return [call for call in self.calls if call.key == key]

    @property
    def keys(self) -> list[tuple[str, str]]:
        """What was called, in the order of the first calls."""
        return list(dict.fromkeys(call.key for call in self.calls))

    def role(self, key: tuple[str, str]) -> str:
        """`denoiser`, `encoder` or `decoder`: by when it was called."""
        when = {call.step for call in self.of(key)}
        if len(when) > 1 or not self.steps:
            return "denoiser"
        only, first = when.pop(), self.first
        if only == 0 and first is not None and self.calls.index(self.of(key)[0]) >= first:
            return "denoiser"
        return "decoder" if only >= len(self.steps) else "encoder" if only == 0 else "denoiser"

    @property
    def first(self) -> int | None:
        """The number of the first call of what is called in several steps."""
        stepped = {key for key in self.keys if len({call.step for call in self.of(key)}) > 1}
        return next((n for n, call in enumerate(self.calls) if call.key in stepped), None)

    def timed(self, key: tuple[str, str]) -> float:
        """The seconds that its calls take in a whole run."""
        calls = self.of(key)
        real = [call.seconds for call in calls if call.seconds]
        return len(calls) * sum(real) / max(len(real), 1)


class Watched:
    """Stands in for a network, or for a module in it, and takes down what is asked of it."""

    def __init__(self, module: nn.Module, component: str, log: Log, path: str = "") -> None:
        self._module, self._component, self._log, self._path = module, component, log, path

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The network's: pipelines ask isinstance(controlnet, ControlNetModel)."""
        return type(self._module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's forward."""
        return self._record(self._module.forward, self._path, self._module, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_module":  # of a copy that is being made
            raise AttributeError(name)
        value = getattr(self._module, name)
        path = f"{self._path}.{name}".lstrip(".")
        if isinstance(value, nn.Module):
            return Watched(value, self._component, self._log, path)
        if inspect.ismethod(value) and value.__self__ is self._module:
            return self._method(value, path)
        if is_plain(value):
            self._log.reads.setdefault(self._component, {})[path] = stored(value)
        else:
            self._use(path)
        return value

    def _use(self, path: str) -> None:
        """Take down what no artifact has; libraries ask for private names where they are."""
        place, _, name = path.rpartition(".")
        served = name in SERVED and not (place and name == "config")  # there is the whole's alone
        if not served and not name.startswith("_"):
            self._log.uses.setdefault(self._component, set()).add(path)

    def _method(self, method: Callable[..., Any], path: str) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
                return self._record(method, path, method, args, kwargs)
            found = method(*args, **kwargs)
            if found is self._module:  # .to(), .eval()
                return self
            if hasattr(found, "__enter__"):
                self._log.contexts.setdefault(self._component, set()).add(path)
            else:
                self._use(path)
            return found

        return call

    def _record(
        self, like: Callable[..., Any], path: str, run: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        log, key = self._log, (self._component, path)
        arguments = pytree.tree_map_only(torch.Tensor, _copy, bound(like, args, kwargs))
        known = _stand_in(log, key, arguments)
        start = time.perf_counter()
        result = run(*args, **kwargs) if known is None else known.result
        seconds = time.perf_counter() - start if known is None else 0.0
        kept = pytree.tree_map_only(torch.Tensor, _copy, result)
        log.calls.append(Call(*key, arguments, kept, len(log.steps), seconds))
        return result


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _stand_in(log: Log, key: tuple[str, str], arguments: Mapping[str, Any]) -> Call | None:
    """The earlier call whose result does for this one: of the same shapes, two steps later on."""
    earlier = [call for call in log.of(key) if call.step > 0]
    seen = {call.step for call in log.of(key)} - {len(log.steps)}
    if log.whole or len(seen) < COMPUTED:
        return None
    wanted = signature_of(arguments)
    return next(
        (each for each in reversed(earlier) if signature_of(each.arguments) == wanted), None
    )


def signature_of(arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """By what calls of one thing are told apart: the tensors' shapes and types, the plain data."""
    tensors, plain = labelled(arguments)
    return shapes_of(tensors), plain


def bound(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments by name; those that go into `**` beside the others."""
    signature = inspect.signature(function)
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, each in signature.parameters.items():
        if each.kind is each.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def watch(pipe: Any, arguments: Mapping[str, Any], *, whole: bool = False) -> Log:
    """Run a copy of the pipeline once and tell what its components were asked.

    Args:
        arguments: of the pipeline's call.
        whole: let denoisers compute in every step.
    """
    log = Log(whole)
    seen = copy.copy(pipe)
    for name, component in components_of(pipe).items():
        if isinstance(component, nn.Module):
            _put(seen, name, Watched(component, name, log))
        elif is_scheduler(component):
            log.scheduler = _scheduler(component, log)
            _put(seen, name, log.scheduler)
        elif callable(component) and hasattr(component, "model_max_length"):
            _put(seen, name, _tokenizer(component, name, log))
    with torch.no_grad():
        log.result = seen(**arguments)
    return log


def _put(pipe: Any, name: str, value: Any) -> None:
    """Set a component without the pipeline's taking down what class it is of."""
    object.__setattr__(pipe, name, value)


def observed_roles(calls: Sequence[Call]) -> dict[str, str]:
    """Roles of a denoiser's tensors, by what changed from step to step."""
    by_step: dict[int, list[Mapping[str, torch.Tensor]]] = {}
    for call in calls:
        by_step.setdefault(call.step, []).append(labelled(call.arguments)[0])
    steps = list(by_step.values())
    if len(steps) < 2:
        return {}
    found = {}
    for label, value in steps[0][0].items():
        pairs = list(zip(steps[0], steps[1], strict=False))
        stays = all(torch.equal(one[label], other[label]) for one, other in pairs)
        counts = value.dim() <= 1 and len(set(value.flatten().tolist())) == 1
        found[label] = "prompt" if stays else "timestep" if counts else "latent"
    return found if "latent" in found.values() else {}


def components_of(pipe: Any) -> dict[str, Any]:
    """The pipeline's components by name, without those that are not there."""
    return {name: each for name, each in pipe.components.items() if each is not None}


def is_scheduler(component: Any) -> bool:
    """Whether it sets timesteps and makes steps."""
    return hasattr(component, "set_timesteps") and hasattr(component, "step")


def _scheduler(scheduler: Any, log: Log) -> Any:
    """A copy whose steps are taken down."""
    copied = copy.deepcopy(scheduler)
    step = copied.step

    @functools.wraps(step)
    def recorded(*args: Any, **kwargs: Any) -> Any:
        if not log.steps:
            log.scheduler = copy.deepcopy(copied)
            del log.scheduler.step  # the one that is taken down
        given = bound(step, args, kwargs)
        before = _copy(given["model_output"]), _copy(given["sample"])
        result = step(*args, **kwargs)
        after = result[0] if isinstance(result, (tuple, Mapping)) else result.prev_sample
        log.steps.append(Step(*before, _copy(after)))
        return result

    copied.step = recorded
    return copied


def _tokenizer(tokenizer: Any, name: str, log: Log) -> Any:
    """The tokenizer, of a class of its own whose calls are taken down."""
    kind = type(tokenizer)

    def call(self: Any, text: Any = None, **options: Any) -> Any:
        found = kind.__call__(self, text, **options)
        tokens = {key: _copy(value) for key, value in dict(found).items()
                  if isinstance(value, torch.Tensor)}  # fmt: skip
        pad = int(getattr(self, "pad_token_id", None) or 0)
        log.readings.append(Reading(name, text, options, tokens, pad, len(log.calls)))
        return found

    copied = copy.copy(tokenizer)
    copied.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return copied
