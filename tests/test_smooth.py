"""Smooth: where 1/s goes, every reason not to, exact numbers, and what 8 bits gain by it."""

from __future__ import annotations

import functools
import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.calibrate import calibrate, layer_values
from effuse.capture import capture
from effuse.dump import dump
from effuse.errors import ConfigError, PassError
from effuse.graph import calls, module_path
from effuse.pass_manager import run_passes
from effuse.passes import ORDER, Cache, Canonicalize, Hoist, Quantize, Smooth, SplitShortcut
from effuse.passes.smooth_search import excerpt
from effuse.program import used_weights
from effuse.statistics import Needs
from effuse.verify import check_variants

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten

TIMES = (9.0, 7.0, 4.0, 1.0)
WIDTH, LOUD = 16, (3, 8, 13)  # the channels that are 30 times the others


def loud(vector):
    vector = vector.clone()
    vector[list(LOUD)] *= 30
    return vector


class Net(nn.Module):
    """A function of the module, a sample and a timestep, over named layers with loud channels."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)
        for layer in layers.values():
            if getattr(layer, "elementwise_affine", getattr(layer, "affine", False)):
                layer.weight.data = loud(layer.weight.data)

    def forward(self, sample, timestep):
        return self.function(self, sample, timestep)


def inputs(shape=(2, 6, WIDTH), seed=0, time=7.0):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return {"sample": noise, "timestep": torch.tensor([time])}


def feed(shape):
    return [inputs(shape, seed, time) for seed, time in enumerate(TIMES * 2)]


def compiled(function, *passes, shape=(2, 6, WIDTH), fuel=None, **layers):
    """The program after `passes`, calibrated on random samples; Canonicalize first."""
    torch.manual_seed(0)
    net = Net(function, **layers).eval()
    program = capture(net, inputs(shape), timesteps=TIMES)
    return run_passes(
        program,
        (Canonicalize(), *passes),
        lambda each: calibrate(each, feed(shape), layer_values, needs=Needs(channels=True)),
        fuel=fuel,
    )


def record(program):
    return next(each for each in program.records[::-1] if each.name == "smooth")


def reasons(program):
    return dict(record(program).reasons.get("smooth", {}))


def targets(program, part="full"):
    return [node.target for node in calls(program.part(part).graph)]


def linear(width=WIDTH, out=WIDTH, **options):
    return nn.Linear(width, out, **options)


# ---- where 1/s goes ------------------------------------------------------------------------------


def normed(net, x, t):
    y = net.norm(x)
    return net.q(y) + net.k(y) * net.v(y)


def layers_of_normed():
    return {"norm": nn.LayerNorm(WIDTH), "q": linear(), "k": linear(), "v": linear(bias=False)}


GOLDEN_NORM = """\
%0: float32[2x6x16] = input sample
%1: float32[1] = input timestep
%2: float32[16] = weight q.bias
%3: float32[16] = weight k.bias
%4: float32[16] = weight norm.weight.smooth
%5: float32[16] = weight norm.bias.smooth
%6: float32[2x6x16] = aten.layer_norm.default(%0, [16], %4, %5, 1e-05, False)  # norm
%7: float32[16x16] = weight q.weight.smooth
%8: float32[2x6x16] = aten.linear.default(%6, %7, %2)  # q
%9: float32[16x16] = weight k.weight.smooth
%10: float32[2x6x16] = aten.linear.default(%6, %9, %3)  # k
%11: float32[16x16] = weight v.weight.smooth
%12: float32[2x6x16] = aten.linear.default(%6, %11)  # v
%13: float32[2x6x16] = aten.mul.Tensor(%10, %12)
%14: float32[2x6x16] = aten.add.Tensor(%8, %13)
return [%14]
"""


@functools.cache
def smooth_normed(*passes):
    return compiled(normed, *passes, **layers_of_normed())


def test_golden_into_an_affine_norm():
    result = smooth_normed(Smooth())
    assert dump(result.part("full").graph) == GOLDEN_NORM
    assert dict(record(result).rewrites) == {"fold": 1}
    assert result.weights.keys() == used_weights(*result.parts)


def test_the_stored_tensors_are_the_equation():
    before, result = smooth_normed(), smooth_normed(Smooth(alpha=0.5))
    scale = result.weights["q.weight.smooth"][0] / before.weights["q.weight"][0]
    for name in "qkv":
        expected = before.weights[f"{name}.weight"] * scale
        assert torch.allclose(result.weights[f"{name}.weight.smooth"], expected, rtol=1e-5)
    for name in ("norm.weight", "norm.bias"):
        assert torch.allclose(
            result.weights[f"{name}.smooth"] * scale, before.weights[name], rtol=1e-5
        )
    assert {int(each) for each in scale.topk(3).indices} == set(LOUD)


def modulated(net, x, t):
    a, c = net.time(t[:, None]).chunk(2, dim=-1)
    return net.leave(F.layer_norm(x, (WIDTH,)) * (1 + a[:, None]) + c[:, None])


def layers_of_modulated():
    time = nn.Linear(1, 2 * WIDTH)
    time.bias.data[list(LOUD)] += 30
    return {"time": time, "leave": linear()}


def is_inverse(node):
    return str(node.target).endswith(".inverse.smooth")


def test_modulation_at_run_time_is_multiplied_where_it_is_small():
    result = compiled(modulated, Smooth(), **layers_of_modulated())
    assert dict(record(result).rewrites) == {"fold": 1}
    products = calls(result.part("full").graph, aten.mul.Tensor)
    small = [node for node in products if any(map(is_inverse, node.all_input_nodes))]
    assert [list(node.meta["val"].shape) for node in small] == [[1, 1, WIDTH]]


def test_modulation_in_tables_is_stored_divided():
    plain = compiled(modulated, Hoist(), **layers_of_modulated())
    result = compiled(modulated, Hoist(), Smooth(), **layers_of_modulated())
    assert dict(record(result).rewrites) == {"fold": 1}
    assert targets(result) == targets(plain)
    assert {name for name in result.weights if ".smooth" in name} == {
        "leave.weight.smooth",
        "leave.weight.inverse.smooth",  # the factor that the norm did not have
        "table.schedule_unsqueeze_2.smooth",
    }
    assert len(result.weights) == len(plain.weights) + 1
    (norm,) = calls(result.part("full").graph, aten.layer_norm.default)
    assert norm.args[2].target == "leave.weight.inverse.smooth"


def behind_gelu(net, x, t):
    return net.leave(F.gelu(net.norm(x)))


def layers_of_gelu():
    return {"norm": nn.LayerNorm(WIDTH), "leave": linear()}


def test_an_explicit_multiply_behind_what_cannot_be_crossed():
    plain = compiled(behind_gelu, **layers_of_gelu())
    result = compiled(behind_gelu, Smooth(), **layers_of_gelu())
    assert dict(record(result).rewrites) == {"multiply": 1}
    assert targets(plain) == [aten.layer_norm.default, aten.gelu.default, aten.linear.default]
    assert targets(result) == [*targets(plain)[:2], aten.mul.Tensor, aten.linear.default]


def rows(net, x, t):
    return net.leave(F.relu(net.enter(x)))


def layers_of_rows():
    enter = linear()
    enter.weight.data = loud(enter.weight.data)
    return {"enter": enter, "leave": linear()}


def test_rows_of_the_layer_before_through_relu():
    plain = compiled(rows, **layers_of_rows())
    result = compiled(rows, Smooth(include=("leave",)), **layers_of_rows())
    assert targets(result) == targets(plain)
    scale = result.weights["leave.weight.smooth"][0] / plain.weights["leave.weight"][0]
    for name in ("enter.weight", "enter.bias"):
        value = result.weights[f"{name}.smooth"]
        back = value * scale.view([-1] + [1] * (value.dim() - 1))
        assert torch.allclose(back, plain.weights[name], rtol=1e-5)


def test_a_layer_that_is_smoothed_and_folded_into():
    """Its columns are multiplied and its rows divided, in whatever order."""

    def chain(net, x, t):
        return net.leave(F.relu(net.enter(net.norm(x))))

    result = compiled(chain, Smooth(), norm=nn.LayerNorm(WIDTH), **layers_of_rows())
    assert dict(record(result).rewrites) == {"fold": 2}
    assert len(targets(result)) == 4
    assert record(result).error < 1e-5


def convolved(net, x, t):
    return net.leave(net.norm(x))


@pytest.mark.parametrize("size", [1, 3])
def test_a_convolution_behind_a_group_norm(size):
    layers = {"norm": nn.GroupNorm(4, WIDTH), "leave": nn.Conv2d(WIDTH, 8, size, padding=size // 2)}
    result = compiled(convolved, Smooth(), shape=(2, WIDTH, 8, 8), **layers)
    assert dict(record(result).rewrites) == {"fold": 1}
    assert targets(result) == [aten.group_norm.default, aten.conv2d.default]
    assert record(result).error < 1e-5


def test_a_norm_without_factors_gets_them():
    def bare(net, x, t):
        return net.leave(F.layer_norm(net.enter(x), (WIDTH,)))

    result = compiled(bare, Smooth(include=("leave",)), **layers_of_rows())
    assert targets(result)[-2:] == [aten.layer_norm.default, aten.linear.default]
    assert dict(record(result).rewrites) == {"fold": 1}


# ---- numbers -------------------------------------------------------------------------------------

NETWORKS = {
    "norm": (normed, layers_of_normed),
    "modulation": (modulated, layers_of_modulated),
    "gelu": (behind_gelu, layers_of_gelu),
    "rows": (rows, layers_of_rows),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}, {"format": "w4a8"}, {"format": "w8a16"}],
                         ids=str)  # fmt: skip
def test_the_numbers_stay(name, options):
    if options.get("format") == "w4a8":
        options = {"format": "int4/group8:int8/group8/dynamic"}
    function, layers = NETWORKS[name]
    result = compiled(function, Hoist(), Smooth(min_gain_db=0.01, **options), **layers())
    assert record(result).error < 1e-5
    if options.get("alpha") or not options:
        assert sum(record(result).rewrites.values()) >= 1


@pytest.mark.parametrize("options", [{}, {"alpha": 0.5}])
def test_a_second_run_changes_nothing(options):
    once = smooth_normed(Smooth(**options))
    twice = smooth_normed(Smooth(**options), Smooth(**options))
    assert dump(twice.part("full").graph) == dump(once.part("full").graph)
    assert twice.weights.keys() == once.weights.keys()
    assert reasons(twice) == {"it is smooth already": 3}


def test_fuel_stops_it():
    before = compiled(normed, **layers_of_normed())
    canonical = sum(before.records[0].rewrites.values())
    result = compiled(normed, Smooth(), fuel=canonical, **layers_of_normed())
    assert dump(result.part("full").graph) == dump(before.part("full").graph)


# ---- rejects -------------------------------------------------------------------------------------


def read_elsewhere(net, x, t):
    y = net.norm(x)
    return net.leave(y) + y


def computed(net, x, t):
    return F.linear(net.norm(x), net.leave.weight * x.mean())


def constant_added(net, x, t):
    return net.leave(net.norm(x) + 1)


GELU = "the gain is under twice min_gain_db, and aten.gelu.default cannot be crossed"
OTHERS = "the gain is under twice min_gain_db, and others read its input too"
NUMBER = "the gain is under twice min_gain_db, and a number is added"
REJECTS = [
    ("its weight is computed", computed, {}),
    ("the gain is under min_gain_db", behind_gelu, {"min_gain_db": 100.0}),
    ("among exclude", behind_gelu, {"exclude": ("leave",)}),
    ("not among include", behind_gelu, {"include": ("norm",)}),
    ("the format's groups do not fill its rows", behind_gelu, {"format": "w4a16"}),
    (GELU, behind_gelu, None),
    (OTHERS, read_elsewhere, None),
    (NUMBER, constant_added, None),
]


def gain(function):
    """What the one layer of a network gains, in dB, by the pass's own note."""
    result = compiled(function, Smooth(min_gain_db=0.01), **layers_of_gelu())
    return float(record(result).notes[0].split("falls by ")[1].split(" ")[0])


