"""The phases of a compilation: capture, rewrite, lower; `api.compile` strings them together."""

from __future__ import annotations

import gzip
import importlib
import importlib.metadata
import inspect
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effuse import __version__, artifact, stream
from effuse.build_buckets import Bucket, buckets_of, capture_open, to_build
from effuse.calibrate import Progress, calibrate, draw_calls, drive, layer_values, needs_of
from effuse.capture_unwrap import by_name, parameter_names, unwrapped
from effuse.config import Config
from effuse.cost import part_costs, plan_costs, rate_costs
from effuse.dump import dump
from effuse.errors import BackendError, ConfigError
from effuse.graph import calls
from effuse.kernels.table import BY_TARGET
from effuse.parity import UNCHECKED, check_parity, narrow_floats, worst_parity
from effuse.pass_manager import fuel_from_environment, run_passes
from effuse.passes import Canonicalize
from effuse.passes.base import Purpose
from effuse.plan import Role, to_json
from effuse.program import Program
from effuse.progress import Phases
from effuse.roles import TIMESTEP_NAMES
from effuse.runtime import Session
from effuse.sampler_probe import stored
from effuse.statistics import Calibration
from effuse.watch import Watch

BESIDE = ("rates", "sampler")  # entries of a program's model that the manifest holds beside it
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino", "diffusers", "numpy",
             "triton")  # fmt: skip


