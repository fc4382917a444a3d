"""A scheduler as data: a sampler whose steps are rows of numbers. Imports numpy only.

With x_j the sample before step j, o_j the network's output there, n_j noise and

    u_j = clip(p_j x_j + q_j o_j, -1, 1)    (a clipped prediction, divided by its range)

a step is x_{i+1} = Σ_{j ≤ i} a_ij x_j + b_ij o_j + c_ij u_j + d_ij n_j, and the network is shown
s_i x_i. `effuse.sampler_probe` finds the numbers. They are kept in float64; a step computes in the
sample's own dtype, at least float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effuse.errors import ArtifactError, InputError
from effuse.plan import Input, ProgramSpec, Role
from effuse.runtime import first_of

Array = np.ndarray[Any, Any]

FAMILIES = ("sample", "output", "clipped", "noise")  # x, o, u, n


@dataclass(frozen=True)
class Term:
    """A coefficient of what the step `lag` steps before read or made."""

    family: str
    lag: int
    factor: float


@dataclass(frozen=True)
class Row:
    """One step: the terms of the next sample, and how this step's output is clipped, if it is."""

    scale: float
    terms: tuple[Term, ...]
    clip: tuple[float, float] | None = None  # p and q

    @property
    def noisy(self) -> bool:
        """Whether the step adds noise."""
        return any(term.family == "noise" and not term.lag for term in self.terms)

    @property
    def depth(self) -> int:
        """How many steps back it reads."""
        return max((term.lag for term in self.terms), default=0)

    def to_json(self) -> dict[str, Any]:
        """The row as JSON's own types: for each family pairs of lag and factor."""
        found: dict[str, Any] = {"scale": self.scale}
        if self.clip is not None:
            found["clip"] = list(self.clip)
        for term in self.terms:
            found.setdefault(term.family, []).append([term.lag, term.factor])
        return found

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Row:
        """The inverse of `to_json`."""
        terms = tuple(Term(family, int(lag), float(factor)) for family in FAMILIES
                      for lag, factor in data.get(family, ()))  # fmt: skip
        clip = (float(data["clip"][0]), float(data["clip"][1])) if "clip" in data else None
        return Row(float(data["scale"]), terms, clip)


class Sampler:
    """What a scheduler does at each of its steps, as numbers, and what it remembers of a picture.

    Args:
        timesteps: what the network is told at each step; some schedulers repeat one.
        rows: the steps.
        initial_scale: what standard normal noise is multiplied with to start from.
        name: the scheduler, for people.
    """

    def __init__(
        self, timesteps: Array, rows: Sequence[Row], initial_scale: float = 1.0, name: str = ""
    ) -> None:
        self.timesteps, self.rows = timesteps, tuple(rows)
        self.initial_scale, self.name = initial_scale, name
        self._last = {(term.family, index - term.lag): index
                      for index, row in enumerate(self.rows) for term in row.terms}  # fmt: skip
        self._past: dict[tuple[str, int], Array] = {}

    @property
    def depth(self) -> int:
        """How many steps back the deepest step reads."""
        return max((row.depth for row in self.rows), default=0)

    def noisy(self, i: int) -> bool:
        """Whether step i adds noise."""
        return self.rows[i].noisy

    def scale(self, i: int, x: Array) -> Array:
        """The sample as the network is shown it at step i."""
        return x if self.rows[i].scale == 1 else wide(x) * self.rows[i].scale

    def step(self, i: int, x: Array, output: Array, noise: Array | None = None) -> Array:
        """The next sample. Step 0 begins a picture; from there on in order.

        Args:
            i: the step's index.
            x: the sample before it, not scaled.
            output: what the network gave; guided, if there is guidance.
            noise: standard normal, of the sample's shape, where the row is `noisy`.

        Raises:
            InputError: noise is missing, or an earlier step that this one reads did not run.
        """
        row = self.rows[i]
        if i == 0:
            self.reset()
        x, output = wide(x), wide(output)
        known = {("sample", i): x, ("output", i): output, **self._past}
        if row.clip is not None:
            p, q = row.clip
            known["clipped", i] = np.clip(p * x + q * output, -1, 1)
        if noise is not None:
            known["noise", i] = wide(noise)
        found = np.zeros_like(x)
        for term in row.terms:
            found += term.factor * self._read(known, term, i)
        self._past = {key: np.array(value) for key, value in known.items()
                      if self._last.get(key, -1) > i}  # fmt: skip
        return found

    def reset(self) -> None:
        """Forget the picture."""
        self._past = {}

    def to_json(self) -> dict[str, Any]:
        """The sampler as JSON's own types."""
        return {
            "name": self.name,
            "timesteps": self.timesteps.tolist(),
            "dtype": str(self.timesteps.dtype),
            "initial_scale": self.initial_scale,
            "rows": [row.to_json() for row in self.rows],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any] | None) -> Sampler:
        """The inverse of `to_json`; also takes what a manifest holds in place of a sampler.

        Raises:
            InputError: the artifact has none, and why.
            ArtifactError: the data are not a sampler.
        """
        if not data or "refused" in data:
            why = data["refused"] if data else "it was compiled without a scheduler"
            raise InputError(f"the artifact has no sampler: {why}")
        try:
            times = np.array(data["timesteps"], dtype=str(data["dtype"]))
            rows = [Row.from_json(row) for row in data["rows"]]
            return Sampler(times, rows, float(data["initial_scale"]), str(data["name"]))
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            raise ArtifactError(f"manifest: the sampler is damaged: {error!r}") from error

    @staticmethod
    def _read(known: Mapping[tuple[str, int], Array], term: Term, i: int) -> Array:
        found = known.get((term.family, i - term.lag))
        if found is None and term.family == "noise" and not term.lag:
            raise InputError(f"step {i} adds noise: hand in standard normal noise of x's shape")
        if found is None:
            raise InputError(
                f"step {i} reads the {term.family} of step {i - term.lag}, which did not run; "
                "begin with step 0"
            )
        return found


