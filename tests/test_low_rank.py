"""LowRank: the decomposition against linear algebra, the rewrite, and what few bits gain by it."""

from __future__ import annotations

import itertools
import logging
import math
from functools import partial

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import effuse
from effuse.calibrate import calibrate, needs_of, step_values
from effuse.capture import capture
from effuse.errors import ConfigError, EffuseError
from effuse.graph import calls
from effuse.kernels.quantizers import parse_quantizer, round_trip
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, LowRank, Quantize, Smooth
from effuse.passes.low_rank_factors import decompose, low_rank, metric_of
from effuse.program import run_program

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

ops = torch.ops.effuse
INT4 = partial(round_trip, quantizer=parse_quantizer("int4/group32"))
SCHEDULE = list(range(90, -1, -10))
W4 = "int4/group32:none:int4/channel:none"
LOUD = 20.0  # of every ninth input channel, against the others


def weight(rows=64, columns=96, seed=0):
    found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found[:, ::9] *= LOUD
    return found


def nothing(rest):
    return torch.zeros_like(rest)


# ---- the decomposition ---------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_left_is_the_tail_of_the_spectrum(exact):
    matrix = weight()
    values = torch.linalg.svdvals(matrix.double())
    for rank in (1, 8, 40):
        found = decompose(matrix, rank, nothing, rounds=1, exact=exact)
        tail = (values[rank:].square().sum() / values.square().sum()).sqrt().item()
        assert found.errors[0] == pytest.approx(tail, rel=1e-5 if exact else 1e-2)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64)])
def test_full_rank_is_the_weight_itself(shape):
    matrix = weight(*shape)
    found = decompose(matrix, 1000, INT4)
    assert found.up.shape == (shape[0], 64) and found.down.shape == (64, shape[1])
    assert (found.product - matrix).norm() < 1e-5 * matrix.norm()


@given(rank=st.integers(1, 40), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=25)
def test_the_error_falls_by_round_and_with_rank(rank, seed):
    matrix = weight(seed=seed)
    found = decompose(matrix, rank, INT4, exact=True)
    kept = found.errors if found.errors[-1] < min((1.0, *found.errors[:-1])) else found.errors[:-1]
    assert all(one > other for one, other in itertools.pairwise(kept))
    rest = matrix - found.product
    error = ((rest - INT4(rest)).norm() / matrix.norm()).item()
    assert error == pytest.approx(min(found.errors), rel=1e-3)
    assert min(decompose(matrix, rank + 8, INT4, exact=True).errors) < min(found.errors) * 1.001


def test_turns_pay_beside_one_pass():
    found = decompose(weight(128, 256), 16, INT4)
    assert len(found.errors) > 2 and min(found.errors) < 0.95 * found.errors[0]


@pytest.mark.parametrize("seed", range(3))
def test_weighing_by_the_inputs_lowers_the_error_of_the_output(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4000, 96, generator=generator)
    x = x * 10 ** (2 * torch.rand(96, generator=generator) - 1)
    matrix = weight()

    def noise(rank, metric):
        found = decompose(matrix, rank, INT4, metric=metric)
        rest = matrix - found.product
        return (x @ (rest - INT4(rest)).T).norm() / (x @ matrix.T).norm()

    metric = metric_of(x.T @ x / len(x))
    assert noise(8, metric) < 1.02 * noise(8, None)  # plain rounds are among the ways
    assert noise(24, metric) < 0.85 * noise(24, None)


def test_the_metric_inverts_where_a_channel_never_spoke():
    moment = torch.diag(torch.tensor([1.0, 0.0, 4.0]))
    found = metric_of(moment)
    assert found.isfinite().all() and (found.diagonal() > 0).all()
    up, down, _ = low_rank(torch.eye(3), 3, found, exact=True, seed=0)
    assert torch.allclose(up @ down, torch.eye(3), atol=1e-5)


