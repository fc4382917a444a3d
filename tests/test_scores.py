"""Attention scores in powers of two: which attentions, the start token, what refuses them."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.backends.onnx import export_part
from effuse.calibrate import calibrate, step_values
from effuse.capture import capture
from effuse.errors import BackendError
from effuse.graph import calls, evaluate
from effuse.kernels.log2_attention import attention_log2_reference
from effuse.log import Log
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Quantize
from effuse.passes.base import Work

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten, ops = torch.ops.aten, torch.ops.effuse


class Attentions(nn.Module):
    """Self-attention, cross-attention on a prompt, joint attention on both."""

    def __init__(self):
        super().__init__()
        self.own, self.text, self.leave = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, sample, timestep, encoder_hidden_states):
        x = self.own(sample)
        text = self.text(encoder_hidden_states)
        both = torch.cat([text, x], 1)
        for keys in (x, text, both):
            x = x + heads(F.scaled_dot_product_attention(split(x), split(keys), split(keys)))
        return self.leave(x * timestep.float().cos())


def split(x):
    return x.unflatten(-1, (2, 4)).transpose(1, 2)


def heads(x):
    return x.transpose(1, 2).flatten(2)


@functools.cache
def program(tokens=5):
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 6, 8), "timestep": torch.tensor(7.0),
              "encoder_hidden_states": torch.randn(2, tokens, 8)}  # fmt: skip
    captured = capture(Attentions().eval(), values, timesteps=(9.0, 7.0))
    return run_passes(captured, (Canonicalize(), Hoist()))


def quantized(bits, tokens=5, fuel=None):
    given = program(tokens)
    work = Work(log=Log(fuel), calibration=calibrate(given, None, step_values))
    with torch.no_grad():
        return Quantize("w8a16", scores=bits, exclude=("*",)).run(given, work), work.log


def test_the_start_token_is_kept_in_cross_attention_alone():
    found, log = quantized(4)
    graph = found.part("full").graph
    nodes = calls(graph, ops.attention_log2.default)
    assert [node.args[6:] for node in nodes] == [(4, 0), (4, 1), (4, 0)]
    assert [node.args[5] for node in nodes] == [0.5] * 3
    assert not calls(graph, aten.scaled_dot_product_attention.default)
    assert log.rewrites["attention scores"] == 3
    (only, ) = {node.args[7] for node in calls(quantized(4, 1)[0].part("full").graph,
                                               ops.attention_log2.default)}  # fmt: skip
    assert only == 0  # of a prompt of one token, a start alone would be left


def test_no_scores_asked_for_and_none_changed():
    found, log = quantized(0)
    assert len(calls(found.part("full").graph, aten.scaled_dot_product_attention.default)) == 3
    assert not log.rewrites


def test_out_of_fuel_and_reasons():
    found, _ = quantized(4, fuel=2)
    assert len(calls(found.part("full").graph, ops.attention_log2.default)) == 2
    for wrong in (1, 9, -1):
        assert "scores: expected 0 or 2 to 8" in Quantize(scores=wrong).requires(program())


def output(found):
    given = calibrate(program(), None, step_values).probes["full"][0]
    return evaluate(found.part("full").graph, found.weights, given)[0]


def test_more_bits_are_nearer_until_the_powers_of_two_are_what_is_left():
    exact = output(program())
    errors = [((output(quantized(b)[0]) - exact).norm() / exact.norm()).item() for b in (2, 4, 8)]
    assert errors[0] >= errors[1] >= errors[2] and errors[2] < 0.05


@pytest.mark.parametrize("start", [0, 1])
def test_scores_that_are_powers_of_two_of_the_greatest_are_exact(start):
    steps = torch.tensor([0.0, 3.0, 1.0, 1.0, 2.0])
    q, k = torch.ones(1, 1, 1, 1), (-steps * torch.log(torch.tensor(2.0))).view(1, 1, 5, 1)
    v = torch.eye(5).view(1, 1, 5, 5)
    found = attention_log2_reference(q, k, v, None, False, 1.0, 8, start)
    expected = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_every_score_is_within_half_a_power_and_the_start_is_itself():
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 2, 7, 4), torch.randn(2, 2, 9, 4), torch.eye(9).expand(2, 2, 9, 9)
    found = attention_log2_reference(q, k, v, None, False, 2.0, 8, 1)
    scores = (q @ k.transpose(-1, -2) * 2.0).softmax(-1)
    assert torch.equal(found[..., 0], scores[..., 0])  # against the identity, y is the scores
    ratio = (found / scores).log2().abs()
    assert ratio.max() <= 0.5 + 1e-4 and ratio[..., 1:].max() > 0.4


def test_queries_without_keys_give_zeros_as_in_float():
    q, k, v = (torch.randn(1, 2, 3, 4) for _ in range(3))
    mask = torch.ones(3, 3, dtype=torch.bool).tril()
    mask[1] = False
    found = attention_log2_reference(q, k, v, mask, False, 0.5, 8, 0)
    assert torch.equal(found[:, :, 1], torch.zeros(1, 2, 4))
    # one key that is seen alone has the score 1
    assert torch.allclose(found[:, :, 0], v[:, :, 0]) and found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_come_back_as_they_went_in(dtype):
    q, k, v = (torch.randn(1, 2, 3, 4).to(dtype) for _ in range(3))
    found = ops.attention_log2.default(q, k, v, None, True, 0.5, 8, 0)
    expected = attention_log2_reference(q.float(), k.float(), v.float(), None, True, 0.5, 8, 0)
    assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


def test_onnx_refuses_them():
    found, _ = quantized(4)
    with pytest.raises(BackendError, match="attention scores in powers of two of 4 bits"):
        export_part(found.part("full"), found.weights)
