"""Quantize: golden before and after, a reject for each reason, numbers by hand, refused twice."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effuse.calibrate import calibrate, step_values
from effuse.capture import capture
from effuse.dump import dump
from effuse.errors import ConfigError, PassError
from effuse.graph import calls, clone, inputs, module_path
from effuse.kernels.quantizers import find_scale, parse_quantizer, scale_of_range
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Quantize
from effuse.passes.base import Work
from effuse.passes.quantize_sites import last_layers
from effuse.program import run_program
from effuse.verify import exact_bound, verify


def weight_scale(weight):
    return find_scale(weight.flatten(1), parse_quantizer("int8/channel"))[0][:, 0]


UINT8 = parse_quantizer("uint8/tensor/asymmetric")


def affine(low, high):
    """Scale and zero point of 8-bit activations from `low` to `high`."""
    return scale_of_range(torch.tensor(low), torch.tensor(high), UINT8)


logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten, ops = torch.ops.aten, torch.ops.effuse


class Chain(nn.Module):
    """conv, conv, linear, conv: the two in the middle are neither first nor last."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2)
        self.dense = nn.Linear(4, 4)
        self.last = nn.Conv2d(4, 2, 1)

    def forward(self, sample):
        h = self.middle(F.silu(self.first(sample)))
        return self.last(self.dense(h.transpose(1, 3)).transpose(1, 3))


