"""Whole pipelines: what each component is asked is watched, and what pays is compiled."""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effuse import pipeline_artifact
from effuse.api import Compiled
from effuse.api import compile as compile_network
from effuse.config import Config, preset, resolve
from effuse.errors import CaptureError, ConfigError, EffuseError, nearest
from effuse.pipeline_calls import PLAIN, labelled, outline
from effuse.pipeline_free import PROMPT_ARGUMENTS, seeded, torch_free
from effuse.pipeline_parts import NETWORK, entry_folder, open_component
from effuse.pipeline_run import CompiledPipeline
from effuse.pipeline_watch import Call, Log, components_of, observed_roles, signature_of, watch

PROMPT = "a photograph"
STEP_ARGUMENTS = ("num_inference_steps", "steps")


class Entrance(nn.Module):
    """A method of a network, with its plain arguments, as a network of its tensors alone."""

    def __init__(self, module: nn.Module, path: str, call: Call) -> None:
        super().__init__()
        self.module = module
        self.config = getattr(module, "config", None)
        self._path = path
        self._arguments = call.arguments
        tensors, _ = labelled(call.arguments)
        self.names = {label: f"input_{n}" for n, label in enumerate(tensors)}
        self.forward = self._entrance()

    def _entrance(self) -> Callable[..., Any]:
        """Forward, with a parameter for each tensor."""

        def forward(**given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            place: Any = self.module
            for name in filter(None, self._path.split(".")):
                place = getattr(place, name)
            arguments = {name: self._filled(name, value, given)
                         for name, value in self._arguments.items()}  # fmt: skip
            return tuple(outline(place(**arguments))[1])

        kind = inspect.Parameter.KEYWORD_ONLY
        parameters = [inspect.Parameter(name, kind) for name in self.names.values()]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return forward

    def _filled(self, label: str, value: Any, given: Mapping[str, Any]) -> Any:
        """An argument as it was, with the tensors given."""
        if label in self.names:
            return given[self.names[label]]
        if isinstance(value, Mapping):
            return {key: self._filled(f"{label}.{key}", each, given) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            filled = (self._filled(f"{label}.{n}", each, given) for n, each in enumerate(value))
            return type(value)(filled)
        return value if isinstance(value, PLAIN) else None  # a random generator


@dataclass(frozen=True)
class Request:
    """What a person wants of a pipeline."""

    pipe: Any
    config: Config
    calls: Sequence[Mapping[str, Any]]  # arguments of the pipeline's call: the first is watched
    named: Sequence[str] | None  # components that have to be compiled
    progress: bool


def compile_pipeline(
    pipe: Any,
    config: Config | str | Path | Mapping[str, Any] = "exact",
    *,
    components: Sequence[str] | None = None,
    steps: int = 50,
    prompts: Sequence[Any] = (PROMPT,),
    call: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> CompiledPipeline:
    """Compile the components of a diffusers pipeline that pay, and put them back.

    One short run is watched. What is called in each step, a denoiser, is compiled as `config` says;
    what is called before or after, text encoders and the decoder, by the exact passes. Sizes are
    those of the watched run. What is not called, or cannot be compiled, stays as it is, and the
    report says why; small parts are compiled too, for one in torch keeps all from running without.
    The pipeline that is handed in stays as it is.

    Args:
        pipe: a diffusers pipeline, its networks in eval mode.
        config: as of `effuse.compile`, for the denoisers.
        components: names of those to compile, and no others; one that cannot be is an error then.
        steps: of the schedule.
        prompts: what single calls are handed, texts or lists of texts: the first is watched, all
            calibrate.
        call: further arguments of the pipeline's call: sizes, guidance.
        progress: whether to show bars when standard error is a terminal.

    Raises:
        ConfigError: a name is no network of the pipeline.
        EffuseError: a component that was named cannot be compiled.
    """
    request = Request(
        pipe, resolve(config), calls_of(pipe, steps, prompts, call or {}), components, progress
    )
    check_names(request)
    log = watch(pipe, seeded(pipe, request.calls[0]))
    holder = tempfile.TemporaryDirectory(prefix="effuse-")
    folder = Path(holder.name)
    try:
        parts, described = compile_parts(request, log, folder)
        manifest = pipeline_artifact.describe(pipe, log, described, request.calls[0], steps)
        manifest["others"] = pipeline_artifact.save_others(folder, manifest, pipe)
        manifest["torch_free"] = torch_free(pipe, request.calls[0], log, described, folder)
        manifest = pipeline_artifact.finish(folder, manifest)
    except BaseException:
        holder.cleanup()
        raise
    return CompiledPipeline(parts, manifest, folder, keep=holder, pipe=pipe)


def calls_of(
    pipe: Any, steps: int, prompts: Sequence[Any], call: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The arguments of a call for each prompt, named as the pipeline names them."""
    known = inspect.signature(pipe.__call__).parameters
    counts = next((name for name in STEP_ARGUMENTS if name in known), None)
    if counts is None:
        raise ConfigError(f"pipe: its call takes none of {', '.join(STEP_ARGUMENTS)}")
    rest: dict[str, Any] = {counts: steps, **call}
    if "output_type" in known:
        rest.setdefault("output_type", "np")
    prompt = next((name for name in PROMPT_ARGUMENTS if name in known), None)
    if prompt is None or any(name in call for name in PROMPT_ARGUMENTS):
        return [rest]
    return [{prompt: each, **rest} for each in prompts]


def check_names(request: Request) -> None:
    """Refuse names that are no networks of the pipeline, and a pipeline without any."""
    networks = [name for name, each in components_of(request.pipe).items()
                if isinstance(each, nn.Module)]  # fmt: skip
    for name in request.named or ():
        if name not in networks:
            raise ConfigError(f"components: no network is called {name!r}{nearest(name, networks)}")
    if not networks:
        raise ConfigError("pipe: none of its components is a torch.nn.Module")


def compile_parts(
    request: Request, log: Log, folder: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Stand-ins for the components that are compiled, and what is to be told of every one."""
    parts, described = {}, {}
    whole = sum(log.timed(key) for key in log.keys) or 1.0
    for name, module in components_of(request.pipe).items():
        if not isinstance(module, nn.Module):
            continue
        keys = [key for key in log.keys if key[0] == name]
        told: dict[str, Any] = {
            "class": f"{type(module).__module__}.{type(module).__qualname__}",
            "calls": sum(len(log.of(key)) for key in keys),
            "share": round(sum(log.timed(key) for key in keys) / whole, 4),
            "role": log.role(keys[0]) if keys else None,
        }
        reason = left_alone(request, name, told)
        if reason is None:
            try:
                told |= read_of(module, log, name)
                opened, told["entries"] = compile_component(request, log, name, module, folder)
                parts[name] = open_component(name, told, opened)
            except EffuseError as error:
                if request.named is not None:
                    raise
                reason = f"{type(error).__name__}: {error}"
        described[name] = {**told, "reason": reason}
    return parts, described


def left_alone(request: Request, name: str, told: Mapping[str, Any]) -> str | None:
    """Why a component stays as it is, or None."""
    if request.named is not None:
        return None if name in request.named else "not among components="
    return None if told["calls"] else "not called in the watched run"


def read_of(module: nn.Module, log: Log, name: str) -> dict[str, Any]:
    """What the pipeline reads of a component: its config, plain attributes, contexts.

    Raises:
        CaptureError: it uses something of the component that no artifact has.
    """
    if uses := sorted(log.uses.get(name, ())):
        raise CaptureError(
            f"the pipeline uses {', '.join(f'{name}.{use}' for use in uses)}, which is neither a "
            "call on tensors nor plain data"
        )
    own = {key: value for key, value in vars(module).items()
           if isinstance(value, PLAIN) and not key.startswith("_")}  # fmt: skip
    config: Any = getattr(module, "config", None) or {}
    plain = dict(config.to_dict() if hasattr(config, "to_dict") else config)
    aliases = getattr(config, "attribute_map", {})
    plain |= {alias: getattr(config, alias, None) for alias in aliases}
    return {
        "config": {key: value for key, value in plain.items() if is_json(value)},
        "reads": own | log.reads.get(name, {}),
        "contexts": sorted(log.contexts.get(name, ())),
    }


def is_json(value: Any) -> bool:
    """Whether JSON keeps it."""
    if isinstance(value, (list, tuple)):
        return all(map(is_json, value))
    if isinstance(value, Mapping):
        return all(isinstance(key, str) for key in value) and all(map(is_json, value.values()))
    return isinstance(value, PLAIN)


def compile_component(
    request: Request, log: Log, name: str, module: nn.Module, folder: Path
) -> tuple[dict[str, Compiled], list[dict[str, Any]]]:
    """An artifact for every kind of call of a component, by the folder it lies in."""
    opened, entries = {}, []
    for key in [key for key in log.keys if key[0] == name]:
        path, denoises = key[1], log.role(key) == "denoiser" and not key[1]
        kinds = kinds_of(log.of(key))
        if denoises and len(kinds) > 1:
            raise ConfigError(
                f"{name} is called with {len(kinds)} kinds of arguments, and a denoiser is compiled"
                " for one; give prompts of one length"
            )
        for number, (call, count) in enumerate(kinds):
            where = entry_folder(name, path, number)
            if denoises:
                compiled = compile_denoiser(request, log, module, key)
            else:
                compiled = compile_entrance(request, module, path, call)
            compiled.save(folder / where)
            opened[where] = compiled
            entries.append({**described_entry(module, call, where, denoises), "calls": count})
    return opened, entries


def kinds_of(calls: Sequence[Call]) -> list[tuple[Call, int]]:
    """A call of each shape and plain data, and how many there are of it."""
    found: dict[str, list[Call]] = {}
    for call in calls:
        found.setdefault(repr(signature_of(call.arguments)), []).append(call)
    return [(alike[-1], len(alike)) for alike in found.values()]


def described_entry(module: nn.Module, call: Call, where: str, denoises: bool) -> dict[str, Any]:
    """An entry for the manifest."""
    place: Any = module
    for name in filter(None, call.path.split(".")):
        place = getattr(place, name)
    function = place.forward if isinstance(place, nn.Module) else place
    parameters = inspect.signature(function).parameters
    defaults = {name: each.default for name, each in parameters.items()
                if isinstance(each.default, PLAIN) and each.default is not None}  # fmt: skip
    tensors, plain = labelled(call.arguments)
    return {
        "folder": where,
        "path": call.path,
        "kind": NETWORK if denoises else "method",
        "parameters": list(parameters),
        "defaults": defaults,
        "tensors": list(tensors),
        "plain": plain,
        "result": outline(call.result)[0],
    }


def compile_entrance(request: Request, module: nn.Module, path: str, call: Call) -> Compiled:
    """A method of a network, by the exact passes."""
    entrance = Entrance(module, path, call).eval()
    tensors, _ = labelled(call.arguments)
    given = {entrance.names[label]: value for label, value in tensors.items()}
    config = request.config
    plain = Config(
        passes=preset("exact"), backend=config.backend, target=config.target, seed=config.seed,
        roles=dict.fromkeys(given, "latent"),
    )  # fmt: skip
    return compile_network(entrance, plain, inputs=given, progress=request.progress)


def compile_denoiser(
    request: Request, log: Log, module: nn.Module, key: tuple[str, str]
) -> Compiled:
    """A network that is called in each step, as the configuration says."""
    calls = log.of(key)
    roles = {**observed_roles(calls), **request.config.roles}
    times = timesteps_of(calls, roles)
    config = request.config.model_copy(update={"roles": roles})
    second = next((each for each in calls if each.step == 1), calls[0])
    inputs = {name: value for name, value in second.arguments.items()
              if value is not None}  # fmt: skip
    return compile_network(
        module, config, inputs=inputs, schedule=times, progress=request.progress,
        calibration=lambda model: sample(request, key[0], model),
    )  # fmt: skip


def sample(request: Request, name: str, model: Any) -> None:
    """Run the pipeline on every prompt with this in a component's place."""
    pipe = copy.copy(request.pipe)
    object.__setattr__(pipe, name, model)
    for arguments in request.calls:
        with torch.no_grad():
            pipe(**arguments)


def timesteps_of(calls: Sequence[Call], roles: Mapping[str, str]) -> torch.Tensor | None:
    """The timesteps as the network is handed them, in order; None if none of its inputs is one."""
    label = next((label for label, role in roles.items() if role == "timestep"), None)
    if label is None:
        return None
    return torch.stack([labelled(each.arguments)[0][label].flatten()[0] for each in calls])
