"""Lowering to fused ops: what is fused and what is not, the same numbers, kernels that take it."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton")

from effuse.backends.triton_layout import laid_out, lies
from effuse.backends.triton_linears import kernel_of
from effuse.backends.triton_lower import lower
from effuse.backends.triton_run import PartRun
from effuse.calibrate import calibrate, layer_values, needs_of
from effuse.capture import capture
from effuse.dump import dump
from effuse.graph import calls, recorded, value_of
from effuse.kernels.launch import as_tuple, run_jit
from effuse.kernels.quantize import dequantize, quantize
from effuse.kernels.table import BY_TARGET, FUSED_OPS
from effuse.parity import parity_bound_db, worst_db
from effuse.pass_manager import run_passes
from effuse.passes import (
    Cache,
    Canonicalize,
    Hoist,
    Lora,
    LowRank,
    Quantize,
    Smooth,
    SplitShortcut,
)
from effuse.program import run_program
from effuse.verify import exact_bound, relative_error

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

ops = torch.ops.effuse
INT8 = "int8/channel:int8/token/dynamic"
W4A8 = "int4/group32:int8/group32/dynamic:int4/channel:uint8/tensor/asymmetric"
W4A16 = "int4/group32:none:int4/channel:none"
BOUND = 10 * exact_bound(torch.float32)  # codes are equal: sums of a few hundred products differ


class Net(nn.Module):
    """A function of named layers and a sample, perhaps with other inputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, sample, *others):
        return self.function(self, sample, *others)


def inputs_of(*shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def program_of(function, *passes, shape=(2, 5, 64), dtype=torch.float32, **layers):
    """The captured function of named layers, after the passes."""
    torch.manual_seed(0)
    net = Net(function, **layers).eval().to(dtype)
    values = {"sample": inputs_of(shape, dtype=dtype)[0]}
    return after(capture(net, values), passes)


def after(program, passes):
    def calibration(current):
        feed = [program.examples] if "timestep" not in program.examples else None
        return calibrate(current, feed, layer_values, needs=needs_of(passes))

    return run_passes(program, (Canonicalize(), *passes), calibration)


def counts(lowered, part="full"):
    """How often each op of ours is called."""
    targets = (str(node.target) for node in calls(lowered.program.part(part).graph))
    return Counter(t.split(".")[1] for t in targets if t.startswith("effuse"))


def checked(program, part="full", bound=BOUND):
    """The lowered program: the same numbers, kernels that take every call, and nothing to add."""
    lowered = lower(program)
    before, found = (run_program(each, program.examples) for each in (program, lowered.program))
    for one, other in zip(before, found, strict=True):
        assert other.dtype == one.dtype and other.stride() == one.stride()
        assert relative_error(one, other) < bound
    assert_launches(lowered.program)
    again = lower(lowered.program)
    assert not any(log.rewrites for log in again.logs.values())
    return lowered


def assert_launches(program):
    for each in program.parts:
        for node in calls(each.graph):
            row = BY_TARGET.get(node.target)
            if row in FUSED_OPS:  # of dequantize there are some for PyTorch
                row.native.launch(as_tuple(value_of(node)), *recorded(node.args))


def rewrites(lowered, part="full"):
    """What the rules did, copies aside."""
    return {rule: n for rule, n in lowered.logs[part].rewrites.items() if rule != "copy"}


def reasons(lowered, rule, part="full"):
    return dict(lowered.logs[part].reasons[rule])


def dense(net, x):
    return net.dense(x)


EDGES = partial(Quantize, edges=True)

# ---- linear layers -------------------------------------------------------------------------------

FORMATS = (
    ("w8a8", "linear_scaled", "quantize"),
    (INT8, "linear_scaled", "quantize_rows"),
    ("fp8", "linear_scaled", "quantize_rows"),
    ("int4/channel:uint8/tensor/asymmetric", "linear_scaled", "quantize"),
    ("int4/channel:int8/token/dynamic", "linear_packed", "quantize_rows"),
    ("int4/channel:none", "linear_packed", None),
    (W4A16, "linear_packed", None),
    (W4A8, "linear_packed", "quantize_rows"),
    ("int4/group32:int8/token/dynamic", "linear_packed", "quantize_rows"),
    ("int4/group16:int4/group16/dynamic", "linear_packed", "quantize_rows"),
    ("nvfp4", "linear_packed", "quantize_rows"),
    ("mxfp4", "linear_packed", "quantize_rows"),
    ("e2m1/group16/scale-e4m3:none", "linear_packed", None),
)


@pytest.mark.parametrize(("format", "op", "codes"), FORMATS)
def test_a_layer_of_every_format_becomes_a_kernel(format, op, codes):
    lowered = checked(program_of(dense, EDGES(format), dense=nn.Linear(64, 40)))
    assert counts(lowered) == Counter({op: 1, **({codes: 1} if codes else {})})


@pytest.mark.parametrize("format", ["w8a8", "fp8", W4A16])
def test_a_layer_without_a_bias(format):
    layer = nn.Linear(64, 40, bias=False)
    lowered = checked(program_of(dense, EDGES(format), dense=layer))
    assert rewrites(lowered)["linear"] == 1


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ("w8a16", "no kernel takes weights int8/channel beside activations float"),
        ("e4m3/channel:none", "no kernel takes weights e4m3/channel beside activations float"),
        ("int4/group8:none", "no kernel takes weights int4/group8 beside activations float"),
        ("int3/group32:none", "no kernel takes weights int3/group32 beside activations float"),
        ("int4/group32:int8/group16/dynamic",
         "no kernel takes weights int4/group32 beside activations int8/group16/dynamic"),
        ("int4/group32:e4m3/token/dynamic",
         "no kernel takes weights int4/group32 beside activations e4m3/token/dynamic"),
        ("int4/group32:uint8/tensor/asymmetric",
         "no kernel takes weights int4/group32 beside activations uint8/tensor/asymmetric of known "
         "range"),
        ("uint4/group32/asymmetric:none", "weights uint4/group32/asymmetric"),
    ],
)  # fmt: skip
def test_a_format_without_a_kernel_stays_and_says_so(format, reason):
    lowered = checked(program_of(dense, EDGES(format), dense=nn.Linear(64, 40)))
    assert not rewrites(lowered)
    assert reasons(lowered, "linear") == {reason: 1}


