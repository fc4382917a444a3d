"""Structure: long skips, spans, chains, blocks and stacks of hand-written and field networks."""

from __future__ import annotations

import functools
import gc
import logging
from typing import Any

import diffusers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.capture import capture
from effuse.examples import derive_inputs
from effuse.graph import calls, module_path, value_of
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist
from effuse.passes.cut import Target, reuse
from effuse.structure import LAYERS, Structure, module_outputs, modules, reused_share

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (9.0, 7.0, 3.0, 1.0)
PASSES = (Canonicalize(), Hoist())


def structure_of(module, inputs=None, timesteps=TIMES, passes=PASSES):
    """The structure of a module, captured and hoisted, or of a function with its layers."""
    if inputs is None:
        inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(7.0)}
    program = run_passes(capture(module.eval(), inputs, timesteps=timesteps), passes)
    return Structure(program.part("full"), program)


class Net(nn.Module):
    """`function(net, sample, timestep)` over layers that are made when they are first named."""

    def __init__(self, function, **layers):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, sample, timestep):
        return self.function(self, sample, timestep)


def conv(width=4, out=None, **options):
    return nn.Conv2d(width, out or width, 3, padding=1, **options)


def spans_of(function, **layers):
    return structure_of(Net(function, **layers)).spans


def targets(*nodes):
    return [str(node.target).removeprefix("aten.") for node in nodes]


# ---- spans ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["shortcut", "branch"])
@pytest.mark.parametrize("scale", [1.0, 2.0**0.5])
def test_an_identity_shortcut_in_either_order_and_scaled(first, scale):
    def forward(net, sample, timestep):
        x = net.enter(sample)
        branch = net.second(F.silu(net.first(x)))
        return net.leave((x + branch if first == "shortcut" else branch + x) / scale)

    names = ("enter", "first", "second", "leave")
    (span,) = spans_of(forward, **{name: conv() for name in names})
    assert span.entry is span.shortcut
    assert [module_path(node) for node in (span.entry, span.branch)] == ["enter", "second"]
    assert span.inner is span.branch and span.name == "second"


@pytest.mark.parametrize("first", ["shortcut", "branch"])
def test_a_projected_shortcut(first):
    def forward(net, sample, timestep):
        x = net.enter(sample)
        branch = net.second(F.silu(net.first(x)))
        short = net.short(x)
        return short + branch if first == "shortcut" else branch + short

    (span,) = spans_of(
        forward, enter=conv(), first=conv(4, 6), second=conv(6), short=nn.Conv2d(4, 6, 1)
    )  # fmt: skip
    places = [module_path(node) for node in (span.entry, span.shortcut, span.branch)]
    assert places == ["enter", "short", "second"]


def test_a_resampled_shortcut_as_in_adms_resblocks():
    def forward(net, sample, timestep):
        x = net.enter(sample)
        return F.avg_pool2d(x, 2) + net.second(F.avg_pool2d(net.first(x), 2))

    (span,) = spans_of(forward, enter=conv(), first=conv(), second=conv())
    assert module_path(span.entry) == "enter"
    assert targets(span.shortcut) == ["avg_pool2d.default"]


@pytest.mark.parametrize("kind", ["rotary", "timestep", "number", "two deep", "no layer"])
def test_sums_that_are_no_spans(kind):
    def forward(net, sample, timestep):
        x = net.enter(sample)
        if kind == "rotary":  # the layer is on both sides
            return x * timestep.cos() + x.flip(1) * timestep.sin()
        if kind == "timestep":
            return x + net.time(timestep.expand(1, 4)).reshape(1, 4, 1, 1)
        if kind == "number":
            return x + 1
        if kind == "no layer":
            return x + F.silu(x)
        return net.first(F.silu(net.second(x))) + net.third(F.silu(net.fourth(x)))

    layers = {name: conv() for name in ("enter", "first", "second", "third", "fourth")}
    assert spans_of(forward, time=nn.Linear(4, 4), **layers) == ()


@pytest.mark.parametrize("hoisted", [True, False])
def test_the_value_before_a_gate_of_the_timestep(hoisted):
    def forward(net, sample, timestep):
        x = net.enter(sample)
        gate = net.time(timestep.expand(1, 4)).reshape(1, 4, 1, 1)
        return x + gate * net.second(F.silu(net.first(x))) / 2

    layers = {name: conv() for name in ("enter", "first", "second")}
    passes = PASSES if hoisted else PASSES[:1]
    net = Net(forward, time=nn.Linear(4, 4), **layers)
    (span,) = structure_of(net, passes=passes).spans
    assert targets(span.branch, span.inner) == ["div.Tensor", "conv2d.default"]
    assert span.name == "second"


