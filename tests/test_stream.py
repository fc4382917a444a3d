"""Streamed builds: weights stay in files, and the result is that of a build in memory."""

from __future__ import annotations

import errno
import io
import json
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import effuse
from effuse.errors import ConfigError, PassError
from effuse.passes import Hoist, LowRank, Quantize, Smooth
from effuse.weights import FILE, FileWeights, copied, only, open_folder, peek

TIMES = [float(time) for time in range(900, 0, -300)]
NO_BOUND = -99.0


def network():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=64,
        attention_head_dim=8,
    ).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("network")
    network().save_pretrained(place)
    return place


def config(**options):
    passes = (
        Hoist(),
        LowRank(rank=4, format="w4a16", inputs=False, rounds=2),
        Quantize("w4a16", min_sqnr_db=NO_BOUND),
    )
    return effuse.Config(**{"passes": passes, "backend": "reference", **options})


def call(compiled):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, 64, generator=generator)
    return compiled(latent, TIMES[1], text).sample


# ---- the store -----------------------------------------------------------------------------------


names = st.sampled_from("abcd")
sizes = st.sampled_from((0, 3, 40_000))
dtypes = st.sampled_from((torch.float32, torch.int8, torch.bool, torch.bfloat16))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(names, sizes, dtypes), max_size=6))
def test_a_store_of_files_reads_as_a_dict_does(writes):
    store, plain = FileWeights({}), {}
    for number, (name, size, dtype) in enumerate(writes):
        value = (torch.arange(2 * size).reshape(2, size) % (number + 2)).to(dtype)
        store[name] = plain[name] = value
    assert set(store) == set(plain)
    for name, value in plain.items():
        assert torch.equal(store[name], value) and store[name].dtype == value.dtype
        assert store.peek(name).shape == value.shape and store.peek(name).dtype == value.dtype


def test_copies_change_apart():
    store = FileWeights({})
    store["a"] = torch.ones(70_000)
    other = copied(store)
    other["a"], other["b"] = torch.zeros(70_000), torch.ones(3)
    assert store["a"].sum() == 70_000 and "b" not in store
    assert set(only(other, {"b"})) == {"b"} and set(other) == {"a", "b"}


def test_what_is_read_is_a_tensor_of_its_own(folder):
    store = open_folder(folder, torch.float32)
    name = "conv_in.weight"
    store[name].zero_()
    assert store[name].abs().sum() > 0


def test_only_shapes_are_read_where_only_shapes_are_asked_for(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    store = open_folder(copy, torch.float32)
    (copy / FILE).unlink()
    assert peek(store, "conv_in.weight").shape == (64, 4, 3, 3)
    with pytest.raises(FileNotFoundError):
        store["conv_in.weight"]


def test_a_checkpoint_in_shards_is_one_store(folder, tmp_path):
    tensors = load_file(folder / FILE)
    half = len(tensors) // 2
    shards = {"one.safetensors": list(tensors)[:half], "two.safetensors": list(tensors)[half:]}
    for name, held in shards.items():
        save_file({each: tensors[each] for each in held}, tmp_path / name)
    table = {each: name for name, held in shards.items() for each in held}
    (tmp_path / f"{FILE}.index.json").write_text(json.dumps({"weight_map": table}))
    found = open_folder(tmp_path, torch.float32)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


def test_a_full_disk_is_told_with_the_way_out():
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    store = FileWeights({}, Full())
    with pytest.raises(ConfigError, match=r"No space left on device.*TMPDIR"):
        store["a"] = torch.ones(70_000)
    assert "a" not in store


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / f"{FILE}.index.json").write_text(text)
    with pytest.raises(ConfigError, match="no index of weights"):
        open_folder(tmp_path, torch.float32)


# ---- the build -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "onnx"])
def test_a_streamed_build_computes_what_one_in_memory_does(folder, backend):
    settled = config(backend=backend)
    streamed = effuse.compile(folder, config(backend=backend, stream=True), schedule=TIMES)
    whole = effuse.compile(folder, settled, schedule=TIMES)
    assert torch.equal(call(streamed), call(whole))
    rewrites = [each.manifest["passes"] for each in (streamed, whole)]
    assert [each["rewrites"] for each in rewrites[0]] == [each["rewrites"] for each in rewrites[1]]


