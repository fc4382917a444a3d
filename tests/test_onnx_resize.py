"""Resizing by factors that are not whole: the pixels that PyTorch takes, in ONNX Runtime too."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.backends import onnx
from effuse.backends.onnx_resize import gather_uneven
from effuse.capture import capture
from effuse.graph import calls, clone, eliminate
from effuse.parity import check_parity
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize
from effuse.program import run_program
from effuse.weights import copied

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

DOUBLE = torch.float64  # in which the factor 32/110 is rounded to another pixel


class Resized(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.options, self.weight = options, nn.Parameter(torch.linspace(1, 2, 3))

    def forward(self, sample):
        scaled = sample * self.weight.reshape(-1, *[1] * (sample.dim() - 2))
        return F.interpolate(scaled, mode="nearest", **self.options)


def captured(shape, dynamic=None, dtype=torch.float32, **options):
    generator = torch.Generator().manual_seed(0)
    values = {"sample": torch.randn(2, 3, *shape, generator=generator).to(dtype)}
    program = capture(Resized(**options).to(dtype).eval(), values, dynamic=dynamic)
    return run_passes(program, (Canonicalize(),))


def gathered(program):
    """The program with its graph rewritten."""
    graph, _ = clone(program.parts[0].graph)
    weights = copied(program.weights)
    gather_uneven(graph, weights)
    eliminate(graph)
    return replace(program, parts=(replace(program.parts[0], graph=graph),), weights=weights)


def resizes(program) -> int:
    return sum("upsample" in str(node.target) for node in calls(program.parts[0].graph))


UNEVEN = [((32,), {"size": 110}), ((32, 4), {"size": (110, 9)}), ((7, 8), {"scale_factor": 1.7}),
          ((2, 5, 6), {"size": (3, 7, 6)}), ((9, 9), {"size": (5, 4)})]  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        *UNEVEN,
        ((32,), {"size": 110, "dtype": DOUBLE}),
        ((32,), {"size": 110, "dtype": torch.bfloat16}),
    ],
)
def test_uneven_factors_become_the_pixels_that_eager_takes(shape, options):
    program = captured(shape, **options)
    result = gathered(program)
    assert (resizes(program), resizes(result)) == (1, 0)
    (found,) = run_program(result, dict(result.examples))
    assert torch.equal(found, program.expected[0])
    assert resizes(gathered(result)) == 0


@pytest.mark.parametrize("options", [{"size": (16, 24)}, {"scale_factor": 2.0}, {"size": (4, 2)}])
def test_whole_factors_stay_resizes(options):
    program = captured((8, 8), **options)
    assert resizes(gathered(program)) == 1


def test_open_sizes_stay_resizes():
    program = captured((8, 8), dynamic={"height": (4, 16)}, scale_factor=1.5)
    assert resizes(gathered(program)) == 1


def test_onnx_runtime_takes_the_same_pixels(tmp_path):
    program = captured((32,), size=110)
    onnx.build(program, tmp_path)
    session = onnx.load_session(program.spec(), tmp_path)
    assert check_parity(program, session, "onnx")["sqnr_db"] > 120