def test_a_gate_of_the_latent_belongs_to_the_branch():
    def forward(net, sample, timestep):
        x = net.enter(sample)
        return x + net.first(x) * net.second(x).sigmoid()

    (span,) = spans_of(forward, enter=conv(), first=conv(), second=conv())
    assert span.inner is span.branch


def test_a_value_that_grows_by_broadcasting_is_no_stream():
    def forward(net, sample, timestep):
        x = net.enter(sample)
        return x + net.first(x).mean((2, 3), keepdim=True)

    assert spans_of(forward, enter=conv(), first=conv()) == ()


# ---- chains, blocks, stacks ----------------------------------------------------------------------


class Layered(nn.Module):
    """A stem, then per word of `plan` residual layers: c one convolution, d two, r a new level."""

    def __init__(self, plan):
        super().__init__()
        torch.manual_seed(0)
        self.plan = plan
        self.stem, self.head = conv(), conv()
        self.layers = nn.ModuleList(
            nn.Sequential(conv(), nn.SiLU(), conv()) if each == "d" else conv() for each in plan
        )

    def forward(self, sample, timestep):
        x = self.stem(sample) * timestep.cos()
        for kind, layer in zip(self.plan, self.layers, strict=True):
            x = layer(x) if kind == "r" else x + layer(x)
        return self.head(x)


@pytest.mark.parametrize(
    ("plan", "chains", "blocks"),
    [
        ("c", [1], [1]),
        ("cc", [2], [1, 1]),
        ("cd", [2], [2]),
        ("cdcdcd", [6], [2, 2, 2]),
        ("cdd", [3], [3]),
        ("cddcdd", [6], [3, 3]),
        ("cdcdc", [5], [5]),
        ("cdrcdcd", [2, 4], [2, 2, 2]),
    ],
)
def test_chains_and_the_pieces_that_they_repeat(plan, chains, blocks):
    found = structure_of(Layered(plan))
    assert [len(chain.spans) for chain in found.chains] == chains
    assert [len(block.spans) for block in found.blocks] == blocks
    assert len(found.units) == len(found.layers) == len(plan.replace("r", ""))
    for chain in found.chains:
        for one, other in zip(chain.spans, chain.spans[1:], strict=False):
            assert one.join is other.entry
        assert chain.exit is chain.spans[-1].join


def test_a_stack_is_what_follows_the_first_block():
    found = structure_of(Layered("cdcdcd"))
    stack = found.stack()
    assert stack.first == found.blocks[0]
    assert (stack.entry, stack.exit) == (found.blocks[0].exit, found.blocks[-1].exit)
    assert stack.name == "all after layers"
    assert structure_of(Layered("cd")).stack() is None  # nothing follows


def test_a_stack_takes_the_stream_with_the_most_arithmetic():
    found = structure_of(Layered("cc" + "r" + "dddd"))
    assert found.stack().entry is found.spans[0].join  # the first stream ends with the last
    assert found.stack().exit is found.spans[-1].join

    class Wide(Layered):
        def forward(self, sample, timestep):
            x = self.stem(sample)
            x = x + self.layers[0](x)
            x = x + self.layers[1](x)
            x = F.avg_pool2d(x, 2)
            for layer in self.layers[2:]:
                x = x + layer(x)
            return self.head(x)

    found = structure_of(Wide("cc" + "d" * 9))
    assert [len(chain.spans) for chain in found.chains] == [2, 9]
    assert found.stack().exit is found.chains[1].exit
    assert found.stack().entry is found.chains[1].spans[0].join


def test_a_stream_that_somebody_else_reads_ends_its_chain():
    def forward(net, sample, timestep):
        x = net.enter(sample) * timestep.cos()
        one = x + net.first(x)
        two = one + net.second(one)
        three = two + net.third(two)
        return net.leave(three * one.sigmoid())

    layers = {name: conv() for name in ("enter", "first", "second", "third", "leave")}
    found = structure_of(Net(forward, **layers))
    assert [len(chain.spans) for chain in found.chains] == [1, 2]