@pytest.mark.parametrize(("reason", "function", "options"), REJECTS)
def test_every_reason_not_to(reason, function, options):
    if options is None:
        options = {"min_gain_db": 0.75 * gain(function)}
    result = compiled(function, Smooth(**options), **layers_of_gelu())
    assert reasons(result) == {reason: 1}
    plain = compiled(function, **layers_of_gelu())
    assert dump(result.part("full").graph) == dump(plain.part("full").graph)


def test_a_grouped_convolution_is_refused():
    layers = {"norm": nn.GroupNorm(4, WIDTH), "leave": nn.Conv2d(WIDTH, 8, 1, groups=2)}
    result = compiled(convolved, Smooth(), shape=(2, WIDTH, 4, 4), **layers)
    assert reasons(result) == {"a grouped convolution": 1}


def test_what_calibration_did_not_see_is_refused():
    program = compiled(normed, **layers_of_normed())

    def nothing_kept(each):
        return calibrate(each, feed((2, 6, WIDTH)), lambda part, node: False)

    result = run_passes(program, (Smooth(),), nothing_kept)
    assert reasons(result) == {"its input was never seen in calibration": 3}
    with pytest.raises(PassError, match="smooth needs calibration"):
        run_passes(program, (Smooth(),))


def test_options_are_checked():
    with pytest.raises(ConfigError, match=r"alpha: expected 0 to 1, or 'search', came 1\.5"):
        Smooth(alpha=1.5)
    with pytest.raises(ConfigError, match="format: 'w8a9' is unknown"):
        Smooth(format="w8a9")
    order = list(ORDER)
    assert order.index(SplitShortcut) < order.index(Smooth) < order.index(Quantize)


