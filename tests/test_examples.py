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
