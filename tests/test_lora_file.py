"""LoRA files: every layout gives the planted change of weights; every misfit one readable error."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from effuse.errors import InputError
from effuse.lora_file import Layer, Lora, Pair, read_lora
from effuse.lora_layouts import numbered

REAL = Path(__file__).parent.parent / "examples/models/lora-sd15/analog_svd_rank4.safetensors"

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
QUERY = f"{BLOCK}.attn1.to_q"
ATTENTION = (
    Layer(QUERY, (6, 5)),
    Layer(f"{BLOCK}.attn1.to_k", (6, 5)),
    Layer(f"{BLOCK}.attn1.to_v", (6, 5)),
    Layer(f"{BLOCK}.attn1.to_out.0", (5, 6)),
    Layer(f"{BLOCK}.attn2.to_q", (6, 5)),
    Layer(f"{BLOCK}.attn2.to_k", (6, 7)),
    Layer(f"{BLOCK}.attn2.to_v", (6, 7)),
    Layer(f"{BLOCK}.attn2.to_out.0", (5, 6)),
)
LAYERS = (
    Layer("conv_in", (4, 3, 3, 3)),
    Layer("down_blocks.0.attentions.0.proj_in", (5, 4, 1, 1)),
    *ATTENTION,
    Layer(f"{BLOCK}.ff.net.0.proj", (16, 5)),
    Layer("mid_block.resnets.1.time_emb_proj", (4, 9)),
    Layer("up_blocks.1.resnets.2.conv_shortcut", (4, 5, 1, 1)),
    Layer("up_blocks.1.upsamplers.0.conv", (4, 4, 3, 3)),
)
SPELLINGS = {  # layout, down, up, alpha
    "unet": ("peft", "unet.{path}.lora_A.weight", "unet.{path}.lora_B.weight", "unet.{path}.alpha"),
    "bare": ("peft", "{path}.lora_A.weight", "{path}.lora_B.weight", "{path}.alpha"),
    "transformer": ("peft", "transformer.{path}.lora_A.weight",
                    "transformer.{path}.lora_B.weight", "transformer.{path}.alpha"),
    "adapter": ("peft", "base_model.model.{path}.lora_A.default.weight",
                "base_model.model.{path}.lora_B.default.weight", "base_model.model.{path}.alpha"),
    "older": ("diffusers", "unet.{path}.lora.down.weight", "unet.{path}.lora.up.weight",
              "unet.{path}.alpha"),
    "kohya": ("kohya", "lora_unet_{flat}.lora_down.weight", "lora_unet_{flat}.lora_up.weight",
              "lora_unet_{flat}.alpha"),
    "kohya transformer": ("kohya", "lora_transformer_{flat}.lora_down.weight",
                          "lora_transformer_{flat}.lora_up.weight",
                          "lora_transformer_{flat}.alpha"),
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


def planted(shape: Sequence[int], rank: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Factors `up` and `down` for a layer, as eighths: exact in every stored dtype."""
    random = torch.Generator().manual_seed(seed)
    out, *reads = shape
    factors = (
        torch.randint(-32, 33, size, generator=random) for size in ((out, rank), (rank, *reads))
    )
    return tuple(factor / 8 for factor in factors)


def spelled(spelling: str, layer: Layer, rank: int = 2, seed: int = 0) -> Tensors:
    """A pair of planted factors under a layout's names."""
    up, down = planted(layer.shape, rank, seed)
    _, down_name, up_name, _ = SPELLINGS[spelling]
    words = {"path": layer.path, "flat": layer.path.replace(".", "_")}
    return {down_name.format(**words): down, up_name.format(**words): up}


def change(pair: Pair) -> np.ndarray[Any, Any]:
    """up @ down, of the weight's shape."""
    return np.tensordot(pair.up, pair.down, 1)


def wanted(layer: Layer, rank: int = 2, seed: int = 0) -> np.ndarray[Any, Any]:
    up, down = planted(layer.shape, rank, seed)
    return torch.tensordot(up, down, 1).numpy()