def test_layers_in_float_and_dynamic_ones_of_one_scale_stay():
    lowered = checked(program_of(dense, dense=nn.Linear(64, 40)))
    assert reasons(lowered, "linear") == {"a layer in float": 1}
    program = program_of(dense, EDGES("w8a8", activations="dynamic"), dense=nn.Linear(64, 40))
    lowered = checked(program)
    assert reasons(lowered, "dynamic") == {"one scale over the whole input, found at run time": 1}


def test_what_a_kernel_refuses_is_a_reason():
    layer = nn.Linear(33, 40)  # an odd row has half a byte over
    lowered = checked(program_of(dense, EDGES("int4/channel:none"), dense=layer, shape=(2, 33)))
    (reason,) = reasons(lowered, "linear")
    assert "which is even" in reason and not rewrites(lowered)


def test_half_types_are_as_close_as_their_rounding():
    for dtype, format in ((torch.bfloat16, "w8a8"), (torch.float16, INT8), (torch.bfloat16, W4A16)):
        program = program_of(dense, EDGES(format), dense=nn.Linear(64, 40), dtype=dtype)
        lowered = checked(program, bound=4 * torch.finfo(dtype).eps)
        assert rewrites(lowered)["linear"] == 1


def test_kernels_by_pairs():
    assert kernel_of("static", "int4/channel") == kernel_of("static", "int8/channel") == "scaled"
    assert kernel_of("int8/token/dynamic", "int4/group64") == "packed"
    assert "no kernel" in kernel_of("int4/group32/dynamic", "int4/group64")
    assert "no kernel" in kernel_of("int8/group32/dynamic", "int4/channel")


# ---- branches ------------------------------------------------------------------------------------


def attention(net, x):
    q, k, v = net.q(x), net.k(x), net.v(x)
    return net.join(F.scaled_dot_product_attention(q, k, v))


def heads(**options):
    layer = partial(nn.Linear, 64, 64, **options)
    return {"q": layer(), "k": layer(), "v": layer(), "join": layer()}


@pytest.mark.parametrize("format", [INT8, "fp8", W4A8, "nvfp4"])
def test_a_branch_and_its_shared_half_are_in_the_kernels(format):
    branch = LowRank(rank=4, format=format, inputs=False, edges=True)
    lowered = checked(program_of(attention, branch, EDGES(format), **heads()))
    assert "project" not in counts(lowered) and rewrites(lowered)["branch"] == 4
    assert rewrites(lowered)["down"] == 2  # one D for q, k and v, one for the last


