"""What Prune takes out: masked equals pruned for every kind on three networks; rejects, names."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn
from torch.nn import functional as F

from effuse.calibrate import drive
from effuse.capture import capture
from effuse.graph import calls, evaluate
from effuse.log import Log
from effuse.pass_manager import run_passes
from effuse.passes import (
    Cache,
    Canonicalize,
    Hoist,
    LowRank,
    Prune,
    Quantize,
    Skip,
)
from effuse.passes.base import Work
from effuse.passes.prune_candidates import find_candidates, find_sites
from effuse.passes.prune_cost import forwards, graph_flops
from effuse.passes.prune_figures import size_of
from effuse.passes.prune_scores import (
    losses,
    record_inputs,
    rests,
    together,
)
from effuse.passes.prune_surgery import masked, pruned
from effuse.passes.skip_search import output_loss
from effuse.verify import exact_bound, relative_error, verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (900.0, 600.0, 300.0, 100.0)
KINDS = ("span", "block", "head", "unit", "channel")
NETS = ("dit", "unet", "flux")

aten = torch.ops.aten

few = settings(deadline=None, max_examples=40)


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8,
        attention_head_dim=2,
    )  # fmt: skip
    return model, {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(300.0),
                   "encoder_hidden_states": torch.randn(2, 5, 8)}  # fmt: skip


def dit():
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=4, in_channels=4, num_layers=2, sample_size=8,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    return model, {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": torch.full((2,), 300.0),
                   "class_labels": torch.tensor([1, 2])}  # fmt: skip


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return model, {
        "hidden_states": torch.randn(2, 6, 4), "encoder_hidden_states": torch.randn(2, 3, 16),
        "pooled_projections": torch.randn(2, 16), "timestep": torch.full((2,), 300.0),
        "img_ids": torch.randn(6, 3), "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip


@functools.cache
def network(name):
    """A captured network whose biases, gates and norms are not those of a fresh one."""
    torch.manual_seed(0)
    model, inputs = globals()[name]()
    with torch.no_grad():
        for each in model.parameters():
            each += 0.1 * torch.randn_like(each)
    return captured(model, inputs)


def captured(model, inputs, times=TIMES):
    program = capture(model.eval(), inputs, timesteps=times)
    return run_passes(program, (Canonicalize(),))


@functools.cache
def found(name, kind, groups=None):
    return tuple(find_candidates(network(name), (kind,), Log(), groups))


def sample(program, watch):
    drive(program, None, watch)


def run(program, **options):
    return run_passes(program, (Prune(**options),), drive=sample)


def outputs(program, values=None):
    graph = program.part("full").graph
    with torch.no_grad():
        return evaluate(graph, program.weights, values or program.examples)


# ---- surgery -------------------------------------------------------------------------------------


def sites_of(candidates):
    return list({id(each.site): each.site for each in candidates}.values())


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", ("head", "unit", "channel"))
def test_a_pruned_site_equals_the_masked_one(net, kind):
    program, every = network(net), found(net, kind)
    assert bool(every) == (kind != "channel" or net == "unet")
    for site in sites_of(every):
        gone = [each for each in every if each.site is site and each.atom % 2 == 0]
        less = pruned(program, gone)
        assert size_of(program, "parameters") - size_of(less, "parameters") == sum(
            each.parameters for each in gone
        )
        mask = masked(program.part("full"), site)
        with torch.no_grad():
            values = {**program.examples, **mask.values({each.atom for each in gone})}
            expected = evaluate(mask.graph, program.weights, values)
        assert relative_error(outputs(less), expected) <= exact_bound(torch.float32)
        assert relative_error(expected, outputs(program)) > 1e-4  # something was there


@pytest.mark.parametrize("net", NETS)
def test_all_sites_pruned_at_once_equal_all_masked(net):
    program = network(net)
    every = find_candidates(program, ("head", "unit", "channel"), Log(), 4)
    part, values = program.part("full"), dict(program.examples)
    for site in sites_of(every):
        mask = masked(part, site)
        part = replace(part, graph=mask.graph)
        values |= mask.values({0})
    less = pruned(program, [each for each in every if each.atom == 0])
    verify(less)
    with torch.no_grad():
        expected = evaluate(part.graph, program.weights, values)
    assert relative_error(outputs(less), expected) <= exact_bound(torch.float32)
    assert size_of(less, "flops") < size_of(program, "flops")


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("kind", ("span", "block"))
def test_a_pruned_span_equals_its_shortcut(net, kind):
    program, every = network(net), found(net, kind)
    assert len(every) > 1
    for each in every[:: -(-len(every) // 6)]:
        less = pruned(program, [each])
        assert relative_error(outputs(less), bypassed(program, [each])) == 0
        assert relative_error(outputs(less), outputs(program)) > 1e-4
        assert size_of(program, "parameters") - size_of(less, "parameters") == each.parameters
        assert size_of(program, "flops") - size_of(less, "flops") == each.flops


def bypassed(program, candidates):
    """The whole network, with the values of joins replaced by those of their shortcuts."""
    joins = {join.node: join.shortcut for each in candidates for join in each.block.joins}
    seen = {}

    def observe(node, value):
        seen[node] = value
        if node.name in joins:
            seen[node] = seen[node.args[joins[node.name]]]
        return seen[node]

    with torch.no_grad():
        return evaluate(program.part("full").graph, program.weights, program.examples, observe)


def test_all_spans_together_take_what_only_they_shared():
    program, every = network("dit"), found("dit", "span")
    less = pruned(program, every)
    together = size_of(program, "parameters") - size_of(less, "parameters")
    assert together > sum(each.parameters for each in every)
    assert relative_error(outputs(less), bypassed(program, every)) == 0
    verify(less)


def test_removing_nothing_changes_nothing():
    program = network("unet")
    assert pruned(program, []) is program


def test_weights_are_smaller_and_gone():
    program = network("dit")
    head = found("dit", "head")[0]
    path = head.path
    less = pruned(program, [head])
    assert less.weights[f"{path}.to_q.weight"].shape == (12, 16)
    assert less.weights[f"{path}.to_out.0.weight"].shape == (16, 12)
    assert torch.equal(less.weights[f"{path}.to_v.bias"], program.weights[f"{path}.to_v.bias"][4:])
    assert program.weights[f"{path}.to_q.weight"].shape == (16, 16)
    span = found("dit", "span")[0]
    gone = set(program.weights) - set(pruned(program, [span]).weights)
    assert {f"{path}.to_q.weight", f"{path}.to_out.0.bias"} <= gone


def test_both_halves_of_a_gated_unit_go():
    site = found("unet", "unit")[0].site
    less = pruned(network("unet"), [each for each in found("unet", "unit")
                                    if each.site is site and each.atom < 10])  # fmt: skip
    path = site.name.removesuffix(".0")
    assert less.weights[f"{path}.0.proj.weight"].shape == (108, 16)
    assert less.weights[f"{path}.2.weight"].shape == (16, 54)


def test_channels_go_by_whole_norm_groups():
    program, every = network("unet"), found("unet", "channel")
    gone = [each for each in every if each.site is every[0].site and each.atom < 3]
    less = pruned(program, gone)
    norms = {node.args[1] for node in calls(less.part("full").graph, aten.group_norm.default)}
    assert norms == {4, 1}


class Odd(nn.Module):
    """Attention and hidden channels written in other ways than diffusers writes them."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(6, 8)
        self.wide, self.narrow = nn.Linear(8, 6), nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.randn(6))
        self.norm = nn.LayerNorm(8)

    def forward(self, sample, timestep):
        h = self.enter(sample) * torch.cos(timestep.float())[:, None, None]
        qkv = self.qkv(self.norm(h)).reshape(*h.shape[:2], 3, 4, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        h = h + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        gate = self.up(self.norm(h))
        h = h + self.down(gate[..., :6] * torch.sigmoid(gate[..., 6:]))
        wide = F.silu(self.wide(self.norm(h))) * self.scale
        return self.leave(h + self.narrow(torch.cat([wide, -wide], -1)))


@functools.cache
def odd():
    torch.manual_seed(0)
    return captured(Odd(), {"sample": torch.randn(2, 5, 4), "timestep": torch.full((2,), 300.0)})


@pytest.mark.parametrize("net", NETS)
def test_no_two_of_a_kind_share_a_name(net):
    for kind in KINDS:
        names = [each.name for each in found(net, kind)]
        assert len(set(names)) == len(names)


def test_blocks_of_one_module_are_named_by_what_they_hold():
    names = [each.name for each in found("unet", "block")]
    assert {"up_blocks.0.resnets.0+attentions.0", "up_blocks.0.resnets.1+attentions.1"} < set(names)
    assert found("unet", "block")[0].path in names[0]


class Twice(nn.Module):
    """Two attentions in one module: their sites share its path."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, sample, timestep):
        h = sample * torch.cos(timestep.float())[:, None, None]
        for into, out in ((self.a, self.b), (self.c, self.d)):
            q = into(h).unflatten(-1, (2, 4)).transpose(1, 2)
            h = h + out(F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2))
        return h


def test_sites_of_one_module_are_named_by_their_weights():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Twice()

        def forward(self, sample, timestep):
            return 2 * self.inner(sample, timestep)  # no wrapper, which would be left out

    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 5, 8), "timestep": torch.full((2,), 300.0)}
    every = find_candidates(captured(Net(), values), ("head",), Log())
    assert [each.name for each in every] == [
        "inner.a+b[head 0]", "inner.a+b[head 1]", "inner.c+d[head 0]", "inner.c+d[head 1]"
    ]  # fmt: skip
    assert {each.path for each in every} == {"inner"}


def test_fused_projections_slices_and_concatenations_are_followed():
    program = odd()
    every = find_candidates(program, ("head", "unit"), Log())
    counts = Counter(each.kind for each in every)
    assert counts == {"head": 4, "unit": 12}
    for site in sites_of(every):
        mask = masked(program.part("full"), site)
        less = pruned(
            program, [each for each in every if each.site is site and each.atom in (1, 3)]
        )
        verify(less)
        with torch.no_grad():
            values = {**program.examples, **mask.values({1, 3})}
            expected = evaluate(mask.graph, program.weights, values)
        assert relative_error(outputs(less), expected) <= exact_bound(torch.float32)
    assert pruned(program, every[:1]).weights["qkv.weight"].shape == (18, 8)


# ---- rejects -------------------------------------------------------------------------------------


class Bound(nn.Module):
    """Sites that cannot be cut, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1)
        self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.norm = nn.GroupNorm(1, 8)
        self.fold, self.folded, self.whole = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 8)
        self.mean, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample, timestep):
        h = self.enter(sample) + torch.cos(timestep.float())[:, None, None, None]
        h = h + self.second(F.silu(self.norm(self.first(h))))
        x = h.flatten(2).transpose(1, 2)
        wide = self.fold(x)
        x = x + self.whole(wide) + self.folded(wide[..., :4] * wide[..., 4:])
        mean = self.mean(x)
        x = x + self.last(mean - mean.mean(-1, keepdim=True))
        return self.leave(x.transpose(1, 2).reshape(h.shape))


