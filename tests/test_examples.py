"""Example inputs found by trial: widths, ranks, types and arguments that no config tells."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from effuse.example_repair import repaired, reshaped, resized
from effuse.example_trial import trial
from effuse.examples import derive_inputs, describe, first_guess


class Cross(nn.Module):
    """A prompt of a width that no config tells, and one timestep a sample."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first, self.prompt = nn.Conv2d(3, 8, 1), nn.Linear(width, 8)
        self.time = nn.Linear(1, 8)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> torch.Tensor:
        kept = self.prompt(encoder_hidden_states).mean(dim=1)
        shift = kept + self.time(timestep[:, None].float())
        return self.first(sample) + shift[:, :, None, None]


class Video(nn.Module):
    """Frames in the second axis, in front of the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        batch, frames, channels, height, width = sample.shape
        flat = sample.reshape(batch * frames, channels, height, width)
        return self.layer(flat).reshape(sample.shape)


class Demanding(nn.Module):
    """Does not work without an argument that has a default."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.pooled = nn.Linear(4, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor, pooled_vector: torch.Tensor | None = None) -> torch.Tensor:
        shift = self.pooled(pooled_vector.float())  # type: ignore[union-attr]
        return self.layer(x) + shift


class Listed(nn.Module):
    """One picture after another, as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self.layer(each) for each in x]


class Counting(nn.Module):
    """Refuses everything, and counts how often it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.asked = nn.Linear(4, 4), [0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.asked[0] += 1
        raise ValueError("never")


class OneFrame(nn.Module):
    """A picture with an axis of frames, of more channels than the first layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Conv3d(3, 12, 1), nn.Conv2d(12, 3, 1)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if z.dim() < 5:
            raise ValueError("not enough values to unpack")
        return self.decoder(z.squeeze(2)).unsqueeze(2)


class Computed(nn.Module):
    """Keeps a weight that it has computed of its parameters, with its inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.layer = nn.utils.weight_norm(nn.ConvTranspose2d(12, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class Signal(nn.Module):
    """One channel of a signal that is longer than the kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layer = nn.Conv1d(3, 3, 1), nn.Conv1d(1, 1, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 1:
            raise ValueError("a signal has one channel")
        return self.layer(x)


class Padded(nn.Module):
    """One signal a sample, padded by more than a prompt has tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(1, 4, 64, stride=64)

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return self.layer(nn.functional.pad(audio.unsqueeze(1), (384, 384), mode="reflect"))


class Angles(nn.Module):
    """Takes frames one by one after the first, and puts waves in the channels' place."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 15}
        self.last, self.first = nn.Conv3d(4, 4, (3, 1, 1), stride=(2, 1, 1)), nn.Linear(15, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        waves = torch.cat([(x * n).sin() for n in range(5)], 1)
        found = self.first(waves.movedim(1, -1))
        if x.shape[2] % 2 == 0:
            raise ValueError("no first frame")
        return self.last(found.movedim(-1, 1))


class Alone(nn.Module):
    """Mixes up the samples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = self.layer(x)
        return (found[:, None] + found[None]).squeeze(1).reshape(found.shape)


def shapes(model: nn.Module, **options: Any) -> dict[str, Any]:
    found = derive_inputs(model.eval(), size=8, **options)
    with torch.no_grad():
        model(**found)
    return {name: tuple(each.shape) for name, each in found.items() if torch.is_tensor(each)}


@pytest.mark.parametrize("width", [12, 96])
def test_a_width_is_what_the_first_layer_wants(width: int):
    assert shapes(Cross(width)) == {
        "sample": (2, 3, 8, 8), "timestep": (2,), "encoder_hidden_states": (2, 77, width),
    }  # fmt: skip


def test_a_rank_is_what_forward_unpacks():
    found = shapes(Video())
    assert len(found["sample"]) == 5
    assert found["sample"][2] == 4


def test_an_argument_that_forward_does_without_in_name_only():
    assert shapes(Demanding())["pooled_vector"] == (2, 6)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_weight_that_is_no_parameter():
    assert shapes(Computed())["x"] == (2, 12, 8, 8)


def test_rank_and_width_may_be_wrong_at_once():
    assert shapes(OneFrame())["z"] == (2, 12, 1, 8, 8)


def test_signals_are_long_and_have_one_channel():
    assert shapes(Signal())["x"] == (2, 1, 4096)


def test_a_signal_may_have_no_channels():
    assert derive_inputs(Padded().eval(), size=8)["audio"].shape == (2, 4096)


def test_what_is_multiplied_before_a_layer():
    assert shapes(Angles())["x"] == (2, 3, 9, 8, 8)


def test_one_sample_where_a_network_takes_no_more():
    assert shapes(Alone())["x"] == (1, 3, 8, 8)


def test_lists_of_tensors():
    found = derive_inputs(Listed().eval(), size=8)["x"]
    assert [tuple(each.shape) for each in found] == [(4, 8, 8)] * 2


def test_trials_are_bounded():
    model = Counting().eval()
    net = describe(model, 2, 8)
    _, failed = repaired(trial(model), net, first_guess(net), trials=5)
    assert failed is not None
    assert failed.reason == "ValueError: never"


def test_statements_are_told_from_the_innermost_outwards():
    model = Demanding().eval()
    failed = trial(model)({"x": torch.ones(2, 4)})
    assert failed is not None
    assert "pooled_vector.float()" in failed.lines[0]


def test_other_sizes_keep_the_values():
    value = torch.arange(6).reshape(2, 3)
    assert resized(value, 1, 5).tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4]]
    assert resized(value, 1, 2).tolist() == [[0, 1], [3, 4]]
    assert reshaped(value, (7,)).tolist() == [0, 1, 2, 3, 4, 5, 0]
