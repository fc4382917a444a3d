"""Sums that do not read their first addend become products; it goes."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from effuse.capture import capture
from effuse.graph import calls
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it


class Scores(nn.Module):
    """A sum with a weight of the network as its first addend."""

    def __init__(self, function, addend: torch.Tensor, **options: float) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.register_buffer("addend", addend)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.function(self.addend, sample, sample.mT, **self.options).tanh()


def targets(model: nn.Module, shape: tuple[int, ...]) -> tuple[list[str], set[str]]:
    torch.manual_seed(0)
    program = run_passes(capture(model.eval(), {"sample": torch.randn(shape)}), (Canonicalize(),))
    assert program.records[0].error is not None and program.records[0].error < 1e-6
    found = [str(node.target) for node in calls(program.parts[0].graph)]
    return found, set(program.weights)


@pytest.mark.parametrize(("alpha", "scaled"), [(1.0, []), (0.5, ["aten.mul.Tensor"])])
def test_what_is_not_read_goes(alpha: float, scaled: list[str]):
    model = Scores(torch.baddbmm, torch.ones(2, 3, 3), beta=0, alpha=alpha)
    found, weights = targets(model, (2, 3, 4))
    assert found == ["aten.mT.default", "aten.bmm.default", *scaled, "aten.tanh.default"]
    assert not weights


def test_so_it_does_in_two_dimensions():
    found, weights = targets(Scores(torch.addmm, torch.ones(3), beta=0), (3, 4))
    assert "aten.mm.default" in found and not weights


@pytest.mark.parametrize("options", [{}, {"beta": 0.5}, {"alpha": 2.0}])
def test_what_is_read_stays(options: dict[str, float]):
    found, weights = targets(Scores(torch.baddbmm, torch.randn(2, 3, 3), **options), (2, 3, 4))
    assert "aten.baddbmm.default" in found and weights == {"addend"}