class Branches(nn.Module):
    """Two layers read one value; the timestep and the prompt have layers of their own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.text = nn.Linear(3, 4)
        self.outer = nn.Linear(4, 4)

    def forward(self, sample, timestep, prompt):
        h = self.inner(sample) * timestep.float().cos()[:, None]
        h = h + self.text(prompt)
        return self.outer(self.query(h) * self.key(h))


@functools.cache  # passes leave a program alone, as the last test here shows
def chain(dtype=torch.float32, kind=Chain):
    torch.manual_seed(0)
    model = kind().eval().to(dtype)
    return capture(model, {"sample": torch.randn(2, 2, 4, 4).to(dtype)})


@functools.cache
def branches():
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7, 7])}
    values["prompt"] = torch.randn(2, 3)
    return capture(Branches().eval(), values, timesteps=(9.0, 7.0, 1.0))


def calibration(program):
    return calibrate(program, None, step_values)


@functools.cache
def whole(activations="static"):
    """The chain, quantized as it comes."""
    return quantized(chain(), activations=activations)


def quantized(program, *before, **options):
    return run_passes(program, (*before, Quantize(**options)), calibration)


def lines(program):
    return {layer.name: layer for layer in program.layers}


def nodes(program, target, part="full"):
    return calls(program.part(part).graph, target)


BEFORE = """\
%0: float32[2x2x4x4] = input sample
%1: float32[4x2x3x3] = weight first.weight
%2: float32[4] = weight first.bias
%3: float32[4x2x3x3] = weight middle.weight
%4: float32[4] = weight middle.bias
%5: float32[4x4] = weight dense.weight
%6: float32[4] = weight dense.bias
%7: float32[2x4x1x1] = weight last.weight
%8: float32[2] = weight last.bias
%9: float32[2x4x4x4] = aten.conv2d.default(%0, %1, %2, [1, 1], [1, 1])  # first
%10: float32[2x4x4x4] = aten.silu.default(%9)
%11: float32[2x4x2x2] = aten.conv2d.default(%10, %3, %4, [2, 2], [1, 1], [1, 1], 2)  # middle
%12: float32[2x2x2x4] = aten.transpose.int(%11, 1, 3)
%13: float32[2x2x2x4] = aten.linear.default(%12, %5, %6)  # dense
%14: float32[2x4x2x2] = aten.transpose.int(%13, 1, 3)
%15: float32[2x2x2x2] = aten.conv2d.default(%14, %7, %8)  # last
return [%15]
"""

STATIC = """\
%0: float32[2x2x4x4] = input sample
%1: float32[4x2x3x3] = weight first.weight
%2: float32[4] = weight first.bias
%3: float32[2x4x1x1] = weight last.weight
%4: float32[2] = weight last.bias
%5: float32[2x4x4x4] = aten.conv2d.default(%0, %1, %2, [1, 1], [1, 1])  # first
%6: float32[2x4x4x4] = aten.silu.default(%5)
%7: float32[] = weight range.full.silu.scale
%8: uint8[] = weight range.full.silu.zero
%9: uint8[2x4x4x4] = effuse.quantize.default(%6, %7, %8, 0)
%10: float32[2x4x4x4] = effuse.dequantize.default(%9, %7, %8, 0)
%11: int8[4x2x3x3] = weight middle.weight.int8
%12: float32[4] = weight middle.weight.scale
%13: int8[4] = weight zeros.int8.4
%14: float32[4x2x3x3] = effuse.dequantize.default(%11, %12, %13, 0)  # middle
%15: int32[4] = weight middle.bias.full.conv2d_1.int32
%16: float32[4] = weight middle.bias.full.conv2d_1.scale
%17: int32[4] = weight zeros.int32.4
%18: float32[4] = effuse.dequantize.default(%15, %16, %17, 0)  # middle
%19: float32[2x4x2x2] = aten.conv2d.default(%10, %14, %18, [2, 2], [1, 1], [1, 1], 2)  # middle
%20: float32[] = weight range.full.conv2d_1.scale
%21: uint8[] = weight range.full.conv2d_1.zero
%22: uint8[2x4x2x2] = effuse.quantize.default(%19, %20, %21, 0)  # middle
%23: float32[2x4x2x2] = effuse.dequantize.default(%22, %20, %21, 0)  # middle
%24: float32[2x2x2x4] = aten.transpose.int(%23, 1, 3)
%25: float32[] = weight range.full.transpose.scale
%26: uint8[] = weight range.full.transpose.zero
%27: uint8[2x2x2x4] = effuse.quantize.default(%24, %25, %26, 0)
%28: float32[2x2x2x4] = effuse.dequantize.default(%27, %25, %26, 0)
%29: int8[4x4] = weight dense.weight.int8
%30: float32[4] = weight dense.weight.scale
%31: int8[4] = weight zeros.int8.4
%32: float32[4x4] = effuse.dequantize.default(%29, %30, %31, 0)  # dense
%33: int32[4] = weight dense.bias.full.linear.int32
%34: float32[4] = weight dense.bias.full.linear.scale
%35: int32[4] = weight zeros.int32.4
%36: float32[4] = effuse.dequantize.default(%33, %34, %35, 0)  # dense
%37: float32[2x2x2x4] = aten.linear.default(%28, %32, %36)  # dense
%38: float32[2x4x2x2] = aten.transpose.int(%37, 1, 3)
%39: float32[2x2x2x2] = aten.conv2d.default(%38, %3, %4)  # last
return [%39]
"""

DYNAMIC = """\
%0: float32[2x2x4x4] = input sample
%1: float32[4x2x3x3] = weight first.weight
%2: float32[4] = weight first.bias
%3: float32[4] = weight middle.bias
%4: float32[4] = weight dense.bias
%5: float32[2x4x1x1] = weight last.weight
%6: float32[2] = weight last.bias
%7: float32[2x4x4x4] = aten.conv2d.default(%0, %1, %2, [1, 1], [1, 1])  # first
%8: float32[2x4x4x4] = aten.silu.default(%7)
%9: int8[4x2x3x3] = weight middle.weight.int8
%10: float32[4] = weight middle.weight.scale
%11: float32[2x4x2x2] = effuse.conv2d_dynamic.default(%8, %9, %10, %3, [2, 2], [1, 1], [1, 1], 2)  # middle
%12: float32[2x2x2x4] = aten.transpose.int(%11, 1, 3)
%13: int8[4x4] = weight dense.weight.int8
%14: float32[4] = weight dense.weight.scale
%15: float32[2x2x2x4] = effuse.linear_dynamic.default(%12, %13, %14, %4)  # dense
%16: float32[2x4x2x2] = aten.transpose.int(%15, 1, 3)
%17: float32[2x2x2x2] = aten.conv2d.default(%16, %5, %6)  # last
return [%17]
"""  # noqa: E501


def test_golden_static():
    program = chain()
    assert dump(program.parts[0].graph) == BEFORE
    result = quantized(program)
    assert dump(result.parts[0].graph) == STATIC
    assert dump(program.parts[0].graph) == BEFORE
    assert set(result.weights) == {
        line.split("weight ")[1] for line in STATIC.splitlines() if "= weight" in line
    }


def test_golden_dynamic():
    result = quantized(chain(), activations="dynamic")
    assert dump(result.parts[0].graph) == DYNAMIC


def test_the_report_names_every_layer():
    found = lines(whole())
    assert {name: (layer.op, layer.format, layer.reason) for name, layer in found.items()} == {
        "first": ("conv2d", "float", "first layer"),
        "middle": ("conv2d", "w8a8", ""),
        "dense": ("linear", "w8a8", ""),
        "last": ("conv2d", "float", "last layer"),
    }
    assert [layer.parameters for layer in found.values()] == [72, 72, 16, 8]
    assert all(20 < layer.sqnr_db < 60 for layer in found.values())


def test_edges_are_quantized_on_request():
    result = quantized(chain(), edges=True)
    assert {layer.format for layer in result.layers} == {"w8a8"}
    graph = result.parts[0].graph
    assert list(graph.nodes)[: len(inputs(graph))] == inputs(graph)  # behind the inputs
    two = quantized(branches(), edges=True)
    graph = two.parts[0].graph
    assert list(graph.nodes)[:3] == inputs(graph)


REASONS = {
    "exclude": (dict(exclude=("mid*",)), "middle", "among exclude"),
    "include": (dict(include=("middle",)), "dense", "not among include"),
    "bound": (dict(min_sqnr_db=199.0), "dense", "under the bound"),
    "first": ({}, "first", "first layer"),
    "last": ({}, "last", "last layer"),
}


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("name", REASONS)
def test_a_layer_that_stays_in_float_says_why(name, activations):
    options, layer, reason = REASONS[name]
    result = quantized(chain(), activations=activations, **options)
    found = lines(result)[layer]
    assert found.format == "float"
    assert found.reason.startswith(reason)
    assert result.records[0].reasons["quantize"][reason] >= 1
    kept = chain().weights[f"{layer}.weight"]
    assert torch.equal(result.weights[f"{layer}.weight"], kept)
    quantized_ones = [each for each in result.layers if each.format == "w8a8"]
    assert result.records[0].rewrites.get("quantize", 0) == len(quantized_ones)


def test_include_and_exclude_together():
    found = lines(quantized(chain(), include=("*",), exclude=("dense",), edges=True))
    assert {name for name, layer in found.items() if layer.format == "w8a8"} == {
        "first", "middle", "last",
    }  # fmt: skip


def test_the_bound_keeps_the_noisier_layer_in_float():
    ratios = {name: layer.sqnr_db for name, layer in lines(whole()).items()}
    low, high = sorted((ratios["middle"], ratios["dense"]))
    assert low < high
    bound = (low + high) / 2
    found = lines(quantized(chain(), min_sqnr_db=bound))
    noisy = min(("middle", "dense"), key=ratios.__getitem__)
    assert found[noisy].reason == f"under the bound: {low:.1f} dB, the bound is {bound:g} dB"
    assert [name for name, layer in found.items() if layer.format == "w8a8"] == [
        name for name in ("middle", "dense") if name != noisy
    ]


def test_what_a_slot_keeps_makes_no_last_layer():
    part = chain().part("full")
    graph, _ = clone(part.graph)
    (results,) = graph.output_node().args
    middle = calls(graph, aten.conv2d.default)[1]
    graph.output_node().args = ((*results, middle),)
    kept = replace(part, graph=graph, outputs=(*part.outputs, "kept"))
    assert {module_path(node) for node in last_layers(kept, chain())} == {"last"}


def test_a_layer_that_calibration_never_saw_stays_in_float():
    program = chain()
    found = calibration(program)
    for key in [key for key in found.statistics.ranges if key[1] == "transpose"]:
        del found.statistics.ranges[key]
    result = run_passes(program, (Quantize(),), lambda _: found)
    layer = lines(result)["dense"]
    assert (layer.format, layer.reason) == ("float", "never seen in calibration")
    assert layer.sqnr_db is None
    assert lines(result)["middle"].format == "w8a8"
    dynamic = run_passes(program, (Quantize(activations="dynamic"),), lambda _: found)
    assert lines(dynamic)["dense"].format == "w8a8"


def test_fuel():
    for fuel in range(3):
        result = run_passes(chain(), (Quantize(),), calibration, fuel=fuel)
        assert sum(layer.format == "w8a8" for layer in result.layers) == fuel
        reasons = [layer.reason for layer in result.layers]
        assert reasons.count("out of fuel") == 2 - fuel


# refusals


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_a_quantized_program_is_refused(activations):
    result = whole(activations)
    for again in ("static", "dynamic"):
        with pytest.raises(PassError, match="quantize: the program is quantized already"):
            quantized(result, activations=again)


def test_a_program_with_weights_in_8_bits_alone_is_refused():
    result = quantized(branches(), Hoist(), exclude=("inner", "query", "key", "outer"))
    assert {layer.format for layer in result.layers} == {"float", "w8"}
    with pytest.raises(PassError, match="quantized already"):
        quantized(result)


def test_no_calibration_is_a_clear_error():
    with pytest.raises(PassError, match=r"needs calibration: hand compile\(calibration=run\)"):
        run_passes(chain(), (Quantize(),))


def test_an_unknown_format_is_refused():
    with pytest.raises(ConfigError, match=r"'w8a7'.*did you mean 'w8a"):
        quantized(chain(), format="w8a7")


def test_groups_that_fit_no_layer_are_refused_with_the_nearest_that_do():
    with pytest.raises(PassError, match=r"no layer can be quantized.*groups of 64.*group18"):
        quantized(chain(), format="w4a4")


# what is written


def test_a_value_that_two_layers_read_is_quantized_once():
    result = quantized(branches(), exclude=("text",))
    found = lines(result)
    assert {name for name, layer in found.items() if layer.format == "w8a8"} == {"query", "key"}
    (quantize,) = nodes(result, ops.quantize.default)
    (pair,) = quantize.users
    linears = {n for n in nodes(result, aten.linear.default) if n.args[0] is pair}
    assert len(linears) == 2
    assert (found["inner"].reason, found["outer"].reason) == ("first layer", "last layer")


def test_a_shortcut_around_the_first_layer_makes_no_others_first_ones():
    class Around(Chain):
        def forward(self, sample):
            h = self.first(sample) + sample.repeat(1, 2, 1, 1)
            h = self.dense(self.middle(F.silu(h)).transpose(1, 3)).transpose(1, 3)
            return self.last(h) + self.beside(sample[:, :, ::2, ::2])

        def __init__(self):
            super().__init__()
            self.beside = nn.Conv2d(2, 2, 1)

    found = lines(quantized(chain(kind=Around), min_sqnr_db=0))
    assert {name: layer.reason for name, layer in found.items()} == {
        "first": "first layer", "middle": "", "dense": "", "last": "last layer",
        "beside": "first layer",
    }  # fmt: skip


def test_the_result_of_a_convolution_is_read_in_its_8_bits():
    class Two(Chain):
        def forward(self, sample):
            return self.last(self.middle(self.dense2(self.first(sample))))

        def __init__(self):
            super().__init__()
            self.dense2 = nn.Conv2d(4, 4, 1)

    result = quantized(chain(kind=Two))
    one, other = (n for n in nodes(result, aten.conv2d.default) if n.args[1].op != "get_attr")
    quantizes = nodes(result, ops.quantize.default)
    assert len(quantizes) == 3  # before the first of the two, between them, behind the second
    assert other.args[0].args[0].args[0] is one


def test_prompt_parts_keep_float_arithmetic_and_store_8_bits():
    result = quantized(branches(), Canonicalize(), Hoist())
    prompt = result.part("prompt")
    assert lines(result)["text"].format == "w8"
    (linear,) = calls(prompt.graph, aten.linear.default)
    assert linear.args[0].op == "placeholder"
    assert linear.args[1].target is ops.dequantize.default
    assert linear.args[2].target == "text.bias"
    assert calls(prompt.graph, ops.quantize.default) == []
    assert "text.weight" not in result.weights
    dynamic = quantized(branches(), Canonicalize(), Hoist(), activations="dynamic")
    assert calls(dynamic.part("prompt").graph, ops.linear_dynamic.default) == []
    assert lines(dynamic)["text"].format == "w8"


def test_a_computed_bias_stays_as_it_is():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, sample, timestep):
            h = self.layers[0](sample)
            h = F.linear(h, self.layers[1].weight, timestep.float().cos().expand(4))
            return self.layers[2](h)

    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 4), "timestep": torch.tensor([7])}
    program = capture(Biased().eval(), values, timesteps=(9.0, 7.0))
    for activations in ("static", "dynamic"):
        result = quantized(program, activations=activations)
        assert sum(layer.format == "w8a8" for layer in result.layers) == 1
        assert result.records[0].sqnr_db > 30


# numbers


def as_numpy(program, name):
    return program.weights[name].double().numpy()


def test_a_static_layer_by_hand():
    """dense of the chain, in numpy integers, from the stored tensors alone."""
    result = quantized(chain(), include=("dense",))
    seen = {}
    run_program(result, result.examples, lambda part, node, value: seen.update({node: value}))
    (linear,) = nodes(result, aten.linear.default)
    (quantize,) = nodes(result, ops.quantize.default)
    x = seen[quantize.args[0]].numpy()
    scale, zero = (as_numpy(result, f"range.full.transpose.{kind}") for kind in ("scale", "zero"))
    steps = np.clip(np.rint(x / np.float32(scale)) + zero, 0, 255).astype(np.int64) - int(zero)
    weight = result.weights["dense.weight.int8"].numpy().astype(np.int64)
    bias = result.weights["dense.bias.full.linear.int32"].numpy().astype(np.int64)
    sums = np.einsum("...i,oi->...o", steps, weight) + bias
    expected = sums * (scale * as_numpy(result, "dense.weight.scale"))
    assert np.allclose(seen[linear].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert weight.min() >= -127
    assert np.abs(weight).max(axis=1).tolist() == [127] * 4
    real = chain().weights
    error = np.abs(bias * as_numpy(result, "dense.bias.full.linear.scale")
                   - real["dense.bias"].double().numpy())  # fmt: skip
    assert (error <= as_numpy(result, "dense.bias.full.linear.scale") / 2 + 1e-9).all()


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["first", "middle", "dense", "last"])
def test_the_sqnr_of_a_layer_is_that_of_the_layer_alone(name, activations):
    """Recomputed with fake quantization written here, on what the float network gives."""
    program = chain()
    found = calibration(program)
    result = run_passes(program, (Quantize(activations=activations),), lambda _: found)
    graph = program.parts[0].graph
    weight = program.weights[f"{name}.weight"]
    (site,) = (n for n in calls(graph) if any(a.target == f"{name}.weight"
               for a in n.all_input_nodes))  # fmt: skip
    scale = weight.abs().flatten(1).amax(1).div(127).reshape(-1, *[1] * (weight.dim() - 1))
    rounded = (weight / scale).round() * scale

    def fake(value, low, high):
        step = (max(high, 0) - min(low, 0)) / 255
        zero = round(-min(low, 0) / step)
        return ((value / step).round() + zero).clamp(0, 255).sub(zero).mul(step)

    def ranged(value, node):
        if activations == "dynamic":
            return fake(value, value.min().item(), value.max().item())
        return fake(value, *found.statistics.ranges["full", node.name].overall)

    signal = noise = 0.0
    for probe in found.probes["full"]:
        seen = {}
        run_program(program, probe, lambda _, node, value, seen=seen: seen.update({node: value}))
        seen |= {n: program.weights[n.target] for n in graph.nodes if n.op == "get_attr"}
        arguments = [seen.get(a, a) if isinstance(a, torch.fx.Node) else a for a in site.args]
        x = probe["sample"] if site.args[0].op == "placeholder" else arguments[0]
        twin = site.target(ranged(x, site.args[0]), rounded, *arguments[2:])
        if activations == "static" and site.target is aten.conv2d.default:
            twin = ranged(twin, site)
        real = seen[site].double()
        signal += real.square().sum().item()
        noise += (real - twin.double()).square().sum().item()
    assert len(found.probes["full"]) == 4
    assert lines(result)[name].sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.1)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_the_network_stays_close(activations):
    result = quantized(chain(), activations=activations)
    assert result.records[0].exact is False
    assert result.records[0].sqnr_db > 30
    exact = quantized(chain(), activations=activations, include=("nothing",))
    assert exact.records[0].error <= exact_bound(torch.float32)
    assert dump(exact.parts[0].graph) == dump(chain().parts[0].graph)


@pytest.mark.parametrize("activations", ["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_other_types_keep_their_type(dtype, activations):
    program = chain(dtype)
    result = quantized(program, activations=activations, edges=True)
    verify(result)
    assert {layer.format for layer in result.layers} == {"w8a8"}
    (found,) = run_program(result, result.examples)
    assert found.dtype == dtype
    assert result.records[0].sqnr_db > 25


def test_half_precision_in_prompt_parts():
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 4).half(), "prompt": torch.randn(2, 3).half()}

    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.text, self.inner = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, sample, prompt):
            return self.inner(sample) * self.text(prompt)

    program = capture(Text().eval().half(), values)
    result = quantized(program, Hoist())
    assert lines(result)["text"].format == "w8"
    assert result.records[-1].sqnr_db > 30


def dead_channels(weight, bias):
    """A chain whose middle layer has channels of (almost) no weight, and their bias."""
    program = chain()
    found = dict(program.weights)
    found["middle.weight"] = found["middle.weight"].clone()
    found["middle.weight"][1:3] = torch.tensor([0.0, weight]).reshape(2, 1, 1, 1)
    found["middle.bias"] = torch.tensor([0.1, bias, -bias, 0.1])
    return replace(program, weights=found, expected=None)


@pytest.mark.parametrize("weight", [0.0, 1e-30, 1e-9])
@pytest.mark.parametrize("bias", [0.013, 7.0])
def test_the_bias_of_a_dead_channel_survives(weight, bias):
    program = dead_channels(weight, bias)
    result = quantized(program, include=("middle",))
    scale = result.weights["middle.bias.full.conv2d_1.scale"].double()
    steps = result.weights["middle.bias.full.conv2d_1.int32"].double()
    assert torch.allclose(steps * scale, program.weights["middle.bias"].double(), rtol=1e-4)
    assert (steps.abs() <= 2**30).all()
    stored = [name for name in result.weights if name.endswith(".int8") and "middle" in name]
    assert len(stored) == 1


def test_layers_that_share_a_weight_share_its_8_bits():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.tied, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, sample):
            return self.last(self.tied(self.tied(self.first(sample)).sin()))

    torch.manual_seed(0)
    result = quantized(capture(Tied().eval(), {"sample": torch.randn(2, 4)}))
    assert len([name for name in result.weights if name.endswith(".int8")]) == 1
    assert [layer.format for layer in result.layers].count("w8a8") == 2
    assert all(layer.sqnr_db > 30 for layer in result.layers)


def test_tied_layers_of_different_ranges_and_a_dead_channel_keep_apart():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.biases = nn.ParameterList([torch.randn(4), torch.randn(4)])
            with torch.no_grad():
                self.weight[1] = 1e-20
                self.biases[0][1], self.biases[1][1] = 500.0, 1e-3

        def forward(self, sample):
            h = F.linear(self.first(sample) * 1e-3, self.weight, self.biases[0])
            return self.last(F.linear(h.tanh() * 1e3, self.weight, self.biases[1]))

    torch.manual_seed(0)
    result = quantized(capture(Tied().eval(), {"sample": torch.randn(2, 4)}), min_sqnr_db=-200)
    assert [layer.format for layer in result.layers].count("w8a8") == 2
    for name in ("biases.0.full.linear_1", "biases.1.full.linear_2"):
        found = result.weights[f"{name}.int32"].double() * result.weights[f"{name}.scale"].double()
        real = {"biases.0": 500.0, "biases.1": 1e-3}[name[:8]]
        assert found[1].item() == pytest.approx(real, rel=1e-4)
    for node in nodes(result, aten.linear.default):
        if node.args[1].op == "get_attr":
            continue
        weight, scale = (result.weights[each.target] for each in node.args[1].args[:2])
        x_scale = result.weights[node.args[0].args[1].target]
        bias_scale = result.weights[node.args[2].args[1].target]
        assert torch.allclose(bias_scale, scale * x_scale)
        assert weight.dtype == torch.int8


# the formulas


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(finite, finite)
def test_affine_covers_the_range_and_holds_zero(one, other):
    low, high = min(one, other), max(one, other)
    scale, zero = affine(low, high)
    assert scale.dtype == torch.float32
    assert zero.dtype == torch.uint8
    step, offset = scale.double().item(), int(zero)
    assert step > 0
    assert (0 - offset) * step <= max(0, -offset) * step  # zero is step number `offset`: exact
    assert (0 - offset) * step <= min(low, 0.0) + step * 0.51
    assert (255 - offset) * step >= max(high, 0.0) - step * 0.51
    if max(high, 0.0) - min(low, 0.0) > 1e-30:
        assert 255 * step == pytest.approx(max(high, 0.0) - min(low, 0.0), rel=1e-6)


def test_affine_of_nothing_and_next_to_nothing():
    for low, high in ((0.0, 0.0), (0.0, 1e-44), (-1e-45, 0.0)):
        scale, zero = affine(low, high)
        assert (scale.item(), zero.item()) == (1.0, 0)
    scale, zero = affine(1.0, 2.0)
    assert (scale.item(), zero.item()) == (pytest.approx(2 / 255), 0)
    scale, zero = affine(-2.0, -1.0)
    assert (scale.item(), zero.item()) == (pytest.approx(2 / 255), 255)


def test_weight_scales_are_symmetric_per_channel():
    weight = torch.tensor([[1.0, -127.0], [0.5, 0.25], [0.0, 0.0]])
    scale = weight_scale(weight)
    assert scale.tolist()[:2] == [1.0, pytest.approx(0.5 / 127)]
    assert scale[2] > 0
    assert torch.equal(weight_scale(weight.bfloat16()).to(torch.float32), weight_scale(weight))
    assert weight_scale(torch.randn(3, 2, 3, 3)).shape == (3,)


def test_the_given_program_is_left_alone():
    program = chain()
    before = {name: tensor.clone() for name, tensor in program.weights.items()}
    graph, _ = clone(program.parts[0].graph)
    Quantize().run(program, Work(calibration=calibration(program)))
    assert dump(program.parts[0].graph) == dump(graph)
    assert before.keys() == program.weights.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in program.weights.items())