def test_branches_beside_float_and_static_activations_keep_their_first_half():
    for format in (W4A16, "w8a8"):
        branch = LowRank(rank=4, format=format, inputs=False, edges=True)
        lowered = checked(program_of(attention, branch, EDGES(format), **heads()))
        assert counts(lowered)["project"] == 2 and rewrites(lowered)["branch"] == 4


def test_codes_take_one_branch_only():
    branch = LowRank(rank=4, format=INT8, inputs=False, edges=True, shared=False)
    lowered = checked(program_of(attention, branch, EDGES(INT8), **heads()))
    assert counts(lowered)["project"] == 2 and rewrites(lowered)["down"] == 2
    assert reasons(lowered, "down") == {"the values have another branch already": 2}


def test_slots_for_loras_stay_swappable():
    passes = (LowRank(rank=4, format=INT8, inputs=False, edges=True), Lora(), EDGES(INT8))
    lowered = checked(program_of(attention, *passes, **heads()))
    assert "down" not in rewrites(lowered) and "branch" not in rewrites(lowered)
    assert reasons(lowered, "branch") == {"the branch takes LoRAs while it runs": 4}
    assert rewrites(lowered)["residual"] == 4  # the branch's result is added in the epilogue
    factors = {name for each in lowered.program.adapters for name in (each.down, each.up)}
    read = {n.target for n in lowered.program.part("full").graph.nodes if n.op == "get_attr"}
    assert factors and factors <= read


# ---- planes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("format", "bias"), [("w8a8", True), ("fp8", False), (W4A8, True)])
def test_layers_on_one_input_become_one(format, bias):
    lowered = checked(program_of(attention, EDGES(format), **heads(bias=bias)))
    assert rewrites(lowered)["planes"] == 1
    assert sum(counts(lowered)[op] for op in ("linear_scaled", "linear_packed")) == 2


def test_layers_of_another_shape_or_ending_stay_apart():
    def function(net, x):
        return net.q(x) + net.k(x)[..., :40], F.gelu(net.v(x)), net.w(x)

    layers = {"q": nn.Linear(64, 40), "k": nn.Linear(64, 48), "v": nn.Linear(64, 40),
              "w": nn.Linear(64, 40, bias=False)}  # fmt: skip
    lowered = checked(program_of(function, EDGES(INT8), **layers))
    assert "planes" not in rewrites(lowered) and counts(lowered)["linear_scaled"] == 4


def test_many_layers_on_one_input_stay_apart():
    def function(net, x):
        return tuple(layer(x) for layer in net.many)

    many = nn.ModuleList(nn.Linear(64, 32) for _ in range(5))
    lowered = checked(program_of(function, EDGES(INT8), many=many))
    assert reasons(lowered, "planes") == {"more than 4 layers read one value": 5}


# ---- epilogues -----------------------------------------------------------------------------------


def test_the_whole_epilogue():
    def function(net, x):
        gate = net.modulation(x.mean(1, keepdim=True))
        return x + gate * F.gelu(net.dense(x), approximate="tanh")

    layers = {"dense": nn.Linear(64, 64), "modulation": nn.Linear(64, 64)}
    lowered = checked(program_of(function, EDGES(INT8), **layers))
    assert rewrites(lowered) == {"linear": 2, "activation": 1, "gate": 1, "residual": 1}
    gate, dense = calls(lowered.program.part("full").graph, ops.linear_scaled.default)
    assert gate.args[-5:-2] == (None, None, "")
    assert dense.args[-3] == "gelu_tanh" and None not in dense.args[-5:-3]


@pytest.mark.parametrize("kind", ["none", "tanh", "silu"])
def test_activations(kind):
    def function(net, x):
        return F.silu(net.dense(x)) if kind == "silu" else F.gelu(net.dense(x), approximate=kind)

    lowered = checked(program_of(function, EDGES(INT8), dense=nn.Linear(64, 40)))
    assert rewrites(lowered) == {"linear": 1, "activation": 1}


