"""Inspect: what a network would become, told from its structure alone, without weights."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
import json
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effuse.capture import capture
from effuse.capture_unwrap import by_name
from effuse.cost import rate_costs
from effuse.errors import ConfigError, nearest, require
from effuse.plan import Role

Row = tuple[str, str, tuple[Any, ...], str]  # label, role, shape, dtype


@dataclass(frozen=True)
class Inspection:
    """The inputs with their roles, and what of the network changes how often."""

    rows: tuple[Row, ...]
    rates: Mapping[str, Mapping[str, int]]  # rate -> parameters, flops
    parameters: int
    seconds: float

    @property
    def leaves_step_program(self) -> float:
        """The share of the parameters in use that the step program need not hold."""
        counts = {rate: cost["parameters"] for rate, cost in self.rates.items()}
        return 1 - counts["step"] / max(sum(counts.values()), 1)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON's own types."""
        keys = ("label", "role", "shape", "dtype")
        return {
            "rates": {rate: dict(cost) for rate, cost in self.rates.items()},
            "inputs": [
                dict(zip(keys, (label, role, list(shape), dtype), strict=True))
                for label, role, shape, dtype in self.rows
            ],
            "parameters": self.parameters,
            "leaves_step_program": self.leaves_step_program,
        }


def inspect_network(
    model: nn.Module,
    inputs: Mapping[str, Any] | None = None,
    roles: Mapping[str, str | Role] | None = None,
) -> Inspection:
    """Capture a network on the meta device and count its parameters and operations by rate.

    Without `inputs` they are derived from the network's own config, for one picture. `model` keeps
    its weights and its mode.

    Raises:
        CaptureError, ConfigError, InputError: as `effuse.capture.capture` does.
    """
    start = time.perf_counter()
    if inputs is None:
        from effuse.examples import derive_inputs

        with by_name(model):
            inputs = derive_inputs(model, batch=1)
    ghost = _on_meta(model).eval()
    program = capture(ghost, pytree.tree_map(_ghost, dict(inputs)), roles=roles)
    names = {name for name, _ in ghost.named_parameters(remove_duplicate=False)}
    return Inspection(
        rows=tuple((i.label, i.role.value, i.shape, i.dtype) for i in program.inputs),
        rates=rate_costs(program, names),
        parameters=sum(parameter.numel() for parameter in ghost.parameters()),
        seconds=time.perf_counter() - start,
    )


def _ghost(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of the network with no values, made without copying any."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = (module._parameters, module._buffers, vars(module))
        for tensor in (value for values in held for value in values.values()):
            if isinstance(tensor, nn.Parameter):
                memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
            elif isinstance(tensor, torch.Tensor):
                memo[id(tensor)] = tensor.detach().to("meta")
    return copy.deepcopy(model, memo)


def resolve(target: str, settings: Mapping[str, Any] | None = None) -> nn.Module:
    """The network that `target` names, on the meta device and in eval mode.

    `target` is a folder written by save_pretrained, a JSON file that holds `class` and `settings`,
    or a dotted class such as `diffusers.FluxTransformer2DModel`. `settings` are its config's
    keywords, over those of the folder or file.

    Raises:
        ConfigError: no such file or class, a class that is no network, or an unknown setting.
    """
    path, settings = Path(target), dict(settings or {})
    if path.is_dir():
        kind, config = _folder(path)
        _check_settings(kind, settings)
        return _build(kind.from_config, {"config": config | settings})  # type: ignore[attr-defined]
    if path.suffix == ".json":
        data = _read(path)
        unknown = sorted(data.keys() - {"class", "settings"})
        if unknown or not isinstance(data.get("class"), str):
            raise ConfigError(f"{path}: expected the keys class and settings, got {sorted(data)}")
        target, settings = data["class"], dict(data.get("settings") or {}) | settings
    kind = find_class(target)
    _check_settings(kind, settings)
    return _build(kind, settings)


def load_folder(path: Path) -> nn.Module:
    """The network that save_pretrained wrote to a folder, with its weights, in eval mode.

    Weights are read from safetensors only, since a pickle can run code.

    Raises:
        ConfigError: there is no such folder, or it holds no diffusers network with weights.
    """
    kind, _ = _folder(path)
    try:
        model, told = kind.from_pretrained(  # type: ignore[attr-defined]
            str(path), use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{path}: the weights cannot be loaded: {error}") from error
    check_complete(path, model, told["missing_keys"])
    network: nn.Module = model.eval()
    return network


def check_complete(path: Path, model: nn.Module, missing: Collection[str]) -> None:
    """Refuse files without all weights: diffusers would draw those that are missing.

    Raises:
        ConfigError: some are missing, and no other name of the same tensor is there.
    """
    stored = model.state_dict()
    read = {value.data_ptr() for name, value in stored.items() if name not in missing}
    absent = [name for name in missing if name in stored and stored[name].data_ptr() not in read]
    if absent:
        raise ConfigError(
            f"{path}: {len(absent)} of the network's {len(stored)} weights are not in its files, "
            f"such as {absent[0]!r}; copy the folder again, or, if the network was changed after "
            "it was stored, store it again"
        )


def _folder(path: Path) -> tuple[type[nn.Module], dict[str, Any]]:
    """The diffusers class that a folder's config.json names, and that config."""
    config = _read(path / "config.json")
    if "_class_name" not in config:
        raise ConfigError(f"{path / 'config.json'}: no _class_name; is it a diffusers network?")
    kind = find_class(f"diffusers.{config['_class_name']}")
    if not hasattr(kind, "from_config"):
        raise ConfigError(f"{path / 'config.json'}: {kind.__name__} is no diffusers network")
    return kind, config


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def find_class(dotted: str) -> type[nn.Module]:
    """The network class of a dotted name.

    Raises:
        ConfigError: there is no such module or class, or it is no `torch.nn.Module`.
        MissingExtra: the class is of diffusers, which is not installed.
    """
    home, _, name = dotted.rpartition(".")
    if not all(word.isidentifier() for word in dotted.split(".")) or not home:
        raise ConfigError(
            f"{dotted!r} is neither a folder, nor a JSON file, nor a dotted class such as "
            "diffusers.FluxTransformer2DModel"
        )
    module = require(home, "diffusers") if home == "diffusers" else _module(home)
    try:
        kind = getattr(module, name, None)
    except Exception as error:  # diffusers imports a class's own file only here
        raise ConfigError(f"cannot import {dotted}: {error}") from error
    if kind is None:
        close = difflib.get_close_matches(name, dir(module), n=5, cutoff=0.4)
        raise ConfigError(f"{home} has no class {name!r}{nearest(name, close)}")
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise ConfigError(f"{dotted} is not a subclass of torch.nn.Module")
    return kind


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"cannot import {name!r}: {error}") from error


def _check_settings(kind: type[nn.Module], settings: Mapping[str, Any]) -> None:
    known = inspect.signature(kind).parameters
    if any(each.kind is each.VAR_KEYWORD for each in known.values()):
        return
    for name in settings:
        if name not in known:
            raise ConfigError(f"{kind.__name__} has no setting {name!r}{nearest(name, known)}")


def _build(make: Any, keywords: Mapping[str, Any]) -> nn.Module:
    """Run a constructor on the meta device; what it computes from real numbers moves there too."""
    name = getattr(getattr(make, "__self__", make), "__name__", make)
    try:
        with torch.device("meta"):
            model: nn.Module = make(**keywords)
    except Exception as error:
        message = f"{name} cannot be built from these settings: {type(error).__name__}: {error}"
        raise ConfigError(message) from error
    return model.to("meta").eval()
