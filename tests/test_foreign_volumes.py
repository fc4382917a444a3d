"""Networks of three-dimensional and transposed convolutions: what of them is quantized."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effuse.calibrate import calibrate, layer_values
from effuse.capture import capture
from effuse.errors import PassError
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Quantize
from effuse.program import Program
from effuse.statistics import Calibration

logging.getLogger("torch.__trace").disabled = True


class Volume(nn.Module):
    """Frames down and up again, and a linear layer between."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.mid = nn.Conv3d(4, 8, 2, stride=2), nn.Linear(8, 8)
        self.up = nn.ConvTranspose3d(8, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.silu(self.down(x)).movedim(1, -1)
        return self.up(self.mid(h).movedim(-1, 1))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(1)
    model = Volume().eval().requires_grad_(False)
    return run_passes(capture(model, {"x": torch.randn(1, 4, 4, 4, 4)}), (Canonicalize(), Hoist()))


def rewritten(program: Program, rewrite: Quantize) -> Program:
    def measured(current: Program) -> Calibration:
        return calibrate(current, [current.examples], layer_values)

    return run_passes(program, (rewrite,), measured)


def test_what_stays_in_float_is_listed_with_its_reason(program: Program) -> None:
    found = rewritten(program, Quantize(min_sqnr_db=0, edges=True))
    layers = {each.name: each for each in found.layers}
    assert layers["mid"].format == "w8a8" and not layers["mid"].reason
    assert layers["down"].reason.startswith("three-dimensional convolution: only linear layers")
    assert layers["up"].reason.startswith("transposed convolution: ")
    assert layers["down"].parameters == 4 * 8 * 8 and layers["up"].format == "float"


def test_what_was_asked_for_by_name_is_refused(program: Program) -> None:
    with pytest.raises(PassError, match="layers: 'down' is a three-dimensional convolution"):
        rewritten(program, Quantize(min_sqnr_db=0, edges=True, layers=(("down", "w8a8"),)))
    found = rewritten(program, Quantize(edges=True, min_sqnr_db=0, layers=(("up", "float"),)))
    assert found.layers
