"""Example inputs of networks that keep, read or lay out their tensors in ways of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from effuse.capture import capture
from effuse.errors import InputError
from effuse.example_repair import repaired, sizes
from effuse.example_trial import Failure, trial
from effuse.examples import derive_inputs, describe, first_guess
from effuse.plan import Role
from effuse.verify import compare


class Keeping(nn.Module):
    """Frames before channels, a timestep a frame, and a table made at the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(4, 4, 1)
        self.table: list[torch.Tensor] = []

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if not self.table:
            self.table = [torch.ones(1) + number for number in range(40)]
        hidden = self.layer(sample.permute(0, 2, 1, 3, 4))
        batch, frames = timestep.shape
        return hidden + timestep.reshape(batch, 1, frames, 1, 1)


class Reading(nn.Module):
    """Reads a mask's values before a layer whose width no config tells."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.prompt = nn.Conv2d(3, 8, 1), nn.Linear(12, 8)

    def forward(
        self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor, text_mask: torch.Tensor
    ) -> torch.Tensor:
        if text_mask.all():
            encoder_hidden_states = encoder_hidden_states * 2
        kept = self.prompt(encoder_hidden_states).mean(dim=1)
        return self.first(sample) + kept[:, :, None, None]


class Last(nn.Module):
    """Videos with their channels last, in patches of 2 x 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = nn.Linear(channels * 4, 8)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch, frames, height, width, channels = hidden_states.shape
        patches = hidden_states.reshape(batch, frames, height // 2, 2, width // 2, 2, channels)
        return self.layer(patches.movedim(3, 4).flatten(4))


class Layered(nn.Module):
    """A prompt for each layer, by number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states: torch.Tensor, prompt_layers: list) -> torch.Tensor:  # type: ignore[type-arg]
        for number, layer in enumerate(self.layers):
            hidden_states = hidden_states + layer(prompt_layers[number]).mean()
        return hidden_states


class Maskless(nn.Module):
    """Has an argument for a mask, which only fits networks with frames in place of samples."""

    config: ClassVar = {"caption_channels": 8}

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.prompt = nn.Conv2d(4, 8, 1), nn.Linear(8, 8)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        kept = self.prompt(encoder_hidden_states)
        if encoder_attention_mask is not None:
            kept = kept * encoder_attention_mask.view(16, -1, 1)
        return self.layer(hidden_states) + kept.mean(dim=1)[:, :, None, None]


class Dropping(nn.Module):
    """Leaves out the prompt of some samples, by truth values; one table has few rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(2, 4), nn.Linear(4, 4)

    def forward(
        self, sample: torch.Tensor, token_ids: torch.Tensor, prompt_drop: torch.Tensor
    ) -> torch.Tensor:
        kept = self.table(token_ids)
        kept[prompt_drop] *= 0.0
        return sample + self.layer(kept).mean(dim=1)[:, :, None, None]


class Mixed(nn.Module):
    """Layers of two dtypes, of which the second takes nothing that the first gives."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1).double()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(sample) + timestep)


class Frames(nn.Module):
    """Keeps its last frame for the next piece of a video, and is left with it where it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(4, 4, 1)
        self.last: torch.Tensor | None = None
        self.pieces: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.last is not None or self.pieces:
            raise ValueError("a video begins with its first frame")
        self.last = self.layer(x)[:, :, -1:]
        self.pieces += [x.shape[2]]
        if self.pieces[-1] % 4 != 1:
            raise ValueError("a frame and pieces of four")
        last, self.last, self.pieces = self.last, None, []
        return x + last


def test_what_a_failed_call_leaves_behind_does_not_fail_the_next():
    assert derive_inputs(Frames().eval(), size=8)["x"].shape == (2, 4, 9, 8, 8)


def test_a_timestep_has_no_width_to_mend():
    with pytest.raises(InputError, match=r"does not take the examples.*timestep \(.*type.*inputs="):
        derive_inputs(Mixed().eval(), size=8)


def test_sizes_that_would_fill_the_memory_are_not_tried():
    error = RuntimeError("expected 60000 or 9")
    failed = Failure(error, (1, 1, True), ((2, 300),), None, False, ())
    inputs = {"few": torch.zeros(2, 300), "many": torch.zeros(2, 8, 100, 300)}
    tried = [tuple(each[name].shape) for each in sizes(failed, ["few", "many"], inputs)
             for name in inputs if each[name] is not inputs[name]]  # fmt: skip
    assert tried == [(2, 2), (2, 60000), (2, 9), (2, 8, 100, 2), (2, 8, 100, 9)]


def test_what_a_network_keeps_from_its_first_call_is_no_progress():
    found = derive_inputs(Keeping().eval(), size=8)
    assert found["timestep"].shape == (2, found["sample"].shape[1])
    assert found["sample"].shape[2] == 4


def test_a_network_that_reads_values_is_tried_on_real_numbers():
    found = derive_inputs(Reading().eval(), size=8)
    assert found["encoder_hidden_states"].shape[-1] == 12
    with torch.device("meta"):
        unknown = derive_inputs(Reading().eval(), size=8)
    assert unknown["encoder_hidden_states"].shape[-1] != 12


@pytest.mark.parametrize("channels", [4, 9])
def test_channels_in_the_last_axis(channels: int):
    model = Last(channels).eval()
    inputs = {"hidden_states": torch.randn(2, 4, 8, 16, 16)}
    found, failed = repaired(trial(model), describe(model, 2, 16), inputs)
    assert failed is None
    assert found["hidden_states"].shape == (2, 8, 16, 16, channels)


def test_a_list_grows_by_what_layers_take():
    found = derive_inputs(Layered().eval(), size=8)
    assert [each.shape[-1] for each in found["prompt_layers"]] == [8, 8, 8]


def test_an_argument_that_does_not_fit_is_left_out():
    model = Maskless().eval()
    assert "encoder_attention_mask" in first_guess(describe(model, 2, 8))
    assert "encoder_attention_mask" not in derive_inputs(model, size=8)


def test_the_prompt_of_another_encoder():
    class Two(nn.Module):
        config: ClassVar = {"cross_attention_dim_t5": 10, "text_len_t5": 20, "text_embed_2_dim": 6}

        def forward(
            self, encoder_hidden_states_t5: torch.Tensor, encoder_hidden_states_2: torch.Tensor
        ) -> torch.Tensor:
            return encoder_hidden_states_t5.mean() + encoder_hidden_states_2.mean()

    found = derive_inputs(Two())
    assert found["encoder_hidden_states_t5"].shape == (2, 20, 10)
    assert found["encoder_hidden_states_2"].shape == (2, 77, 6)


def test_samples_picked_by_truth_values_are_captured_with_them():
    model = Dropping().eval()
    given: dict[str, Any] = derive_inputs(model, size=4)
    given |= {"sample": torch.randn(2, 4, 4, 4), "prompt_drop": torch.tensor([True, False])}
    program = capture(model, given)
    assert {item.name for item in program.inputs if item.role is Role.STATIC} >= {"prompt_drop"}
    assert compare(program) is not None
    assert compare(program)[0] == 0.0  # type: ignore[index]


def test_a_video_that_steers_is_as_large_as_the_latent():
    class Steered(nn.Module):
        config: ClassVar = {"in_channels": 4, "vace_in_channels": 6}

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.control = nn.Conv3d(4, 8, 1), nn.Conv3d(6, 8, 1)

        def forward(
            self, sample: torch.Tensor, control_hidden_states: torch.Tensor | None = None
        ) -> torch.Tensor:
            assert control_hidden_states is not None
            return self.layer(sample) + self.control(control_hidden_states)

    found = derive_inputs(Steered(), size=8)
    assert found["control_hidden_states"].shape == (2, 6, *found["sample"].shape[2:])