def test_the_seed_decides_and_the_global_generator_stays():
    matrix = weight(128, 256)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    one, other, third = (decompose(matrix, 8, INT4, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.up, other.up) and torch.equal(one.down, other.down)
    assert not torch.equal(one.up, third.up)


# ---- the pass ------------------------------------------------------------------------------------


class Net(nn.Module):
    """Convolutions, attention with its four linear layers, and inputs with loud channels."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 64, 3, padding=1)
        self.mix = nn.Conv2d(64, 64, 3, padding=1, stride=2)
        self.apart = nn.Conv2d(64, 64, 3, padding=1, groups=2)
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.value, self.join = nn.Linear(64, 64), nn.Linear(64, 64)
        self.leave = nn.Conv2d(64, 3, 1)
        loud = torch.ones(64)
        loud[::9] = LOUD
        for each in (self.query, self.key, self.value, self.join):
            each.weight.data *= loud / 8
        self.mix.weight.data *= loud[:, None, None] / 8

    def forward(self, sample, timestep):
        h = F.silu(self.enter(sample)) * (1 + timestep.float().cos())[:, None, None, None]
        h = self.apart(F.silu(self.mix(h)))
        tokens = h.flatten(2).transpose(1, 2)
        heads = [
            each(tokens).unflatten(-1, (4, 16)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens = tokens + self.join(mixed)
        up = F.interpolate(tokens.transpose(1, 2).reshape(h.shape), scale_factor=2.0)
        return self.leave(up)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def inputs():
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return {"sample": noise, "timestep": torch.tensor([50, 50])}


def compiled(net, *passes, **options):
    options.setdefault("backend", "reference")
    settings = effuse.Config(passes=(Hoist(), *passes), **options)
    return effuse.compile(net, settings, inputs=inputs(), schedule=SCHEDULE, progress=False)


def sqnr(net, result):
    with torch.no_grad():
        real = net(**inputs())
    noise = result(**inputs()) - real
    return 20 * math.log10(real.norm() / noise.norm())


def rewritten(net, *passes):
    """The program after the passes, calibrated on noise."""
    given = capture(net, inputs(), timesteps=SCHEDULE)

    def calibration(program):
        return calibrate(program, None, step_values, groups=1, needs=needs_of(passes))

    return run_passes(given, (Canonicalize(), Hoist(), *passes), calibration)


def found(program, *targets):
    return calls(program.part("full").graph, *targets)


@pytest.mark.parametrize("options", [{}, {"inputs": False}, {"shared": False}, {"edges": True},
                                     {"exact_svd": True}, {"rank": 999}], ids=str)  # fmt: skip
def test_before_quantization_it_changes_nothing(net, options):
    result = rewritten(net, LowRank(**{"rank": 4, "format": W4} | options))
    (one,), (other,) = (run_program(result, inputs()), [net(**inputs())])
    assert (one - other).norm() < 4e-6 * other.norm()
    # down and up of: query, key, value, join, and of the convolution `mix`
    branches = 2 * 4 if options.get("shared") is False else 1 + 3 + 2
    assert len(found(result, ops.project.default)) == branches
    convolutions = 2 * (3 if options.get("edges") else 1)
    assert len(found(result, ops.project_conv.default)) == convolutions


def test_layers_that_read_one_input_share_the_half_that_reads_it(net):
    result = rewritten(net, LowRank(rank=4, format=W4))
    halves = {node.args[0] for node in found(result, ops.project.default)}
    shared = [
        half for half in halves if len(half.users) == 3 and half.target is ops.project.default
    ]
    assert len(shared) == 1


def test_what_stays_without_a_branch_is_said(net):
    (record,) = [
        each for each in compiled(net, LowRank(rank=4, format=W4)).manifest["passes"]
        if each["name"] == "low_rank"
    ]  # fmt: skip
    text = str(record)
    assert "a grouped convolution" in text and "the first or the last layer" in text
    assert "5 layers" in text and "dB more in the middle" in text


@pytest.mark.parametrize("backend", ["reference", "onnx"])
def test_four_bits_gain_by_a_branch(net, backend):
    options = {"min_sqnr_db": -99.0, "exclude": ("apart",)}  # which gets no branch
    plain = compiled(net, Quantize(W4, **options), backend=backend)
    branch = LowRank(rank=32, format=W4)  # the convolution has 72 loud columns of 576
    better = compiled(net, branch, Quantize(W4, **options), backend=backend)
    assert sqnr(net, better) > sqnr(net, plain) + 3
    gptq = compiled(net, branch, Quantize(W4, rounding="gptq", **options), backend=backend)
    assert sqnr(net, gptq) > sqnr(net, better)


def test_both_back_ends_compute_the_same(net, tmp_path):
    passes = (LowRank(rank=8, format=W4), Quantize(W4, min_sqnr_db=-99.0))
    one, other = (compiled(net, *passes, backend=each) for each in ("reference", "onnx"))
    assert torch.allclose(one(**inputs()), other(**inputs()), rtol=1e-3, atol=1e-4)
    other.save(tmp_path / "net.effuse")
    model = onnx.load(str(tmp_path / "net.effuse" / "full.onnx"), load_external_data=False)
    assert sum(node.op_type == "MatMulNBits" for node in model.graph.node) == 4
    again = effuse.load(tmp_path / "net.effuse")
    assert torch.equal(other(**inputs()), torch.as_tensor(again(**inputs())))


def test_a_remainder_is_measured_with_its_branch(net):
    """Else the better the branch, the worse what it leaves over would look."""
    branch = LowRank(rank=48, format=W4)
    layers = compiled(net, branch, Quantize(W4, min_sqnr_db=-99.0)).manifest["layers"]
    plain = compiled(net, Quantize(W4, min_sqnr_db=-99.0)).manifest["layers"]
    for one, other in zip(layers, plain, strict=True):
        assert one["name"] == other["name"]
        if one["name"] in ("query", "key", "value", "join", "mix"):
            assert one["sqnr_db"] > other["sqnr_db"] + 3


def test_every_variant_of_a_cache_gets_its_branches(net):
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.leave = nn.Linear(32, 32), nn.Linear(32, 32)
            self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

        def forward(self, sample, timestep):
            h = self.enter(sample) * (1 + timestep.float().cos())[:, None]
            for block in self.blocks:
                h = h + F.silu(block(h))
            return self.leave(h)

    torch.manual_seed(1)
    given = {"sample": torch.randn(2, 32), "timestep": torch.tensor([50, 50])}
    program = capture(Deep().eval(), given, timesteps=SCHEDULE)
    passes = (Canonicalize(), Hoist(), Cache(mode="residual", interval=2))
    program = run_passes(program, (*passes, LowRank(rank=4, format=W4, inputs=False)))
    counts = [len(calls(part.graph, ops.project.default)) for part in program.variants]
    assert len(counts) == 2 and all(count and count % 2 == 0 for count in counts)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rounds": 0}, {"format": "int9/what"}], ids=str)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError):
        LowRank(**options)


def test_a_second_branch_is_refused(net):
    branch = LowRank(rank=4, format=W4, inputs=False)
    program = rewritten(net, branch)
    with pytest.raises(EffuseError, match="low-rank branches already"):
        run_passes(program, (branch,))


def test_layers_that_run_once_a_picture_get_branches_too():
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.step = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, sample, timestep, encoder_hidden_states):
            return self.step(sample) + self.text(encoder_hidden_states)

    torch.manual_seed(0)
    given = {
        "sample": torch.randn(2, 5, 64),
        "timestep": torch.tensor([7.0]),
        "encoder_hidden_states": torch.randn(2, 5, 64),
    }
    branch = LowRank(rank=4, format="w4a16", inputs=False, edges=True)
    program = capture(Text().eval(), given, timesteps=(7.0,))
    program = run_passes(program, (Canonicalize(), Hoist(), branch))
    found = {part.name: len(calls(part.graph, ops.project.default)) for part in program.parts}
    assert found["prompt"] == 2 and found["full"] == 2


def test_what_many_layers_read_is_no_reason_to_share():
    class Many(nn.Module):
        def __init__(self, count):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(count))

        def forward(self, sample, timestep):
            return sum(layer(sample) for layer in self.layers)

    given = {"sample": torch.randn(2, 5, 64), "timestep": torch.tensor([7.0])}
    branch = LowRank(rank=4, format="w4a16", inputs=False, edges=True)
    for count, downs in ((4, 1), (5, 5)):
        program = capture(Many(count).eval(), given, timesteps=(7.0,))
        graph = run_passes(program, (Canonicalize(), branch)).part("full").graph
        assert len(calls(graph, ops.project.default)) == count + downs


# ---- smoothing for the branch --------------------------------------------------------------------


def smoothed_error(rank):
    """The output's relative error at w4a4 of a layer with loud inputs, smoothed for `rank`."""
    torch.manual_seed(0)
    loud = torch.ones(128)
    loud[::16] = 40.0

    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(128, 128, bias=False)

        def forward(self, sample, timestep):
            return self.layer(sample * loud)

    def feed(model):
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            model(torch.randn(1, 64, 128, generator=generator), torch.tensor([7.0]))

    net = Loud().eval()
    passes = (
        Smooth(format="w4a4", rank=rank),
        LowRank(rank=8, format="w4a4", edges=True),
        Quantize("w4a4", edges=True, min_sqnr_db=-99.0),
    )
    x = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(9))
    given = {"sample": x, "timestep": torch.tensor([7.0])}
    compiled = effuse.compile(
        net, effuse.Config(passes=passes, backend="reference"), inputs=given, calibration=feed
    )
    with torch.no_grad():
        truth = net(**given)
    return float((compiled(**given) - truth).norm() / truth.norm())


def test_smoothing_that_knows_of_the_branch_leaves_less_error():
    assert smoothed_error(8) < 0.9 * smoothed_error(0)


def test_a_branch_of_no_rank_is_no_branch():
    with pytest.raises(ConfigError, match="rank: expected 0 or more, came -1"):
        Smooth(rank=-1)
