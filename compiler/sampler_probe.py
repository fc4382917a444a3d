"""A diffusers scheduler's steps as numbers, found by running it on pixels that are experiments.

A scheduler that computes every pixel alone runs as many experiments as a tensor has pixels. In each
pixel one input of one step is not zero (a sample, an output, a noise), and the pixel's later values
are that input's factors. Small inputs give what is linear; inputs so large that they are clipped
give what is not: with f(L) = eL + b and f(2L) = 2eL + b, e is the slope and b the clipped share.
What was found is then held against the scheduler on random pictures.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from effuse.errors import InputError
from effuse.sampler import Row, Sampler, Term

Array = np.ndarray[Any, Any]

SMALL, LARGE = 2.0**-30, 2.0**24  # surely not clipped, surely clipped; powers of two scale exactly
NOTHING = 1e-12  # relative: a factor that rounding alone made
DEEP, DEEPEST = 3, 8  # steps: rows that look back so far may be shortened, to less than that
SAME = 1e-9  # relative: two rows that say the same, in float64
CLOSE = 2.0**-18  # of a step's terms: some roundings in float32, where a scheduler computes in it
GROUPS = ("x", "o", "n", "X", "2X", "O", "2O")  # the experiments: capitals are large
DRAWS = (torch.randn, torch.randn_like)
OTHER_DRAWS = (torch.rand, torch.rand_like, torch.randint, torch.normal, torch.multinomial,
               torch.bernoulli, torch.Tensor.normal_, torch.Tensor.uniform_)  # fmt: skip
REMEDIES = (  # a config's entry, values of it, and what it may be changed to
    ("thresholding", (True,), "thresholding=False"),
    ("variance_type", ("learned", "learned_range"), "variance_type='fixed_small'"),
)
WORKING = "DDIM, Euler, DPM-Solver++, UniPC, PNDM, Heun and flow-match Euler are known to work"


class Refused(InputError):
    """A scheduler that rows of numbers cannot describe."""


class Noise(TorchFunctionMode):
    """Hands out noise in place of what torch would draw, once a step."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.draws = torch.zeros(0), 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every call into torch while the mode is on."""
        given = dict(kwargs or {})
        if func in OTHER_DRAWS:
            raise Refused("it draws random numbers that are not normal")
        if func not in DRAWS:
            return func(*args, **given)
        like = args[0] if func is torch.randn_like else None
        size = given.get("size", args[0] if len(args) == 1 else args)
        shape = tuple(like.shape if like is not None else size)
        self.draws += 1
        if self.draws > 1 or shape != tuple(self.value.shape):
            raise Refused(f"it draws noise of shape {shape}, {self.draws} times a step")
        dtype = given.get("dtype") or (like.dtype if like is not None else None)
        return self.value.to(dtype=dtype or torch.get_default_dtype(), copy=True)

    def next(self, value: torch.Tensor) -> None:
        """The noise of the next step."""
        self.value, self.draws = value, 0


def probe(scheduler: Any, steps: int | None = None, **timing: Any) -> Sampler:
    """What a diffusers scheduler does at each step, as numbers, checked against itself.

    Args:
        scheduler: it stays as it is.
        steps: for its set_timesteps; None: the timesteps that it has.
        timing: what else set_timesteps takes: `mu`, `sigmas`, `timesteps`.

    Raises:
        InputError: its steps cannot be described so, why, and what could.
    """
    fresh = renewed(scheduler, steps, timing)
    try:
        check_step(fresh)
        solver = described(fresh)
        check(solver, fresh)
    except Refused as error:
        raise InputError(f"{type(scheduler).__name__}: {error}; {remedy(scheduler)}") from error
    return solver


def stored(schedule: Any) -> dict[str, Any] | None:
    """What an artifact keeps of a schedule: its sampler, or why it has none; None without one."""
    if not hasattr(schedule, "step"):  # timesteps alone, or none
        return None
    try:
        return probe(schedule).to_json()
    except InputError as error:
        return {"refused": str(error)}


def remedy(scheduler: Any) -> str:
    """The nearest that works."""
    config = getattr(scheduler, "config", {})
    found = [change for name, values, change in REMEDIES if config.get(name) in values]
    return f"with {' and '.join(found)} it may work" if found else WORKING


def renewed(scheduler: Any, steps: int | None, timing: Mapping[str, Any]) -> Any:
    """A copy of the scheduler that has not stepped yet.

    Raises:
        InputError: it refuses these timesteps, or has none, or has stepped and cannot be set anew.
    """
    name = type(scheduler).__name__
    fresh = copy.deepcopy(scheduler)
    if steps is not None or timing:
        try:
            fresh.set_timesteps(*(() if steps is None else (steps,)), **timing)
        except Exception as error:  # whatever a scheduler raises for what it does not take
            kind = type(error).__name__
            raise InputError(f"{name}: set_timesteps raised {kind}: {error}") from error
        return fresh
    times = getattr(scheduler, "timesteps", None)
    if times is None or not len(times):
        raise InputError(f"{name}: no timesteps; call set_timesteps first, or give steps")
    again = copy.deepcopy(scheduler)
    try:
        again.set_timesteps(getattr(scheduler, "num_inference_steps", None) or len(times))
    except Exception:  # it wants more than a number, and only its owner knows what
        again = None
    if again is not None and same_times(scheduler, again):
        return again
    if getattr(scheduler, "step_index", None) is not None:
        raise InputError(f"{name}: has stepped already; call set_timesteps anew before")
    return fresh


