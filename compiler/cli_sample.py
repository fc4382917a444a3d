"""The verb run: pictures from an artifact."""

from __future__ import annotations

import dataclasses
import inspect
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from effuse import api
from effuse.cli_text import check_place, out, shape_text, size_text, whole_file
from effuse.devices import CPU
from effuse.errors import ConfigError, InputError, MissingExtra, nearest, require
from effuse.plan import Input, ProgramSpec, Role
from effuse.report_plan import variants_text
from effuse.sampler import Array, Denoiser, Sampler, one, trajectory

Values = dict[str, Any]  # label -> array

STEPS = 50  # where neither the person nor the artifact says
BATCH = 4  # pictures, where the batch is left open
SMALLEST = 256  # pixels: smaller grids are enlarged by a whole factor


@dataclass(frozen=True)
class Sampling:
    """What the person asked to sample."""

    artifact: str
    output: Path
    steps: int | None = None
    scheduler: Path | None = None
    inputs: Path | None = None
    uncond: Path | None = None
    guidance: float = 1.0
    seed: int = 0
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    loras: Mapping[Path, float] = dataclasses.field(default_factory=dict)  # with their scales
    cpu: bool = False  # in place of the device that it was built for


def read_arrays(path: Path | None, spec: ProgramSpec) -> Values:
    """The arrays of an .npz or .safetensors file by input label; none without a file.

    Raises:
        InputError: the file cannot be read, or names an input that the artifact does not have.
    """
    if path is None:
        return {}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                found = dict(file)
        else:
            found = require("safetensors.numpy").load_file(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as .npz or .safetensors: {error}") from error
    labels = [item.label for item in spec.inputs if item.role is not Role.TIMESTEP]
    for name in found:
        if name not in labels:
            raise InputError(f"{path}: the artifact has no input {name!r}{nearest(name, labels)}")
    return found


def open_sizes(
    spec: ProgramSpec, given: Mapping[str, Any], wanted: Mapping[str, int]
) -> dict[str, int]:
    """A number for each size left open: asked for, else of the given arrays, else within bounds.

    Raises:
        ConfigError: a size was asked for that the artifact does not leave open.
    """
    names = {size for item in spec.inputs for size in item.shape if isinstance(size, str)}
    for name in wanted:
        if name not in names:
            raise ConfigError(f"--size: {name!r} is not left open{nearest(name, names)}")
    found = {name: min(max(BATCH, low), high) for name, (low, high) in spec.bounds.items()}
    found |= spec.shapes[0] if spec.shapes else {}
    for item in spec.inputs:
        shape = np.shape(given[item.label]) if item.label in given else ()
        found |= {name: size for name, size in zip(item.shape, shape, strict=False)
                  if isinstance(name, str)}  # fmt: skip
    return {**found, **wanted}


def shape_of(item: Input, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The input's shape as numbers."""
    return tuple(size if isinstance(size, int) else sizes[size] for size in item.shape)


def fill(
    spec: ProgramSpec, given: Values, sizes: Mapping[str, int], say: Callable[[str], None]
) -> Values:
    """Every input but latent and timestep: given, or ones for masks and zeros for the rest."""
    found = {}
    for item in spec.inputs:
        if item.role in (Role.LATENT, Role.TIMESTEP):
            continue
        if item.label in given:
            found[item.label] = given[item.label].astype(item.dtype, copy=False)
            continue
        value = 1 if item.label.endswith("mask") else 0
        found[item.label] = np.full(shape_of(item, sizes), value, item.dtype)
        say(f"{item.label}: {'ones' if value else 'zeros'}, since no file gives it")
    return found


def prepare_scheduler(request: Sampling, spec: ProgramSpec) -> Any:
    """The scheduler with its timesteps set, which are the artifact's where it has a schedule.

    Raises:
        ConfigError: the timesteps differ.
    """
    diffusers = require("diffusers", "diffusers")
    require("torch", "diffusers")
    from effuse.build import timesteps_of
    from effuse.cli_build import load_scheduler, set_steps

    plain = request.scheduler is None
    scheduler = diffusers.DDIMScheduler() if plain else load_scheduler(Path(str(request.scheduler)))
    known = spec.timesteps
    scheduler = set_steps(scheduler, request.steps or len(known or ()) or STEPS)
    times = timesteps_of(scheduler)
    assert times is not None
    found = tuple(float(each) for each in times)
    if known is not None and sorted(found) != sorted(known):
        name = "a plain DDIMScheduler" if plain else str(request.scheduler)
        raise ConfigError(
            f"the artifact was compiled for the {steps_text(known)}, but {name} gives the "
            f"{steps_text(found)}; give the scheduler and the steps that it was compiled with: "
            f"--scheduler DIR --steps {len(known)}"
        )
    return scheduler


def steps_text(times: Sequence[float]) -> str:
    """`3 timesteps 999, 666, 333`, long lists cut."""
    words = [f"{each:g}" for each in times]
    shown = words if len(words) <= 4 else [*words[:3], "…", words[-1]]
    return f"{len(times)} timesteps {', '.join(shown)}"


class Live:
    """A diffusers scheduler where a sampler is expected; it draws its own noise."""

    def __init__(self, scheduler: Any, seed: int) -> None:
        import torch

        self.scheduler = scheduler
        self.timesteps = scheduler.timesteps.cpu().numpy()
        self.initial_scale = float(getattr(scheduler, "init_noise_sigma", 1.0))
        takes_noise = "generator" in inspect.signature(scheduler.step).parameters
        generator = torch.Generator().manual_seed(seed)
        self.options = {"generator": generator} if takes_noise else {}

    def noisy(self, i: int) -> bool:
        """Whether step i has to be handed noise."""
        return False

    def scale(self, i: int, x: Array) -> Array:
        """The sample as the network is shown it."""
        import torch

        scale = getattr(self.scheduler, "scale_model_input", lambda value, _: value)
        shown: Array = scale(torch.from_numpy(x), self.scheduler.timesteps[i]).numpy()
        return shown

    def step(self, i: int, x: Array, output: Array, noise: Array | None = None) -> Array:
        """The next sample."""
        import torch

        given = torch.from_numpy(output), self.scheduler.timesteps[i], torch.from_numpy(x)
        after: Array = self.scheduler.step(*given, **self.options).prev_sample.numpy()
        return after


def solver_of(request: Sampling, spec: ProgramSpec, kept: Mapping[str, Any] | None) -> Any:
    """The artifact's own sampler, or the scheduler or number of steps that was asked for.

    Raises:
        MissingExtra: that needs diffusers, which is not installed.
    """
    own = Sampler.from_json(kept) if kept and "refused" not in kept else None
    if own and request.scheduler is None and request.steps in (None, len(own.timesteps)):
        return own
    try:
        return Live(prepare_scheduler(request, spec), request.seed)
    except MissingExtra as error:
        why = "other steps were asked for than it has" if own else (
            kept["refused"] if kept else "it was compiled without a scheduler")  # fmt: skip
        raise MissingExtra(f"no sampler of the artifact's own: {why}; {error}") from error


def sample(request: Sampling) -> None:
    """Sample pictures from an artifact, and write them as one grid."""
    check_place(request.output)
    console = out()
    compiled = api.load(request.artifact, providers=(CPU,) if request.cpu else ())
    spec = compiled.session.spec
    for path, scale in request.loras.items():
        name = compiled.load_lora(path, scale)
        layers = len(compiled.loras[-1].pairs)
        console.print(f"LoRA {escape(name)}: {layers} layers, scale {scale:g}", emoji=False)
    shape, told, free = sampling_inputs(request, spec, console)
    solver = solver_of(request, spec, compiled.manifest.get("sampler"))
    denoise = Denoiser(compiled, told, free, request.guidance)
    generator = np.random.default_rng(request.seed)
    noise = generator.standard_normal(shape, np.float32)
    start = time.perf_counter()
    latents = trajectory(denoise, solver, noise, generator)
    seconds = time.perf_counter() - start
    write_grid(latents, request.output, console)
    steps = len(solver.timesteps)
    console.print(
        f"[bold]wrote[/] {escape(str(request.output))} "
        f"({size_text(request.output.stat().st_size)}, {shape[0]} pictures, {steps} steps, "
        f"{seconds:.1f} s, {1000 * seconds / steps:.0f} ms a step)"
    )
    if ran := variants_text(compiled.session.steps):
        console.print(f"ran {ran}")


def halved(spec: ProgramSpec) -> ProgramSpec:
    """The inputs as the caller has them, where the plan wants both halves of guidance at once."""
    rows = one(spec, Role.LATENT).shape[0]
    if spec.plan.guidance is None or not isinstance(rows, int):
        return spec
    halves = tuple(
        dataclasses.replace(item, shape=(rows // 2, *item.shape[1:]))
        if item.shape[:1] == (rows,) else item
        for item in spec.inputs
    )  # fmt: skip
    return dataclasses.replace(spec, inputs=halves)


def sampling_inputs(
    request: Sampling, spec: ProgramSpec, console: Console
) -> tuple[tuple[int, ...], Values, Values | None]:
    """The latent's shape, the prompt's arrays, and those without a prompt if guidance is on."""
    latent = one(spec, Role.LATENT)
    if len(latent.shape) != 4:
        raise InputError(
            f"the latent {latent.label} is {shape_text(latent.shape)}, and run makes pictures of "
            "latents of shape batch×channels×height×width only; use effuse.load in Python"
        )
    if request.guidance > 1:
        spec = halved(spec)
        latent = one(spec, Role.LATENT)
    given = read_arrays(request.inputs, spec)
    sizes = open_sizes(spec, given, request.sizes)
    told = fill(spec, given, sizes, console.print)
    if request.guidance <= 1:
        return shape_of(latent, sizes), told, None
    if not told:
        raise ConfigError("--guidance: the artifact has no prompt input to guide with")
    free = fill(spec, read_arrays(request.uncond, spec), sizes,
                lambda text: console.print(f"without a prompt, {text}"))  # fmt: skip
    return shape_of(latent, sizes), told, free


def write_grid(latents: Any, path: Path, console: Console) -> None:
    """Latents (n, c, h, w) in [-1, 1] as one PNG, as near to a square as they fit."""
    image = require("PIL.Image")
    count, channels, height, width = latents.shape
    if channels not in (1, 3):
        console.print(
            f"note: {channels} channels are no picture yet (a VAE decodes them); the first "
            f"{min(channels, 3)} are drawn as they are",
            style="yellow",
        )
    colours = latents[:, :3] if channels >= 3 else latents[:, :1].repeat(3, axis=1)
    pixels = ((np.clip(np.nan_to_num(colours), -1, 1) + 1) * 127.5).round().astype(np.uint8)
    across = int(np.ceil(np.sqrt(count)))
    down = -(-count // across)
    grid = np.zeros((across * down, height, width, 3), np.uint8)
    grid[:count] = pixels.transpose(0, 2, 3, 1)
    grid = grid.reshape(down, across, height, width, 3).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(down * height, across * width, 3)
    factor = -(-SMALLEST // max(grid.shape[:2]))
    with whole_file(path) as staged:
        image.fromarray(grid.repeat(factor, axis=0).repeat(factor, axis=1)).save(staged, "PNG")