def capture_program(
    model: Any, inputs: Mapping[str, Any] | None, schedule: Any, config: Config,
    progress: Progress = lambda what, done, total: None,
) -> Program:  # fmt: skip
    """Capture the network, with example inputs derived where none are given."""
    network = stream.ghost(model) if config.stream else load_network(model)
    times = timesteps_of(schedule)
    first = None if times is None else times[len(times) // 2]
    if inputs is None:
        from effuse.examples import derive_inputs

        device = torch.device("cpu") if config.stream else None
        with by_name(network):
            inputs = derive_inputs(network, timestep=first, device=device)
    elif times is not None:
        inputs = on_schedule(inputs, times, config)
    known = None if times is None else as_given(times, inputs, config)
    place = stream.on_meta if config.stream else dict
    program, inputs = capture_open(network, inputs, config, known, place)
    if config.stream:
        program = stream.attach(program, Path(model), network, inputs, progress)
    rates = rate_costs(program, parameter_names=parameter_names(network))
    return replace(
        program,
        constants={**plain_defaults(network, inputs), **program.constants},
        model={**program.model, "rates": rates, "sampler": stored(schedule)},
    )


def plain_defaults(network: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of forward that were captured with it, so that a call may repeat them."""
    parameters = inspect.signature(network.forward).parameters
    return {
        name: each.default
        for name, each in parameters.items()
        if name not in inputs
        and name != "return_dict"
        and isinstance(each.default, (bool, int, float, str))
    }


def load_network(model: Any) -> nn.Module:
    """The network itself, or the one that save_pretrained wrote to a folder, in eval mode."""
    if not isinstance(model, (str, os.PathLike)):
        return unwrapped(model)
    from effuse.inspect_model import load_folder

    return load_folder(Path(model))


def timesteps_of(schedule: Any) -> torch.Tensor | None:
    """The distinct timesteps of a diffusers scheduler, or of a sequence of numbers, in order.

    Raises:
        ConfigError: there are none.
    """
    if schedule is None:
        return None
    times = getattr(schedule, "timesteps", schedule)
    if times is None or len(times) == 0:
        raise ConfigError(
            "schedule: no timesteps; call scheduler.set_timesteps(n) before compiling"
        )
    tensor = torch.as_tensor(times).cpu().flatten()
    return torch.tensor(list(dict.fromkeys(tensor.tolist())), dtype=tensor.dtype)


def on_schedule(inputs: Mapping[str, Any], times: torch.Tensor, config: Config) -> dict[str, Any]:
    """The example inputs with a timestep that the schedule has, in a dtype that can hold it."""
    found = dict(inputs)
    whole = bool((times == times.round()).all())
    for name, value in timestep_inputs(inputs, config).items():
        dtype = value.dtype if whole or value.is_floating_point() else times.dtype
        known = times.to(dtype)
        if value.dtype != dtype or not torch.isin(value.flatten()[0], known):
            found[name] = torch.full_like(value, known[len(known) // 2].item(), dtype=dtype)
    return found


def timestep_inputs(inputs: Mapping[str, Any], config: Config) -> dict[str, torch.Tensor]:
    """The example inputs that are timesteps, by the configuration or by their names."""
    names = {n for n, role in config.roles.items() if role == Role.TIMESTEP} | TIMESTEP_NAMES
    return {n: v for n, v in inputs.items() if n in names and isinstance(v, torch.Tensor)}


def as_given(times: torch.Tensor, inputs: Mapping[str, Any], config: Config) -> tuple[float, ...]:
    """The timesteps as the network is given them: rounded to the dtype of its input."""
    dtypes = [value.dtype for value in timestep_inputs(inputs, config).values()]
    rounded = times.to(dtypes[0]) if dtypes else times
    return tuple(dict.fromkeys(float(time) for time in rounded))


def calibrate_for(
    config: Config,
    program: Program,
    feed: Any,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Calibrate as the configuration says, keeping what its passes need."""
    options: Any = {"seed": config.seed, "progress": progress}
    draw, count = config.calibration_steps, config.calibration_calls
    return calibrate(
        program,
        feed,
        layer_values,
        groups=config.step_groups,
        needs=needs_of(config.passes),
        counts=draw_calls(program, feed, draw, count, **options),
        **options,
    )


def rewrite(
    program: Program, config: Config, feed: Any, show: Phases, schedule: Any = None
) -> Program:
    """Run the passes of the configuration, calibrating when one of them asks for it."""
    if not callable(feed) and feed is not None:
        feed = list(feed)  # it is gone through again where a rewrite makes statistics stale

    def run_calibration(current: Program) -> Calibration:
        with show.phase("calibrate"):
            return calibrate_for(config, current, feed, show)

    def run_sampling(current: Program, watch: Watch) -> None:
        with show.phase("calibrate"):
            drive(current, feed, watch, seed=config.seed, progress=show)

    folder = os.environ.get("EFFUSE_DUMP")
    return run_passes(
        program,
        (Canonicalize(), *config.passes),
        None if config.stream else run_calibration,
        drive=stream.refuse_calibration if config.stream else run_sampling,
        fuel=fuel_from_environment(),
        dump_to=Path(folder) if folder else None,
        progress=show,
        purpose=Purpose(pick_backend(config)[0], config.target, schedule),
    )


def pick_backend(config: Config) -> tuple[str, str | None]:
    """The back end to use, and what `auto` had to fall back from."""
    if config.backend != "auto":
        return config.backend, None
    reason = importlib.import_module("effuse.backends.onnx").available()
    return ("onnx", None) if reason is None else ("reference", reason)


def lower(
    program: Program, config: Config, folder: Path, show: Phases
) -> tuple[Session | None, dict[str, Any]]:
    """Build the program into `folder`, check it against reference, and complete the artifact.

    What is streamed is neither opened nor checked as a whole: that would take its memory. What
    cannot run here is checked as far as it was lowered. A back end may change the arithmetic before
    (`adapt`), and says at what cost.
    """
    name, fallback = pick_backend(config)
    backend = importlib.import_module(f"effuse.backends.{name}")
    if reason := backend.available():
        raise BackendError(f"{name}: {reason}")
    program = backend.adapt(program) if hasattr(backend, "adapt") else program
    buckets = buckets_of(program)
    told = backend.build(to_build(program, buckets), folder, show, config.target)
    session: Session | None = None
    parity: Mapping[str, Any] = UNCHECKED
    absent = backend.absent(config.target)
    if buckets:
        found = [bucket_parity(each, config, name, folder, absent) for each in buckets]
        told = {**told, "buckets": [b.to_json(p) for b, p in zip(buckets, found, strict=True)]}
        parity = worst_parity(found)
    elif not config.stream:
        later = absent or (name == "onnx" and config.target)  # opened for its device, when called
        session = None if later else backend.load_session(program.spec(), folder)
        rehearsed = session or backend.rehearse(program.spec(), folder)
        narrow = narrow_floats(name, config.target or "")
        if rehearsed is not None:
            parity = check_parity(program, rehearsed, name, narrow)
    text = "\n".join(f"# {part.name}\n{dump(part.graph)}" for part in program.parts)
    (folder / "graphs.txt.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    described = {**describe(program, config, name, parity, fallback), **told}
    described["absent"] = absent
    return session, artifact.finish(folder, described)


def bucket_parity(
    bucket: Bucket, config: Config, backend: str, folder: Path, absent: str | None
) -> Mapping[str, Any]:
    """The agreement of a bucket's built program with reference; its session is closed again."""
    module = importlib.import_module(f"effuse.backends.{backend}")
    open_session = module.rehearse if absent else module.load_session
    session = None if config.stream else open_session(bucket.named.spec(), folder)
    narrow = narrow_floats(backend, config.target or "")
    return UNCHECKED if session is None else check_parity(bucket.named, session, backend, narrow)


def describe(
    program: Program,
    config: Config,
    backend: str,
    parity: Mapping[str, Any],
    fallback: str | None,
) -> dict[str, Any]:
    """The manifest, but for the files."""
    return {
        "format": artifact.FORMAT,
        "effuse": __version__,
        "backend": backend,
        "fallback": fallback,
        "target": config.target,
        "config": config.data(),
        "program": to_json(program.spec()),
        "model": describe_model(program.model),
        "passes": [each.to_json() for each in program.records],
        "layers": to_json(program.layers),
        "parts": {
            part.name: {"rate": part.rate.name.lower(), **part_costs(part, program.weights)}
            for part in program.parts
        },
        "plan": plan_costs(program),
        "rates": program.model.get("rates", {}),
        "sampler": program.model.get("sampler"),
        "native": native_ops(program, backend),
        "parity": dict(parity),
        "versions": versions(LIBRARIES),
    }


def describe_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The network for people and pipelines, without the folder that it was loaded from."""
    config = {k: v for k, v in model.get("config", {}).items() if k != "_name_or_path"}
    return {**{k: v for k, v in model.items() if k not in BESIDE}, "config": config}


def native_ops(program: Program, backend: str) -> dict[str, str]:
    """For each effuse op in the program: whether this back end runs it natively or simulates it."""
    found = {node.target for part in program.parts for node in calls(part.graph)}
    rows = [BY_TARGET[target] for target in found if target in BY_TARGET]
    return {row.name: row.implementations.get(backend, "simulated") for row in rows}


def versions(names: Sequence[str]) -> dict[str, str]:
    """Installed versions, and Python's."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
