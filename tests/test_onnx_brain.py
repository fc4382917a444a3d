"""What is computed in bfloat16, for ONNX Runtime, whose CPU only casts it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.backends.onnx import build, load_session
from effuse.backends.onnx_brain import CASTS, brain, widen_brain
from effuse.capture import capture
from effuse.graph import calls, clone, eliminate, evaluate
from effuse.metrics import sqnr_db
from effuse.verify import verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

BRAIN = torch.bfloat16


class Island(nn.Module):
    """A network in float32, but for its attention, a layer, and what is cut and chosen there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 48).to(BRAIN), nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        q, k, v = self.inner(sample.to(BRAIN)).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        ramp = torch.arange(16, dtype=BRAIN, device=sample.device)
        chosen = torch.where(mixed > 0, mixed * ramp, v.type_as(mixed))
        return sample + self.outer(chosen.float()) / 16


def inputs(seed: int) -> dict[str, torch.Tensor]:
    """A latent of seven tokens."""
    torch.manual_seed(seed)
    return {"sample": torch.randn(2, 7, 16)}


def made() -> nn.Module:
    """The network, the same each time."""
    torch.manual_seed(0)
    return Island().eval()


def test_only_casts_are_left_of_it_and_each_op_is_rounded_once():
    program = capture(made(), inputs(0))
    graph, _ = clone(program.parts[0].graph)
    widen_brain(graph)
    eliminate(graph)
    left = [node for node in calls(graph) if brain(node)]
    assert left and all(node.target in CASTS for node in left)
    for seed in range(3):
        given = inputs(seed)
        (found,) = evaluate(graph, program.weights, given)
        torch.testing.assert_close(found, made()(**given), rtol=0, atol=4e-3)
        assert not torch.equal(found, unrounded(given))


def unrounded(given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the network gives in float32 throughout."""
    wide = Island().eval()
    wide.load_state_dict(made().state_dict())
    q, k, v = wide.inner.float()(given["sample"]).chunk(3, dim=-1)
    mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
    chosen = torch.where(mixed > 0, mixed * torch.arange(16), v)
    return given["sample"] + wide.outer(chosen) / 16


@pytest.mark.parametrize("op", [
    lambda x: x * 3.3 + x, lambda x: x.exp() - x.mean(dim=-1, keepdim=True), lambda x: F.silu(x),
    lambda x: torch.cat([x[:, 1:], x[:, :1]], dim=1).transpose(1, 2).flatten(1),
    lambda x: x.softmax(dim=-1), lambda x: F.pad(x, (1, 1)).clamp(-1, 1),
], ids=["sums", "mean", "silu", "moves", "softmax", "pad"])  # fmt: skip
def test_onnx_runtime_gives_the_same_bits_op_by_op(tmp_path: Path, op):
    class Short(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return op(sample.to(BRAIN)).float()

    program = capture(Short().eval(), inputs(0))
    verify(program)
    build(program, tmp_path)
    run, other = load_session(program.spec(), tmp_path), inputs(1)
    found, expected = torch.as_tensor(run(**other)), Short()(**other)
    off = (found - expected).abs() > 0
    assert off.float().mean() < 0.01  # at a tie of float32's own rounding
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=0)


def test_a_network_with_an_island_of_it_agrees(tmp_path: Path):
    program = capture(made(), inputs(0))
    build(program, tmp_path)
    run, other = load_session(program.spec(), tmp_path), inputs(1)
    ratio = sqnr_db(made()(**other).detach().numpy(), run(**other))
    assert ratio > 60  # of attention alone 53: kernels differ in where they round within
