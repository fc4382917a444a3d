"""Example inputs of what steers or frames a network: shapes that a call asks of several inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from effuse.example_rows import guessed
from effuse.example_shapes import counted, patched, repeated, several
from effuse.examples import config_of, derive_inputs, describe


class Stacked(nn.Module):
    """States of several layers side by side, which no layer's width tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, length, _ = hidden_states.shape
        apart = hidden_states.transpose(1, 2).reshape(batch, 5, 6, length)
        return self.layer(apart.mean(1).mT)


class Patches(nn.Module):
    """Patches of 2×2 pixels as tokens, and no channels but in the width of their layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4 * 3, 4)

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        apart = [each.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)) for each in x]
        return [self.layer(each.permute(1, 3, 2, 4, 0).flatten(2)) for each in apart]


class Framed(nn.Module):
    """Frames as samples, and a prompt for each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.prompt = nn.Conv2d(4, 4, 1), nn.Linear(6, 4)

    def forward(self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        batch, channels, frames, height, width = sample.shape
        each = sample.transpose(1, 2).reshape(batch * frames, channels, height, width)
        kept = self.prompt(encoder_hidden_states).mean(dim=1)
        return self.layer(each) + kept[:, :, None, None]


class Steered(nn.Module):
    """A video, what steers it and which of that is told, which have to gain frames together."""

    config: Mapping[str, Any] = {"use_simplified_condition_embedding": True,
                                 "concat_conditioning_mask": True}  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 4, 1), nn.Conv2d(5, 4, 1)

    def forward(
        self, sample: torch.Tensor, controlnet_cond: torch.Tensor,
        conditioning_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        given = torch.cat([controlnet_cond, conditioning_mask], dim=1)  # type: ignore[list-item]
        frames = [layer(each.transpose(1, 2).flatten(0, 1))
                  for layer, each in ((self.first, sample), (self.second, given))]  # fmt: skip
        batch, _, count, height, width = given.shape
        return (frames[0] + frames[1]).reshape(batch, count, 4, height, width)


class Part(nn.Module):
    """A network with a config, which offers several scales."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config, self.layer = config, nn.Conv2d(4, 4, 1)

    def forward(self, sample: torch.Tensor, scale: int, other: int) -> torch.Tensor:
        if scale not in self.config["scales"]:
            raise ValueError("no such scale")
        return self.layer(sample) * scale


class Several(nn.Module):
    """Holds others, and has no config of its own."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.nets = nn.ModuleList(parts)

    def forward(self, controlnet_cond: torch.Tensor, control_type: torch.Tensor) -> torch.Tensor:
        return controlnet_cond


class Zipped(nn.Module):
    """Goes through what steers and how much, though names and annotations tell one of each."""

    config: Mapping[str, Any] = {"conditioning_channels": 3}

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 8, 2, stride=2)

    def forward(
        self, sample: torch.Tensor, controlnet_cond: torch.Tensor, weight: float = 1.0,
        strict: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        found = self.layer(sample).flatten(2)
        for each, scale in zip(controlnet_cond, weight, strict=strict):  # type: ignore[call-overload]
            found = found + self.layer(each).flatten(2) * scale
        return found


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    found = derive_inputs(model.eval(), size=8)
    with torch.no_grad():
        model(**found)
    return {name: tuple(each.shape) for name, each in found.items() if torch.is_tensor(each)}


def test_a_width_is_what_a_reshape_counts():
    assert shapes(Stacked())["hidden_states"][-1] == 30


def test_channels_are_those_of_which_patches_have_a_layer_s_width():
    found = derive_inputs(Patches().eval(), size=8, trials=5)["x"]  # 3 do; by luck 23
    assert [tuple(each.shape) for each in found] == [(3, 8, 8)] * 2


def test_what_is_no_patch_of_a_picture_keeps_its_channels():
    inputs = {"x": torch.ones(2, 8, 4, 4), "prompt": torch.ones(2, 8, 4)}
    given = [(12, 30), (12, 12), (7, 32)]  # no whole patches, none to change, no whole channels
    assert not [each for pair in given for each in patched(*pair, list(inputs), inputs)]
    (found,) = patched(16, 32, list(inputs), inputs)
    assert found["x"].shape == (2, 4, 4, 4)


@pytest.mark.parametrize("message", ["shape '[2, 5]' is invalid for input of size 7", "another"])
def test_a_count_that_no_size_gives_is_not_proposed(message: str):
    assert not list(counted(message, ["x"], {"x": torch.ones(2, 3)}))


def test_a_prompt_for_every_frame():
    found = shapes(Framed())
    frames = found["sample"][2]
    assert frames > 1
    assert found["encoder_hidden_states"] == (2 * frames, 77, 6)


def test_only_a_prompt_of_each_sample_is_repeated():
    inputs = {"prompt": torch.arange(2.0).reshape(2, 1, 1), "pooled": torch.ones(2, 4)}
    proposals = list(repeated([(6, 4), (2, 4), (7, 4)], 2, list(inputs), inputs))
    assert [each["prompt"].flatten().tolist() for each in proposals] == [[0, 0, 0, 1, 1, 1]]
    assert proposals[0]["pooled"].shape == (2, 4)


def test_what_has_the_shape_of_another_but_for_channels_gains_frames_with_it():
    found = shapes(Steered())
    assert found["sample"] == found["controlnet_cond"]
    assert len(found["sample"]) == 5
    assert found["conditioning_mask"] == (2, 1, *found["sample"][2:])


def test_a_number_is_the_first_that_the_config_offers():
    found = derive_inputs(Part(scales=(3, 4)).eval(), size=8)
    assert (found["scale"], found["other"]) == (3, 1)


def test_the_config_of_what_only_holds_others():
    part = Part(conditioning_channels=3, num_control_type=5)
    net = describe(Several(part, Part()), 2, 8)
    assert guessed(net, "controlnet_cond").shape == (2, 3, 64, 64)
    assert guessed(net, "control_type").tolist() == [[1, 0, 0, 0, 0]] * 2


def test_a_part_with_a_config_does_not_speak_for_the_others():
    assert config_of(Several(Part(in_channels=4), nn.Linear(2, 2))) == {}


def test_a_picture_steers_at_the_size_of_pixels_where_its_channels_are_named():
    net = describe(Several(Part(ctrl_conditioning_channels=3)), 2, 8)
    assert guessed(net, "controlnet_cond").shape == (2, 3, 64, 64)


def test_what_is_gone_through_is_a_list_and_steers_in_the_latent_s_shape():
    found = derive_inputs(Zipped().eval(), size=8)
    assert found["weight"] == [1.0]
    (given,) = found["controlnet_cond"]
    assert given.shape == found["sample"].shape == (2, 4, 8, 8)
    assert "strict" not in found


def test_only_numbers_of_the_type_complained_of_are_listed():
    message = "'float' object is not iterable"
    words = ["scale", "count", "whole", "scale", "missing"]
    defaults = {"scale": 1.0, "count": 2, "other": 1.0}
    assert list(several(message, words, defaults, {"whole": 2.0})) == [
        {"whole": 2.0, "scale": [1.0]}, {"whole": [2.0]}
    ]  # fmt: skip
    assert not list(several("'float' has no length", words, defaults, {}))
