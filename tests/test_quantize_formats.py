"""Quantize's formats and options: each does what it says, on networks of a few layers."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.calibrate import calibrate, needs_of, step_values
from effuse.capture import capture
from effuse.errors import CalibrationError, PassError
from effuse.graph import calls
from effuse.kernels.formats import FORMATS
from effuse.pass_manager import run_passes
from effuse.passes import Hoist, Quantize
from effuse.program import run_program

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

ops = torch.ops.effuse
TIMES = tuple(float(time) for time in range(90, -1, -10))


class Net(nn.Module):
    """A convolution and two linear layers whose inputs are correlated, and grow with time."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(2, 64, 3, padding=1)
        self.middle = nn.Conv2d(64, 64, 3, padding=1)
        self.wide, self.narrow = nn.Linear(64, 128), nn.Linear(128, 64, bias=False)
        self.leave = nn.Conv2d(64, 2, 1)

    def forward(self, sample, timestep):
        h = F.silu(self.enter(sample)) * (0.2 + timestep[:, None, None, None] / 30)
        tokens = F.relu(self.middle(h)).flatten(2).transpose(1, 2)
        tokens = tokens + self.narrow(F.relu(self.wide(tokens)))
        return self.leave(tokens.transpose(1, 2).reshape(h.shape))


@functools.cache
def captured():
    torch.manual_seed(0)
    net = Net().eval()
    values = {"sample": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([50.0, 50.0])}
    return capture(net, values, timesteps=TIMES)


def quantized(format="w8a8", groups=10, feed=None, **options):
    each = Quantize(format, min_sqnr_db=-100, **options)

    def calibration(program):
        return calibrate(program, feed, step_values, groups=groups, needs=needs_of((each,)))

    return run_passes(captured(), (Hoist(), each), calibration)


@functools.cache
def found(format="w8a8", **options):
    return quantized(format, **options)


def layer(program, name):
    return next(each for each in program.layers if each.name == name)


def noise(program, time=50.0):
    """Relative power of the output's error at one timestep."""
    generator = torch.Generator().manual_seed(3)
    values = {"sample": torch.randn(2, 2, 8, 8, generator=generator)}
    values["timestep"] = torch.tensor([time, time])
    (exact,), (found,) = (run_program(each, values) for each in (captured(), program))
    return ((found - exact).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_quantizes_every_inner_layer(name):
    program = found(name)
    assert [each.format for each in program.layers if not each.reason] == [name] * 3
    assert {each.reason for each in program.layers} == {"", "first layer", "last layer"}
    bound = 2e-3 if FORMATS[name].weight.grid.bits == 8 else 0.1
    assert 0 < noise(program) < bound


def test_fewer_bits_are_noisier_and_smaller():
    noises = [noise(found(name)) for name in ("w8a16", "w8a8", "w4a8", "w4a4")]
    assert noises == sorted(noises)
    sizes = [
        sum(each.nbytes for each in found(name).weights.values()) for name in ("w4a16", "w8a16")
    ]
    assert sizes[0] < 0.7 * sizes[1]


def test_gptq_is_closer_than_nearest_layer_by_layer():
    nearest, better = found("w4a16"), found("w4a16", rounding="gptq")
    for name in ("middle", "wide", "narrow"):
        assert layer(better, name).sqnr_db > layer(nearest, name).sqnr_db + 1


def test_searched_weight_scales_lower_the_error_that_they_search():
    plain, searched = found("w4a16"), found("w4a16", weight_ranges="mse")
    for name in ("wide", "narrow"):
        weight = captured().weights[f"{name}.weight"]
        errors = [
            (unpacked(program, name) - weight).abs().pow(2.4).mean()
            for program in (plain, searched)
        ]
        assert errors[1] < errors[0]


def unpacked(program, name):
    """The float weight that a linear layer reads."""
    part = program.part("full")
    for node in calls(part.graph, ops.unpack.default):
        args = [
            program.weights[str(each.target)] if hasattr(each, "target") else each
            for each in node.args
        ]
        if name in str(node.args[0].target):
            return node.target(*args)
    raise AssertionError(f"no unpack of {name}")


def test_a_corrected_bias_takes_the_mean_error_away():
    plain, corrected = found("w4a16"), found("w4a16", correct_bias=True)
    for name in ("middle", "wide", "narrow"):  # the last one has no bias to begin with
        assert layer(corrected, name).sqnr_db > layer(plain, name).sqnr_db
    static = found("w4a8", correct_bias=True)
    assert layer(static, "middle").sqnr_db > layer(found("w4a8"), "middle").sqnr_db


def test_one_group_of_steps_is_static():
    one, static = quantized(groups=1, activations="step"), quantized(groups=1)
    for time in (90.0, 0.0):
        assert noise(one, time) == pytest.approx(noise(static, time), rel=1e-3)


def test_ranges_by_step_fit_the_steps_of_small_values():
    by_step, static = found(activations="step"), found()
    assert noise(by_step, 0.0) < 0.5 * noise(static, 0.0)
    assert noise(by_step, 90.0) == pytest.approx(noise(static, 90.0), rel=0.3)


def test_ranges_by_step_where_nothing_else_is_looked_up_by_step():
    class Timeless(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, sample, timestep):
            return self.c(F.relu(self.b(self.a(sample))))

    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 4), "timestep": torch.tensor([90.0, 90.0])}
    program = capture(Timeless().eval(), values, timesteps=TIMES)
    each = Quantize(activations="step")
    result = run_passes(program, (Hoist(), each), lambda it: calibrate(it, None, step_values))
    assert layer(result, "b").format == "w8a8"
    (exact,), (output,) = run_program(program, values), run_program(result, values)
    assert torch.allclose(exact, output, atol=3e-2)
    assert not torch.equal(exact, output)


