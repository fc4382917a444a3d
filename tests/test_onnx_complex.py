"""Complex numbers for ONNX: products of two precisions, widened where torch widens them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from effuse.backends.onnx_complex import widen_pairs
from effuse.capture import capture
from effuse.graph import calls, clone, eliminate, evaluate, value_of

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Turned(nn.Module):
    """Pairs turned by angles of a precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        angles = torch.linspace(0, 3, 12, dtype=dtype).reshape(3, 4)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(sample.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(-2).float()


@pytest.mark.parametrize(("dtype", "casts"), [(torch.float64, 1), (torch.float32, 0)])
def test_pairs_are_widened_before_they_are_numbers(dtype: torch.dtype, casts: int):
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 3, 8)}
    program = capture(Turned(dtype).eval(), inputs)
    graph, _ = clone(program.parts[0].graph)
    before = evaluate(graph, program.weights, inputs)
    widen_pairs(graph)
    eliminate(graph)
    (made,) = calls(graph, aten.view_as_complex.default)
    assert value_of(made).real.dtype is dtype
    assert (made.args[0].target is aten._to_copy.default) is bool(casts)
    assert torch.equal(before[0], evaluate(graph, program.weights, inputs)[0])
