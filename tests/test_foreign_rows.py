"""Networks of one-dimensional convolutions, as of audio and motion, through the rewrites."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from effuse.backends.onnx import build, load_session
from effuse.calibrate import calibrate, layer_values
from effuse.capture import capture
from effuse.graph import calls
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, LowRank, Quantize, SplitShortcut
from effuse.program import Program, run_program
from effuse.statistics import Calibration

logging.getLogger("torch.__trace").disabled = True

aten = torch.ops.aten


class Rows(nn.Module):
    """A level down and up, with a skip concatenation, on (batch, channels, length)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time = nn.Conv1d(4, 16, 3, padding=1), nn.Linear(1, 16)
        self.down = nn.Conv1d(16, 16, 4, stride=2, padding=1)
        self.mid = nn.Conv1d(16, 16, 3, padding="same", dilation=2, groups=2)
        self.up = nn.ConvTranspose1d(16, 16, 4, stride=2, padding=1)
        self.join, self.last = nn.Conv1d(32, 16, 5, padding=2), nn.Conv1d(16, 4, 1, bias=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        skip = self.first(x) + self.time(t[:, None])[:, :, None]
        h = self.mid(F.silu(self.down(F.silu(skip))))
        return self.last(F.silu(self.join(torch.cat([self.up(h), skip], dim=1))))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(2, 4, 16), "t": torch.full((2,), 5.0)}
    captured = capture(Rows().eval().requires_grad_(False), inputs)
    return run_passes(captured, (Canonicalize(), Hoist()))


def outputs(program: Program) -> torch.Tensor:
    return run_program(program, program.examples)[0]


def count(program: Program, *targets: object) -> int:
    return sum(len(calls(part.graph, *targets)) for part in program.parts)


def test_rows_are_images_of_one_row_to_the_bit(program: Program) -> None:
    assert program.expected is not None
    assert torch.equal(outputs(program), program.expected[0])
    assert count(program, aten.conv1d.default) == 0
    assert count(program, aten.conv2d.default) == 4
    assert program.weights["join.weight.row"].shape == (16, 32, 1, 5)
    assert "join.weight" not in program.weights


def test_onnx_agrees(program: Program, tmp_path) -> None:
    build(program, tmp_path)
    session = load_session(program.spec(), tmp_path)
    found = session(**program.examples)
    torch.testing.assert_close(torch.as_tensor(found), outputs(program), rtol=1e-4, atol=1e-5)


def test_a_concatenation_of_rows_is_split(program: Program) -> None:
    split = run_passes(program, (SplitShortcut(),))
    assert count(split, aten.conv2d.default) == 5
    assert count(split, aten.cat.default) == 0


@pytest.mark.parametrize(
    "rewrite", [LowRank(rank=2, inputs=False, edges=True), Quantize(edges=True, min_sqnr_db=0)]
)
def test_layers_of_rows_are_rewritten(program: Program, rewrite: LowRank | Quantize) -> None:
    def measured(current: Program) -> Calibration:
        return calibrate(current, [current.examples], layer_values)

    found = run_passes(program, (rewrite,), measured)
    assert found.records[-1].rewrites
    assert sqnr_db(outputs(program).numpy(), outputs(found).numpy()) > 20