def test_units_are_innermost_and_layers_outermost():
    def forward(net, sample, timestep):
        x = net.enter(sample) * timestep.cos()
        inner = net.first(x)
        inner = inner + net.second(inner)
        inner = inner + net.third(inner)
        return net.leave(x + net.last(inner))

    layers = {name: conv() for name in ("enter", "first", "second", "third", "last", "leave")}
    found = structure_of(Net(forward, **layers))
    assert [span.name for span in found.units] == ["second", "third"]
    assert [span.name for span in found.layers] == ["last"]
    assert len(found.spans) == 3


def test_bottlenecks_are_what_every_way_passes():
    def forward(net, sample, timestep):
        x = net.enter(sample)
        y = net.first(x)
        z = net.second(y) + net.third(y).sigmoid()
        return net.leave(z) * z

    layers = {name: conv() for name in ("enter", "first", "second", "third", "leave")}
    found = structure_of(Net(forward, **layers), timesteps=None)
    entry = next(node for node in found.order if module_path(node) == "enter")
    assert targets(*found.bottlenecks(entry)) == ["conv2d.default", "add.Tensor", "mul.Tensor"]
    last = found.bottlenecks(entry)[-1]
    assert found.bottlenecks(last) == []


# ---- the field's networks ------------------------------------------------------------------------


class Attention(nn.Module):
    """Self-attention and a feed-forward layer on tokens (batch, tokens, 16)."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + self.mlp(x)


class UViT(nn.Module):
    """Tokens of the timestep and the patches; out blocks start by cat, then a linear layer."""

    def __init__(self, depth=2):
        super().__init__()
        self.patch, self.head = nn.Linear(16, 16), nn.Linear(16, 16)
        self.enter = nn.ModuleList(Attention() for _ in range(depth))
        self.middle = Attention()
        self.joins = nn.ModuleList(nn.Linear(32, 16) for _ in range(depth))
        self.leave = nn.ModuleList(Attention() for _ in range(depth))

    def forward(self, sample, timestep):
        x = self.patch(sample.reshape(2, 16, 16))
        time = (timestep * torch.arange(16)).cos().expand(2, 1, 16)
        x, skips = torch.cat([time, x], dim=1), []
        for block in self.enter:
            skips.append(x := block(x))
        x = self.middle(x)
        for join, block in zip(self.joins, self.leave, strict=True):
            x = block(join(torch.cat([x, skips.pop()], dim=-1)))
        return self.head(x[:, 1:]).reshape(sample.shape)


class ResBlock(nn.Module):
    """ADM's: GroupNorm, then scale and shift by the timestep; both sides resampled alike."""

    def __init__(self, width, out, resample=lambda x: x):
        super().__init__()
        self.resample, self.skip = resample, nn.Conv2d(width, out, 1) if width != out else None
        self.norm1, self.conv1 = nn.GroupNorm(2, width), conv(width, out)
        self.time, self.norm2, self.conv2 = nn.Linear(8, 2 * out), nn.GroupNorm(2, out), conv(out)

    def forward(self, x, t):
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        scale, shift = self.time(F.silu(t))[:, :, None, None].chunk(2, dim=1)
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        x = self.resample(x)
        return h + (x if self.skip is None else self.skip(x))


class ADM(nn.Module):
    """Two levels of one ResBlock; the levels change by ResBlocks that resample."""

    def __init__(self):
        super().__init__()
        self.enter, self.time = conv(4, 8), nn.Linear(8, 8)
        down = functools.partial(F.avg_pool2d, kernel_size=2)
        up = functools.partial(F.interpolate, scale_factor=2.0)
        self.down = nn.ModuleList([ResBlock(8, 8), ResBlock(8, 8, down), ResBlock(8, 16)])
        self.middle = ResBlock(16, 16)
        widths = [(32, 16), (24, 16), (24, 8), (16, 8)]
        self.up = nn.ModuleList(ResBlock(*pair) for pair in widths)
        self.grow = ResBlock(16, 16, up)
        self.leave = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 4))

    def forward(self, sample, timestep):
        t = self.time((timestep * torch.arange(8)).cos()[None])
        skips = [h := self.enter(sample)]
        for block in self.down:
            skips.append(h := block(h, t))
        h = self.middle(h, t)
        for place, block in enumerate(self.up):
            h = block(torch.cat([h, skips.pop()], dim=1), t)
            h = self.grow(h, t) if place == 1 else h
        return self.leave(h)


