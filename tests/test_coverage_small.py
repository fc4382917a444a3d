"""The coverage benchmark's small values: they fit each other, and come first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks are not in the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from coverage_config import Search  # noqa: E402
from coverage_small import HEAD, HEADS, WIDTH, shares, small_settings  # noqa: E402


class Rotary(nn.Module):
    """Rotary axes that have to share a head's width: to halve them all at once fails."""

    def __init__(
        self, num_layers: int = 24, num_attention_heads: int = 24, attention_head_dim: int = 128,
        axes_dims_rope: tuple[int, ...] = (16, 56, 56), hidden_size: int = 3072,
    ) -> None:  # fmt: skip
        super().__init__()
        if sum(axes_dims_rope) != attention_head_dim:
            raise ValueError("the axes do not share a head's width")
        if hidden_size != num_attention_heads * attention_head_dim:
            raise ValueError("the heads do not share the width")
        self.first = nn.Conv2d(4, hidden_size, 1)
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_layers))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        hidden = self.first(sample).movedim(1, -1) + timestep / 1000
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden.movedim(-1, 1)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_rotary_axes_share_a_head_in_even_parts(count: int):
    parts = shares(count)
    assert len(parts) == count
    assert sum(parts) == HEAD
    assert all(part % 2 == 0 and part > 0 for part in parts)


def test_only_numbers_that_get_smaller_are_set():
    defaults = {"num_attention_heads": 24, "num_key_value_heads": 8, "attention_head_dim": 16,
                "in_channels": 64, "text_dim": 4096, "qk_norm": "rms", "heads": True,
                "axes_dims_rope": [16, 56, 56], "caption_channels": None}  # fmt: skip
    assert small_settings(defaults) == {"num_attention_heads": HEADS, "text_dim": 64,
                                        "num_key_value_heads": HEADS // 2,
                                        "axes_dims_rope": [8, 12, 12]}  # fmt: skip


def test_small_values_fit_each_other():
    search = Search(Rotary, {})
    found = search.find()
    assert search.failed == {}
    assert (found["hidden_size"], found["attention_head_dim"]) == (WIDTH, HEAD)
    assert found["num_layers"] == 2
    assert search.trials == Search(Rotary, {}).trials  # nothing was searched for