def test_what_comes_in_another_order_stays():
    def function(net, x):
        y = F.silu(net.a(x) + x)
        y = y * (net.b(y) + x)
        return (y + net.c(y)) * y.mean(1, keepdim=True)

    layers = {name: nn.Linear(64, 64) for name in "abc"}
    lowered = checked(program_of(function, EDGES(INT8), **layers))
    assert rewrites(lowered)["residual"] == 3
    assert reasons(lowered, "activation") == {"the layer's epilogue is past its activation": 1}
    assert reasons(lowered, "gate") == {"the layer's epilogue is past its gate": 2}


def test_results_that_are_read_twice_keep_their_layer():
    def function(net, x):
        y, z = net.dense(x), net.dense(x.flip(0))
        return F.gelu(y), y, z * z

    lowered = checked(program_of(function, EDGES(INT8), dense=nn.Linear(64, 64)))
    assert rewrites(lowered) == {"linear": 2}


def test_a_cast_is_the_layers_own():
    def function(net, x):
        return x.float() + net.dense(x).float() * 0.5, net.dense(x.flip(0)).float()

    program = program_of(function, EDGES(INT8), dense=nn.Linear(64, 64), dtype=torch.bfloat16)
    lowered = checked(program, bound=4 * torch.finfo(torch.bfloat16).eps)
    assert rewrites(lowered)["cast"] == 2


# ---- producers -----------------------------------------------------------------------------------


def modulated(net, x):
    shift, scale = net.modulation(x.mean(1)).chunk(2, -1)
    return net.dense(net.norm(x) * (1 + scale[:, None]) + shift[:, None])


def multiplied(net, x):
    shift, scale = net.modulation(x.mean(1, keepdim=True)).chunk(2, -1)
    return net.dense(shift + scale * net.norm(x))


NORMS = {
    "layer": nn.LayerNorm(64, elementwise_affine=False),
    "affine": nn.LayerNorm(64),
    "rms": nn.RMSNorm(64, eps=1e-6),
}


@pytest.mark.parametrize(
    ("function", "norm", "format"),
    [(modulated, "layer", None), (modulated, "affine", INT8), (modulated, "rms", INT8),
     (multiplied, "layer", INT8), (multiplied, "rms", None)],
)  # fmt: skip
def test_norm_and_modulation(function, norm, format):
    passes = () if format is None else (EDGES(format),)
    layers = {"norm": NORMS[norm], "dense": nn.Linear(64, 64), "modulation": nn.Linear(64, 128)}
    lowered = checked(program_of(function, *passes, **layers))
    assert counts(lowered)["row_norm"] == 1 and counts(lowered)["quantize_rows"] == len(passes)
    found = rewrites(lowered)
    assert (found["scale"], found["shift"], found.get("producer", 0)) == (1, 1, len(passes))


def test_a_norm_that_feeds_codes():
    def function(net, x):
        return net.dense(net.norm(x))

    layers = {"norm": nn.LayerNorm(64), "dense": nn.Linear(64, 64)}
    lowered = checked(program_of(function, EDGES(INT8), **layers))
    assert counts(lowered) == Counter(row_norm=1, linear_scaled=1)
    plain = checked(program_of(function, **layers))
    assert not rewrites(plain)  # one kernel as it is


def test_a_norm_that_is_needed_in_float_too():
    def function(net, x):
        y = net.norm(x)
        return net.dense(y) + y.flip(0)

    layers = {"norm": nn.LayerNorm(64), "dense": nn.Linear(64, 64)}
    lowered = checked(program_of(function, EDGES(INT8), **layers))
    assert counts(lowered) == Counter(quantize_rows=1, linear_scaled=1)
    assert reasons(lowered, "producer") == {"its input is needed in float too": 1}


def test_a_norm_written_out_goes_beneath_transposes():
    def function(net, x):
        y = x.reshape(2, 5, 4, 16).transpose(1, 2)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return y * net.norm.weight

    lowered = checked(program_of(function, norm=nn.RMSNorm(16)))
    assert rewrites(lowered) == {"rms": 1} and not lowered.logs["full"].rewrites["copy"]


def test_a_norm_in_float32_of_half_types():
    def function(net, x):
        y = F.layer_norm(x.float(), (64,), eps=1e-6)
        shift, scale = net.modulation(x.mean(1)).float().chunk(2, -1)
        return net.dense((y * (1 + scale[:, None]) + shift[:, None]).to(x.dtype))

    layers = {"dense": nn.Linear(64, 64), "modulation": nn.Linear(64, 128)}
    program = program_of(function, EDGES(INT8), dtype=torch.bfloat16, **layers)
    lowered = checked(program, bound=8 * torch.finfo(torch.bfloat16).eps)
    assert rewrites(lowered)["norm_cast"] == rewrites(lowered)["producer"] == 1


