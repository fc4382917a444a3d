"""What a student is trained on: calls of the network, given, recorded, or sampled by the teacher.

Which call comes when follows from the seed and its number alone, so a run that was interrupted
goes on with the very calls that it would have had.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from effuse.distill_network import Network
from effuse.errors import CalibrationError, ConfigError
from effuse.plan import Role
from effuse.program import Program
from effuse.watch import Watch

PROBES = 6  # calls that quality is measured on before and after
ENOUGH = 3 * PROBES  # calls of which so many are kept aside
LINEAR_BETAS = (1e-4, 0.02, 1000)  # DDPM's, from, to, steps: where no scheduler says otherwise

Step = Callable[[Tensor, Tensor, int], Tensor]  # latent, prediction, index of the step -> latent


@dataclass(frozen=True)
class Call:
    """The inputs of one call by name, and what it should give, where that is known."""

    values: Mapping[str, Tensor]
    target: Tensor | None = None


class Source(Protocol):
    """Calls to train on, by number."""

    def at(self, number: int) -> Call:
        """The call of that number, always the same one."""

    def probes(self) -> Sequence[Call]:
        """A few calls, spread over the data, on which quality is measured."""

    def key(self) -> str:
        """What decides the calls, as a hash."""


def shuffled(count: int, seed: int, turn: int) -> list[int]:
    """A permutation of range(count) that follows from seed and turn."""
    digest = hashlib.sha256(f"{seed} {turn}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator).tolist()


def drawn(count: int, wanted: int, seed: int) -> set[int]:
    """One number of each of `wanted` equal stretches of range(count), at random.

    Not the middle ones: calls come trajectory by trajectory, and all might be of one step.
    """
    edges = [number * count // wanted for number in range(wanted + 1)]
    return {
        low + shuffled(high - low, seed, -1 - number)[0]
        for number, (low, high) in enumerate(pairwise(edges))
    }


class Pool:
    """Calls that are at hand; each is taken once before any is taken again.

    Of enough calls a few, drawn all over, are kept aside for quality; of fewer, quality is that on
    some of them.

    Raises:
        CalibrationError: there are none.
    """

    def __init__(self, calls: Sequence[Call], seed: int = 0) -> None:
        if not calls:
            raise CalibrationError(
                "data yielded nothing: expected calls to train on; hand a non-empty iterable of "
                "inputs, or a run(model) that samples with the model it is given"
            )
        count = min(PROBES, len(calls))
        aside = drawn(len(calls), count, seed)
        self._probes = tuple(calls[index] for index in sorted(aside))
        kept = [call for index, call in enumerate(calls) if index not in aside]
        self.calls = tuple(kept if len(calls) >= ENOUGH else calls)
        self.seed = seed
        self._turn, self._order = 0, shuffled(len(self.calls), seed, 0)

    def at(self, number: int) -> Call:
        """The call of that number."""
        turn, place = divmod(number, len(self.calls))
        if turn != self._turn:
            self._turn, self._order = turn, shuffled(len(self.calls), self.seed, turn)
        return self.calls[self._order[place]]

    def probes(self) -> Sequence[Call]:
        """Calls evenly spread over what was given."""
        return self._probes

    def key(self) -> str:
        """A hash of all values."""
        found = hashlib.sha256(repr(self.seed).encode())
        for call in (*self._probes, *self.calls):
            for name, value in sorted(call.values.items()):
                found.update(name.encode() + _bytes(value))
            found.update(b"" if call.target is None else _bytes(call.target))
        return found.hexdigest()


def _bytes(value: Tensor) -> bytes:
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8)
    return f"{value.dtype} {tuple(value.shape)}".encode() + raw.numpy().tobytes()


class Listener(Watch):
    """Keeps every call of a network; what equals the call before is kept once."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def begin(self, values: Mapping[str, Tensor], index: int | None) -> None:
        """One call."""
        before = self.calls[-1].values if self.calls else {}
        kept = {
            name: before[name]
            if name in before and torch.equal(before[name], value)
            else value.detach().clone()
            for name, value in values.items()
        }
        self.calls.append(Call(kept))


class Trajectories:
    """Pictures that the teacher draws from noise, one trajectory after another, no data needed.

    A trajectory's calls come in random order, each once. Prompts are the program's examples.

    Args:
        teacher: the network that samples.
        times: the schedule's timesteps.
        step: how a prediction moves the latent.
        seed: of the noise and of the order.
    """

    def __init__(self, teacher: Network, times: Sequence[float], step: Step, seed: int = 0) -> None:
        self.teacher, self.times, self.step, self.seed = teacher, tuple(times), step, seed
        self._turn: int | None = None
        self._calls: Sequence[Call] = ()

    def at(self, number: int) -> Call:
        """The call of that number."""
        turn, place = divmod(number, len(self.times))
        if turn != self._turn:
            calls = self.sampled(turn)
            self._calls = [calls[index] for index in shuffled(len(calls), self.seed, turn)]
            self._turn = turn
        return self._calls[place]

    def probes(self) -> Sequence[Call]:
        """Calls along a trajectory that is never trained on."""
        return Pool(self.sampled(-1)).probes()

    def key(self) -> str:
        """A hash of what the trajectories follow from, beside the teacher."""
        return hashlib.sha256(repr((self.seed, self.times)).encode()).hexdigest()

    @torch.no_grad()
    def sampled(self, turn: int) -> list[Call]:
        """The calls of one trajectory, in the order of its steps."""
        values = self._noise(turn)
        main = next(item.name for item in self.teacher.program.inputs if item.role is Role.LATENT)
        calls = []
        for index, time in enumerate(self.times):
            values = {**values, **at_time(self.teacher.program, values, time)}
            calls.append(Call(values))
            (prediction, *_), _ = self.teacher(values)
            latent = values[main]
            prediction = matching(prediction.to(latent.device), latent)
            values = {**values, main: self.step(latent, prediction, index).to(latent.dtype)}
        return calls

    def _noise(self, turn: int) -> dict[str, Tensor]:
        digest = hashlib.sha256(f"noise {self.seed} {turn}".encode()).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        found = dict(self.teacher.program.examples)
        for item in self.teacher.program.inputs:
            value = found[item.name]
            if item.role is Role.LATENT and value.is_floating_point():
                found[item.name] = torch.randn(value.shape, generator=random).to(value.dtype)
        return found