def test_a_checkpoint_in_bfloat16_is_read_as_float32(folder, tmp_path):
    network().bfloat16().save_pretrained(tmp_path)
    passes = (Hoist(),)
    streamed = effuse.compile(tmp_path, config(passes=passes, stream=True), schedule=TIMES)
    whole = effuse.compile(tmp_path, config(passes=passes), schedule=TIMES)
    assert torch.equal(call(streamed), call(whole))


def test_a_streamed_build_is_opened_when_it_is_used(folder, tmp_path):
    compiled = effuse.compile(folder, config(stream=True), schedule=TIMES)
    assert compiled._session is None and compiled.manifest["parity"]["sqnr_db"] is None
    loaded = effuse.load(compiled.save(tmp_path / "unet.effuse"))
    assert compiled._session is None
    assert torch.equal(call(loaded), call(compiled))


def test_an_interrupted_build_goes_on(folder, tmp_path, monkeypatch):
    def build(**changes):
        branch = LowRank(rank=4, format="w4a16", inputs=False, resume=str(tmp_path), **changes)
        passes = (Hoist(), branch, Quantize("w4a16", min_sqnr_db=NO_BOUND))
        return effuse.compile(folder, config(passes=passes, stream=True), schedule=TIMES)

    first = build()
    kept = sorted(tmp_path.iterdir())
    kept[0].write_bytes(b"half a fi")  # as after a crash of the machine
    counted = []
    from effuse.passes import low_rank

    real = low_rank.decompose
    monkeypatch.setattr(low_rank, "decompose", lambda *a, **k: counted.append(1) or real(*a, **k))
    again = build()
    assert len(counted) == 1 and torch.equal(call(first), call(again))
    build(rounds=1)  # decides the result: nothing that was kept fits
    assert len(counted) == 1 + len(kept)


# ---- bad input -----------------------------------------------------------------------------------


def test_a_network_in_memory_cannot_be_streamed():
    with pytest.raises(ConfigError, match=r"stream: expected a folder .* came UNet2DCondition"):
        effuse.compile(network(), config(stream=True), schedule=TIMES)


def damaged(folder, place, change):
    tensors = load_file(folder / FILE)
    change(tensors)
    shutil.copy(folder / "config.json", place)
    save_file(tensors, place / FILE)
    return place


def spoil(tensors):
    tensors["conv_in.weight"] = tensors["conv_in.weight"].clone()
    tensors["conv_in.weight"][3] = torch.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("conv_in.bias"), r"1 of the network's \d+ weights.*'conv_in.bias'"),
        (lambda t: t.update({"conv_in.bias": torch.zeros(3)}), r"'conv_in.bias' is \(3,\) in the"),
        (spoil, "'conv_in.weight' holds NaN"),
    ],
)
def test_files_that_are_not_the_networks_are_refused(folder, tmp_path, change, message):
    place = damaged(folder, tmp_path, change)
    with pytest.raises(ConfigError, match=message):
        effuse.compile(place, config(stream=True), schedule=TIMES)


def test_a_missing_or_damaged_file_is_named(folder, tmp_path):
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        effuse.compile(tmp_path, config(stream=True), schedule=TIMES)
    (tmp_path / FILE).write_bytes((folder / FILE).read_bytes()[:1000])
    with pytest.raises(ConfigError, match="safetensors"):
        effuse.compile(tmp_path, config(stream=True), schedule=TIMES)


@pytest.mark.parametrize(
    ("each", "message"),
    [
        (Quantize("w8a8"), "calibrated ranges"),
        (Quantize("w4a16", rounding="gptq"), "rounding needs calibration"),
        (LowRank(format="w4a16"), "inputs=False"),
        (Smooth(format="w8a8"), "calibration"),
    ],
)
def test_passes_that_calibrate_are_refused(folder, each, message):
    with pytest.raises(PassError, match=message):
        effuse.compile(folder, config(passes=(Hoist(), each), stream=True), schedule=TIMES)
