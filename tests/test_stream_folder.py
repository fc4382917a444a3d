"""Folders of weights as people have them: in shards, tied, of several dtypes, and damaged."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from diffusers import UNet2DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import nn

import effuse
from effuse.errors import ConfigError
from effuse.passes import Hoist
from effuse.stream import Hollow, add_ties, check_known, computed
from effuse.weights import FILE, FileWeights, derive, derive_parts, open_folder

TIMES = [900.0, 100.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("network")
    UNet2DModel(
        sample_size=8,
        block_out_channels=(32,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    ).save_pretrained(place, max_shard_size="150KB")
    return place


@pytest.fixture
def mine(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "network")


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def compiled(folder):
    config = effuse.Config(backend="reference", stream=True)
    return effuse.compile(folder, config, schedule=TIMES, progress=False)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- what is fine --------------------------------------------------------------------------------


def test_shards_of_several_dtypes_are_read_as_one(folder, mine):
    first = shards(mine)[0]
    save_file({name: each.bfloat16() for name, each in load_file(first).items()}, first)
    assert len(shards(mine)) > 1
    found, whole = open_folder(mine, torch.float32), open_folder(folder, torch.float32)
    assert {each.dtype for each in found.values()} == {torch.float32}
    halved = set(load_file(first))
    for name, value in whole.items():
        expected = value.bfloat16().float() if name in halved else value
        assert torch.equal(found[name], expected)
    build = compiled(mine)
    sample = torch.ones(2, 3, 8, 8)
    expected = UNet2DModel.from_pretrained(mine).eval()(sample, TIMES[0]).sample
    assert torch.allclose(build(sample, TIMES[0]).sample, expected, atol=1e-5)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight


def test_tied_weights_are_found_under_their_other_name():
    with torch.device("meta"):
        network = Tied().to("meta")  # as resolve builds it
    stored = FileWeights({"second.weight": torch.ones(3, 3)})
    add_ties(network, stored)
    assert torch.equal(stored["first.weight"], torch.ones(3, 3))
    assert "first.bias" not in stored


class Rotary(nn.Module):
    """Computes what it never stores, as rotary embeddings do."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.linear = nn.Linear(config["size"], 1)
        self.register_buffer("table", torch.arange(config["size"]) / 2.0, persistent=False)

    @classmethod
    def from_config(cls, config):
        return cls(config)


def test_what_a_network_computes_when_it_is_built_is_computed_again():
    with torch.device("meta"):
        network = Rotary({"size": 3})
    assert network.table.is_meta
    found = computed(network)
    assert set(found) == {"table"} and found["table"].tolist() == [0, 0.5, 1]


def test_a_video_network_with_rotary_tables_streams(tmp_path):
    torch.manual_seed(0)
    network = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16,
        freq_dim=16, ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path)
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 5, 16),
        "return_dict": False,
    }
    config = effuse.Config(passes=(Hoist(),), backend="reference", stream=True)
    build = effuse.compile(tmp_path, config, inputs=inputs, schedule=[500, 100], progress=False)
    with torch.no_grad():
        expected = network(**inputs)[0]
    assert torch.allclose(build(**inputs)[0], expected, atol=1e-5)


def test_a_hollow_network_takes_no_memory():
    with Hollow():
        linear = nn.Linear(10**6, 10**6)
    assert linear.weight.is_meta and linear.weight.shape == (10**6, 10**6)


# ---- what is computed when it is read ------------------------------------------------------------