def test_a_calibration_too_short_for_the_groups_is_refused():
    values = {"sample": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([90.0, 90.0])}
    with pytest.raises(CalibrationError, match=r"too short for the step groups.*fewer step_groups"):
        quantized(activations="step", feed=[values])


def test_without_a_schedule_there_are_no_steps_to_look_up():
    program = capture(nn.Sequential(nn.Linear(4, 4)).eval(), {"input": torch.randn(2, 4)})
    with pytest.raises(PassError, match=r"activations='step'.*schedule="):
        run_passes(program, (Quantize(activations="step"),))


def test_ranges_that_are_searched_need_their_histograms():
    for setter in ("mse", "percentile", "entropy"):
        assert noise(found("w8a8", ranges=setter)) < 1e-2
    four = "int8/channel:uint4/tensor/asymmetric"
    plain, searched = found(four), found(four, ranges="mse")
    assert layer(searched, "narrow").sqnr_db > layer(plain, "narrow").sqnr_db + 1


def test_layers_may_have_formats_of_their_own():
    program = quantized("w8a8", layers=(("wide", "w4a8"), ("narrow", "float")))
    formats = {each.name: each.format for each in program.layers}
    assert (formats["middle"], formats["wide"], formats["narrow"]) == ("w8a8", "w4a8", "float")
    with pytest.raises(PassError, match=r"layers: no linear or convolution is at 'wild'"):
        quantized("w8a8", layers=(("wild", "float"),))


@pytest.mark.parametrize("name", ["w8a8", "int8/channel:uint4/tensor/asymmetric"])
@pytest.mark.parametrize("kind", [nn.Linear, functools.partial(nn.Conv2d, kernel_size=1)])
def test_a_layer_that_reads_a_layer_has_the_range_of_what_it_reads(name, kind):
    """The new layer's own name is another one, and may be that of another value."""

    class Straight(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(kind(4, 4) for _ in range(5))

        def forward(self, sample):
            for scale, each in zip((1, 30, 1 / 30, 30, 1), self.layers, strict=True):
                sample = each(sample)
                if scale == 30:
                    sample = sample * scale
            return sample

    torch.manual_seed(0)
    shape = (2, 4) if kind is nn.Linear else (2, 4, 3, 3)
    values = {"sample": torch.randn(shape)}
    program = capture(Straight().eval(), values)
    found = calibrate(program, [values], step_values)
    each = Quantize(name, min_sqnr_db=-100)
    result = run_passes(program, (each,), lambda it: calibrate(it, [values], step_values))
    graph = result.part("full").graph
    written = [node for node in calls(graph, ops.quantize.default, ops.fake_quantize.default)
               if node.args[1].op == "get_attr"]  # fmt: skip
    assert written
    ends = {round(float(v.low.min()), 4) for v in found.statistics.ranges.values()}
    for node in written:
        scale, zero = (result.weights[str(arg.target)] for arg in node.args[1:3])
        low = -float(scale) * int(zero)
        assert any(abs(low - min(end, 0)) <= float(scale) for end in ends)
    (exact,), (output,) = run_program(program, values), run_program(result, values)
    ratio = 10 * torch.log10(exact.square().sum() / (exact - output).square().sum())
    assert ratio > (25 if name == "w8a8" else 5)


def test_the_folder_of_a_build_is_not_recorded():
    assert "resume" not in Quantize(resume="somewhere").options()
    assert "somewhere" not in str(quantized(resume="somewhere").records)


def test_a_constant_activation_is_quantized_without_a_zero_scale():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, sample):
            return self.c(self.b(self.a(sample) * 0.0 + 3.0))

    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 4)}
    program = capture(Constant().eval(), values)
    result = run_passes(program, (Quantize(),), lambda it: calibrate(it, [values], step_values))
    assert [each.format for each in result.layers] == ["float", "w8a8", "float"]
    (exact,), (output,) = run_program(program, values), run_program(result, values)
    assert torch.allclose(exact, output, atol=2e-2)
