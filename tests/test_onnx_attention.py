"""Attention as one op of ONNX Runtime: found by structure, exact, refused with a reason."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.backends.onnx_attention import fuse_attention, give_one_head, unfit
from effuse.capture import capture
from effuse.graph import calls, clone, eliminate, evaluate
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten, ops = torch.ops.aten, torch.ops.effuse
SDPA = aten.scaled_dot_product_attention.default


class Attention(nn.Module):
    """Heads of 4 over 8 channels; `options` are handed on to the attention."""

    def __init__(self, tokens=lambda x: x, dtype=torch.float32, **options):
        super().__init__()
        self.query, self.key = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 8, dtype=dtype)
        self.tokens, self.options = tokens, options

    def forward(self, sample):
        n, s, c = sample.shape
        query = self.query(sample).view(n, s, 2, 4).transpose(1, 2)
        keys = self.tokens(sample)
        key = self.key(keys).view(n, -1, 2, 4).transpose(1, 2)
        y = F.scaled_dot_product_attention(query, key, key, **self.options)
        return y.transpose(1, 2).reshape(n, s, c)


def graph_of(model, dtype=torch.float32):
    torch.manual_seed(0)
    sample = torch.randn(2, 6, 8).to(dtype)
    program = run_passes(capture(model.eval(), {"sample": sample}), (Canonicalize(),))
    graph, _ = clone(program.parts[0].graph)
    return graph, program.weights, {"sample": sample}


class Headless(nn.Module):
    """Attention over (batch, tokens, width), the mask as it comes."""

    def __init__(self, mask=None):
        super().__init__()
        self.key, self.mask = nn.Linear(8, 8), mask

    def forward(self, sample):
        key = self.key(sample)
        return F.scaled_dot_product_attention(sample, key, key, attn_mask=self.mask, scale=0.3)


@pytest.mark.parametrize("shape", [None, (6, 6), (2, 6, 6)])
def test_attention_without_heads_has_one(shape):
    mask = None if shape is None else torch.randn(shape)
    graph, weights, values = graph_of(Headless(mask))
    expected = evaluate(graph, weights, values)
    give_one_head(graph)
    eliminate(graph)
    (node,) = calls(graph, SDPA)
    assert node.meta["val"].shape == (2, 1, 6, 8)
    torch.testing.assert_close(evaluate(graph, weights, values), expected)
    fuse_attention(graph)
    eliminate(graph)
    assert bool(calls(graph, SDPA)) is (shape == (6, 6))  # a mask for all samples and heads
    torch.testing.assert_close(evaluate(graph, weights, values), expected)


def test_attention_with_heads_keeps_them():
    graph, _, _ = graph_of(Attention())
    before = [node.target for node in graph.nodes]
    give_one_head(graph)
    assert [node.target for node in graph.nodes] == before


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "scale": {"scale": 0.3},
    "added": {"attn_mask": torch.randn(2, 2, 6, 6)},
    "added to all": {"attn_mask": torch.randn(1, 1, 6, 6)},
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_becomes_one_op_without_transposes(name):
    graph, weights, values = graph_of(Attention(**MASKS[name]))
    (before,) = evaluate(graph, weights, values)
    fuse_attention(graph)
    eliminate(graph)
    assert not calls(graph, SDPA, aten.transpose.int)
    assert len(calls(graph, ops.attention.default)) == 1
    (after,) = evaluate(graph, weights, values)
    assert torch.allclose(before, after, atol=1e-6)
    assert after.shape == before.shape


def test_heads_that_are_not_split_from_one_axis_are_moved():
    class Rotated(nn.Module):
        def forward(self, sample):
            heads = sample.view(2, 6, 2, 4).transpose(1, 2)
            turned = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
            return F.scaled_dot_product_attention(turned, heads, heads)

    graph, weights, values = graph_of(Rotated())
    (before,) = evaluate(graph, weights, values)
    fuse_attention(graph)
    eliminate(graph)
    assert calls(graph, ops.attention.default)
    (after,) = evaluate(graph, weights, values)
    assert torch.allclose(before, after, atol=1e-6)


REASONS = {
    "truth values": Attention(attn_mask=torch.ones(6, 6).tril().bool()),
    "not batch x heads x tokens x tokens": Attention(attn_mask=torch.randn(2, 2, 1, 6)),
    "float32": Attention(dtype=torch.float16),
    "unequal numbers": Attention(lambda x: x[:, :4], is_causal=True),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_the_runtimes_op_does_not_compute_stays(reason):
    dtype = torch.float16 if reason == "float32" else torch.float32
    graph, _, _ = graph_of(REASONS[reason], dtype)
    (node,) = calls(graph, SDPA)
    assert reason in unfit(node)
    fuse_attention(graph)
    assert calls(graph, SDPA) == [node]


def test_three_dimensions_and_shared_keys_stay():
    class Flat(nn.Module):
        def forward(self, sample):
            return F.scaled_dot_product_attention(sample, sample, sample)

    class Shared(nn.Module):
        def forward(self, sample):
            heads = sample.view(2, 6, 2, 4).transpose(1, 2)
            one = heads[:, :1]
            return F.scaled_dot_product_attention(heads, one, one, enable_gqa=True)

    for model, reason in ((Flat(), "batch x heads"), (Shared(), "share keys")):
        graph, _, _ = graph_of(model)
        (node,) = calls(graph, SDPA)
        assert reason in unfit(node)
