"""A program as a differentiable function of its weights, on the device that it is trained on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from effuse.errors import ConfigError, InputError
from effuse.graph import Observer, calls, clone, evaluate, module_path, move
from effuse.plan import STEP_INPUT, Rate
from effuse.program import Part, Program, step_index, used_weights

aten = torch.ops.aten

TRAINED_DTYPES = (torch.float32, torch.float64)
# The layers, and which of their arguments are weights.
WEIGHTS_OF: Mapping[Any, tuple[int, ...]] = {
    aten.linear.default: (1, 2),
    aten.conv1d.default: (1, 2),
    aten.conv2d.default: (1, 2),
    aten.conv3d.default: (1, 2),
    aten.conv_transpose1d.default: (1, 2),
    aten.conv_transpose2d.input: (1, 2),
    aten.conv_transpose3d.input: (1, 2),
    aten.group_norm.default: (2, 3),
    aten.layer_norm.default: (2, 3),
    aten.rms_norm.default: (2,),
    aten.embedding.default: (0,),
}

Taps = Mapping[str, str]  # node of the step's graph -> the feature that it gives
Values = Mapping[str, Any]
Wanted = Callable[[str], bool]  # whether a layer at this module path may change


class Network:
    """A program's graphs and weights on one device; called with values, it gives outputs.

    Args:
        program: any; it stays as it is.
        device: where to compute; None: where its weights are.
    """

    def __init__(self, program: Program, device: torch.device | None = None) -> None:
        self.home = next((each.device for each in program.weights.values()), torch.device("cpu"))
        self.device = device or self.home
        if self.device != self.home:
            program = program.with_parts(*(_moved(part, self.device) for part in program.parts))
        self.program = program
        self.weights: dict[str, Tensor] = {
            name: program.weights[name].detach().to(self.device)
            for name in sorted(used_weights(*self.parts))
        }
        self._indexed = any(STEP_INPUT in part.inputs for part in self.parts)

    @property
    def parts(self) -> tuple[Part, ...]:
        """What one step runs: the slower parts, and the default variant."""
        found = self.program.parts
        default = self.program.plan.default
        return tuple(part for part in found if part.rate is not Rate.STEP or part.name == default)

    @property
    def full(self) -> Part:
        """The default variant."""
        return self.program.part(self.program.plan.default)

    def __call__(
        self, values: Values, weights: Mapping[str, Tensor] | None = None, taps: Taps | None = None
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The outputs, and the features at `taps` by name."""
        found: dict[str, Tensor] = {}

        def tap(node: fx.Node, value: Any) -> None:
            if taps and node.name in taps:
                found[taps[node.name]] = value

        return self.run(values, weights, tap), found

    def run(
        self, values: Values, weights: Mapping[str, Tensor] | None, observe: Observer
    ) -> tuple[Tensor, ...]:
        """The outputs; `observe` sees the values of the default variant, and may replace them.

        Raises:
            InputError: the program holds tables by step, and `values` are at none of its steps.
        """
        env = {name: value.to(self.device) for name, value in values.items()}
        env[STEP_INPUT] = torch.tensor([self._index(values)], device=self.device)
        for part in self.parts:
            watch = observe if part.rate is Rate.STEP else None
            stored = {**self.weights, **(weights or {})}
            given = evaluate(part.graph, stored, env, watch, call_anywhere)
            env.update(zip(part.outputs, given, strict=True))
        return tuple(env[name] for name in self.program.outputs)

    def _index(self, values: Values) -> int:
        if not self._indexed:
            return 0
        try:
            return step_index(self.program, values)
        except ValueError:
            raise InputError(
                "data: a timestep is not one of the schedule that the program holds tables for; "
                "sample with that schedule, or train before Hoist"
            ) from None


def call_anywhere(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call gives; a view that another device's strides do not allow is a copy."""
    target = aten.reshape.default if node.target is aten.view.default else node.target
    return target(*args, **kwargs)  # type: ignore[operator]


def _moved(part: Part, device: torch.device) -> Part:
    graph, _ = clone(part.graph)
    move(graph, device)
    return replace(part, graph=graph)


def trainable(network: Network, wanted: Wanted = lambda path: True) -> tuple[str, ...]:
    """The names of the floating-point weights of layers; tables and buffers stay as they are."""
    read = {
        str(weight.target)
        for part in network.parts
        for node in calls(part.graph, *WEIGHTS_OF)
        if wanted(module_path(node))
        for weight in _weights_of(node)
    }
    return tuple(name for name in sorted(read) if network.weights[name].is_floating_point())


def _weights_of(node: fx.Node) -> Collection[fx.Node]:
    places = WEIGHTS_OF[node.target]
    given = [node.args[place] for place in places if place < len(node.args)]
    return [each for each in given if isinstance(each, fx.Node) and each.op == "get_attr"]


def check_trainable(network: Network, what: str, wanted: Wanted = lambda path: True) -> None:
    """Refuse what gradients do not pass through, or would lose themselves in.

    Raises:
        ConfigError: layers are quantized, there is none to train, or their dtype is too short.
    """
    packed = {
        str(node.target)
        for part in network.parts
        for node in calls(part.graph)
        if getattr(node.target, "namespace", "") == "effuse"
    }
    if packed:
        raise ConfigError(
            f"{what}: expected layers in floating point, came {', '.join(sorted(packed))}, which "
            "gradients do not pass; distill first, and quantize what it gives"
        )
    names = trainable(network, wanted)
    if not names:
        raise ConfigError(
            f"{what}: none of its layers that may be trained has a weight; let include and exclude "
            "leave some, or train nothing"
        )
    short = {network.weights[name].dtype for name in names} - set(TRAINED_DTYPES)
    if short:
        found = ", ".join(sorted(str(each).removeprefix("torch.") for each in short))
        raise ConfigError(
            f"{what}: expected weights in float32, came {found}, in which small updates are "
            "rounded away; capture the network in float32, and cast what is trained"
        )