LEVELS: dict[str, Any] = {"block_out_channels": (8, 16), "norm_num_groups": 4, "sample_size": 8}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def unet(layers=1, **settings):
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    blocks |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(
        attention_head_dim=4, layers_per_block=layers, **LEVELS, **blocks, **settings
    )


def conditional(**settings):
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
    blocks |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
    widths = {"attention_head_dim": 2, "cross_attention_dim": 12}
    return diffusers.UNet2DConditionModel(**LEVELS, **blocks, **widths, **settings)


def sdxl():
    return conditional(
        use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=10 + 6 * 8,
    )  # fmt: skip


def dit():
    sizes = {"in_channels": 4, "out_channels": 8, "num_layers": 3, "sample_size": 8}
    return diffusers.DiTTransformer2DModel(num_embeds_ada_norm=10, **HEADS, **sizes)


def pixart():
    heads = {"num_attention_heads": 2, "attention_head_dim": 6, "cross_attention_dim": 12}
    return diffusers.PixArtTransformer2DModel(
        num_layers=2, sample_size=8, caption_channels=10, **heads
    )


def sd3():
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 8}
    return diffusers.SD3Transformer2DModel(num_layers=3, **HEADS, **widths, **sizes)


def flux():
    widths = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "in_channels": 4}
    layers = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16}
    return diffusers.FluxTransformer2DModel(
        num_attention_heads=2, axes_dims_rope=(4, 4, 8), **layers, **widths
    )


class Decoder(nn.Module):
    """AutoencoderTiny's decoder."""

    def __init__(self):
        super().__init__()
        self.net = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(3, 1),
        ).decoder  # fmt: skip

    def forward(self, sample):
        return self.net(sample)


# name: (network, long skips, units, layers, chains' lengths, blocks' lengths)
NETWORKS = {
    "unet": (unet, 4, 12, 12, [1, 2, 3, 2, 2, 1, 1], [1, 2, 3, 2, 2, 1, 1]),
    "unet-deeper": (
        lambda: unet(2, add_attention=False), 6, 17, 17,
        [1, 1, 2, 2, 2, 2, 2, 2, 1, 1, 1], [1, 1, 2, 2, 1, 1, 2, 2, 2, 1, 1, 1],
    ),
    "sd15": (conditional, 4, 20, 12, [1, 2, 3, 2, 2, 1, 1], [1, 2, 3, 2, 2, 1, 1]),
    "sdxl": (sdxl, 4, 32, 12, [1, 2, 3, 2, 2, 1, 1], [1, 2, 3, 2, 2, 1, 1]),
    "dit": (dit, 0, 6, 6, [6], [2, 2, 2]),
    "pixart": (pixart, 0, 6, 6, [6], [3, 3]),
    "sd3": (sd3, 0, 9, 9, [6, 3], [2, 2, 2, 3]),
    "flux": (flux, 0, 9, 9, [4, 3, 1, 1], [2, 2, 3, 1, 1]),
    "uvit": (UViT, 2, 10, 10, [2, 2, 2, 2, 2], [2, 2, 2, 2, 2]),
    "adm": (ADM, 4, 9, 9, [1] * 9, [1] * 9),
    "decoder": (Decoder, 0, 4, 4, [1] * 4, [1] * 4),
}  # fmt: skip


@functools.cache
def found(name):
    torch.manual_seed(0)
    net, inputs, times = NETWORKS[name][0]().eval(), None, (999.0, 500.0, 1.0)
    if name == "decoder":
        inputs, times = {"sample": torch.randn(1, 4, 8, 8)}, None
    elif name not in ("uvit", "adm"):
        times = (1.0, 0.5) if name == "flux" else times
        inputs = derive_inputs(net, timestep=torch.tensor(times[0]), size=8)
    else:
        times = TIMES
    structure = structure_of(net, inputs, times)
    gc.freeze()  # it stays for all tests, and walks over its nodes would take most of their time
    return structure


@pytest.mark.parametrize("name", NETWORKS)
def test_counts(name):
    _, skips, units, layers, chains, blocks = NETWORKS[name]
    structure = found(name)
    assert len(structure.skips) == skips
    assert (len(structure.units), len(structure.layers)) == (units, layers)
    assert [len(chain.spans) for chain in structure.chains] == chains
    assert [len(block.spans) for block in structure.blocks] == blocks
    names = [span.name for span in structure.units]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["unet", "unet-deeper", "sd15", "sdxl", "adm", "uvit"])