def halves(weight):
    return weight[: len(weight) // 2], None, weight.sum(1)


def test_what_is_derived_is_what_is_computed_at_once():
    plain = {"a": torch.arange(24.0).reshape(4, 6)}
    files = FileWeights(plain)
    for weights in (plain, files):
        weights["t"] = derive(weights, ["a"], lambda each: each.t().contiguous(), "transposed")
        one, none, three = derive_parts(weights, ["t"], halves, "halves")
        weights["one"], weights["three"] = one, three
        assert none is None
    assert set(files) == set(plain)
    for name, value in plain.items():
        assert torch.equal(files[name], value)
        assert files.peek(name).shape == value.shape and files.peek(name).dtype == value.dtype


def test_what_is_derived_is_of_the_weights_as_they_were():
    files = FileWeights({"a": torch.ones(3)})
    files["b"] = derive(files, ["a"], torch.neg, "negated")
    files["a"] = torch.zeros(3)
    assert files["b"].tolist() == [-1, -1, -1]


def test_a_key_says_what_decides_a_tensor():
    def key(value, function=torch.neg, label="negated"):
        files = FileWeights({"a": value})
        files["b"] = derive(files, ["a"], function, label)
        return files.key("b")

    ones = torch.ones(3)
    assert key(ones) == key(ones.clone())
    others = {key(torch.zeros(3)), key(ones.double()), key(ones, torch.abs, "made positive")}
    assert len(others | {key(ones)}) == 4


def test_a_stored_tensor_has_the_key_of_its_content(folder, mine):
    name = "conv_in.weight"
    one, other = (open_folder(each, torch.float32) for each in (folder, mine))
    assert one.key(name) == other.key(name) != one.key("conv_out.weight")


# ---- what is not ---------------------------------------------------------------------------------


def test_a_missing_shard_is_named_with_what_is_there(mine):
    gone = shards(mine)[1]
    gone.unlink()
    with pytest.raises(ConfigError, match=rf"{gone.name}: no such file.*with all its shards"):
        compiled(mine)


def test_a_shard_that_is_cut_off_is_named(mine):
    cut = shards(mine)[1]
    os.truncate(cut, cut.stat().st_size - 100)
    with pytest.raises(ConfigError, match=rf"{cut.name}: damaged.*download or convert it again"):
        compiled(mine)


def test_a_file_that_shrinks_while_it_is_read_is_named(mine):
    stored = open_folder(mine, torch.float32)
    last = shards(mine)[-1]
    name = max(load_file(last), key=lambda each: stored.held(each).offset)
    os.truncate(last, 100)
    with pytest.raises(ConfigError, match=f"{last.name}: ends inside a tensor"):
        stored[name]


def test_a_shard_without_what_the_index_expects_is_named(mine):
    short = shards(mine)[0]
    tensors = load_file(short)
    name, _ = tensors.popitem()
    save_file(tensors, short)
    with pytest.raises(ConfigError, match=rf"1 of the \d+ tensors.*{name!r}; copy the folder"):
        compiled(mine)


def test_an_index_that_leaves_its_folder_is_refused(mine):
    (mine / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ConfigError, match=r"names '../x.safetensors', which is not in its folder"):
        compiled(mine)


def test_tensors_that_the_network_has_no_place_for_are_refused(mine):
    change_config(mine, layers_per_block=0, add_attention=False)
    with pytest.raises(ConfigError, match=r"tensors in its files have no place in the network"):
        compiled(mine)


def test_what_the_class_says_to_pass_over_is_passed_over(tmp_path):
    network = Tied()
    stored = FileWeights({"old.bias": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"such as 'old.bias'"):
        check_known(network, stored, tmp_path)
    network._keys_to_ignore_on_load_unexpected = [r"^old\."]
    check_known(network, stored, tmp_path)


def test_a_config_of_an_unknown_class_is_told_the_nearest(mine):
    change_config(mine, _class_name="UNet2DModle")
    with pytest.raises(ConfigError, match=r"no class 'UNet2DModle'; did you mean 'UNet2DModel'"):
        compiled(mine)


def test_a_dtype_that_nothing_reads_is_named(mine):
    first = shards(mine)[0]
    save_file({n: each.to(torch.float8_e4m3fn) for n, each in load_file(first).items()}, first)
    with pytest.raises(ConfigError, match=r"is stored as F8_E4M3; expected one of"):
        compiled(mine)
