"""The networks of the field for TensorRT: their files are taken, and compute what they should."""

from __future__ import annotations

import logging

import onnx
import pytest
import torch

import effuse
from effuse.passes import Cache, Hoist, Lora, LowRank, Quantize

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = [900, 500, 100]
OPTIONS = {"min_sqnr_db": -100.0}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unet():
    from diffusers import UNet2DConditionModel

    net = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=64,
    )  # fmt: skip
    return net, {
        "sample": randn(2, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": randn(2, 5, 64, seed=1),
    }


def dit():
    from diffusers import DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    return net, {
        "hidden_states": randn(2, 4, 8, 8),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 7]),
    }


def sd3():
    from diffusers import SD3Transformer2DModel

    net = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=1,
        attention_head_dim=32, num_attention_heads=2, joint_attention_dim=64,
        caption_projection_dim=64, pooled_projection_dim=64, pos_embed_max_size=8,
    )  # fmt: skip
    return net, {
        "hidden_states": randn(2, 4, 8, 8),
        "encoder_hidden_states": randn(2, 6, 64, seed=1),
        "pooled_projections": randn(2, 64, seed=2),
        "timestep": torch.tensor([500.0, 500.0]),
    }


CASES = {  # each network once, each preset's formats once
    "unet, w8a8 with a cache": (unet, None, (Cache(interval=2), Quantize("w8a8", **OPTIONS)), 30),
    "dit, w4a8 with branches": (dit, None, (LowRank(rank=4), Quantize("w4a8", **OPTIONS)), 90),
    "dit, LoRAs in float16": (dit, "tensorrt-11-fp16", (Lora(max_rank=4),), 45),
    "sd3, fp8": (sd3, "sm_90", (Quantize("fp8", activations="static", **OPTIONS),), 30),
}


@pytest.mark.parametrize("case", CASES)
def test_a_network_is_taken_and_agrees(case, tmp_path):
    make, target, passes, least = CASES[case]
    torch.manual_seed(0)
    net, inputs = make()
    config = effuse.Config(passes=(Hoist(), *passes), backend="tensorrt", target=target)
    compiled = effuse.compile(net.eval(), config, inputs=inputs, schedule=TIMES, progress=False)
    parity, lint = compiled.manifest["parity"], compiled.manifest["lint"]
    assert parity["sqnr_db"] >= least
    assert all(counts["warning"] == 0 for counts in lint.values())
    folder = compiled.save(tmp_path / "net.effuse")
    models = sorted(folder.glob("*.onnx"))
    assert len(models) == len(compiled.manifest["program"]["parts"])
    domains = {node.domain for path in models for node in onnx.load(path).graph.node}
    assert domains == {""}