def test_every_reject_has_its_reason():
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 3, 2, 2), "timestep": torch.full((2,), 300.0)}
    program, log = captured(Bound(), values), Log()
    (site,) = find_sites(program, ("unit", "channel"), log)
    assert site.labels["fold_bias", 0] == (0, 1, 2, 3) * 2  # tied by the product of two halves
    reasons = {each.partition(": ")[2] for kind in log.reasons.values() for each in kind}
    assert reasons == {
        "they are channels of an input",
        "they are channels of a residual stream",
        "there is one only, or one norm group holds all",
        "two of them meet at one position",
        "mean.dim reads them as one",
    }


def test_sums_that_are_no_candidates_have_a_reason():
    log = Log()
    find_candidates(network("unet"), ("span",), log)
    assert any("holds other spans" in reason for reason in log.reasons["span"])


def test_a_norm_over_all_heads_keeps_them_together():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.out, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.RMSNorm(8)

        def forward(self, sample, timestep):
            q = self.norm(self.q(sample)).unflatten(-1, (2, 4)).transpose(1, 2)
            h = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            return sample + self.out(h) * timestep[:, None, None]

    log = Log()
    program = captured(Net(), {"sample": torch.randn(2, 3, 8), "timestep": torch.full((2,), 300.0)})
    assert find_sites(program, ("head",), log) == []
    assert any("rms_norm.default reads them as one" in reason for reason in log.reasons["head"])


