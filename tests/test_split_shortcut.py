"""SplitShortcut: golden splits, a reject for each reason, exact numbers, what 8 bits gain by it."""

from __future__ import annotations

import functools
import logging

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effuse.backends.reference import session
from effuse.calibrate import calibrate, layer_values, trajectory
from effuse.capture import capture
from effuse.dump import dump
from effuse.graph import calls, evaluate, module_path, value_of
from effuse.kernels.quantize import dequantize, quantize
from effuse.kernels.quantizers import parse_quantizer, scale_of_range
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, Quantize, SplitShortcut
from effuse.program import run_program, same_step, used_weights
from effuse.verify import exact_bound, relative_error, verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten, ops = torch.ops.aten, torch.ops.effuse

TIMES = (999.0, 800.0, 600.0, 400.0)
BOUND = exact_bound(torch.float32)


class Net(nn.Module):
    """A function of the module and a sample, over named layers."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, sample):
        return self.function(self, sample)


def program_of(function, shape=(2, 4, 4, 4), dtype=None, **layers):
    torch.manual_seed(0)
    net = Net(function, **layers).eval().to(dtype)
    return run_passes(capture(net, {"sample": torch.randn(shape).to(dtype)}), (Canonicalize(),))


def split(program, fuel=None, **options):
    return run_passes(program, (SplitShortcut(**options),), fuel=fuel)


def reasons(program):
    return dict(program.records[-1].reasons.get("split", {}))


def rewrites(program):
    return program.records[-1].rewrites.get("split", 0)


def layers_of(program, part="full"):
    return calls(program.part(part).graph, aten.conv2d.default, aten.linear.default)


def conv(width, out, size=1, **options):
    return nn.Conv2d(width, out, size, padding=size // 2, **options)


# ---- golden --------------------------------------------------------------------------------------


def joined(net, sample):
    h = net.deep(sample)
    return net.shortcut(torch.cat([h, sample], dim=1))


def normed(net, sample):
    both = torch.cat([net.deep(sample), sample], dim=1)
    return net.shortcut(F.silu(net.norm(both)))


DIRECT = """\
%0: float32[2x4x4x4] = input sample
%1: float32[2x4x1x1] = weight deep.weight
%2: float32[2] = weight deep.bias
%3: float32[3] = weight shortcut.bias
%4: float32[2x2x4x4] = aten.conv2d.default(%0, %1, %2)  # deep
%5: float32[3x2x3x3] = weight shortcut.weight.split0
%6: float32[2x3x2x2] = aten.conv2d.default(%4, %5, %3, [2, 2], [1, 1])  # shortcut
%7: float32[3x4x3x3] = weight shortcut.weight.split1
%8: float32[2x3x2x2] = aten.conv2d.default(%0, %7, None, [2, 2], [1, 1])  # shortcut
%9: float32[2x3x2x2] = aten.add.Tensor(%6, %8)  # shortcut
return [%9]
"""

BEHIND_A_NORM = """\
%0: float32[2x4x4x4] = input sample
%1: float32[2x4x1x1] = weight deep.weight
%2: float32[2] = weight deep.bias
%3: float32[6] = weight norm.weight
%4: float32[6] = weight norm.bias
%5: float32[3] = weight shortcut.bias
%6: float32[2x2x4x4] = aten.conv2d.default(%0, %1, %2)  # deep
%7: float32[2x6x4x4] = aten.cat.default([%6, %0], 1)
%8: float32[2x6x4x4] = aten.group_norm.default(%7, 2, %3, %4, 1e-05, False)  # norm
%9: float32[2x6x4x4] = aten.silu.default(%8)
%10: float32[2x2x4x4] = aten.slice.Tensor(%9, 1, 0, 2)
%11: float32[2x4x4x4] = aten.slice.Tensor(%9, 1, 2, 6)
%12: float32[3x2x1x1] = weight shortcut.weight.split0
%13: float32[2x3x4x4] = aten.conv2d.default(%10, %12, %5)  # shortcut
%14: float32[3x4x1x1] = weight shortcut.weight.split1
%15: float32[2x3x4x4] = aten.conv2d.default(%11, %14)  # shortcut
%16: float32[2x3x4x4] = aten.add.Tensor(%13, %15)  # shortcut
return [%16]
"""


def test_golden_direct():
    program = program_of(joined, deep=conv(4, 2), shortcut=conv(6, 3, 3, stride=2))
    before = dump(program.parts[0].graph)
    result = split(program)
    assert dump(result.parts[0].graph) == DIRECT
    assert dump(program.parts[0].graph) == before
    weight = program.weights["shortcut.weight"]
    assert "shortcut.weight" not in result.weights
    assert set(result.weights) == used_weights(*result.parts)
    pieces = [result.weights[f"shortcut.weight.split{number}"] for number in (0, 1)]
    assert torch.equal(torch.cat(pieces, dim=1), weight)
    assert all(piece.is_contiguous() and piece._base is None for piece in pieces)


def test_golden_behind_a_norm_the_slices_are_taken_after_it():
    program = program_of(normed, deep=conv(4, 2), norm=nn.GroupNorm(2, 6), shortcut=conv(6, 3))
    result = split(program, through_norm=True)
    assert dump(result.parts[0].graph) == BEHIND_A_NORM
    assert result.records[-1].error <= BOUND


def test_the_whole_concatenation_stays_for_its_other_readers():
    def function(net, sample):
        both = torch.cat([net.deep(sample), sample], dim=1)
        return net.shortcut(both) + both.mean()

    result = split(program_of(function, deep=conv(4, 2), shortcut=conv(6, 3)))
    assert rewrites(result) == 1
    (cat,) = calls(result.parts[0].graph, aten.cat.default)
    assert all(user.target is aten.mean.default for user in cat.users)


# ---- rejects -------------------------------------------------------------------------------------


def along_rows(net, sample):
    return net.shortcut(torch.cat([sample, net.deep(sample)], dim=2))


def of_one(net, sample):
    return net.shortcut(torch.cat([net.deep(sample)], dim=1))


def computed(net, sample):
    weight = net.shortcut.weight * sample.mean()
    return F.conv2d(torch.cat([net.deep(sample), sample], dim=1), weight)


def of_two_types(net, sample):
    return net.shortcut(torch.cat([net.deep(sample), sample.half()], dim=1))


def plain(net, sample):
    return net.shortcut(net.deep(sample))


NO_CONCAT = "its input is no concatenation"
REJECTS = {
    NO_CONCAT: (plain, {"shortcut": conv(2, 3)}, {}),
    "the concatenation is along another axis than the channels": (
        along_rows, {"deep": conv(4, 4), "shortcut": conv(4, 3)}, {}),
    "behind a norm or an activation, which takes through_norm=True": (
        normed, {"shortcut": conv(6, 3), "norm": nn.GroupNorm(2, 6)}, {}),
    "its weight is computed": (computed, {"shortcut": conv(6, 3)}, {}),
    "a grouped convolution": (joined, {"shortcut": conv(6, 6, groups=2)}, {}),
    "the concatenation has one operand": (of_one, {"shortcut": conv(2, 3)}, {}),
    "the operands are of different types": (of_two_types, {"shortcut": conv(6, 3)}, {}),
    "among exclude": (joined, {"shortcut": conv(6, 3)}, {"exclude": ("short*",)}),
    "not among include": (joined, {"shortcut": conv(6, 3)}, {"include": ("up.*",)}),
}  # fmt: skip


@pytest.mark.parametrize("reason", REJECTS)
def test_every_reason_not_to(reason):
    function, layers, options = REJECTS[reason]
    program = program_of(function, **{"deep": conv(4, 2), **layers})
    result = split(program, **options)
    assert reason in reasons(result)
    assert rewrites(result) == 0
    assert dump(result.parts[0].graph) == dump(program.parts[0].graph)
    assert sum(reasons(result).values()) == len(layers_of(program))


def test_a_concatenation_of_rows_is_none_of_channels_for_a_linear_layer():
    def function(net, sample):
        return net.mix(torch.cat([sample, sample * 2], dim=1))

    result = split(program_of(function, (2, 3, 4), mix=nn.Linear(4, 4)))
    assert rewrites(result) == 0
    assert "along another axis" in next(iter(reasons(result)))


def test_without_fuel_nothing_is_split():
    program = program_of(joined, deep=conv(4, 2), shortcut=conv(6, 3))
    result = split(program, fuel=0)
    assert dump(result.parts[0].graph) == dump(program.parts[0].graph)


# ---- exact numbers -------------------------------------------------------------------------------


class Joined(nn.Module):
    """Nested and repeated operands, dropout between, a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.enter, self.shortcut, self.leave = conv(4, 2), conv(10, 4, 3), conv(4, 4)
        self.twice, self.drop = conv(8, 4), nn.Dropout(0.5)

    def forward(self, sample):
        h = self.enter(sample)
        inner = torch.cat([h, sample], dim=1)
        y = self.shortcut(self.drop(torch.cat([inner, sample.contiguous()], dim=-3)))
        one = self.twice(torch.cat([y, sample], dim=1))
        other = self.twice(torch.cat([sample, y], dim=1))
        return self.leave(torch.cat([one * other], dim=0))