def same_times(one: Any, other: Any) -> bool:
    """Whether two schedulers have the same timesteps and noise levels."""
    for name in ("timesteps", "sigmas"):
        first, second = getattr(one, name, None), getattr(other, name, None)
        given = [torch.as_tensor(each).cpu() for each in (first, second) if each is not None]
        if len(given) == 1 or (given and not torch.equal(*given)):
            return False
    return True


def check_step(scheduler: Any) -> None:
    """Refuse a scheduler that takes other things than outputs, timesteps and samples."""
    if not callable(getattr(scheduler, "step", None)):
        raise Refused("it has no method step")
    taken = list(inspect.signature(scheduler.step).parameters.values())
    if [each.name for each in taken[1:3]] != ["timestep", "sample"]:
        first = ", ".join(each.name for each in taken[:3])
        raise Refused(f"its step takes ({first}, …) in place of (output, timestep, sample)")
    needed = [each.name for each in taken[3:] if each.default is each.empty
              and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]  # fmt: skip
    if needed:
        raise Refused(f"its step also needs {', '.join(needed)}")


class Runner:
    """One run of a copy of a scheduler, with noise handed in."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.noise = copy.deepcopy(scheduler), Noise()
        takes = inspect.signature(scheduler.step).parameters
        self.options = {"return_dict": False} if "return_dict" in takes else {}

    def step(
        self, index: int, x: torch.Tensor, output: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sample as the network is shown it, and the next sample."""
        time = self.scheduler.timesteps[index]
        scale = getattr(self.scheduler, "scale_model_input", lambda value, _: value)
        self.noise.next(noise)
        try:
            with self.noise, torch.no_grad():
                shown = scale(x, time)
                found = self.scheduler.step(output, time, x.clone(), **self.options)
        except Refused:
            raise
        except Exception as error:  # a scheduler is anybody's code
            raise Refused(f"its step {index} raised {type(error).__name__}: {error}") from error
        found = found[0] if isinstance(found, tuple) else getattr(found, "prev_sample", found)
        if not torch.is_tensor(found) or found.shape != x.shape or not found.is_floating_point():
            raise Refused(f"its step {index} does not give a sample of the sample's shape")
        return shown.double(), found.double()


@dataclass(frozen=True)
class Factors:
    """By family the factors (step, step read) of the samples, and each step's clip and scale."""

    tables: Mapping[str, Array]
    clips: Mapping[int, tuple[float, float]]
    scales: Array


def described(scheduler: Any) -> Sampler:
    """The scheduler's sampler, not yet checked."""
    factors = measured(*responses(scheduler))
    rows = [row_of(factors, index) for index in range(len(factors.scales))]
    start = float(getattr(scheduler, "init_noise_sigma", 1.0))
    times = scheduler.timesteps.cpu().numpy().copy()
    return Sampler(times, shortened(rows), start, type(scheduler).__name__)


def responses(scheduler: Any) -> tuple[Array, Array]:
    """What came of each experiment, (step, group, step of the input), and the samples' scales."""
    run, count = Runner(scheduler), len(scheduler.timesteps)
    sizes = {"x": SMALL, "o": SMALL, "n": SMALL,
             "X": LARGE, "2X": 2 * LARGE, "O": LARGE, "2O": 2 * LARGE}  # fmt: skip
    found, scales = np.zeros((count, len(GROUPS), count)), np.ones(count)
    for index in range(count):
        given = {kind: torch.zeros(len(GROUPS) * count + 1, dtype=torch.float64) for kind in "xon"}
        for place, group in enumerate(GROUPS):
            given[group[-1].lower()][place * count + index] = sizes[group]
        x, output, noise = (given[kind].reshape(1, 1, 1, -1) for kind in "xon")
        shown, after = run.step(index, x, output, noise)
        values = after.flatten().numpy()
        if not np.isfinite(values).all():
            raise Refused(f"its step {index} gives numbers that are not finite")
        if values[-1] != 0:
            raise Refused(f"its step {index} makes something of nothing but zeros")
        found[index] = values[:-1].reshape(len(GROUPS), count)
        scales[index] = float(shown.flatten()[index]) / SMALL
    return found, scales