GATES = {
    "geglu": lambda one, other: one * F.gelu(other),
    "geglu_tanh": lambda one, other: F.gelu(other, approximate="tanh") * one,
    "swiglu": lambda one, other: one * F.silu(other),
    "swiglu_first": lambda one, other: F.silu(one) * other,
}
CUTS = {
    "chunk": lambda y: y.chunk(2, -1),
    "split": lambda y: y.split(64, -1),
    "sizes": lambda y: y.split([64, 64], -1),
    "slice": lambda y: (y[..., :64], y[..., 64:]),
}


@pytest.mark.parametrize(("kind", "cut"), list(zip(GATES, CUTS, strict=True)))
def test_gated_activations(kind, cut):
    def function(net, x):
        return net.dense(GATES[kind](*CUTS[cut](net.wide(x))))

    layers = {"wide": nn.Linear(64, 128), "dense": nn.Linear(64, 64)}
    program = program_of(function, EDGES(INT8), shape=(2, 3, 64), **layers)
    lowered = checked(program)
    assert counts(lowered) == Counter(quantize_rows=1, gated=1, linear_scaled=2)
    (gate,) = calls(lowered.program.part("full").graph, ops.gated.default)
    assert gate.args[3:] == (kind, "int8/token/dynamic")


def test_gates_that_no_kernel_has():
    def function(net, x):
        one, other = net.wide(x).chunk(2, -1)
        third = net.wide(x.flip(0)).chunk(2, 1)
        middle = net.wide(x).split([32, 64, 32], -1)[1]
        return F.gelu(one) * other, third[0] * F.silu(third[0]), one * F.silu(middle)

    lowered = checked(program_of(function, shape=(2, 4, 64), wide=nn.Linear(64, 128)))
    assert not rewrites(lowered)
    assert reasons(lowered, "gated") == {"gelu of the first half": 1}


def test_smoothing_that_is_left_is_in_the_kernel():
    def function(net, x):
        return net.dense(F.silu(net.first(x)))

    layers = {"first": nn.Linear(64, 64), "dense": nn.Linear(64, 64)}
    smooth = Smooth(alpha=0.5, min_gain_db=-99.0, format=INT8)
    branch = LowRank(rank=4, format=INT8, inputs=False, edges=True)
    lowered = checked(program_of(function, smooth, branch, EDGES(INT8), **layers))
    assert rewrites(lowered)["smooth"] == 2 and rewrites(lowered)["down"] == 2
    assert not calls(lowered.program.part("full").graph, torch.ops.aten.mul.Tensor)


# ---- convolutions and group norms ----------------------------------------------------------------