class Attentive(nn.Module):
    """A U-ViT: tokens, blocks, and a long skip through linear(cat([x, skip], -1))."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.down, self.middle, self.up = (nn.Linear(8, 8) for _ in range(3))
        self.skip, self.norm, self.last = nn.Linear(16, 8), nn.LayerNorm(16), nn.Linear(16, 8)

    def forward(self, sample):
        skip = self.enter(sample)
        skip = skip + F.gelu(self.down(skip))
        h = skip + F.gelu(self.middle(skip))
        h = self.skip(torch.cat([h, skip], dim=-1))
        h = h + F.gelu(self.up(h))
        return self.leave(self.last(F.silu(self.norm(torch.cat([h, skip], dim=-1)))))


def unet2d():
    return diffusers.UNet2DModel(
        block_out_channels=(8, 16), norm_num_groups=4, sample_size=8, layers_per_block=1,
        attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), in_channels=4, out_channels=4,
    )  # fmt: skip


NETWORKS = {  # the network, its sample's shape, layers split directly, and with those behind norms
    "joined": (Joined, (2, 4, 4, 4), 3, 3),
    "attentive": (Attentive, (2, 5, 4), 1, 2),
    "unet2d": (unet2d, (1, 4, 8, 8), 5, 9),  # with sine and cosine of the timestep
}


@functools.cache
def network(name, *passes):
    torch.manual_seed(0)
    kind, shape, *_ = NETWORKS[name]
    values = {"sample": torch.randn(shape)}
    if name == "unet2d":
        values["timestep"] = torch.tensor(999.0)
    program = capture(kind().eval(), values, timesteps=TIMES)
    return run_passes(program, (Canonicalize(), *passes))


@pytest.mark.parametrize("through_norm", [False, True], ids=["direct", "norms"])
@pytest.mark.parametrize("name", NETWORKS)
def test_numbers_stay_and_a_second_run_changes_nothing(name, through_norm):
    program = network(name)
    result = split(program, through_norm=through_norm)
    assert rewrites(result) == NETWORKS[name][3 if through_norm else 2]
    assert 0 < result.records[-1].error <= BOUND
    verify(result)
    again = split(result, through_norm=through_norm)
    assert dump(again.parts[0].graph) == dump(result.parts[0].graph)
    assert again.weights.keys() == result.weights.keys()
    assert rewrites(again) == 0


@pytest.mark.parametrize("name", ["attentive", "unet2d"])
def test_no_layer_reads_a_concatenation_any_more(name):
    left = calls(split(network(name)).parts[0].graph, aten.cat.default)
    readers = {user.target for cat in left for user in cat.users}
    assert readers <= {aten.group_norm.default, aten.layer_norm.default, aten.slice.Tensor}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_keep_their_numbers(dtype):
    program = program_of(joined, deep=conv(4, 2), shortcut=conv(6, 3), dtype=dtype)
    result = split(program)
    assert rewrites(result) == 1
    assert result.records[-1].error <= exact_bound(dtype)


def test_nested_concatenations_are_one():
    program = network("joined")
    result = split(program)
    found = [node for node in layers_of(result) if module_path(node) == "shortcut"]
    assert [value_of(node.args[0]).shape[1] for node in found] == [2, 4, 4]
    assert [node.args[2] is None for node in found] == [False, True, True]
    assert len({node.args[0] for node in found}) == 2  # the sample stands in it twice
    left = calls(result.parts[0].graph, aten.cat.default)
    assert [len(cat.args[0]) for cat in left] == [1]  # the one along the batch


def test_a_shared_weight_is_split_once():
    program = network("joined")
    result = split(program)
    assert sorted(name for name in result.weights if name.startswith("twice")) == [
        "twice.bias", "twice.weight.split0", "twice.weight.split1"
    ]  # fmt: skip


def test_a_shared_weight_with_two_borders_is_split_twice():
    def function(net, sample):
        h = net.deep(sample)
        return net.mix(torch.cat([h, sample], 1)) + net.mix(torch.cat([sample, h], 1))

    program = program_of(function, deep=conv(4, 2), mix=conv(6, 3))
    result = split(program)
    weight = program.weights["mix.weight"]
    pieces = {name: each for name, each in result.weights.items() if "split" in name}
    assert {name: each.shape[1] for name, each in pieces.items()} == {
        "mix.weight.split0": 2, "mix.weight.split1": 4,
        "mix.weight.split0.1": 4, "mix.weight.split1.1": 2,
    }  # fmt: skip
    assert torch.equal(pieces["mix.weight.split1.1"], weight[:, 4:])


def test_a_weight_that_a_whole_layer_reads_too_stays():
    def function(net, sample):
        both = torch.cat([net.deep(sample), sample], 1)
        return net.mix(both) + net.mix(both.roll(1, dims=1))

    result = split(program_of(function, deep=conv(4, 2), mix=conv(6, 3)))
    assert {"mix.weight", "mix.weight.split0", "mix.weight.split1"} <= result.weights.keys()


def test_layers_behind_one_norm_share_its_slices():
    def function(net, sample):
        both = F.silu(net.norm(torch.cat([net.deep(sample), sample], 1)))
        return net.one(both) * net.other(both)

    layers = {"norm": nn.GroupNorm(3, 6), "one": conv(6, 3), "other": conv(6, 3)}
    result = split(program_of(function, deep=conv(4, 2), **layers), through_norm=True)
    assert rewrites(result) == 2
    assert len(calls(result.parts[0].graph, aten.slice.Tensor)) == 2


def test_a_concatenation_inside_of_an_operand_is_found_in_the_same_run():
    def function(net, sample):
        inner = F.silu(torch.cat([net.deep(sample), sample], 1))
        return net.mix(torch.cat([inner, sample], 1))

    program = program_of(function, deep=conv(4, 2), mix=conv(10, 3))
    assert rewrites(split(program)) == 1
    result = split(program, through_norm=True)
    assert rewrites(result) == 2
    found = [node.args[1].target for node in layers_of(result)]
    assert found == [
        "deep.weight", "mix.weight.split0.split0", "mix.weight.split0.split1", "mix.weight.split1"
    ]  # fmt: skip
    assert [len(node.args) > 2 and node.args[2] is not None for node in layers_of(result)] == [
        True, True, False, False
    ]  # fmt: skip


@pytest.mark.parametrize(("size", "padded"), [(3, 0), (4, 2)])  # 4: one more at the end
def test_padding_by_name_is_a_convolution_too(size, padded):
    def function(net, sample):
        return net.shortcut(torch.cat([net.deep(sample), sample], dim=1))

    same = nn.Conv2d(6, 3, size, padding="same", dilation=1)
    result = split(program_of(function, deep=conv(4, 2), shortcut=same))
    assert rewrites(result) == 1
    graph = result.parts[0].graph
    assert not calls(graph, aten.conv2d.padding, aten.cat.default)
    assert len(calls(graph, aten.constant_pad_nd.default)) == padded
    assert len(calls(graph, aten.conv2d.default)) == 3


@settings(max_examples=15, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3), min_size=2, max_size=4),
    cut=st.integers(1, 3),
    bias=st.booleans(),
    convolution=st.booleans(),
)
def test_any_nesting_of_any_sizes_is_the_whole_layer(sizes, cut, bias, convolution):
    axis = 1 if convolution else -1

    def function(net, sample):
        pieces = [sample.narrow(axis, 0, size) * (number + 1) for number, size in enumerate(sizes)]
        nested = torch.cat([*pieces[:cut], *pieces[cut : cut + 1]], axis)
        return net.mix(torch.cat([nested, *pieces[cut + 1 :]], axis))

    width = sum(sizes)
    mix = conv(width, 2, bias=bias) if convolution else nn.Linear(width, 2, bias=bias)
    shape = (1, 3, 2, 2) if convolution else (2, 3)
    result = split(program_of(function, shape, mix=mix))
    assert rewrites(result) == 1
    assert len(layers_of(result)) == len(sizes)
    assert result.records[-1].error <= BOUND


# ---- variants ------------------------------------------------------------------------------------


def test_variants_of_a_cache_share_the_pieces_and_stay_exact():
    before = network("unet2d", Hoist(), Cache(interval=2, warmup=1, order=0, mode="deep"))
    result = split(before)
    reuse = result.part("reuse")
    assert len(result.variants) == 2
    read = {node.args[0].target for node in layers_of(result, "reuse")
            if node.args[0].op == "placeholder" and "split" in node.args[1].target}  # fmt: skip
    slots = {name for slot in result.plan.slots for name in slot.past}
    assert read and read <= slots  # the kept value, in the place of an operand
    pieces = {name for name in used_weights(reuse) if "split" in name}
    assert pieces and pieces <= used_weights(result.part("full"))
    values = same_step(result, result.examples)
    with torch.no_grad():
        full = run_program(result, result.examples)
        assert relative_error(run_program(result, values, variant="reuse"), full) <= BOUND
        one, other = (
            [session(program)(**inputs, return_dict=False)[0] for inputs in trajectory(program, 0)]
            for program in (before, result)
        )
    assert relative_error(other, one) <= BOUND


# ---- what it is for ------------------------------------------------------------------------------


def through_8_bits(x):
    at = scale_of_range(x.min(), x.max(), parse_quantizer("uint8/tensor/asymmetric"))
    return dequantize(quantize(x, *at, 0), *at, 0)


def error(one, other):
    return (one.double() - other.double()).square().mean().item()


def test_activations_of_the_skip_half_err_400_times_less():
    """METHODS 1.2: the ratio of the squared ranges, (1 / 0.05)²."""
    torch.manual_seed(0)
    h, skip = torch.randn(4, 16, 32, 32), 0.05 * torch.randn(4, 16, 32, 32)
    whole = through_8_bits(torch.cat([h, skip], dim=1))
    ratio = error(whole[:, 16:], skip) / error(through_8_bits(skip), skip)
    assert ratio == pytest.approx(400, rel=0.1)


class Skewed(nn.Module):
    """h ~ N(0, 1) and skip ~ N(0, 0.05) meet in front of a projection."""

    def __init__(self):
        super().__init__()
        self.deep, self.shallow = conv(4, 8, bias=False), conv(4, 8, bias=False)
        self.shortcut, self.leave = conv(16, 8), conv(8, 4)
        for layer, std in ((self.deep, 1.0), (self.shallow, 0.05)):
            weight = layer.weight.data
            layer.weight.data = std * weight / weight.norm(dim=1, keepdim=True)

    def forward(self, sample):
        both = torch.cat([self.deep(sample), self.shallow(sample)], dim=1)
        return self.leave(F.silu(self.shortcut(both)))


@functools.cache
def skewed(*passes):
    torch.manual_seed(0)
    feed = [{"sample": torch.randn(2, 4, 16, 16)} for _ in range(2)]
    program = capture(Skewed().eval(), feed[0])
    passes = (Canonicalize(), *passes)
    return run_passes(program, passes, lambda before: calibrate(before, feed, layer_values))


def skip_half(program, exact_weights=None):
    """What the shortcut adds for the skip's 8 channels, by the numbers that it computes on."""
    part = program.parts[0]
    seen = {}
    evaluate(part.graph, program.weights, program.examples, seen.__setitem__)
    site = [node for node in layers_of(program) if module_path(node) == "shortcut"][-1]
    x, weight = seen[site.args[0]], seen.get(site.args[1])
    if weight is None:
        weight = program.weights[site.args[1].target]
    weight = weight[:, -8:] if exact_weights is None else exact_weights
    return F.conv2d(x[:, -8:], weight)


