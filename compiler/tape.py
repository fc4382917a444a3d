"""A sampler's calls, taped: what a network was given and gave, to be repeated with another.

Copies are kept in memory, of a bounded number of steps; a tensor that stays the same, once.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effuse.errors import require

Model = Callable[..., Any]
OnStep = Callable[[int, Any, Any], None]  # index, timestep, the network's output
Sampler = Callable[[Model, OnStep], Any]  # -> final latents in [-1, 1], (n, 3, h, w)

RECENT = 16  # tensors that a new one is compared with: prompts stay the same


@dataclass(frozen=True, eq=False)
class Stored:
    """A tensor's copy in memory, and the device that it came from."""

    value: Any
    device: Any

    def holds(self, tensor: Any) -> bool:
        """Whether this is a copy of `tensor`."""
        mine = self.value
        same = (mine.shape, mine.dtype, self.device) == (tensor.shape, tensor.dtype, tensor.device)
        return same and bool((mine == tensor.detach().cpu()).all())

    def restored(self) -> Any:
        """The tensor where it was."""
        return self.value.to(self.device)


def tree_map(function: Callable[[Any], Any], value: Any) -> Any:
    """`value` with every leaf of its tuples, lists and dicts replaced."""
    if isinstance(value, (tuple, list)):
        return type(value)(tree_map(function, item) for item in value)
    if isinstance(value, dict):
        return {key: tree_map(function, item) for key, item in value.items()}
    return function(value)


def restored(value: Any) -> Any:
    """The inverse of `stored`."""
    return value.restored() if isinstance(value, Stored) else value


@dataclass(frozen=True)
class Call:
    """One call of the reference: its arguments, stored, and its first output."""

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: np.ndarray[Any, Any]

    def repeat(self, model: Model) -> tuple[float, np.ndarray[Any, Any]]:
        """How long `model` takes on the same arguments (seconds), and its first output."""
        args, kwargs = tree_map(restored, self.arguments)
        start = time.perf_counter()
        output = model(*args, **kwargs)
        wait_for(output)
        return time.perf_counter() - start, first_output(output)


@dataclass
class Tape:
    """The calls of a bounded number of steps, evenly spaced however many steps there will be."""

    limit: int
    memory: float = math.inf  # bytes
    steps: dict[int, list[Call]] = field(default_factory=dict)
    stride: int = 1
    _sizes: Counter[int] = field(default_factory=Counter)  # bytes that each step added
    _recent: deque[Stored] = field(default_factory=lambda: deque(maxlen=RECENT))

    def record(self, step: int, args: Any, kwargs: Any, output: Any) -> None:
        """Keep copies of a call's arguments and output; a full tape forgets every other step."""
        if step % self.stride:
            return
        arguments = tree_map(lambda value: self._stored(step, value), (args, kwargs))
        call = Call(arguments, first_output(output))
        self._sizes[step] += call.output.nbytes
        self.steps.setdefault(step, []).append(call)
        while len(self.steps) > 1 and self._full():
            self.stride *= 2
            self.steps = {n: calls for n, calls in self.steps.items() if n % self.stride == 0}
            self._sizes = Counter({n: self._sizes[n] for n in self.steps})

    def _full(self) -> bool:
        return len(self.steps) > self.limit or self._sizes.total() > self.memory

    def _stored(self, step: int, value: Any) -> Any:
        """A copy that nobody changes; of a tensor that stays the same, a prompt's, only one."""
        if not hasattr(value, "detach"):
            return value
        known = next((each for each in self._recent if each.holds(value)), None)
        if known is None:
            known = Stored(value.detach().cpu().clone(), value.device)
            self._sizes[step] += known.value.nbytes
        else:
            self._recent.remove(known)
        self._recent.append(known)  # the latest last: what is seen again is not forgotten
        return known


@dataclass
class Trace:
    """A model that is watched, and taped if asked, while a sampler calls it."""

    model: Model
    tape: Tape | None = None
    timesteps: list[float] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)  # inside the model, by step
    variants: Counter[str] = field(default_factory=Counter)  # calls, if the model counts them
    pictures: Any = None  # float32 in [-1, 1], (n, 3, h, w)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives."""
        step, start = len(self.timesteps), time.perf_counter()
        output = self.model(*args, **kwargs)
        wait_for(output)
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start
        if self.tape is not None:
            self.tape.record(step, args, kwargs, output)
        return output

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)  # samplers read the network's config, dtype and device

    def on_step(self, index: int, timestep: Any, output: Any) -> None:
        """The sampler is through with a step."""
        self.timesteps.append(float(timestep))

    def sample(self, sample: Sampler) -> Trace:
        """Itself, after sampling."""
        before = variants_run(self.model)
        self.pictures = np.clip(as_array(sample(self, self.on_step)), -1, 1)
        self.variants = variants_run(self.model) - before
        return self


def variants_run(model: Model) -> Counter[str]:
    """How often each variant of a compiled network has run so far; empty of another model."""
    counts = getattr(getattr(model, "session", model), "steps", None)
    return Counter(counts) if isinstance(counts, Counter) else Counter()


def wait_for(output: Any) -> None:
    """Wait for a GPU, whose calls return before they are done."""
    device = getattr(first_tensor(output), "device", None)
    if getattr(device, "type", "cpu") == "cuda":
        require("torch").cuda.synchronize(device)


def first_tensor(output: Any) -> Any:
    """The first tensor of what a denoiser returns: a tensor, a tuple, or an output by name."""
    if hasattr(output, "shape"):
        return output
    return output.sample if hasattr(output, "sample") else output[0]


def first_output(output: Any) -> np.ndarray[Any, Any]:
    """The first tensor as a float32 array of its own."""
    return as_array(first_tensor(output)).copy()


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """A tensor or array as a float32 array."""
    plain = value.detach().cpu().float() if hasattr(value, "detach") else value
    return np.asarray(plain, dtype=np.float32)
