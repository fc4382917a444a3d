"""What is rewritten for OpenVINO's kernels: attention, transposes, sums, tables of the schedule."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.backends.openvino_attention import ATTENTION, share_transposes, write_attention
from effuse.backends.openvino_sums import float_sums
from effuse.backends.openvino_tables import join_tables
from effuse.calibrate import calibrate, step_values
from effuse.capture import capture
from effuse.graph import calls, clone, eliminate, evaluate
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Quantize
from effuse.plan import STEP_INPUT
from effuse.program import run_program
from effuse.weights import copied

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten, ops = torch.ops.aten, torch.ops.effuse

TIMES = (9.0, 7.0, 3.0, 1.0)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def program_of(model, *passes, timesteps=None, **values):
    torch.manual_seed(0)
    captured = capture(model().eval(), values, timesteps=timesteps)
    return run_passes(
        captured, (Canonicalize(), *passes), lambda p: calibrate(p, None, step_values)
    )


def graph_of(program):
    return clone(program.parts[0].graph)[0]


# ---- attention -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Two heads over 8 channels; `options` are handed on."""

    def __init__(self, **options):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.options = options

    def forward(self, sample):
        tokens = sample.flatten(2).transpose(1, 2)
        heads = [each(tokens).unflatten(-1, (2, 4)).transpose(1, 2)
                 for each in (self.query, self.key, self.value)]  # fmt: skip
        return F.scaled_dot_product_attention(*heads, **self.options).transpose(1, 2).flatten(2)


def attention(**options):
    program = program_of(lambda: Attention(**options), sample=noise(2, 8, 2, 3))
    return graph_of(program), program.weights, {"sample": noise(2, 8, 2, 3, seed=1)}


PLAIN = {
    "none": {},
    "scale": {"scale": 0.3},
    "added": {"attn_mask": noise(2, 2, 6, 6)},
    "added to all": {"attn_mask": noise(1, 1, 1, 6)},
}


@pytest.mark.parametrize("name", PLAIN)
def test_attention_becomes_products_around_a_softmax(name):
    graph, weights, values = attention(**PLAIN[name])
    (before,) = evaluate(graph, weights, values)
    write_attention(graph)
    eliminate(graph)
    assert not calls(graph, ATTENTION) and len(calls(graph, aten.matmul.default)) == 2
    assert torch.allclose(before, evaluate(graph, weights, values)[0], atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"attn_mask": torch.ones(6, 6).tril().bool()}, {"is_causal": True}]
)
def test_attention_that_is_masked_by_truth_values_stays(options):
    graph, _, _ = attention(**options)
    write_attention(graph)
    assert len(calls(graph, ATTENTION)) == 1


def test_heads_that_share_keys_stay():
    class Shared(nn.Module):
        def forward(self, sample):
            heads = sample.view(2, 2, 6, 4)
            one = heads[:, :1]
            return F.scaled_dot_product_attention(heads, one, one, enable_gqa=True)

    graph = graph_of(program_of(Shared, sample=noise(2, 12, 4)))
    write_attention(graph)
    assert len(calls(graph, ATTENTION)) == 1


def test_a_transpose_that_several_layers_read_is_apart_from_them():
    graph, weights, values = attention()
    (before,) = evaluate(graph, weights, values)
    share_transposes(graph)
    eliminate(graph)
    (moved,) = calls(graph, aten.permute.default)
    (tokens,) = moved.users
    assert [user.target for user in tokens.users] == [aten.linear.default] * 3
    assert torch.equal(before, evaluate(graph, weights, values)[0])
    share_transposes(graph)
    assert calls(graph, aten.permute.default) == [moved]


def test_a_transpose_that_one_layer_reads_stays():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(8, 8)

        def forward(self, sample):
            return self.mix(sample.transpose(1, 2))

    graph = graph_of(program_of(One, sample=noise(2, 8, 6)))
    share_transposes(graph)
    assert not calls(graph, aten.permute.default)


# ---- sums ----------------------------------------------------------------------------------------


class Sums(nn.Module):
    """Outputs of convolutions that are summed, that another layer reads, and that are both."""

    def __init__(self):
        super().__init__()
        names = ("enter", "summed", "read", "reader", "both", "leave")
        for name in names:
            setattr(self, name, nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, sample):
        h = self.enter(sample)
        h = h + self.summed(F.silu(h))
        h = h + self.reader(self.read(F.silu(h)))
        both = self.both(F.silu(h))
        return F.silu(both) + self.leave(both)


@pytest.fixture(scope="module")
def eight():
    options = {"min_sqnr_db": -100.0, "edges": True}
    return program_of(Sums, Quantize("w8a8", **options), sample=noise(2, 4, 8, 8))


def rounded(program):
    """The layers whose output is rounded to 8 bits."""
    graph = program.parts[0].graph
    sources = (node.args[0] for node in calls(graph, ops.quantize.default))
    weights = (each.args[1] for each in sources if each.target is aten.conv2d.default)
    return {str(each.args[1].target).split(".")[0] for each in weights}


def test_what_is_only_summed_is_not_rounded(eight):
    assert {"enter", "summed", "read", "reader", "both"} <= rounded(eight)
    changed = float_sums(eight)
    assert rounded(eight) - rounded(changed) == {"summed", "reader", "leave"} & rounded(eight)
    assert {"read", "both"} <= rounded(changed)  # another layer takes their 8 bits
    record = changed.records[-1]
    assert record.name == "openvino" and record.sqnr_db > 20 and not record.exact
    assert record.rewrites == {"sums": len(rounded(eight) - rounded(changed))}
    assert float_sums(changed) is changed


def test_without_these_roundings_the_output_is_closer(eight):
    torch.manual_seed(0)
    net, given = Sums().eval(), {"sample": noise(2, 4, 8, 8)}
    with torch.no_grad():
        exact = net(**given).numpy()
        before, after = (
            sqnr_db(exact, run_program(each, given)[0].numpy())
            for each in (eight, float_sums(eight))
        )
    assert after > before


# ---- tables --------------------------------------------------------------------------------------


class Timed(nn.Module):
    """Three values of the timestep, of different sizes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, size) for size in (4, 1, 4))

    def forward(self, sample, timestep):
        a, b, c = (layer(timestep.float()[:, None]) for layer in self.layers)
        return (sample * a.sin() + b.cos()) * c.exp()


def timed(model=Timed):
    values = {"sample": noise(2, 4), "timestep": torch.tensor([7, 7])}
    program = program_of(model, Hoist(), timesteps=TIMES, **values)
    return graph_of(program), copied(program.weights)


def test_all_tables_are_read_at_once():
    graph, weights = timed()
    steps = [{"sample": noise(2, 4), STEP_INPUT: torch.tensor([index])} for index in range(4)]
    before = [evaluate(graph, weights, step)[0] for step in steps]
    assert len(calls(graph, aten.index_select.default)) == 3
    join_tables(graph, weights)
    eliminate(graph)
    (row,) = calls(graph, aten.index_select.default)
    assert weights[row.args[0].target].shape == (4, 9)
    for one, step in zip(before, steps, strict=True):
        assert torch.equal(one, evaluate(graph, weights, step)[0])
    join_tables(graph, weights)
    assert calls(graph, aten.index_select.default) == [row]


def test_a_table_alone_stays():
    class Lone(nn.Module):
        def forward(self, sample, timestep):
            return sample * timestep.float().cos()[:, None]

    graph, weights = timed(Lone)
    names = set(weights)
    join_tables(graph, weights)
    assert set(weights) == names and len(calls(graph, aten.index_select.default)) == 1
