"""Example inputs of a network, from its config and the names of forward's arguments.

`effuse.example_rows` says, for each argument name of the field, how a tensor for it follows from
the config; no network's class is looked at. What cannot be read there (does it take one timestep or
a vector, how wide is that argument?) is found by trying the network on fake tensors, which costs no
arithmetic (`effuse.example_repair`).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effuse.errors import InputError
from effuse.example_network import WAY_OUT, Network
from effuse.example_repair import TRIALS, repaired
from effuse.example_rows import ROWS, guessed, is_time
from effuse.example_trial import trial

FIRST = 12  # layers among which, or among those of no block, one with the config's channels enters


def derive_inputs(
    model: nn.Module,
    *,
    batch: int = 2,
    timestep: torch.Tensor | None = None,
    size: int | None = None,
    device: torch.device | None = None,
    trials: int = TRIALS,
) -> dict[str, Any]:
    """Example inputs for `model.forward`, in the order of its arguments.

    `size` is the latent's height and width (default: the config's sample_size, else 32; 128 for
    networks on packed tokens). The timestep has shape () where the network takes a scalar, else
    (batch,). They are on `device`, by default the network's: a network on the meta device gets
    tensors on the meta device. `trials` bounds how often the network is tried on fake tensors.

    Raises:
        InputError: an argument cannot be derived; give `inputs={...}` instead.
    """
    network = describe(model, batch, size)
    own = next((each.device for each in model.parameters()), torch.device("cpu"))
    found = settle(model, network, first_guess(network), timestep, trials)
    ordered = {name: found[name] for name in network.parameters if name in found}
    return pytree.tree_map_only(torch.Tensor, lambda each: each.to(device or own), ordered)  # type: ignore[no-any-return]


def first_guess(network: Network) -> dict[str, Any]:
    """What rows and patterns say of the arguments that forward has no default for, and rows alone
    of the others.
    """
    known = dict(ROWS)
    found: dict[str, Any] = {}
    for name, argument in network.parameters.items():
        if argument.kind in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL):
            continue
        needed = argument.default is argument.empty
        value = guessed(network, name) if name in known or needed else None
        if value is not None:
            found[name] = value
    return found


def describe(model: nn.Module, batch: int, size: int | None) -> Network:
    """What the rows need to know of a network."""
    config = config_of(model)
    floats = (each.dtype for each in model.parameters() if each.is_floating_point())
    layers = [m for m in model.modules() if isinstance(m, (nn.modules.conv._ConvNd, nn.Linear))]
    settled = ("use_additional_conditions",)  # a network may replace a None in its config
    values = dict(config)
    values |= {key: getattr(model, key) for key in settled if key in values and hasattr(model, key)}
    layers[FIRST:] = [each for each in model.children() if each in layers[FIRST:]]
    wide = [getattr(layer, "in_channels", 0) for layer in layers]
    channels = values.get("in_channels")
    own = wide.index(channels) if channels in wide else 0
    return Network(
        config=values,
        parameters=inspect.signature(model.forward).parameters,
        entry=layers[own] if layers else None,
        batch=batch,
        size=size,
        dtype=next(floats, torch.float32),
    )


def config_of(model: nn.Module) -> Mapping[str, Any]:
    """A network's config; of one that only holds others, as several ControlNets, the first's."""
    own = getattr(model, "config", None)
    if isinstance(own, Mapping):
        return own
    parts = [part for child in model.children()
             for part in (child if isinstance(child, nn.ModuleList) else (child,))]  # fmt: skip
    theirs = [getattr(part, "config", None) for part in parts]
    held = [each for each in theirs if isinstance(each, Mapping)]
    return held[0] if held and len(held) == len(parts) else {}


def settle(
    model: nn.Module, net: Network, inputs: dict[str, Any], timestep: torch.Tensor | None,
    trials: int = TRIALS,
) -> dict[str, Any]:  # fmt: skip
    """The inputs, put right by trial where the network does not take them.

    Raises:
        InputError: the network takes none that were tried.
    """
    if timestep is not None:
        given = {name: timestep for name, value in inputs.items()
                 if is_time(name) and isinstance(value, torch.Tensor)}  # fmt: skip
        inputs = inputs | given
    found, failed = repaired(trial(model), net, inputs, trials)
    if failed is None:
        return pytree.tree_map_only(torch.Tensor, lambda each: each.contiguous(), found)  # type: ignore[no-any-return]
    shapes = ", ".join(f"{name} {describe_value(value)}" for name, value in found.items())
    raise InputError(
        f"inputs: the network does not take the examples that follow from its config ({shapes}): "
        f"{failed.reason}; {WAY_OUT}"
    ) from failed.error


def describe_value(value: Any) -> str:
    """The shape of a tensor, anything else as it prints."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {describe_value(v)}" for key, v in value.items()) + "}"
    if isinstance(value, (list, tuple)) and any(map(torch.is_tensor, value)):
        return "[" + ", ".join(map(describe_value, value)) + "]"
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)
