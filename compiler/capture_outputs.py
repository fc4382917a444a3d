"""What a captured network returns: its tensors, flat, and how they are nested."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from effuse.capture_inputs import copied, on_meta
from effuse.errors import CaptureError


def user_outputs(exported: ExportedProgram) -> list[fx.Node]:
    """The exported graph's tensors that the network returns."""
    return [value for value in returned(exported) if isinstance(value, fx.Node)]


def returned(exported: ExportedProgram) -> list[Any]:
    """What the network returns, flat: nodes of the graph, and anything else as it is."""
    values: Any = exported.graph.output_node().args[0]
    specs = exported.graph_signature.output_specs
    return [value for value, spec in zip(values, specs, strict=True)
            if spec.kind is OutputKind.USER_OUTPUT]  # fmt: skip


def expected_outputs(
    model: nn.Module, inputs: Mapping[str, Any], exported: ExportedProgram
) -> tuple[tuple[torch.Tensor, ...], Any]:
    """Eager's outputs on the example inputs, flat, and how they are nested."""
    spec = exported.call_spec.out_spec
    if spec is None:
        raise CaptureError("the network returns nothing that torch.export understands")
    leaves, numbers = returned(exported), count()
    numbered = [next(numbers) if isinstance(leaf, fx.Node) else Constant(leaf) for leaf in leaves]
    nested = nest(pytree.tree_unflatten(numbered, spec))
    if on_meta(inputs):
        return (), nested
    with torch.no_grad():
        flat = pytree.tree_leaves(model(**copied(inputs)))
    return tuple(value for value in flat if isinstance(value, torch.Tensor)), nested


@dataclass(frozen=True)
class Constant:
    """Something that a network returns and that is no tensor, such as None."""

    value: Any


def nest(value: Any) -> Any:
    """Nested tuples and mappings of tensors' numbers and constants as JSON: 0, {"tuple": […]},
    {"dict": {…}, "order": […]}, {"value": …}.
    """
    if isinstance(value, Constant):
        return {"value": value.value}
    if isinstance(value, Mapping):
        fields = {str(key): nest(item) for key, item in value.items()}
        return {"dict": fields, "order": list(fields)}  # manifests sort what they hold
    if isinstance(value, (list, tuple)):
        return {"tuple": [nest(item) for item in value]}
    return value


def output_names(count: int) -> tuple[str, ...]:
    """`output_0`, `output_1`, …: what graphs call the network's outputs."""
    return tuple(f"output_{index}" for index in range(count))
