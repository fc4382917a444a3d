"""The verbs that start from a network: compile, its dry run, and dump of a network."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import nn

from effuse import api, artifact, build
from effuse.buckets import completed, sizes_text
from effuse.build_buckets import wanted_sizes
from effuse.capture_inputs import dynamic_shapes, flatten_inputs, named_sizes
from effuse.capture_layout import laid_out
from effuse.cli_text import check_place, out, shape_text, size_text, table, whole_file
from effuse.config import Config
from effuse.config import resolve as resolve_config
from effuse.dump import dump
from effuse.errors import ConfigError, require
from effuse.inspect_model import load_folder, resolve
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Pass
from effuse.program import Program
from effuse.resume import finished, part_of
from effuse.roles import infer_roles

FILES = {
    "onnx": "<part>.onnx for each part (a step, and what runs once a picture), weights.safetensors",
    "openvino": "<part>.onnx for each part, weights.safetensors, openvino.json",
    "reference": "graphs.json, weights.safetensors",
    "tensorrt": "<part>.onnx, weights.safetensors, engines.json, build_engines.py, trtexec.txt",
    "triton": "graphs.json, weights.safetensors, kernels.json, a cubin for each kernel",
}
ALWAYS = "manifest.json, SHA256SUMS, graphs.txt.gz"


@dataclass(frozen=True)
class Request:
    """What the person asked to build."""

    model: str
    config: str = "exact"
    steps: int | None = None
    scheduler: Path | None = None
    timesteps: Sequence[float] | None = None
    backend: str | None = None
    target: str | None = None
    batch: int | None = None
    dynamic: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    shapes: Sequence[Mapping[str, int]] = ()
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    stream: bool = False
    resume: Path | None = None

    def settings(self) -> Config:
        """The configuration, with the command line's overrides."""
        base = resolve_config(self.config)
        given = {name: getattr(base, name) for name in type(base).model_fields}
        given["backend"] = self.backend or base.backend
        given["target"] = self.target or base.target
        given["stream"] = base.stream or self.stream
        given["roles"] = {**base.roles, **self.roles}
        given["dynamic"] = {**base.dynamic, **self.dynamic}
        given["shapes"] = self.shapes or base.shapes
        return Config(**given)

    def schedule(self) -> Any:
        """The timesteps, or a scheduler with its timesteps set, or None for any timestep.

        Raises:
            ConfigError: a number of steps without a scheduler, or a scheduler without one.
        """
        if self.timesteps is not None:
            return list(self.timesteps)
        if self.steps is None:
            if self.scheduler is not None:
                raise ConfigError("--scheduler: give the number of steps too: --steps 50")
            return None
        folder = self.scheduler or Path(self.model) / "scheduler"
        if self.scheduler is None and not folder.is_dir():
            raise ConfigError(
                f"--steps {self.steps}: {self.model} has no scheduler/ folder; add --scheduler "
                'DIR, or give the timesteps themselves: --timesteps "999,979,…"'
            )
        return set_steps(load_scheduler(folder), self.steps)


def load_scheduler(folder: Path) -> Any:
    """The diffusers scheduler whose scheduler_config.json is in `folder` or `folder`/scheduler.

    Raises:
        ConfigError: there is none, or it names no diffusers scheduler.
    """
    places = [place / "scheduler_config.json" for place in (folder, folder / "scheduler")]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise ConfigError(f"{folder}: holds no scheduler_config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: does not name a scheduler's class: {error}") from error
    kind = getattr(require("diffusers", "diffusers"), str(name), None)
    if not hasattr(kind, "set_timesteps"):
        raise ConfigError(f"{path}: {name!r} is no scheduler of the installed diffusers")
    return kind.from_config(config)  # type: ignore[union-attr]


def set_steps(scheduler: Any, steps: int) -> Any:
    """The scheduler with its timesteps set.

    Raises:
        ConfigError: it refuses so many steps.
    """
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, TypeError) as error:
        kind = type(scheduler).__name__
        raise ConfigError(f"{kind} does not take {steps} steps: {error}") from error
    return scheduler