def conv(width, out, size=3, **options):
    return nn.Conv2d(width, out, size, padding=size // 2, **options)


def block(net, x):
    y = net.second(F.silu(net.norm(net.first(x))))
    return net.shortcut(x) + y


def test_a_residual_block_in_integers():
    layers = {"first": conv(4, 8), "norm": nn.GroupNorm(2, 8), "second": conv(8, 8, stride=2),
              "shortcut": conv(4, 8, 1, stride=2)}  # fmt: skip
    for format in ("w8a8", W4A8):
        lowered = checked(program_of(block, EDGES(format), shape=(2, 4, 6, 6), **layers))
        found = rewrites(lowered)
        assert (found["conv"], found["requantize"], found["group_norm"]) == (3, 3, 1)
        assert found["producer"] == 1 and counts(lowered)["quantize"] == 1
        assert reasons(lowered, "shortcut") == {
            "the convolutions' results are made codes before they are added": 1
        }


def test_group_norm_and_silu_in_float():
    layers = {"first": conv(4, 8), "norm": nn.GroupNorm(2, 8), "second": conv(8, 8, stride=2),
              "shortcut": conv(4, 8, 1, stride=2)}  # fmt: skip
    lowered = checked(program_of(block, shape=(2, 4, 6, 6), **layers))
    assert rewrites(lowered) == {"group_norm": 1}
    assert reasons(lowered, "conv") == {"a layer in float": 3}


class LowBit(nn.Module):
    """A convolution of int8 codes, with nothing but its input on a grid."""

    def __init__(self, width, out, bias=True):
        super().__init__()
        codes = torch.randint(-127, 128, (out, width, 3, 3), dtype=torch.int8)
        for name, value in {
            "codes": codes, "scale": torch.rand(out) * 0.01, "zeros": torch.zeros(out).char(),
            "step": torch.tensor(0.05), "zero": torch.tensor(120, dtype=torch.uint8),
        }.items():  # fmt: skip
            self.register_buffer(name, value)
        self.bias = nn.Parameter(torch.randn(out)) if bias else None

    def forward(self, x, **options):
        x = dequantize(quantize(x, self.step, self.zero, 0), self.step, self.zero, 0)
        weight = dequantize(self.codes, self.scale, self.zeros, 0)
        return F.conv2d(x, weight, self.bias, padding=1, **options)


def captured(function, shape, **layers):
    """A function as it is captured: canonical graphs keep no codes of constants."""
    torch.manual_seed(0)
    net = Net(function, **{name: LowBit(*sizes) for name, sizes in layers.items()}).eval()
    return capture(net, {"sample": inputs_of(shape)[0]})


def test_the_sum_of_two_convolutions_is_one_with_two_scales():
    def function(net, x):
        return F.silu(net.one(x) + net.two(x.flip(0))) + x

    lowered = checked(captured(function, (2, 4, 5, 5), one=(4, 4), two=(4, 4, False)))
    found = rewrites(lowered)
    assert (found["shortcut"], found["activation"], found["residual"]) == (1, 1, 1)
    assert counts(lowered) == Counter(quantize=2, conv2d_scaled=1)


def test_sums_of_convolutions_that_stay_two():
    def function(net, x):
        one, two, three = net.one(x), net.two(x.flip(0)), net.three(x)
        return F.silu(one) + two, three + net.two(x, stride=2).mean((2, 3), keepdim=True)

    layers = {"one": (4, 4), "two": (4, 4, False), "three": (4, 4)}
    lowered = checked(captured(function, (2, 4, 5, 5), **layers))
    assert reasons(lowered, "shortcut") == {"something follows one of the convolutions": 1}


def test_convolutions_that_stay():
    def function(net, x):
        return net.a(x, dilation=2), net.b(x, groups=2), net.a(x[0])

    lowered = checked(captured(function, (2, 4, 8, 8), a=(4, 4), b=(2, 4)))
    assert reasons(lowered, "conv") == {
        "a dilated convolution": 1, "a grouped convolution": 1, "a convolution without a batch": 1,
    }  # fmt: skip


# ---- layouts -------------------------------------------------------------------------------------


def test_a_value_is_copied_once_and_outputs_lie_as_before():
    def function(net, x):
        y = x.transpose(1, 2)
        for _ in range(3):
            shift, scale = net.modulation(y.mean(1)).chunk(2, -1)
            y = y + net.norm(y) * (1 + scale[:, None]) + shift[:, None]
        return y

    layers = {"norm": nn.LayerNorm(64), "modulation": nn.Linear(64, 128)}
    program = program_of(function, shape=(2, 64, 5), **layers)
    lowered = lower(program)
    assert lowered.logs["full"].rewrites["copy"] == 1
    assert_launches(lowered.program)


def test_layouts():
    x = torch.zeros(2, 3, 4, 5)
    assert lies(x, "rows") and lies(x[:, :, :, :3], "rows") and lies(x, torch.contiguous_format)
    assert not lies(x.transpose(1, 2), "rows") and not lies(x.mT, "rows")
    assert not lies(x, torch.channels_last) and lies(x.mT, "whole") and not lies(x[:, 1:], "whole")
    assert lies(x.to(memory_format=torch.channels_last), torch.channels_last)


def test_weights_are_stored_dense():
    program = program_of(dense, dense=nn.Linear(64, 64))
    name = "dense.weight"
    program.weights[name] = program.weights[name].t().contiguous().t()
    program = after(program, ())
    graph = program.part("full").graph
    for node in graph.nodes:
        if node.target == name:
            node.meta["val"] = node.meta["val"].t().contiguous().t()
    laid_out(graph, program.weights, graph)
    assert program.weights[name].is_contiguous()


# ---- networks ------------------------------------------------------------------------------------


def dit(timesteps=None):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=1, sample_size=8,
        patch_size=2, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", attention_bias=True,
        norm_elementwise_affine=False, activation_fn="gelu-approximate",
    )  # fmt: skip
    values = {"hidden_states": inputs_of((2, 4, 8, 8))[0], "timestep": torch.tensor([500, 500]),
              "class_labels": torch.tensor([1, 2])}  # fmt: skip
    return capture(net.eval(), values, timesteps=timesteps)