# ---- samples, variants, 8 bits -------------------------------------------------------------------


def test_excerpts_are_rows_and_windows():
    x = torch.arange(2 * 500 * 3.0).view(2, 500, 3)
    rows_ = excerpt(x, -1)
    assert rows_.shape[1] == 3
    assert 64 <= len(rows_) < 128
    assert rows_[-1, 0] > 0.9 * x.max()
    image = torch.arange(3 * 2 * 20 * 5.0).view(3, 2, 20, 5)
    assert torch.equal(excerpt(image, -3), image[::2, :, 6:14])


class Blocks(nn.Module):
    """Two residual blocks with loud channels: what one of them adds can be cached."""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.up = nn.ModuleList(linear(WIDTH, 2 * WIDTH) for _ in range(3))
        self.down = nn.ModuleList(linear(2 * WIDTH, WIDTH) for _ in range(3))
        for norm in self.norms:
            norm.weight.data = loud(norm.weight.data)

    def forward(self, sample, timestep):
        h = sample + timestep[:, None, None] / 10
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            h = h + down(F.gelu(up(norm(h)))) / 10
        return h


@functools.cache
def blocks(*passes):
    torch.manual_seed(0)
    shape = (2, 20, WIDTH)
    program = capture(Blocks().eval(), inputs(shape), timesteps=TIMES)
    return run_passes(
        program,
        (Canonicalize(), *passes),
        lambda each: calibrate(each, feed(shape), layer_values, needs=Needs(channels=True)),
    )


