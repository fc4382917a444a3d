"""Compiling a network that is larger than memory, layer by layer.

It is captured without values; its weights stay in the files that save_pretrained wrote and are read
when a pass asks for one. Nothing runs the whole network, so no pass can calibrate, and the build is
not compared with eager: what is checked is the capture, the types after every pass, and each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effuse.arguments import digest
from effuse.capture_inputs import flatten_inputs
from effuse.errors import ConfigError, PassError
from effuse.graph import move
from effuse.plan import Role
from effuse.program import Program
from effuse.weights import FileWeights, open_folder

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
    program: Program, folder: Path, inputs: Mapping[str, Any], progress: Progress
) -> Program:
    """A program that was captured without values, with its weights in files, and its examples.

    Raises:
        ConfigError: weights are missing from the files, or do not fit.
    """
    stored = open_folder(folder, DTYPE)
    check(program.weights, stored, folder)
    weights = stored.only(program.weights)
    check_finite(weights, progress)
    leaves, _ = flatten_inputs(dict(inputs))
    examples = {"_".join(leaf.path): leaf.tensor for leaf in leaves}
    described = tuple(
        replace(item, digest=digest(examples[item.name])) if item.role is Role.STATIC else item
        for item in program.inputs
    )
    for part in program.parts:
        move(part.graph, torch.device("cpu"))
    return replace(program, weights=weights, inputs=described, examples=examples)


def check(wanted: Mapping[str, torch.Tensor], stored: FileWeights, folder: Path) -> None:
    """Refuse files that are not this network's."""
    if missing := [name for name in wanted if name not in stored]:
        raise ConfigError(
            f"{folder}: {len(missing)} of the network's {len(wanted)} weights are not in its "
            f"files, such as {missing[0]!r}; what a network computes when it is built is stored "
            "nowhere: compile such a one with stream=False"
        )
    for name, expected in wanted.items():
        if (found := stored.peek(name)).shape != expected.shape:
            raise ConfigError(
                f"{folder}: {name!r} is {tuple(found.shape)} in the files, and "
                f"{tuple(expected.shape)} by config.json; they are not of one network"
            )


def check_finite(weights: FileWeights, progress: Progress) -> None:
    """Refuse NaN and infinite values; every weight is read once."""
    for number, name in enumerate(weights, start=1):
        if not weights[name].isfinite().all():
            raise ConfigError(
                f"the weight {name!r} holds NaN or infinite values; download it again, or find "
                "out where the training diverged"
            )
        progress("read weights", number, len(weights))


def refuse_calibration(*_: Any) -> Any:
    """For passes that would run the network."""
    raise PassError(
        "stream=True never runs the whole network, so nothing can be searched or measured on it; "
        "leave the pass out, or compile with stream=False"
    )