def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, mid_block_type=None,
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D",), attention_head_dim=8, cross_attention_dim=32,
    )  # fmt: skip
    sample, prompt = inputs_of((2, 4, 8, 8), (2, 6, 32))
    values = {"sample": sample, "timestep": torch.tensor(500), "encoder_hidden_states": prompt}
    return capture(net.eval(), values)


def flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    net = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    latent, prompt, pooled = inputs_of((2, 9, 16), (2, 6, 32), (2, 32))
    values = {"hidden_states": latent, "encoder_hidden_states": prompt, "timestep": torch.ones(2),
              "pooled_projections": pooled, "img_ids": torch.ones(9, 3),
              "txt_ids": torch.zeros(6, 3)}  # fmt: skip
    return capture(net.eval(), values)


@pytest.fixture(scope="module")
def networks():
    return {each.__name__: each() for each in (dit, unet, flux)}


def close(program):
    """The lowered program, checked as a back end's parity with reference is."""
    lowered = lower(program)
    before, found = (run_program(each, program.examples) for each in (program, lowered.program))
    part = program.part(program.plan.default)
    bound = parity_bound_db(program, part, program.examples, before)
    assert worst_db(before, found) >= bound
    assert_launches(lowered.program)
    assert not any(log.rewrites for log in lower(lowered.program).logs.values())
    return lowered


BRANCHES = partial(LowRank, rank=4, inputs=False)


@pytest.mark.parametrize(
    ("name", "passes", "expected"),
    [
        ("dit", (Hoist(),), {"row_norm": 3}),
        ("dit", (Hoist(), Quantize("w8a8")),
         {"row_norm": 3, "linear_scaled": 4, "quantize": 4}),
        ("dit", (Hoist(), BRANCHES(format="fp8"), Quantize("fp8")),
         {"row_norm": 3, "linear_scaled": 4, "quantize_rows": 2}),
        ("dit", (Quantize(W4A8),),
         {"row_norm": 3, "linear_packed": 8, "quantize_rows": 4}),
        ("flux", (Hoist(), BRANCHES(format=INT8), Quantize(INT8)),
         {"row_norm": 5, "linear_scaled": 10, "quantize_rows": 5}),
        ("dit", (Hoist(), Quantize(W4A16)), {"row_norm": 3, "linear_packed": 4}),
        ("unet", (Hoist(),), {"group_stats": 7, "group_norm_act": 7, "gated": 3}),
        ("unet", (Hoist(), SplitShortcut(), Quantize("w8a8")),
         {"group_stats": 10, "group_norm_act": 10, "gated": 3, "linear_scaled": 18}),
    ],
)  # fmt: skip
def test_networks(networks, name, passes, expected):
    lowered = close(after(networks[name], passes))
    found = counts(lowered)
    assert {op: found[op] for op in expected} == expected


def test_scales_looked_up_by_step_and_variants():
    passes = (
        Hoist(),
        Cache(interval=2, warmup=1, mode="block"),
        Quantize("w8a8", activations="step"),
    )
    lowered = close(after(dit((900.0, 700.0, 500.0, 300.0)), passes))
    assert len(lowered.program.variants) > 1
    assert rewrites(lowered)["linear"] == 6
    for part in lowered.program.variants:
        assert not calls(part.graph, ops.dequantize.default)


# ---- golden, kernels, random chains --------------------------------------------------------------


def gated_block(net, x):
    scale = net.modulation(x.mean(1, keepdim=True))
    y = net.wide(F.layer_norm(x, (32,)) * (1 + scale))
    one, other = y.chunk(2, -1)
    return x + net.dense(one * F.gelu(other))


