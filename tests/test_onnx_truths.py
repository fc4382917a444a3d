"""Choices between truth values for ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from effuse.backends.onnx import build, load_session
from effuse.backends.onnx_truths import choose_truths
from effuse.capture import capture
from effuse.graph import calls, clone, eliminate, evaluate

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Choosing(nn.Module):
    """Masks made of masks, and numbers chosen by them."""

    def forward(self, sample: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        high = sample > 0.5
        low = high.masked_fill(mask, False) | mask.masked_fill(sample < -0.5, True)
        either = torch.where(mask, high, sample < 0)
        return torch.where(low, sample, 2.0 * either).masked_fill(either, 3.0)


class Scalars(nn.Module):
    """Choices of which one is a number, or both."""

    def forward(self, sample: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        high = sample > 0.5
        found = [torch.where(mask, True, high), torch.where(mask, False, high),
                 torch.where(mask, high, True), torch.where(mask, high, False),
                 torch.where(mask, True, False).expand_as(high),
                 torch.where(mask, True, True).expand_as(high),
                 high.masked_fill(mask, torch.tensor(True)),
                 high.masked_fill(mask, mask.any())]  # fmt: skip
        return torch.where(high, 2.0, sample) * sum(2**i * each for i, each in enumerate(found))


def given(seed: int) -> dict[str, torch.Tensor]:
    """Numbers of both signs, and every second row masked."""
    torch.manual_seed(seed)
    return {"sample": torch.randn(4, 6), "mask": torch.arange(4)[:, None] % 2 == 0}


def test_truths_are_chosen_by_logic_and_numbers_as_they_were():
    program = capture(Choosing().eval(), given(0))
    graph, _ = clone(program.parts[0].graph)
    choose_truths(graph)
    eliminate(graph)
    left = calls(graph, aten.where.self, aten.masked_fill.Scalar)
    assert len(left) == 2 and all(node.meta["val"].is_floating_point() for node in left)
    for seed in range(3):
        inputs = given(seed)
        expected = Choosing()(**inputs)
        assert torch.equal(evaluate(graph, program.weights, inputs)[0], expected)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("network", [Choosing, Scalars])
def test_onnx_runtime_takes_them(tmp_path: Path, network: type[nn.Module], seed: int):
    program = capture(network().eval(), given(0))
    build(program, tmp_path)
    run, inputs = load_session(program.spec(), tmp_path), given(seed)
    assert torch.equal(torch.as_tensor(run(**inputs)), network()(**inputs))
