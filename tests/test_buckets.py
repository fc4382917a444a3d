"""Buckets: one symbolic program, a static one for each size, and the Session that picks."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from dynamic_networks import Clip, DiT, Tokens, UNet, Video, build, values
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

import effuse
from effuse import export_ort
from effuse.buckets import bounds_of, completed, distance, label_of
from effuse.capture import capture
from effuse.cli_app import app
from effuse.errors import BackendError, CaptureError, ConfigError, InputError
from effuse.metrics import sqnr_db
from effuse.passes import Cache, Guidance, Hoist, Lora, Quantize
from effuse.specialise import resized, specialise

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
SMALL, TALL = {"height": 8, "width": 8}, {"batch": 1, "height": 12, "width": 8}
BUILT = [{"batch": 2, **SMALL}, TALL]


def compiled(kind, *passes, shapes=(SMALL, TALL), backend="reference", **options):
    config = effuse.Config(passes=passes, backend=backend, shapes=shapes, **options)
    return effuse.compile(build(kind), config, inputs=values(kind), schedule=TIMES, progress=False)


def off(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.fixture(scope="module")
def unet():
    """Cached, quantized and with slots for LoRAs, in ONNX."""
    return compiled(UNet, Hoist(), Cache(interval=2), Lora(max_rank=4), backend="onnx")


# ---- the same numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shapes"), [
    (UNet, [SMALL, TALL, {"height": 6, "width": 10, "length": 3}]), (DiT, [SMALL, TALL]),
    (Tokens, [{"tokens": 16}, {"batch": 1, "tokens": 24, "length": 5}]),
    (Video, [{"frames": 1}, {"frames": 5, "height": 4}]),
    (Clip, [{"frames": 1}, {"frames": 5, "height": 4}]),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_every_bucket_is_eager_s(kind, shapes):
    model, net = compiled(kind, Hoist(), shapes=shapes), build(kind)
    for sizes in model.session.spec.shapes:
        for time in (900.0, 100.0):
            inputs = values(kind, **sizes, time=time, seed=1)
            assert off(model(**inputs), net(**inputs)) < 1e-5


def test_static_graphs_hold_no_size_and_types_are_derived():
    program = capture(build(UNet), values(UNet), dynamic={"batch": (1, 4), "height": (4, 32)})
    static = specialise(program, {"batch": 3, "height": 12})
    shapes = {item.name: item.shape for item in static.inputs}
    assert shapes["sample"] == (3, 4, 12, 8) and not static.symbolic
    for node in static.parts[0].graph.nodes:
        assert "sym_size" not in str(node.target)
        shape = getattr(node.meta.get("val"), "shape", ())
        assert all(isinstance(size, int) for size in shape)
    assert program.symbolic  # as it was


def test_int8_buckets_are_the_open_program_s_over_one_store_of_weights():
    bounds = {"batch": (1, 2), "height": (8, 12)}
    passes = (Hoist(), Quantize("w8a8"))
    both = compiled(UNet, *passes, backend="onnx")
    symbolic = compiled(UNet, *passes, backend="onnx", shapes=(), dynamic=bounds)
    stored = [(each.folder / "weights.safetensors").stat().st_size for each in (both, symbolic)]
    assert stored[0] == stored[1]
    for sizes in BUILT:
        inputs = values(UNet, **sizes)
        found, expected = both(**inputs), symbolic(**inputs)
        assert sqnr_db(expected.numpy(), found.numpy()) > 30
        assert off(found, build(UNet)(**inputs)) < 0.1


# ---- the Session picks ---------------------------------------------------------------------------


def test_a_size_that_was_not_built_is_refused_with_those_that_were(unet):
    with pytest.raises(InputError) as error:
        unet(**values(UNet, batch=1, height=14))
    assert str(error.value) == (
        "the size batch=1 height=14 width=8 was not built; built are: batch=2 height=8 width=8; "
        "batch=1 height=12 width=8 (nearest: batch=1 height=12 width=8); compile again with it "
        "among shapes=[…]"
    )
    with pytest.raises(InputError, match="batch is 2 here, but 3 in sample"):
        unet(**{**values(UNet, batch=3), "encoder_hidden_states": torch.zeros(2, 6, 32)})
    with pytest.raises(InputError, match=r"expected shape \(batch, 4, height, 8\), got \(8,\)"):
        unet(**{**values(UNet), "sample": torch.zeros(8)})
    with pytest.raises(InputError, match=r"encoder_hidden_states: expected shape"):
        unet(**values(UNet, length=5))


def test_the_report_has_a_row_for_each_size(unet, tmp_path):
    page = unet.report.to_html(tmp_path / "report.html").read_text()
    assert "<h3>Sizes</h3>" in page and all(label_of(sizes) in page for sizes in BUILT)


def test_sessions_open_when_needed_and_keep_a_cache_of_their_own(unet):
    unet.session.reset()
    unet.session.steps.clear()
    latents = {label_of(sizes): values(UNet, **sizes) for sizes in BUILT}
    for time in TIMES:  # two pictures of two sizes in turns
        for each in latents.values():
            unet(**{**each, "timestep": torch.tensor(time)})
    planned = [line.split(":")[1].split()[0] for line in unet.plan.splitlines()]
    assert "reuse" in planned
    assert unet.session.steps == {name: 2 * planned.count(name) for name in set(planned)}


def test_saved_and_loaded_it_serves_the_same_sizes(unet, tmp_path):
    loaded = effuse.load(unet.save(tmp_path / "unet.zip"))
    assert loaded.plan == unet.plan and loaded.size == unet.size
    assert list(loaded.session.spec.shapes) == BUILT
    for sizes in BUILT:
        inputs = {name: value.numpy() for name, value in values(UNet, **sizes).items()}
        loaded.session.reset()
        unet.session.reset()
        assert np.array_equal(loaded(**inputs), unet(**inputs))
    names = {path.name for path in loaded.folder.iterdir()}
    assert {"full.batch1-height12-width8.onnx", "full.batch2-height8-width8.onnx"} <= names
    rows = json.loads((loaded.folder / "manifest.json").read_text())["buckets"]
    assert [row["sizes"] for row in rows] == BUILT
    assert all(row["parity"]["sqnr_db"] > 90 and row["flops"]["full"] > 0 for row in rows)


def test_exported_to_ort_format_it_serves_the_same_sizes(unet, tmp_path):
    written = export_ort.export(unet.save(tmp_path / "unet.effuse"), tmp_path / "small.effuse")
    assert {f"full.{label_of(sizes)}.ort" for sizes in BUILT} <= written.files.keys()
    loaded = effuse.load(written.path)
    for sizes in BUILT:
        inputs = values(UNet, **sizes)
        loaded.session.reset()
        unet.session.reset()
        assert off(loaded(**inputs), unet(**inputs)) < 1e-5


def test_a_streamed_build_has_the_sizes_of_one_in_memory(tmp_path):
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("AttnUpBlock2D",), mid_block_type=None,
        norm_num_groups=4, attention_head_dim=4,
    )  # fmt: skip
    net.save_pretrained(tmp_path)
    config = effuse.Config(
        passes=(Hoist(),), backend="reference", shapes=[SMALL, TALL], stream=True
    )
    model = effuse.compile(tmp_path, config, schedule=TIMES, progress=False)
    for sizes in BUILT:
        sample = torch.randn(sizes["batch"], 3, sizes["height"], sizes["width"])
        with torch.no_grad():
            expected = net.eval()(sample, 900.0).sample
        assert off(model(sample, 900.0).sample, expected) < 1e-5


def test_a_lora_is_loaded_at_every_size(unet, tmp_path):
    path = tmp_path / "style.safetensors"
    factors = {"lora_A": torch.randn(2, 16), "lora_B": torch.randn(16, 2)}
    save_file({f"block.self_attn.q.{n}.weight": v for n, v in factors.items()}, path)
    net = build(UNet)
    net.block.self_attn.q.weight += factors["lora_B"] @ factors["lora_A"]
    name = unet.load_lora(path)
    try:
        for sizes in BUILT:
            unet.session.reset()
            assert off(unet(**values(UNet, **sizes)), net(**values(UNet, **sizes))) < 1e-4
    finally:
        unet.unload_lora(name)
    unet.session.reset()
    assert off(unet(**values(UNet)), build(UNet)(**values(UNet))) < 1e-5


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(("shapes", "message"), [
    ([{"hieght": 8}], "no size is called 'hieght'; did you mean 'height'"),
    ([{"height": 0}], "height is 0, expected at least 1"),
    ([{}], "one names no size"),
    ([SMALL, SMALL], "height=8 width=8 is given twice"),
])  # fmt: skip
def test_sizes_that_make_no_sense_are_refused_at_once(shapes, message):
    with pytest.raises(ConfigError, match=message):
        effuse.Config(shapes=shapes)


def test_a_bucket_out_of_the_bounds_of_dynamic_is_refused():
    with pytest.raises(ConfigError, match=r"height is 64, expected 4 to 32 \(dynamic=\)"):
        effuse.Config(shapes=[{"height": 64}], dynamic={"height": (4, 32)})


@pytest.mark.parametrize(("kind", "shapes", "error", "message"), [
    (UNet, [SMALL, {"batch": 2, **SMALL}], ConfigError, "is given twice"),
    (UNet, [{"frames": 3}], ConfigError, "no input of the network has the size 'frames'; it has:"),
    (UNet, [SMALL, {"height": 9}], CaptureError, "shapes: .*multiples of 2 only, and height is 9"),
    (Tokens, [{"width": 8}, {"width": 12}], CaptureError, "shapes: the network fixes 'width'"),
])  # fmt: skip
def test_what_the_network_cannot_take_is_refused(kind, shapes, error, message):
    with pytest.raises(error, match=message):
        compiled(kind, shapes=shapes)


class Branching(torch.nn.Module):
    """Large pictures go another way, by a condition on both sizes."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample, timestep):
        x = self.conv(sample)
        return x * 2 if sample.shape[2] * sample.shape[3] > 100 else x + timestep


