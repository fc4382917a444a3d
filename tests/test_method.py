"""A method of a network as a network of its own."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import effuse
from effuse.build import load_network
from effuse.capture import capture
from effuse.errors import CaptureError
from effuse.examples import derive_inputs
from effuse.method import as_network, is_method
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize


class Normal:
    """What a latent is drawn from."""

    def __init__(self, moments: torch.Tensor) -> None:
        self.mean, self.spread = moments.chunk(2, dim=1)

    def mode(self) -> torch.Tensor:
        return self.mean


class Autoencoder(nn.Module):
    """A pair of methods; forward is no use to anyone."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 2 * 5, 4, stride=4)
        self.decoder = nn.ConvTranspose2d(5, 3, 4, stride=4)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> Any:
        found = Normal(self.encoder(x))
        return {"latent_dist": found} if return_dict else (found,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> Any:
        found = self.decoder(z).tanh()
        return {"sample": found} if return_dict else (found,)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not to be called")


@pytest.fixture
def model() -> Autoencoder:
    return Autoencoder().eval()


def test_a_method_is_the_forward_of_a_network(model: Autoencoder):
    network = as_network(model.decode)
    assert type(network).__name__ == "Autoencoder.decode"
    assert list(inspect.signature(network.forward).parameters) == ["z", "return_dict", "generator"]
    assert network.decoder is model.decoder
    assert not network.training
    z = torch.randn(2, 5, 4, 4)
    assert torch.equal(network(z)["sample"], model.decode(z)["sample"])
    assert type(model) is Autoencoder
    with pytest.raises(RuntimeError, match="not to be called"):
        model(z)


def test_a_distribution_is_its_mode(model: Autoencoder):
    network = as_network(model.encode)
    x = torch.randn(2, 3, 16, 16)
    expected = model.encode(x)["latent_dist"].mean
    assert torch.equal(network(x)["latent_dist"], expected)
    assert torch.equal(network(x, return_dict=False)[0], expected)


def test_what_is_a_method_of_a_network(model: Autoencoder):
    assert is_method(model.decode)
    assert not any(map(is_method, (model, "a folder", Path(), Normal(torch.ones(1, 2)).mode)))
    assert load_network(model) is model


def test_inputs_are_those_of_the_method(model: Autoencoder):
    assert derive_inputs(as_network(model.decode), size=4)["z"].shape == (2, 5, 4, 4)
    assert derive_inputs(as_network(model.encode), size=16)["x"].shape == (2, 3, 16, 16)


def test_only_what_the_method_uses_is_kept(model: Autoencoder):
    program = capture(model.decode, {"z": torch.randn(2, 5, 4, 4), "return_dict": False})
    program = run_passes(program, (Canonicalize(),))
    assert sorted(program.weights) == ["decoder.bias", "decoder.weight"]


def test_a_method_in_train_mode_is_refused(model: Autoencoder):
    with pytest.raises(CaptureError, match="train mode"):
        capture(model.train().decode, {"z": torch.randn(2, 5, 4, 4)})


def test_a_compiled_method_stands_in_its_place(model: Autoencoder):
    config = effuse.Config(backend="reference")
    compiled = effuse.compile(model.decode, config, inputs=None, progress=False)
    shape = compiled.session.spec.inputs[0].shape
    z = torch.randn(*map(int, shape))
    expected = model.decode(z, return_dict=False)[0]
    model.decode = compiled  # type: ignore[method-assign,assignment]
    assert torch.equal(model.decode(z, return_dict=False)[0], expected)
    generated = model.decode(z, return_dict=False, generator=torch.Generator())  # of no use to it
    assert torch.equal(generated[0], expected)
