"""Sizes left open: one artifact, eager's numbers at every size within the bounds."""

from __future__ import annotations

import diffusers
import pytest
import torch
from dynamic_networks import Clip, DiT, Tokens, UNet, Video, build, values

import effuse
from effuse.backends.reference import session
from effuse.capture import capture
from effuse.errors import CaptureError, InputError
from effuse.graph import module_path
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, Quantize
from effuse.passes.quantize_sites import first_layers, last_layers

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
BATCH, LENGTH = {"batch": (1, 4)}, {"length": (2, 32)}
PLANE = {"height": (4, 32), "width": (4, 32)}
OPEN = {
    UNet: {**BATCH, **PLANE, **LENGTH},
    DiT: {**BATCH, **PLANE, **LENGTH},
    Tokens: {**BATCH, "tokens": (4, 64), **LENGTH},
    Video: {**BATCH, **PLANE, "frames": (1, 9), **LENGTH},
    Clip: {**BATCH, **PLANE, "frames": (1, 9), **LENGTH},
}
PLANES = ((8, 8), (12, 8), (4, 20), (16, 16), (32, 12))
FILMS = [
    {"height": h, "width": w, "frames": f}
    for (h, w), f in zip(PLANES, (1, 2, 3, 5, 9), strict=True)
]
SIZES = {
    UNet: [{"height": h, "width": w} for h, w in PLANES],
    DiT: [{"height": h, "width": w} for h, w in PLANES],
    Tokens: [{"tokens": n, "length": n // 2} for n in (4, 8, 16, 30, 64)],
    Video: FILMS,
    Clip: FILMS,
}


def compiled(kind, *passes, backend="reference", **options):
    config = effuse.Config(passes=passes, backend=backend, dynamic=OPEN[kind], **options)
    return effuse.compile(build(kind), config, inputs=values(kind), schedule=TIMES, progress=False)


def off(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def exact():
    """The exact artifact of each kind of network and back end, compiled once."""
    made = {}

    def get(kind, backend):
        if (kind, backend) not in made:
            made[kind, backend] = compiled(kind, Hoist(), backend=backend)
        return made[kind, backend]

    return get


@pytest.mark.parametrize(("kind", "backend"), [
    *((kind, "reference") for kind in OPEN), (UNet, "onnx"), (Tokens, "onnx"),
    (Clip, "onnx"),
], ids=lambda value: getattr(value, "__name__", value))  # fmt: skip
def test_five_resolutions_and_four_batches_are_eager_s(exact, kind, backend):
    model, net = exact(kind, backend), build(kind)
    for sizes in SIZES[kind]:
        for batch in (1, 2, 3, 4):
            given = values(kind, batch=batch, **sizes, time=300.0, seed=batch)
            assert off(model(**given), net(**given)) < 1e-5, (sizes, batch)


@pytest.mark.parametrize("length", [2, 5, 31])
def test_the_prompt_s_length_is_open(exact, length):
    for kind in (UNet, Tokens):
        given = values(kind, length=length)
        assert off(exact(kind, "reference")(**given), build(kind)(**given)) < 1e-5


def test_frames_before_channels_and_the_sizes_that_follow_from_them_are_found(exact):
    model = exact(Clip, "reference")
    shapes = {item.label: item.shape for item in model.session.spec.inputs}
    assert shapes["hidden_states"] == ("batch", "frames", 4, "height", "width")
    assert shapes["rotary_emb.0"] == ("frames * (height // 2) * (width // 2)", 16)
    given = values(Clip)
    given["rotary_emb"] = tuple(each[1:] for each in given["rotary_emb"])
    with pytest.raises(InputError, match=r"rotary_emb.0: expected a size of 48 .*got 47"):
        model(**given)


class Fixed(torch.nn.Module):
    """Keeps a table of 64 rows for the pixels of a picture."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.randn(64, 1))

    def forward(self, sample, timestep):
        return (sample.flatten(2).transpose(1, 2) + self.table + timestep).mean(1)


def test_a_product_of_sizes_that_the_network_fixes_is_refused():
    given = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0)}
    with pytest.raises(CaptureError, match=r"'height' and 'width' together .*height \* width = 64"):
        capture(Fixed().eval(), given, dynamic=PLANE)


def test_a_transformer_of_the_field_is_eager_s_at_every_size():
    net = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8,
        num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=16,
        pooled_projection_dim=16, out_channels=4, pos_embed_max_size=24,
    ).eval()  # fmt: skip

    def given(batch, length, height, width):
        return {
            "hidden_states": torch.randn(batch, 4, height, width),
            "encoder_hidden_states": torch.randn(batch, length, 16),
            "pooled_projections": torch.randn(batch, 16), "timestep": torch.full((batch,), 500.0),
        }  # fmt: skip

    config = effuse.Config(passes=(Hoist(),), backend="reference", dynamic=OPEN[UNet])
    model = effuse.compile(net, config, inputs=given(2, 6, 8, 8), schedule=TIMES, progress=False)
    for batch in (1, 2, 3, 4):
        for plane in PLANES:
            inputs = given(batch, 3 + batch, *plane)
            with torch.no_grad():
                expected = net(**inputs, return_dict=False)[0]
            assert off(model(**inputs, return_dict=False)[0], expected) < 1e-5, (batch, plane)


@pytest.mark.parametrize("find", [first_layers, last_layers])
@pytest.mark.parametrize("kind", [UNet, Tokens])
def test_open_sizes_lead_no_layer_to_the_ends(kind, find):
    ends = []
    for options in ({"dynamic": OPEN[kind]}, {}):
        program = capture(build(kind), values(kind), timesteps=TIMES, **options)
        program = run_passes(program, (Canonicalize(),))
        ends.append({module_path(node) for node in find(program.part("full"), program)})
    assert ends[0] == ends[1] and ends[0]


def test_ids_share_the_symbols_of_what_they_number():
    program = capture(build(Tokens), values(Tokens), dynamic=OPEN[Tokens], timesteps=TIMES)
    shapes = {item.name: item.shape for item in program.inputs}
    assert shapes["img_ids"] == ("tokens", 2) and shapes["txt_ids"] == ("length", 2)
    assert shapes["hidden_states"] == ("batch", "tokens", 8)
    given = values(Tokens, tokens=20)
    given["img_ids"] = given["img_ids"][:10]
    with pytest.raises(InputError, match="img_ids: tokens is 10 here, but 20 in hidden_states"):
        session(program)(**given)


def test_tokens_as_many_as_the_prompt_s_are_refused_as_an_example():
    with pytest.raises(InputError, match="'tokens' and 'length' are both 16"):
        capture(build(Tokens), values(Tokens, length=16), dynamic=OPEN[Tokens])


def test_a_native_size_is_captured_by_an_example_of_another():
    with pytest.raises(CaptureError, match="the network takes this path only for 8"):
        capture(build(DiT), values(DiT), dynamic=OPEN[DiT])
    model = compiled(DiT)
    assert model.session.spec.bounds["height"] == (4, 32)
    assert off(model(**values(DiT)), build(DiT)(**values(DiT))) < 1e-5


@pytest.mark.parametrize("passes", [
    (Hoist(), Quantize("w8a8", activations="dynamic")), (Hoist(), Quantize("w4a16")),
    (Hoist(), Cache(interval=2), Quantize("w8a8")),
], ids=["w8a8-dynamic", "w4a16", "w8a8-cache"])  # fmt: skip
def test_presets_at_other_sizes_are_reference_s_in_onnx(passes):
    model, other = (compiled(UNet, *passes, backend=name) for name in ("onnx", "reference"))
    for sizes in ({"height": 12, "width": 8}, {"height": 4, "width": 20, "batch": 1}):
        for time in TIMES[:4]:
            given = values(UNet, **sizes, time=time)
            found, expected = model(**given), other(**given)
            assert sqnr_db(expected.numpy(), found.numpy()) > 30


def test_a_multiple_is_named():
    with pytest.raises(InputError, match="height must be 4 to 32 in steps of 2, got 9"):
        session(capture(build(UNet), values(UNet), dynamic=PLANE))(**values(UNet, height=9))
    with pytest.raises(CaptureError, match=r"'height'.*multiples of 2"):
        capture(build(UNet), values(UNet), dynamic={"height": (5, 31)})


def test_dynamic_leaves_the_example_as_it_was():
    given = values(DiT)
    before = {name: value.clone() for name, value in given.items()}
    effuse.compile(build(DiT), effuse.Config(passes=(), backend="reference", dynamic=OPEN[DiT]),
                   inputs=given, schedule=TIMES, progress=False)  # fmt: skip
    assert all(torch.equal(given[name], before[name]) for name in before)