@functools.cache
def eight_bits():
    """The network in float; its shortcut in 8 bits, whole and split."""
    quantize_all = Quantize(min_sqnr_db=-100)
    return skewed(), skewed(quantize_all), skewed(SplitShortcut(), quantize_all)


def input_scales(program):
    inputs = [node.args[0] for node in layers_of(program) if module_path(node) == "shortcut"]
    assert {node.target for node in inputs} == {ops.dequantize.default}
    return [program.weights[node.args[1].target].item() for node in inputs]


def test_the_quantizers_stand_before_the_concatenation():
    _, joint, apart = eight_bits()
    for program, count in ((joint, 1), (apart, 2)):
        formats = [each.format for each in program.layers if each.name == "shortcut"]
        assert formats == ["w8a8"] * count
    assert not calls(apart.parts[0].graph, aten.cat.default)
    deep, skip = input_scales(apart)
    assert [deep] == input_scales(joint)
    assert deep / skip == pytest.approx(20, rel=0.1)


def test_the_skip_half_of_a_quantized_layer():
    """Its activations' error falls by the ratio of squared ranges; int8 weights add their own."""
    plain, joint, apart = eight_bits()
    truth, weights = skip_half(plain), plain.weights["shortcut.weight"][:, 8:]
    activations = error(skip_half(joint, weights), truth) / error(skip_half(apart, weights), truth)
    layer = error(skip_half(joint), truth) / error(skip_half(apart), truth)
    deep, skip = input_scales(apart)
    assert activations == pytest.approx((deep / skip) ** 2, rel=0.1)
    assert activations > layer > 200


def test_the_network_is_closer_to_float():
    _, joint, apart = eight_bits()
    assert apart.records[-1].sqnr_db > joint.records[-1].sqnr_db