def wide(x: Any) -> Array:
    """The array in float32, or in float64 if it is that already."""
    array = np.asarray(x)
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


def nested(spec: ProgramSpec, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by label as the arguments of a call, nested as forward takes them."""
    found: dict[str, Any] = {}
    for item in spec.inputs:
        place = found
        for key in item.path[:-1]:
            place = place.setdefault(key, {})
        if item.label in values:
            place[item.path[-1]] = values[item.label]
    return found


def one(spec: ProgramSpec, role: Role) -> Input:
    """The input of that role.

    Raises:
        InputError: there is none.
    """
    found = next((item for item in spec.inputs if item.role is role), None)
    if found is None:
        raise InputError(f"the artifact has no input with the role {role.value}, which it needs")
    return found


class Denoiser:
    """A compiled network as a function of sample and timestep, guided where that is asked for.

    Args:
        compiled: the network.
        told: the prompt's arrays by input label (`added_cond_kwargs.text_embeds`).
        free: the same without the prompt; None: no guidance.
        guidance: w of free + w · (told - free).

    Where the network's batch is twice the prompt's, or left open so far, both go in as halves of
    one batch; otherwise it is called twice.
    """

    def __init__(
        self, compiled: Any, told: Mapping[str, Any], free: Mapping[str, Any] | None = None,
        guidance: float = 1.0,
    ) -> None:  # fmt: skip
        self.compiled, self.told, self.free, self.guidance = compiled, told, free, guidance
        self.spec: ProgramSpec = compiled.session.spec
        self.latent, self.timestep = one(self.spec, Role.LATENT), one(self.spec, Role.TIMESTEP)

    def __call__(self, x: Array, time: Any) -> Array:
        """The prediction for x; what the network gives beside it (a variance) is left out."""
        if self.free is None:
            return self._run(x, time, self.told)
        if not self._takes(2 * len(x)):
            free, told = self._run(x, time, self.free), self._run(x, time, self.told)
        else:
            guide = self.spec.plan.guidance
            ends = (self.told, self.free) if guide and guide.conditional_first else (
                self.free, self.told)  # fmt: skip
            found = self._run(np.concatenate([x, x]), time, self._halves(*ends))
            free, told = np.split(found, 2)
            if ends[0] is self.told:
                free, told = told, free
        return free + self.guidance * (told - free)

    def _takes(self, rows: int) -> bool:
        size = self.latent.shape[0]
        if isinstance(size, int):
            return size == rows
        low, high = self.spec.bounds.get(size, (1, rows))
        return low <= rows <= high and not (rows - low) % self.spec.steps.get(size, 1)

    def _halves(self, first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Array]:
        prompts = [item for item in self.spec.inputs if item.role is Role.PROMPT]
        batched = {each.label for each in prompts if each.shape[:1] == self.latent.shape[:1]}
        return {label: np.concatenate([first[label], second[label]]) if label in batched
                else np.asarray(first[label]) for label in first}  # fmt: skip

    def _run(self, x: Array, time: Any, prompt: Mapping[str, Any]) -> Array:
        values = {**prompt, self.latent.label: x, self.timestep.label: np.asarray(time)}
        given = {item.label: typed(values[item.label], item) for item in self.spec.inputs
                 if item.label in values}  # fmt: skip
        found = first_of(self.compiled(**nested(self.spec, given)))
        found = found.float().numpy() if hasattr(found, "detach") else found
        return wide(found)[:, : x.shape[1]]


def typed(value: Any, item: Input) -> Any:
    """An array in the dtype of an input; a timestep as it is; a tensor where numpy has no such."""
    if item.role is Role.TIMESTEP:
        return value
    if item.dtype != "bfloat16":
        return np.asarray(value).astype(item.dtype, copy=False)
    import torch  # whatever computes in bfloat16 has it

    return torch.as_tensor(value).to(torch.bfloat16)


def sample(
    compiled: Any, noise: Array, prompt: Mapping[str, Any] | None = None,
    unconditional: Mapping[str, Any] | None = None, *, guidance: float = 1.0,
    sampler: Sampler | None = None, generator: np.random.Generator | None = None,
) -> Array:  # fmt: skip
    """From noise to latents, by the scheduler that the network was compiled with. Numpy only.

    Args:
        compiled: what `effuse.load` or `effuse.compile` gave, with `schedule=` a scheduler.
        noise: standard normal, (pictures, channels, height, width).
        prompt: the network's other inputs, by label (`added_cond_kwargs.text_embeds`).
        unconditional: the same without the prompt; guides, if given.
        guidance: w of unconditional + w · (conditional - unconditional).
        sampler: another scheduler's; None: the artifact's own.
        generator: of the noise that some schedulers add at every step; None: seeded with 0.

    Raises:
        InputError: the artifact has no sampler, and why; or an input does not fit.
    """
    solver = sampler or Sampler.from_json(compiled.manifest.get("sampler"))
    denoise = Denoiser(compiled, prompt or {}, unconditional, guidance)
    return trajectory(denoise, solver, noise, generator or np.random.default_rng(0))


def trajectory(denoise: Any, solver: Any, noise: Array, generator: np.random.Generator) -> Array:
    """All steps of a solver, from standard normal noise."""
    x: Array = wide(noise) * solver.initial_scale
    for index, time in enumerate(solver.timesteps):
        output = denoise(solver.scale(index, x), time)
        fresh = generator.standard_normal(x.shape, np.float32) if solver.noisy(index) else None
        x = solver.step(index, x, output, fresh)
    return x
