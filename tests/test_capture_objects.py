"""Capture of objects that hold tensors: they are opened, and are plain objects again afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import effuse
from effuse.capture import capture
from effuse.capture_objects import holds, opened
from effuse.errors import InputError


class Layer:
    """Keys and values of one layer, and how often they were read."""

    def __init__(self, *sizes: int) -> None:
        self.key: torch.Tensor | None = torch.randn(sizes) if sizes else None
        self.value: torch.Tensor | None = torch.randn(sizes) if sizes else None
        self.name = "layer"


class Store:
    """One such for every layer; no pytree."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = list(layers)
        self.reads = 0

    def get(self, number: int) -> Layer:
        self.reads += 1
        return self.layers[number]


class Reading(nn.Module):
    """Attends to what is kept of other tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, kept: Store) -> torch.Tensor:
        for number, query in enumerate(self.query):
            layer = kept.get(number)
            found = nn.functional.scaled_dot_product_attention(
                query(sample), layer.key, layer.value
            )
            sample = sample + found * timestep[:, None, None]
        return sample


def given() -> dict[str, Any]:
    torch.manual_seed(0)
    store = Store(Layer(2, 5, 4), Layer(2, 5, 4))
    return {"sample": torch.randn(2, 3, 4), "timestep": torch.ones(2), "kept": store}


def test_tensors_of_an_object_are_inputs_by_attribute():
    inputs = given()
    program = capture(Reading().eval(), inputs)
    labels = [item.label for item in program.inputs]
    assert labels == ["sample", "timestep", "kept.layers.0.key", "kept.layers.0.value",
                      "kept.layers.1.key", "kept.layers.1.value"]  # fmt: skip
    assert inputs["kept"].reads == 0  # forward was given copies


@pytest.mark.parametrize("backend", ["reference", "onnx"])
def test_a_session_reads_another_object(backend: str):
    model, first, other = Reading().eval(), given(), given()
    compiled = effuse.compile(model, effuse.Config(passes=(), backend=backend), inputs=first)
    other["kept"] = Store(Layer(2, 5, 4), Layer(2, 5, 4))
    with torch.no_grad():
        wanted = model(**other)
    assert torch.allclose(compiled(**other), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(compiled(**first), wanted, rtol=1e-2)
    with pytest.raises(InputError, match=r"kept\.layers\.1\.key: missing"):
        compiled(**{**other, "kept": Store(Layer(2, 5, 4), Layer())})


def test_objects_are_opened_while_capturing_only():
    inputs = given()
    before = dict(pytree.SUPPORTED_NODES)
    with opened(inputs):
        (found, *_), _ = pytree.tree_flatten(inputs["kept"])
        assert found is inputs["kept"].layers[0].key
        again = pytree.tree_map_only(torch.Tensor, lambda each: each * 0, inputs["kept"])
        assert type(again) is Store and again.layers[1].name == "layer"
        assert not again.layers[1].value.any() and inputs["kept"].layers[1].value.any()
    assert before == pytree.SUPPORTED_NODES
    with pytest.raises(ValueError, match="inside"), opened(inputs):
        raise ValueError("inside")
    assert before == pytree.SUPPORTED_NODES


def test_an_object_of_a_built_in_kind_is_remade():
    given = {"cache": SimpleNamespace(key=torch.ones(2), name="first")}
    with opened(given):
        found = pytree.tree_map_only(torch.Tensor, lambda each: each * 2, given)["cache"]
    assert type(found) is SimpleNamespace
    assert found.key.tolist() == [2, 2] and found.name == "first"


def test_only_what_holds_a_tensor_is_opened():
    kinds: dict[type, None] = {}
    loop = Store()
    loop.self = loop  # type: ignore[attr-defined]
    assert not holds({"loop": loop, "empty": Layer(), "kind": Store, "net": nn.Linear(2, 2),
                      "call": holds, "number": 1}, kinds, set())  # fmt: skip
    assert not kinds
    assert holds([Layer(1), loop], kinds, set()) and list(kinds) == [Layer]