def test_long_skips_nest_and_come_shallowest_first(name):
    structure = found(name)
    place = structure.order
    for skip in structure.skips:
        assert structure.computed_from(skip.deep, skip.skip)
        assert set(skip.join.args[0]) == {skip.deep, skip.skip}
    for outer, inner in zip(structure.skips, structure.skips[1:], strict=False):
        assert place[outer.skip] < place[inner.skip] < place[inner.join] < place[outer.join]


@pytest.mark.parametrize("name", ["dit", "sd3", "flux"])
def test_units_of_transformers_end_before_their_gates(name):
    for span in found(name).units:
        assert span.branch.target is torch.ops.aten.mul.Tensor
        assert span.inner.target is torch.ops.aten.linear.default
        assert value_of(span.inner).shape == value_of(span.join).shape


UNET_FIRST = ("conv_in", "down_blocks.0.resnets.0.", "conv_out")
FIRST = dict.fromkeys(("unet", "unet-deeper", "sd15", "sdxl"), UNET_FIRST) | {
    "uvit": ("patch", "enter.0", "head"),
    "adm": ("enter", "down.0.", "leave."),
}


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "decoder"])
def test_behind_a_stack_only_the_first_block_is_left(name):
    structure = found(name)
    stack = structure.stack()
    assert stack.exit in structure.bottlenecks(stack.entry)
    assert value_of(stack.exit).shape == value_of(stack.entry).shape
    assert not any(structure.computed_from(span.join, stack.exit) for span in structure.spans)
    part = reuse(structure.part, "reuse", [Target("stack", stack.exit, stack.entry)], 1)
    left = {module_path(node) for node in calls(part.graph, *LAYERS)}
    if name in FIRST:
        assert all(path.startswith(FIRST[name]) for path in left)
    else:
        assert any(path.startswith("transformer_blocks.0.") for path in left)
        assert not any("blocks" in path.replace("transformer_blocks.0.", "") for path in left)


def test_fluxs_stack_ends_with_the_image_cut_from_the_joint_stream():
    structure = found("flux")
    stack = structure.stack()
    assert targets(stack.exit) == ["slice.Tensor"]
    assert stack.exit.args[0] is structure.spans[-1].join
    assert stack.entry is structure.blocks[0].exit


# ---- modules and shares --------------------------------------------------------------------------


def test_what_leaves_a_module():
    structure = found("unet")
    part = structure.part
    (value,) = module_outputs(part, "mid_block")
    assert value is structure.chains[2].exit
    assert [module_path(node) for node in module_outputs(part, "conv_in")] == ["conv_in"]
    assert len(module_outputs(part, "down_blocks.0")) == 2  # to the skip, and the next level
    assert module_outputs(part, "nowhere") == []
    assert module_outputs(part, "down_block") == []  # a path is not a prefix of words
    known = list(modules(part))
    assert {"down_blocks.1.resnets.0", "down_blocks.1", "mid_block", "conv_out"} <= set(known)


def test_the_members_of_a_tuple_leave_a_module():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = conv(4, 8)

        def forward(self, x):
            return self.conv(x).chunk(2, dim=1)

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.split = Split()

        def forward(self, sample, timestep):
            one, other = self.split(sample)
            return one * other.sigmoid()

    structure = structure_of(Whole(), timesteps=None)
    nodes = module_outputs(structure.part, "split")
    assert len(nodes) == 2 and all(isinstance(value_of(node), torch.Tensor) for node in nodes)


def test_the_share_that_is_left_out():
    structure = structure_of(Layered("cccc"))
    part, joins = structure.part, [span.join for span in structure.spans]
    assert reused_share(part, part) == 0.0
    for start, end, share in ((0, 3, 3 / 6), (0, 1, 1 / 6), (2, 3, 1 / 6)):
        cut = reuse(part, "reuse", [Target("", joins[end], joins[start])], 1)
        assert reused_share(part, cut) == pytest.approx(share)
    cut = reuse(part, "reuse", [Target("", joins[1])], 1)
    assert reused_share(part, cut) == pytest.approx(3 / 6)