def load(
    tensors: Tensors, layers: Sequence[Layer] = LAYERS, metadata: dict[str, str] | None = None
) -> Lora:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        save_file(
            {name: value.clone().contiguous() for name, value in tensors.items()}, path, metadata
        )
        return read_lora(path, layers)


def fails(tensors: Tensors, *words: str, metadata: dict[str, str] | None = None) -> str:
    with pytest.raises(InputError) as caught:
        load(tensors, metadata=metadata)
    text = str(caught.value)
    assert "lora.safetensors" in text
    assert [word for word in words if word not in text] == [], text
    assert len(text.splitlines()) < 40
    return text


@settings(max_examples=60, deadline=None)
@given(
    spelling=st.sampled_from(sorted(SPELLINGS)),
    chosen=st.sets(st.sampled_from(LAYERS), min_size=1),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    rank=st.integers(1, 4),
    alpha=st.none() | st.sampled_from([0.5, 1.0, 3.0, 8.0]),
)
def test_named_layouts_give_the_planted_change(
    spelling: str, chosen: set[Layer], dtype: torch.dtype, rank: int, alpha: float | None
) -> None:
    layout, *_, alpha_name = SPELLINGS[spelling]
    tensors: Tensors = {}
    for layer in chosen:
        tensors |= {k: v.to(dtype) for k, v in spelled(spelling, layer, rank).items()}
        if alpha is not None:
            words = {"path": layer.path, "flat": layer.path.replace(".", "_")}
            tensors[alpha_name.format(**words)] = torch.tensor(alpha, dtype=dtype)
    lora = load(tensors)
    assert lora.layout == layout and lora.left_out == ()
    assert list(lora.pairs) == [layer.path for layer in LAYERS if layer in chosen]
    scale = 1.0 if alpha is None else alpha / rank
    for layer in chosen:
        pair = lora.pairs[layer.path]
        assert pair.rank == rank and pair.up.shape == (layer.shape[0], rank)
        assert pair.down.shape == (rank, *layer.shape[1:])
        for array in (pair.up, pair.down):
            assert array.dtype == np.float32 and array.flags.c_contiguous and array.flags.writeable
        np.testing.assert_allclose(change(pair), scale * wanted(layer, rank), rtol=1e-5, atol=1e-5)


def test_processors_of_older_diffusers() -> None:
    tensors: Tensors = {}
    for seed, layer in enumerate(ATTENTION):
        head, leaf = layer.path.replace(".to_out.0", ".to_out").rsplit(".", 1)
        up, down = planted(layer.shape, seed=seed)
        tensors[f"unet.{head}.processor.{leaf}_lora.up.weight"] = up
        tensors[f"unet.{head}.processor.{leaf}_lora.down.weight"] = down
    lora = load(tensors)
    assert lora.layout == "diffusers"
    for seed, layer in enumerate(ATTENTION):
        np.testing.assert_array_equal(change(lora.pairs[layer.path]), wanted(layer, seed=seed))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_1_transformer_blocks_0_attn1_to_q", QUERY),
        ("middle_block_2_emb_layers_1", "mid_block.resnets.1.time_emb_proj"),
        ("output_blocks_5_0_skip_connection", "up_blocks.1.resnets.2.conv_shortcut"),
        ("output_blocks_5_2_conv", "up_blocks.1.upsamplers.0.conv"),
    ],
)
def test_kohya_with_the_names_of_the_original_code(name: str, path: str) -> None:
    layer = next(layer for layer in LAYERS if layer.path == path)
    up, down = planted(layer.shape)
    prefix = f"lora_unet_{name}"
    lora = load({f"{prefix}.lora_up.weight": up, f"{prefix}.lora_down.weight": down})
    np.testing.assert_array_equal(change(lora.pairs[path]), wanted(layer))


def test_linear_factors_and_kernels_of_one_are_the_same() -> None:
    kernel = next(layer for layer in LAYERS if layer.shape[2:] == (1, 1))
    for layer, stored in ((ATTENTION[0], (1, 1)), (kernel, ())):
        up, down = planted(layer.shape)
        tensors = {
            f"{layer.path}.lora_A.weight": down.reshape(*down.shape[:2], *stored),
            f"{layer.path}.lora_B.weight": up.reshape(*up.shape[:2], *stored),
        }
        np.testing.assert_array_equal(change(load(tensors).pairs[layer.path]), wanted(layer))


