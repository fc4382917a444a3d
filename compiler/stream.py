"""Compiling a network that is larger than memory, layer by layer.

It is captured without values; its weights stay in the files that save_pretrained wrote and are read
when a pass asks for one. Nothing runs the whole network, so no pass can calibrate, and the build is
not compared with eager: what is checked is the capture, the types after every pass, and each layer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from effuse.arguments import digest
from effuse.capture_inputs import flatten_inputs
from effuse.errors import ConfigError, PassError
from effuse.graph import move
from effuse.plan import Role
from effuse.program import Program
from effuse.weights import FileWeights, Place, content, open_folder

DTYPE = torch.float32  # that weights are read as: what CPUs compute in
Progress = Callable[[str, int, int], None]


def ghost(model: Any) -> nn.Module:
    """The network of a folder, on the meta device.

    Raises:
        ConfigError: `model` is no such folder.
    """
    from effuse.inspect_model import resolve

    if isinstance(model, nn.Module) or not Path(model).is_dir():
        came = type(model).__name__ if isinstance(model, nn.Module) else repr(str(model))
        raise ConfigError(
            "stream: expected a folder written by save_pretrained, whose weights are read as they "
            f"are needed, came {came}; or compile what is in memory with stream=False"
        )
    return resolve(str(model))


def on_meta(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs without values."""
    found: dict[str, Any] = pytree.tree_map_only(
        torch.Tensor, lambda each: each.to("meta"), dict(inputs)
    )
    return found


def attach(
    program: Program, folder: Path, network: nn.Module, inputs: Mapping[str, Any],
    progress: Progress,
) -> Program:  # fmt: skip
    """A program that was captured without values, with its weights in files, and its examples.

    Raises:
        ConfigError: weights are missing from the files, or do not fit.
    """
    stored = open_folder(folder, DTYPE)
    check_known(network, stored, folder)
    add_ties(network, stored)
    add_computed(program, network, stored)
    check(program.weights, stored, folder)
    weights = stored.only(program.weights)
    read_through(weights, progress)
    leaves, _ = flatten_inputs(dict(inputs))
    examples = {"_".join(leaf.path): leaf.tensor for leaf in leaves}
    described = tuple(
        replace(item, digest=digest(examples[item.name])) if item.role is Role.STATIC else item
        for item in program.inputs
    )
    for part in program.parts:
        move(part.graph, torch.device("cpu"))
    return replace(program, weights=weights, inputs=described, examples=examples)


def check_known(network: nn.Module, stored: FileWeights, folder: Path) -> None:
    """Refuse files that hold more than the network has, but what its class says to pass over."""
    passed = getattr(network, "_keys_to_ignore_on_load_unexpected", None) or ()
    known = {name for name, _ in named_tensors(network)}
    strange = [
        name for name in stored
        if name not in known and not any(re.search(each, name) for each in passed)
    ]  # fmt: skip
    if strange:
        raise ConfigError(
            f"{folder}: {len(strange)} of the {len(stored)} tensors in its files have no place in "
            f"the network that config.json describes, such as {strange[0]!r}; they are not of one "
            "network: copy both again"
        )


def named_tensors(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all their names."""
    yield from network.named_parameters(remove_duplicate=False)
    yield from network.named_buffers(remove_duplicate=False)


def add_ties(network: nn.Module, stored: FileWeights) -> None:
    """Tied weights, which are stored under one of their names, under the others too."""
    names: dict[int, list[str]] = {}
    for name, tensor in named_tensors(network):
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        source = next((name for name in tied if name in stored), None)
        for name in tied:
            if source is not None and name not in stored:
                stored.alias(name, source)


def add_computed(program: Program, network: nn.Module, stored: FileWeights) -> None:
    """What the network computes when it is built, or in forward from nothing, and never stores."""
    missing = [name for name in program.weights if name not in stored]
    real = {name: program.weights[name] for name in missing}
    kept = set(network.state_dict())
    if any(real[name].is_meta and name not in kept for name in missing):
        built = computed(network)
        real |= {name: built[name] for name in missing if name in built and name not in kept}
    for name, tensor in real.items():
        if not tensor.is_meta:
            stored[name] = tensor.to(DTYPE) if tensor.is_floating_point() else tensor


class Hollow(TorchFunctionMode):
    """Memory that is to be filled later is on the meta device: parameters, not what is computed."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func`, on the meta device where it only takes memory."""
        given = dict(kwargs or {})
        if func in (torch.empty, torch.empty_like, torch.empty_strided):
            given["device"] = "meta"
        return func(*args, **given)


def computed(network: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers of such a network, with values where they follow from its config alone."""
    kind: Any = type(network)
    with Hollow():
        built = kind.from_config(dict(network.config))  # type: ignore[arg-type]
    found = dict(built.named_buffers(remove_duplicate=False))
    return {name: tensor for name, tensor in found.items() if not tensor.is_meta}


def check(wanted: Mapping[str, torch.Tensor], stored: FileWeights, folder: Path) -> None:
    """Refuse files that are not this network's."""
    if missing := [name for name in wanted if name not in stored]:
        raise ConfigError(
            f"{folder}: {len(missing)} of the network's {len(wanted)} weights are not in its "
            f"files, such as {missing[0]!r}; copy the folder again, or, if the network was "
            "changed after it was stored, store it again; stream=False takes one that is in memory"
        )
    for name, expected in wanted.items():
        if (found := stored.peek(name)).shape != expected.shape:
            raise ConfigError(
                f"{folder}: {name!r} is {tuple(found.shape)} in the files, and "
                f"{tuple(expected.shape)} by config.json; they are not of one network"
            )


def read_through(weights: FileWeights, progress: Progress) -> None:
    """Read every stored weight once: refuse NaN and infinite values, and remember the hashes."""
    for number, name in enumerate(weights, start=1):
        held = weights.held(name)
        stored = held.mapped() if isinstance(held, Place) else weights[name]
        if not stored.isfinite().all():
            raise ConfigError(
                f"the weight {name!r} holds NaN or infinite values; download it again, or find "
                "out where the training diverged"
            )
        if isinstance(held, Place):
            weights.note_digest(name, content(stored))
        progress("read weights", number, len(weights))


def refuse_calibration(*_: Any) -> Any:
    """For passes that would run the network."""
    raise PassError(
        "stream=True never runs the whole network, so nothing can be searched or measured on it; "
        "leave the pass out, or compile with stream=False"
    )