def test_variants_share_the_smoothed_weights():
    cache = Cache(interval=2, warmup=1, order=0, mode="layer", at=("up.1",))
    plain, result = blocks(Hoist(), cache), blocks(Hoist(), cache, Smooth())
    assert len(result.variants) == 2
    assert record(result).rewrites["fold"] == 3
    assert check_variants(result) is None
    stored = {name for name in result.weights if ".inverse" not in name}
    assert len(stored) == len(plain.weights)
    full, reuse = (used_weights(part) for part in result.variants)
    assert {"up.0.weight.smooth", "up.2.weight.smooth"} < full & reuse
    assert full - reuse == {"up.1.bias", "up.1.weight.smooth"} | {
        f"norms.1.{name}.smooth" for name in ("weight", "bias")
    }
    assert not reuse - full


EIGHT_BITS = Quantize("w8a8", min_sqnr_db=-100, edges=True)


def test_8_bits_gain_several_decibels():
    plain, smoothed = blocks(EIGHT_BITS), blocks(Smooth(), EIGHT_BITS)
    gained = smoothed.records[-1].sqnr_db - plain.records[-1].sqnr_db
    assert gained > 4
    ups = [{layer.name: layer.sqnr_db for layer in each.layers} for each in (plain, smoothed)]
    for name in ("up.0", "up.1", "up.2"):
        assert ups[1][name] > ups[0][name] + 4


def test_the_layers_keep_their_places():
    paths = [module_path(node) for node in calls(blocks(Smooth()).parts[0].graph,
                                                 aten.linear.default)]  # fmt: skip
    assert paths == ["up.0", "down.0", "up.1", "down.1", "up.2", "down.2"]