def measured(found: Array, scales: Array) -> Factors:
    """The factors that explain the responses."""
    small = {kind: found[:, GROUPS.index(kind)] / SMALL for kind in "xon"}
    slopes, jumps = {}, {}
    for kind in "xo":
        first, second = (found[:, GROUPS.index(size + kind.upper())] for size in ("", "2"))
        slopes[kind] = (second - first) / LARGE
        jumps[kind] = 2 * first - second
    for kind in "xo":
        floor = LARGE * np.abs(slopes[kind]) * 2.0**-48  # rounding of the large experiments
        floor = np.maximum(floor, NOTHING * np.abs(jumps[kind]).max())
        jumps[kind] = np.where(np.abs(jumps[kind]) > floor, jumps[kind], 0)
    clipped = np.where(jumps["o"].any(axis=0), jumps["o"], jumps["x"])
    clips = {}
    for index in np.flatnonzero(np.abs(clipped).max(axis=0)):
        at = int(np.argmax(np.abs(clipped[:, index])))
        p, q = ((small[kind][at, index] - slopes[kind][at, index]) / clipped[at, index]
                for kind in "xo")  # fmt: skip
        clips[int(index)] = (float(p), float(q))
    columns = np.isin(np.arange(len(scales)), list(clips))
    tables = {
        "sample": np.where(columns, slopes["x"], small["x"]),
        "output": np.where(columns, slopes["o"], small["o"]),
        "clipped": clipped,
        "noise": small["n"],
    }
    return Factors(tables, clips, scales)


def row_of(factors: Factors, index: int) -> Row:
    """One step's row, without factors that rounding made."""
    least = NOTHING * max(np.abs(table[index]).max() for table in factors.tables.values())
    terms = tuple(
        Term(family, index - int(step), float(table[index, step]))
        for family, table in factors.tables.items()
        for step in reversed(np.flatnonzero(np.abs(table[index, : index + 1]) > least))
    )
    return Row(float(factors.scales[index]), terms, factors.clips.get(index))


def shortened(rows: list[Row]) -> list[Row]:
    """The rows, looking back less where they can: a corrector looks back to the first step.

    What a scheduler remembers, it also put into the samples that it gave. So the samples of a few
    steps may stand for older ones: in terms of what comes from outside, the first sample, outputs
    and noises, both say the same.
    """
    if any(row.clip for row in rows) or max(row.depth for row in rows) < DEEP:
        return rows
    samples = [np.eye(1, 1 + 2 * len(rows))[0]]
    found = []
    for index, row in enumerate(rows):
        vector = expressed(row, samples, index)
        depths = range(1, min(row.depth, DEEPEST)) if row.depth >= DEEP else ()
        tried = (shallow(row, vector, samples, index, depth) for depth in depths)
        short = next((each for each in tried if each is not None), row)
        found.append(min(row, short, key=lambda each: len(each.terms)))
        samples.append(vector)
    return found


def expressed(row: Row, samples: Sequence[Array], index: int) -> Array:
    """The row's sum as factors of the first sample and of each step's output and noise."""
    vector = np.zeros_like(samples[0])
    for term in row.terms:
        step = index - term.lag
        if term.family == "sample":
            vector += term.factor * samples[step]
        else:
            vector[1 + 2 * step + (term.family == "noise")] += term.factor
    return vector


def shallow(
    row: Row, vector: Array, samples: Sequence[Array], index: int, depth: int
) -> Row | None:
    """The row that looks back `depth` steps and comes to the same; None if there is none."""
    old = 1 + 2 * (index - depth)  # what came before the steps that it may read
    kept = np.stack(samples[index - depth :][::-1], axis=1)
    factors, *_ = np.linalg.lstsq(kept[:old], vector[:old], rcond=None)
    rest = vector - kept @ factors
    if np.abs(rest[:old]).max() > SAME * np.abs(vector).max():
        return None
    terms = [Term("sample", lag, float(each)) for lag, each in enumerate(factors)]
    for place, family in enumerate(("output", "noise")):
        values = rest[old + place : 3 + 2 * index : 2][::-1]
        terms += [Term(family, lag, float(each)) for lag, each in enumerate(values)]
    least = NOTHING * np.abs(vector).max()
    return Row(row.scale, tuple(term for term in terms if abs(term.factor) > least))


def check(solver: Sampler, scheduler: Any) -> None:
    """Run both on random pictures, in float64, and refuse where a step differs.

    Raises:
        Refused: the first step that does, and by how much.
    """
    run, generator = Runner(scheduler), np.random.default_rng(0)
    shape = (2, 3, 4, 5)
    x = generator.standard_normal(shape) * solver.initial_scale
    for index in range(len(solver.timesteps)):
        output, noise = (generator.standard_normal(shape) for _ in range(2))
        output = output * generator.choice([0.5, 2.0], shape[:2])[:, :, None, None]
        given = (torch.from_numpy(each) for each in (x, output, noise))
        shown, expected = (each.numpy() for each in run.step(index, *given))
        found = solver.step(index, x, output, noise)
        size = max(np.abs(each).max() for each in (x, output, noise, expected))
        error = max(np.abs(found - expected).max(), np.abs(solver.scale(index, x) - shown).max())
        if not error <= CLOSE * size:
            raise Refused(
                f"its step {index} is not affine in sample, outputs and noise, or looks at more "
                f"than a pixel: off by {error / size:.1g} of the largest number"
            )
        x = expected