def of_cloneofsimo(count: int, layers: Sequence[Layer]) -> Tensors:
    tensors: Tensors = {"text_encoder:0:up": torch.ones(3, 1), "<s1>": torch.ones(8)}
    for i, layer in enumerate(layers[:count]):
        up, down = planted(layer.shape, seed=i)
        tensors |= {f"unet:{i}:up": up, f"unet:{i}:down": down}
    return tensors


@pytest.mark.parametrize("classes", [("CrossAttention", "GEGLU"), ("CrossAttention",), ()])
def test_numbered_layers(classes: tuple[str, ...]) -> None:
    first, second, forward = ATTENTION[:4], ATTENTION[4:], LAYERS[-4]
    order = [*first, *([] if classes == ("CrossAttention",) else [forward]), *second]
    metadata = {"unet": json.dumps(classes), "sks": "<embed>"} if classes else {"sks": "<embed>"}
    tensors = of_cloneofsimo(9, order) | {"sks": torch.ones(8)}
    lora = load(tensors, metadata=metadata)
    assert lora.layout == "cloneofsimo"
    assert lora.left_out == ("<s1>", "sks", "text_encoder:0:up")
    assert len(lora.pairs) == len(order)
    for i, layer in enumerate(order):
        np.testing.assert_array_equal(change(lora.pairs[layer.path]), wanted(layer, seed=i))


@given(st.permutations(range(12)))
def test_numbers_do_not_depend_on_the_order_of_the_layers(order: list[int]) -> None:
    places = ("down_blocks.2", "down_blocks.10", "up_blocks.0", "mid_block")  # 2 before 10
    leaves = ("attn1.to_q", "ff.net.0.proj", "attn2.to_q")
    paths = [f"{p}.attentions.0.transformer_blocks.0.{leaf}" for p in places for leaf in leaves]
    found = numbered([Layer(paths[i], (1, 1)) for i in order])
    assert [layer.path for layer in found] == paths


def test_numbers_that_do_not_fit_say_where_they_part() -> None:
    order = [*ATTENTION[:4], *ATTENTION[4:]]  # attention alone, where the rule has a GEGLU too
    text = fails(of_cloneofsimo(8, order), "unet:4:up (6, 2)", "1 layer that the file would number",
                 "unet:8", "(16, 5)")  # fmt: skip
    assert "unet:3:up" not in text  # the first four do fit
    fails(of_cloneofsimo(1, order), "ResnetBlock2D", metadata={"unet": '["ResnetBlock2D"]'})


