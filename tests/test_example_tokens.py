"""Example inputs of networks on tokens: positions by row, widths in the last axis, counts told."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from effuse.errors import InputError
from effuse.example_shapes import rows
from effuse.examples import derive_inputs


class Placed(nn.Module):
    """Positions of the prompt's and the picture's tokens, one row for each, for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.prompt, self.place = nn.Linear(4, 8), nn.Linear(6, 8), nn.Linear(3, 8)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        if position_ids.shape[1:] != (3,):
            raise ValueError(f"expected 3 axes, got {tuple(position_ids.shape)}")
        batch, _, _ = hidden_states.shape
        parts = [self.prompt(encoder_hidden_states), self.first(hidden_states)]
        tokens = torch.cat(parts, dim=1).reshape(batch, -1, 4, 2)
        return tokens * self.place(position_ids.float()).reshape(1, -1, 4, 2)


class Shifted(nn.Module):
    """Tokens whose width no config tells, shifted by one vector a sample."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.layer = nn.Linear(5, 6), nn.Linear(8, 6)

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        shift = self.time(timestep.expand(hidden_states.shape[0])[:, None].expand(-1, 5).float())
        tokens = self.layer(hidden_states) * shift[:, None]
        return tokens + torch.arange(hidden_states.shape[1])[:, None]


class Counted(nn.Module):
    """Computes places of a count that has to be told, where the places themselves are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def placed(self, count: int) -> torch.Tensor:
        return torch.arange(0, count + 1)

    def forward(
        self, sample: torch.Tensor, row_places: torch.Tensor | None = None,
        row_count: int | None = None,
    ) -> torch.Tensor:  # fmt: skip
        if row_places is None:
            row_places = self.placed(row_count)  # type: ignore[arg-type]
        if row_places.dim() != 1:
            raise ValueError("places are numbers")
        return self.layer(sample) * row_places.sum()


class Turned(nn.Module):
    """Takes no table of cosines and sines that is tried."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 4, 1)

    def forward(self, sample: torch.Tensor, rotary_emb: tuple[torch.Tensor, ...]) -> torch.Tensor:
        raise ValueError("not these")


def test_positions_have_a_row_for_each_token():
    found = derive_inputs(Placed().eval(), size=8)
    prompt, tokens = (found[name].shape for name in ("encoder_hidden_states", "hidden_states"))
    assert found["position_ids"].shape == (prompt[1] + tokens[1], 3)


def test_only_rows_of_indices_follow_a_table():
    inputs = {"ids": torch.zeros(2, 3, dtype=torch.int64), "noise": torch.zeros(2, 3),
              "square": torch.zeros(2, 2, dtype=torch.int64)}  # fmt: skip
    tried = list(rows([(4, 9, 1, 8), (1, 2, 4, 8)], list(inputs), inputs))
    assert [tuple(each["ids"].shape) for each in tried] == [(9, 3)]
    assert all(each["noise"] is inputs["noise"] for each in tried)
    assert not list(rows([(2, 3)], list(inputs), inputs))


def test_what_has_an_axis_too_many_is_tokens_of_its_last():
    assert derive_inputs(Shifted().eval(), size=8)["hidden_states"].shape == (2, 8, 8)


def test_a_number_is_told_where_one_is_missed():
    found = derive_inputs(Counted().eval(), size=8)
    assert found["row_count"] == 1 and "row_places" not in found


def test_a_table_is_told_by_its_shapes():
    with pytest.raises(InputError, match=r"rotary_emb \[\(\d+, 67\), \(\d+, 67\)\]"):
        derive_inputs(Turned().eval(), size=8)