def at_time(program: Program, values: Mapping[str, Tensor], time: float) -> dict[str, Tensor]:
    """The program's timestep inputs, all at `time`."""
    names = [item.name for item in program.inputs if item.role is Role.TIMESTEP]
    return {name: torch.full_like(values[name], time) for name in names}


def matching(prediction: Tensor, latent: Tensor) -> Tensor:
    """The prediction without the variances that some networks give behind it.

    Raises:
        ConfigError: it does not have the latent's shape.
    """
    if prediction.shape[:1] == latent.shape[:1] and prediction.dim() == latent.dim() > 1:
        prediction = prediction[:, : latent.shape[1]]
    if prediction.shape != latent.shape:
        raise ConfigError(
            f"data: trajectories need a prediction of the latent's shape {tuple(latent.shape)}, "
            f"the teacher gives {tuple(prediction.shape)}; hand data=… instead"
        )
    return prediction


# ---- samplers ------------------------------------------------------------------------------------


def ddim(
    alphas: Sequence[float], kind: str = "epsilon", final: float = 1.0, bound: float = math.inf
) -> Step:
    """DDIM's deterministic step, with ᾱ of each timestep and `final` behind the last.

    Args:
        alphas: ᾱ (steps,), the signal's share of the variance.
        kind: what is predicted: `epsilon`, `v_prediction` or `sample`.
        final: ᾱ behind the last step.
        bound: the clean latent is clipped to so much either side.

    Raises:
        ConfigError: `kind` is none of the three.
    """
    kinds = ("epsilon", "v_prediction", "sample")
    if kind not in kinds:
        raise ConfigError(f"schedule: prediction_type {kind!r}: expected one of {', '.join(kinds)}")
    shares = [*map(float, alphas), float(final)]

    def step(latent: Tensor, prediction: Tensor, index: int) -> Tensor:
        a, b = shares[index] ** 0.5, (1 - shares[index]) ** 0.5
        if kind == "epsilon":
            noise, clean = prediction, (latent - b * prediction) / a
        elif kind == "sample":
            noise, clean = (latent - a * prediction) / b, prediction
        else:
            noise, clean = a * prediction + b * latent, a * latent - b * prediction
        c, d = shares[index + 1] ** 0.5, (1 - shares[index + 1]) ** 0.5
        return torch.add(c * clean.clamp(-bound, bound), noise, alpha=d)

    return step


def euler(sigmas: Sequence[float]) -> Step:
    """x + (σ_{i+1} - σ_i) · v, for flows; `sigmas` (steps + 1,) end with 0."""
    levels = [float(sigma) for sigma in sigmas]

    def step(latent: Tensor, prediction: Tensor, index: int) -> Tensor:
        return latent + (levels[index + 1] - levels[index]) * prediction

    return step


def sampler(schedule: Any, times: Sequence[float]) -> Step:
    """The deterministic sampler of a diffusers scheduler: DDIM over its ᾱ, Euler over its σ.

    Without one: Euler where timesteps are 0 to 1, else DDIM over DDPM's linear β.

    Raises:
        ConfigError: the scheduler has neither.
    """
    if hasattr(schedule, "alphas_cumprod"):
        alphas = schedule.alphas_cumprod[torch.tensor(times).round().long()]
        final = float(getattr(schedule, "final_alpha_cumprod", 1.0))
        config = schedule.config
        clips = config.get("clip_sample", False)
        bound = config.get("clip_sample_range", 1.0) if clips else math.inf
        return ddim(alphas, config.prediction_type, final, bound)
    if hasattr(schedule, "sigmas"):
        return euler([*schedule.sigmas[: len(times)], 0.0])
    if hasattr(schedule, "step"):
        raise ConfigError(
            f"schedule: {type(schedule).__name__} has neither alphas_cumprod nor sigmas, so no "
            "trajectory follows from it; hand data=run, a function that samples"
        )
    if max(times) <= 1:
        return euler([*times, 0.0])
    first, last, count = LINEAR_BETAS
    kept = torch.cumprod(1 - torch.linspace(first, last, count, dtype=torch.float64), 0)
    return ddim([float(kept[min(count - 1, round(time))]) for time in times])