LAYERS = {"wide": (32, 64), "dense": (32, 32), "modulation": (32, 32)}
GOLDEN = """\
%0: float32[2x3x32] = input sample
%1: float32[64] = weight wide.bias
%2: float32[32] = weight dense.bias
%3: float32[32] = weight modulation.bias
%4: float32[2x1x32] = aten.mean.dim(%0, [1], True)
%5: float32[32x32] = weight modulation.weight.rest
%6: float32[2x1x32] = aten.linear.default(%4, %5, %3)  # modulation
%7: float16[4x32] = weight modulation.weight.down
%8: float32[2x1x4] = effuse.project.default(%4, %7)
%9: float16[32x4] = weight modulation.weight.up
%10: float32[2x1x32] = effuse.project.default(%8, %9)
%11: float32[2x1x32] = aten.add.Tensor(%6, %10)
%12: float32[2x32] = aten.flatten.using_ints(%11, 0, -2)
%13: float16[4x32] = weight wide.weight.down
%14: (float8_e4m3fn[2x3x32], float32[2x3x1], float32[2x3x4]) = effuse.row_norm.default(%0, None, None, %12, None, %13, 1e-05, layer, 1.0, e4m3/token/dynamic)
%15: float32[2x3x4] = operator.getitem(%14, 2)
%16: float32[2x3x1] = operator.getitem(%14, 1)
%17: float8_e4m3fn[2x3x32] = operator.getitem(%14, 0)
%18: float8_e4m3fn[64x32] = weight wide.weight.rest.e4m3/channel.packed.float8
%19: float32[64] = weight wide.weight.rest.e4m3/channel.scale.channels
%20: float16[64x4] = weight wide.weight.up
%21: float32[2x3x64] = effuse.linear_scaled.default(%17, %16, None, %18, %19, None, %1, %15, %20, None, None, , 1, float32)  # wide
%22: float16[4x32] = weight dense.weight.down
%23: (float8_e4m3fn[2x3x32], float32[2x3x1], float32[2x3x4]) = effuse.gated.default(%21, None, %22, geglu, e4m3/token/dynamic)
%24: float32[2x3x4] = operator.getitem(%23, 2)
%25: float32[2x3x1] = operator.getitem(%23, 1)
%26: float8_e4m3fn[2x3x32] = operator.getitem(%23, 0)
%27: float8_e4m3fn[32x32] = weight dense.weight.rest.e4m3/channel.packed.float8
%28: float32[32] = weight dense.weight.rest.e4m3/channel.scale.channels
%29: float16[32x4] = weight dense.weight.up
%30: float32[2x3x32] = effuse.linear_scaled.default(%26, %25, None, %27, %28, None, %2, %24, %29, None, %0, , 1, float32)  # dense
return [%30]
"""  # noqa: E501


def small(format):
    layers = {name: nn.Linear(*sizes) for name, sizes in LAYERS.items()}
    passes = (BRANCHES(format=format, edges=True), EDGES(format, exclude=("modulation",)))
    return program_of(gated_block, *passes, shape=(2, 3, 32), **layers)


def test_golden():
    assert dump(checked(small("fp8")).program.part("full").graph) == GOLDEN


@pytest.mark.parametrize("format", ["fp8", "w8a8"])
def test_the_kernels_give_what_the_references_give(format):
    program = lower(small(format)).program
    part = program.part("full")
    run = PartRun(part.graph, program.weights, torch.device("cpu"), run_jit)
    (expected,) = run_program(program, program.examples)
    (found,) = run(program.examples)
    assert relative_error(expected, found) < BOUND


STEPS = {
    "dense": lambda net, x: net.dense(x),
    "gelu": lambda net, x: F.gelu(net.dense(x)),
    "gate": lambda net, x: net.dense(x) * x.mean(1, keepdim=True),
    "add": lambda net, x: x + net.dense(x),
    "norm": lambda net, x: F.layer_norm(x, (64,)) * (1 + x.mean(1, keepdim=True)),
    "twice": lambda net, x: net.dense(x) + net.other(x),
    "glu": lambda net, x: (lambda y: y[0] * F.silu(y[1]))(net.wide(x).chunk(2, -1)),
    "turn": lambda net, x: x.flip(1).transpose(0, 1).contiguous().transpose(0, 1),
}


@given(
    steps=st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=4),
    format=st.sampled_from([INT8, "fp8", W4A8, W4A16, "w8a8"]),
    rank=st.sampled_from([0, 4]),
)
@settings(deadline=None, max_examples=8)
def test_chains(steps, format, rank):
    def function(net, x):
        for step in steps:
            x = STEPS[step](net, x)
        return x

    branch = (BRANCHES(format=format, edges=True),) if rank else ()
    layers = {"dense": nn.Linear(64, 64), "other": nn.Linear(64, 64), "wide": nn.Linear(64, 128)}
    close(program_of(function, *branch, EDGES(format), **layers))