# ---- sweeps ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("net", "kind"), (("dit", "span"), ("unet", "block"), ("flux", "head")))
def test_a_swept_loss_is_that_of_the_pruned_network(net, kind):
    program, every = network(net), found(net, kind)
    work = Work(drive=sample)
    with torch.no_grad():
        probes = record_inputs(program, 2, work)
        swept = losses(program, every, probes, work)
        exact = [outputs(program, values) for values in probes]
        single = [
            np.mean([output_loss(outputs(pruned(program, [each]), values), wanted)
                     for values, wanted in zip(probes, exact, strict=True)])
            for each in every
        ]  # fmt: skip
    assert len(probes) == 2
    assert swept == pytest.approx(single, rel=1e-3)
    assert together(program, [[], every[:1]], probes) == pytest.approx([0, single[0]], rel=1e-3)


@pytest.mark.parametrize(("net", "kind"), (("dit", "span"), ("unet", "block"), ("flux", "head")))
def test_the_forwards_of_a_sweep_are_those_of_its_graphs(net, kind):
    program, every = network(net), found(net, kind)
    part = program.part("full")
    counted = sum(len(rest.masks) * graph_flops(rest.graph) for rest in rests(part, every))
    assert forwards(part, every) == pytest.approx(2 + counted / graph_flops(part.graph), rel=0.02)


@pytest.mark.parametrize("net", ("unet", "dit"))
def test_it_composes_with_what_runs_behind_it(net):
    program = network(net)
    passes = (
        Prune(parameters=0.15, what="span", calls=1), Hoist(), Cache(interval=2, mode="block"),
        Skip(steps={"3": ("*",)}, what="unit"), LowRank(rank=2, inputs=False),
        Quantize("w8a8", activations="dynamic"),
    )  # fmt: skip
    done = run_passes(program, passes, drive=sample)
    assert [each.name for each in done.records[1:]] == [each.name for each in passes]
    assert done.records[-1].sqnr_db == pytest.approx(done.records[1].sqnr_db, abs=6)