def test_a_size_at_which_the_network_branches_is_refused():
    inputs = {"sample": torch.randn(2, 4, 8, 8), "timestep": torch.tensor(500.0)}
    config = effuse.Config(backend="reference", shapes=[SMALL, {"height": 16, "width": 16}])
    with pytest.raises(CaptureError, match="takes another path at height=16 width=16"):
        effuse.compile(Branching().eval(), config, inputs=inputs, schedule=TIMES, progress=False)


def test_guidance_wants_an_open_batch():
    with pytest.raises(BackendError, match="Guidance leaves rows of the batch out"):
        compiled(UNet, Hoist(), Guidance(), shapes=[{"batch": 2}, {"batch": 4}],
                 dynamic={"batch": (1, 4)})  # fmt: skip


# ---- from the command line -----------------------------------------------------------------------


def test_the_command_line_lists_the_buckets():
    folder = Path(__file__).parent.parent / "examples" / "models" / "emoji-unet"
    shapes = ["--shape", "height=32,width=32", "--shape", "height=48, width=32,batch=1"]
    result = CliRunner().invoke(app, ["compile", str(folder), *shapes, "--dry-run"])
    assert result.exit_code == 0, result.output
    text = result.output
    assert "a program of its own for batch=2 height=32 width=32" in text
    assert "a program of its own for batch=1 height=48 width=32" in text


# ---- algebra -------------------------------------------------------------------------------------

SIZE = st.integers(1, 64)
SIZES = st.fixed_dictionaries({"batch": SIZE, "height": SIZE})


@given(st.lists(SIZES, min_size=1, max_size=5, unique_by=label_of), SIZES)
@settings(max_examples=50, deadline=None)
def test_completed_sizes_lie_within_their_bounds(shapes, own):
    found = completed(shapes, own)
    bounds = bounds_of((*found, own))
    assert list(found) == shapes  # they name all sizes
    for sizes in found:
        for name, size in sizes.items():
            low, high = bounds.get(name, (own[name], own[name]))
            assert low <= size <= high
    assert all(distance(sizes, other) >= 0 for sizes in found for other in found)
    assert distance(own, own) == 0


@given(st.integers(1, 5), st.integers(1, 9))
def test_resized_repeats_from_the_beginning(rows, wanted):
    tensor = torch.arange(rows * 2).reshape(rows, 2)
    found = resized(tensor, (wanted, 2))
    assert found.shape == (wanted, 2)
    assert all(torch.equal(found[i], tensor[i % rows]) for i in range(wanted))