def example_inputs(request: Request, network: nn.Module, times: Any) -> dict[str, Any]:
    """Example inputs from the network's own config, of the batch that was asked for."""
    from effuse.examples import derive_inputs

    middle = None if times is None else times[len(times) // 2]
    batch = {} if request.batch is None else {"batch": request.batch}
    return derive_inputs(network, timestep=middle, device=torch.device("cpu"), **batch)


def check_folder(model: str) -> None:
    """Refuse what is no network with weights, in terms of what would be.

    Raises:
        ConfigError: the folder does not exist, or holds a whole pipeline.
    """
    path = Path(model)
    if not path.is_dir():
        raise ConfigError(f"{model}: no such folder; give one that save_pretrained wrote")
    if not (path / "config.json").is_file() and (path / "model_index.json").is_file():
        inside = ("unet", "transformer")
        found = [str(path / name) for name in inside if (path / name).is_dir()]
        raise ConfigError(f"{model}: a whole pipeline; give its network: {' or '.join(found)}")


def compile_to(request: Request, output: Path, page: Path | None, quiet: bool) -> None:
    """Compile, save to `output`, and say what was written; `page` gets the report as HTML."""
    artifact.check_target(output)
    check_place(page)
    check_folder(request.model)
    settings, schedule = request.settings(), request.schedule()
    console = Console(quiet=True) if quiet else out()
    passes = ", ".join(each.name for each in settings.passes) or "no passes"
    console.print(f"compiling {escape(request.model)} for {settings.backend} ({passes})")
    folder = Path(request.model)
    network = resolve(request.model) if settings.stream else load_folder(folder)
    inputs = example_inputs(request, network, build.timesteps_of(schedule))
    model = folder if settings.stream else network
    kept = (request.resume or part_of(output)) if settings.stream else request.resume
    tell_kept(console, kept)
    compiled = api.compile(
        model, settings, inputs=inputs, schedule=schedule, progress=not quiet, resume=kept
    )
    compiled.save(output)
    if page is not None:
        with whole_file(page) as staged:
            compiled.report.to_html(staged)
    compiled.report.summary(console)
    tell_written(console, output, compiled, page)


def tell_kept(console: Console, kept: Path | None) -> None:
    """Where an interrupted build goes on, and with what."""
    if kept is None:
        return
    if found := finished(kept):
        console.print(f"going on with {escape(str(kept))}, which has {found} finished tensors")
    else:
        console.print(f"what is finished is kept in {escape(str(kept))}; if this is interrupted, "
                      "the same command goes on")  # fmt: skip


def tell_written(console: Console, output: Path, compiled: api.Compiled, page: Path | None) -> None:
    """What was written, where, and how large it is."""
    kind = "zip" if output.suffix == ".zip" else "folder"
    total = output.stat().st_size if kind == "zip" else compiled.size
    console.print(f"\n[bold]wrote[/] {escape(str(output))} ({kind}, {size_text(total)})")
    files = table("file", "size", right=("size",))
    for path in sorted(compiled.folder.iterdir()):
        files.add_row(f"  {path.name}", size_text(path.stat().st_size))
    console.print(files)
    if page is not None:
        console.print(f"[bold]wrote[/] {escape(str(page))} ({size_text(page.stat().st_size)})")


def dry_run(request: Request, output: Path | None, page: Path | None) -> None:
    """Print what would be done, without capturing or writing anything."""
    if output is not None:
        artifact.check_target(output)
    check_place(page)
    check_folder(request.model)
    console, settings = out(), request.settings()
    times = build.timesteps_of(request.schedule())
    network = resolve(request.model)
    show_config(console, settings, times)
    show_inputs(console, settings, network, example_inputs(request, network, times))
    show_output(console, settings, network, output, page)


def show_config(console: Console, settings: Config, times: Any) -> None:
    """The resolved configuration, and the passes in their legal order."""
    data = settings.data()
    rows = table("configuration", "")
    for name in sorted(data.keys() - {"passes"}):
        rows.add_row(f"  {name}", escape(json.dumps(data[name])))
    rows.add_row("  schedule", schedule_text(times))
    console.print(rows)
    passes = table("pass, in order", "kind", "options")
    for each in (Canonicalize(), *settings.passes):
        passes.add_row(f"  {each.name}", kind_text(each), escape(options_text(each)))
    console.print()
    console.print(passes)


def schedule_text(times: Any) -> str:
    """`50 timesteps, 980 to 0`."""
    if times is None:
        return "any timestep"
    return f"{len(times)} timesteps, {float(times[0]):g} to {float(times[-1]):g}"


def kind_text(each: Pass | type[Pass]) -> str:
    """`exact` or `lossy`."""
    return "exact" if each.exact else "lossy"


def options_text(each: Pass) -> str:
    """`format=w8a8, edges=False`."""
    options = dataclasses.asdict(each).items()
    return ", ".join(f"{name}={value}" for name, value in options if value != ()) or "-"


def show_inputs(
    console: Console, settings: Config, network: nn.Module, inputs: Mapping[str, Any]
) -> None:
    """The inputs with their roles and shapes, and the sizes left open."""
    leaves, constants = flatten_inputs(inputs)
    roles = infer_roles({leaf.label: leaf.tensor.dim() for leaf in leaves}, settings.roles)
    leaves = laid_out(network, inputs, leaves, roles, wanted_sizes(settings))
    dynamic_shapes(inputs, leaves, roles, settings.dynamic)  # raises for a size of no known name
    rows = table("input", "role", "shape", "dtype")
    for leaf in leaves:
        dtype = str(leaf.tensor.dtype).removeprefix("torch.")
        label = escape(leaf.label)
        rows.add_row(f"  {label}", roles[leaf.label].value, shape_text(leaf.tensor.shape), dtype)
    for name, value in constants.items():
        rows.add_row(f"  {escape(name)}", "constant", escape(repr(value)), "")
    console.print()
    console.print(rows)
    for name, (low, high) in settings.dynamic.items():
        console.print(f"  {name} is left open, {low} to {high}")
    for sizes in completed(settings.shapes, named_sizes(leaves, roles)):
        console.print(f"  a program of its own for {sizes_text(sizes)}")


def show_output(
    console: Console, settings: Config, network: nn.Module, output: Path | None, page: Path | None
) -> None:
    """What compile would write."""
    backend, fallback = build.pick_backend(settings)
    if fallback:
        console.print(f"\n[yellow]onnx cannot be used: {escape(fallback)}[/]")
    weights = sum(each.numel() * each.element_size() for each in network.parameters())
    where = "nowhere yet: add -o OUT" if output is None else escape(str(output))
    console.print(f"\n[bold]would write[/] {where}")
    console.print(f"  {FILES[backend]}, {ALWAYS}")
    console.print(f"  the network's weights are {size_text(weights)} before any pass")
    if page is not None:
        console.print(f"[bold]would write[/] {escape(str(page))} (the report)")
    console.print("nothing was compiled or written: a dry run", style="dim")


def network_text(target: str) -> str:
    """The text of a network's graph, captured and canonicalized.

    A folder is loaded with its weights; a class or a JSON file is built without any.
    """
    from effuse.examples import derive_inputs

    if Path(target).is_dir():
        check_folder(target)
        network = load_folder(Path(target))
    else:
        network = resolve(target)
    program = build.capture_program(network, derive_inputs(network), None, Config())
    return program_text(run_passes(program, (Canonicalize(),)))


def program_text(program: Program) -> str:
    """The text of all parts, as an artifact keeps it."""
    return "\n".join(f"# {part.name}\n{dump(part.graph)}" for part in program.parts)