def test_alpha_from_the_configuration_of_adapters(tmp_path: Path) -> None:
    first, second = ATTENTION[0], ATTENTION[5]
    tensors = spelled("unet", first) | spelled("unet", second)
    config = {"r": 2, "lora_alpha": 6, "alpha_pattern": {"attn2.to_k": 1}}
    foreign = {"text_encoder.lora_alpha": 9}
    text = json.dumps({f"unet.{key}": value for key, value in config.items()} | foreign)
    lora = load(tensors, metadata={"lora_adapter_metadata": text})
    np.testing.assert_allclose(change(lora.pairs[first.path]), 3 * wanted(first), rtol=1e-6)
    np.testing.assert_allclose(change(lora.pairs[second.path]), 0.5 * wanted(second), rtol=1e-6)
    save_file(spelled("adapter", first), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_rslora": True}))
    pair = read_lora(tmp_path / "adapter_model.safetensors", LAYERS).pairs[first.path]
    np.testing.assert_allclose(change(pair), 6 / np.sqrt(2) * wanted(first), rtol=1e-6)
    for bad in ('{"lora_alpha": "6"}', '{"alpha_pattern": {"attn.*": 1}}', "[1]", "{"):
        fails(tensors, "configuration", metadata={"lora_adapter_metadata": bad})


def test_what_is_not_the_denoisers_is_left_out() -> None:
    others = ("lora_te_a.lora_up.weight", "lora_te2_a.lora_up.weight", "<s1>", "bundle_emb.a.b",
              "text_encoder.a.lora_A.weight", "text_encoder_2.a.lora_A.weight")  # fmt: skip
    left = {name: torch.ones(1) for name in others}
    lora = load(spelled("kohya", LAYERS[0]) | left)
    assert lora.left_out == tuple(sorted(others)) and list(lora.pairs) == ["conv_in"]
    fails(left, "no LoRA", "6 tensors of a text encoder")


GOOD = spelled("unet", ATTENTION[0])
DOWN, UP = GOOD
UNET = "unet.conv_in"
BAD: Mapping[str, tuple[Tensors, tuple[str, ...]]] = {
    "unknown layer": (
        spelled("unet", Layer(QUERY.replace("blocks.0.attn1", "blocks.7.attn1"), (6, 5))),
        ("1 layer that the network does not have", f"near: {QUERY}"),
    ),
    "shape": (
        spelled("unet", Layer(QUERY, (8, 5))),
        ("other shapes", f"{QUERY} (6, 5)", "(8, 2)", "(2, 5)"),
    ),
    "shape of down": (
        spelled("kohya", Layer(QUERY, (6, 9))),
        ("other shapes", f"{QUERY} (6, 5)", "(2, 9)"),
    ),
    "kernel": (
        spelled("unet", Layer("conv_in", (4, 3, 1, 1))),
        ("other shapes", "conv_in (4, 3, 3, 3)", "(2, 3, 1, 1)"),
    ),
    "up alone": ({UP: GOOD[UP]}, ("without up, or without down", UP)),
    "down alone": ({DOWN: GOOD[DOWN]}, ("without up, or without down", DOWN)),
    "ranks": (GOOD | {UP: torch.ones(6, 3)}, ("ranks differ", "(6, 3)", "(2, 5)")),
    "rank 0": ({UP: torch.ones(6, 0), DOWN: torch.ones(0, 5)}, ("ranks", "(6, 0)")),
    "vector": ({UP: torch.ones(6), DOWN: torch.ones(5)}, ("ranks", "(6,)")),
    "two entries": (GOOD | spelled("kohya", ATTENTION[0]), ("two entries", UP, "lora_unet_")),
    "two adapters": (
        GOOD | {UP.replace(".weight", ".other.weight"): GOOD[UP]},
        ("two entries", "other"),
    ),
    "nan": (GOOD | {UP: GOOD[UP] / 0}, ("NaN or infinity", QUERY, "up")),
    "infinite": (GOOD | {DOWN: GOOD[DOWN].double() * 1e300}, ("NaN or infinity", "down")),
    "alpha nan": (GOOD | {f"unet.{QUERY}.alpha": torch.tensor(torch.nan)}, ("NaN", "alpha")),
    "alpha vector": (GOOD | {f"unet.{QUERY}.alpha": torch.ones(2)}, ("not one number", "(2,)")),
    "integers": (GOOD | {UP: torch.ones(6, 2, dtype=torch.int8)}, ("dtype", "I8", "BF16")),
    "float8": (GOOD | {UP: torch.ones(6, 2).to(torch.float8_e4m3fn)}, ("dtype", "F8_E4M3")),
    "DoRA": (GOOD | {f"unet.{QUERY}.dora_scale": torch.ones(6)}, ("two factors", "DoRA")),
    "DoRA of peft": (
        GOOD | {f"unet.{QUERY}.lora_magnitude_vector": torch.ones(6)},
        ("two factors", "DoRA"),
    ),
    "LoHa": ({"lora_unet_conv_in.hada_w1_a": torch.ones(2)}, ("two factors", "LoHa")),
    "LoKr": ({"lora_unet_conv_in.lokr_w1": torch.ones(2)}, ("two factors", "LoKr")),
    "lora_mid": (
        spelled("kohya", LAYERS[0]) | {"lora_unet_conv_in.lora_mid.weight": torch.ones(2)},
        ("two factors", "lora_mid"),
    ),
    "bias": (GOOD | {f"unet.{QUERY}.lora_B.bias": torch.ones(6)}, ("two factors", "bias")),
    "a checkpoint": (
        {f"layer{i}.weight": torch.ones(2) for i in range(900)},
        ("no LoRA", "layer0.weight", "... and 892 more"),
    ),
    "empty": ({}, ("no LoRA", "expected names as")),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_what_does_not_fit_is_refused_and_listed(case: str) -> None:
    tensors, words = BAD[case]
    fails(tensors, *words)


def test_one_bad_layer_refuses_the_whole_file() -> None:
    tensors = {k: v for layer in LAYERS for k, v in spelled("unet", layer).items()}
    assert len(load(tensors).pairs) == len(LAYERS)
    fails(tensors | spelled("unet", Layer("other", (3, 3))), "nothing was loaded", "other")


def test_flat_names_that_stand_for_two_layers() -> None:
    twins = (Layer("a.b_c", (3, 3)), Layer("a_b.c", (3, 3)))
    with pytest.raises(InputError, match=r"'a_b_c' stands for 2 layers.*a\.b_c, a_b\.c"):
        load(spelled("kohya", twins[0]), twins)
    assert list(load(spelled("unet", twins[1]), twins).pairs) == ["a_b.c"]


def test_a_network_may_own_the_word_of_a_prefix() -> None:
    layers = (Layer("transformer.h", (3, 3)), Layer("g", (3, 3)))
    tensors = {k: v for layer in layers for k, v in spelled("transformer", layer).items()}
    assert list(load(tensors, layers).pairs) == ["transformer.h", "g"]
    bare = spelled("bare", layers[0])
    assert list(load(bare, layers).pairs) == ["transformer.h"]


def test_pickles_and_missing_files(tmp_path: Path) -> None:
    pickled = tmp_path / "disguised.safetensors"
    for name in ("lora.pt", "lora.bin", "lora.ckpt", pickled.name):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        with pytest.raises(InputError, match=r"pickle.*convert it"):
            read_lora(tmp_path / name, LAYERS)
    for name, words in (("none.safetensors", "No such file"), (".", "directory")):
        with pytest.raises(InputError, match=words):
            read_lora(tmp_path / name, LAYERS)


@cache
def sample() -> bytes:
    with TemporaryDirectory() as folder:
        save_file(GOOD, Path(folder) / "lora.safetensors")
        return (Path(folder) / "lora.safetensors").read_bytes()


def refused(data: bytes) -> str | None:
    """The error of reading these bytes; None where they are read."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        path.write_bytes(data)
        try:
            read_lora(path, LAYERS)
        except InputError as error:
            return str(error)
    return None


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_damaged_files_are_refused(data: st.DataObject) -> None:
    whole = sample()
    assert refused(whole) is None
    assert refused(whole[: data.draw(st.integers(0, len(whole) - 1))])  # cut short
    assert refused(whole + b"\0")
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    at, byte = data.draw(st.integers(0, header - 1)), data.draw(st.integers(0, 255))
    refused(whole[:at] + bytes([byte]) + whole[at + 1 :])  # any other exception fails


def stored(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, stop: int, shape: Sequence[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (stored([1]), "not a JSON object"),
        (stored(b"\xff\xfe{}"), "not JSON"),
        (stored(b"[" * 200_000), "not JSON"),
        (stored({"a": 3}), "lacks a dtype"),
        (stored({"a": entry(0, 8, [-2])}, bytes(8)), "lacks a dtype"),
        (stored({"a": entry(0, 8, [3])}, bytes(8)), "in 8 bytes"),
        (stored({"a": entry(8, 16, [2])}, bytes(16)), "lies at byte 8"),
        (stored({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)), "lies at byte 4"),
        (stored({"a": entry(0, 80, [20])}, bytes(8)), "take 80 bytes"),
        (stored({"a": entry(8, 0, [1], "F8")}, bytes(8)), "lies at byte"),
        (stored(b'{"a": {}, "a": {}}'), "names 'a' twice"),
        (stored({"__metadata__": 3}), "__metadata__"),
        (struct.pack("<Q", 2**60) + bytes(16), "header would take"),
        (b"", "0 bytes"),
    ],
)
def test_damage_is_named(data: bytes, word: str) -> None:
    assert word in (refused(data) or "")


def test_a_header_whose_size_reads_like_a_pickles_begin() -> None:
    name, data = "unet.conv_in.lora_A.weight", bytes(8)
    header = json.dumps({name: entry(0, 8, [2])}).encode().ljust(0x0280)  # stored as 80 02 00 …
    text = refused(stored(header, data)) or ""
    assert "pickle" not in text and name in text


@cache
def unet(kind: str) -> tuple[Layer, ...]:
    from diffusers import UNet2DConditionModel

    cross, plain = "CrossAttnDownBlock2D", "DownBlock2D"
    config: dict[str, Any] = {
        "sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
        "sdxl": {
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (plain, cross, cross),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
        },
    }[kind]
    with torch.device("meta"):
        network = UNet2DConditionModel(**config)
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return tuple(
        Layer(name, tuple(module.weight.shape))
        for name, module in network.named_modules()
        if isinstance(module, kinds)
    )


def test_a_real_file_fits_its_architecture_in_every_layer(tmp_path: Path) -> None:
    lora, tensors = read_lora(REAL, unet("sd15")), load_file(REAL)
    assert (len(lora.pairs), len(lora.left_out), lora.layout) == (144, 96, "cloneofsimo")
    inner = "transformer_blocks.0"
    for number, path in {
        0: f"down_blocks.0.attentions.0.{inner}.attn1.to_q",
        3: f"down_blocks.0.attentions.0.{inner}.attn1.to_out.0",
        4: f"down_blocks.0.attentions.0.{inner}.ff.net.0.proj",
        6: f"down_blocks.0.attentions.0.{inner}.attn2.to_k",
        9: f"down_blocks.0.attentions.1.{inner}.attn1.to_q",
        54: f"up_blocks.1.attentions.0.{inner}.attn1.to_q",
        134: f"up_blocks.3.attentions.2.{inner}.attn2.to_out.0",
        135: f"mid_block.attentions.0.{inner}.attn1.to_q",
        143: f"mid_block.attentions.0.{inner}.attn2.to_out.0",
    }.items():
        up, down = (tensors[f"unet:{number}:{role}"].float().numpy() for role in ("up", "down"))
        np.testing.assert_array_equal(lora.pairs[path].up, up)
        np.testing.assert_array_equal(lora.pairs[path].down, down)
    renamed: Tensors = {}
    for path, pair in lora.pairs.items():
        prefix = f"lora_unet_{path.replace('.', '_')}"
        renamed[f"{prefix}.lora_up.weight"] = torch.from_numpy(pair.up)
        renamed[f"{prefix}.lora_down.weight"] = torch.from_numpy(pair.down)
        renamed[f"{prefix}.alpha"] = torch.tensor(4)  # an integer, as some trainers store it
    again = load(renamed, unet("sd15"))
    assert again.layout == "kohya" and list(again.pairs) == list(lora.pairs)
    for path, pair in lora.pairs.items():
        np.testing.assert_array_equal(again.pairs[path].up, pair.up)
        np.testing.assert_array_equal(again.pairs[path].down, pair.down)
    with pytest.raises(InputError, match="that the network does not have") as caught:
        load(renamed, unet("sdxl"))
    assert len(str(caught.value).splitlines()) < 30


def test_a_real_file_for_another_architecture_is_one_readable_error() -> None:
    with pytest.raises(InputError) as caught:
        read_lora(REAL, unet("sdxl"))
    text = str(caught.value)
    assert "144 layers" in text and "unet:0:up (320, 4)" in text and "(640, 640)" in text
    assert "486 layers that the file would number" in text  # 630 in attention and feed-forward
    assert len(text.splitlines()) < 30 and len(text) < 3000


def test_a_device_needs_neither_torch_nor_safetensors() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['safetensors'] = None\n"
        "from effuse.lora_file import read_lora\n"
        "try: read_lora(sys.argv[1], ())\n"
        "except ValueError as error: print(str(error)[-30:])"
    )
    command = [sys.executable, "-P", "-c", code, str(REAL)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "more" in done.stdout
