"""The networks of the parity benchmark: two trained ones, six tiny ones, each on a trajectory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cpu_networks import CALIBRATION_SEED, JUDGED_SEED, PROMPTS, example, seeded, tape
from torch import nn

from effuse.examples import derive_inputs
from effuse.roles import LATENT_NAMES

Step = dict[str, Any]  # inputs by forward's names
PROMPT_INPUTS = ("encoder_hidden_states", "pooled_projections")
BATCH = 2  # of the tiny networks


@dataclass(frozen=True)
class Data:
    """A network, and the inputs that it is calibrated and judged on, both in sampling order."""

    module: nn.Module
    calibration: list[Step]
    judged: list[Step]  # other noise and other prompts
    timesteps: tuple[float, ...]


# ---- trained networks ----------------------------------------------------------------------------


def trained(module: str, pipeline: str, place: str) -> Callable[[int], Data]:
    """A network of examples/, on the inputs that its own sampling gives it."""

    def data(steps: int) -> Data:
        pipe, _ = example(module, pipeline, place)
        network: nn.Module = getattr(pipe, place)
        known = __import__("emoji").names()
        taped = [
            tape(pipe, network, known[first :: len(known) // PROMPTS][:PROMPTS], seed, steps)
            for first, seed in ((0, CALIBRATION_SEED), (1, JUDGED_SEED))
        ]
        return Data(network, *taped, tuple(pipe.scheduler.timesteps.tolist()))

    return data


# ---- tiny networks -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """A network of diffusers, random, with layers wide enough for every format."""

    kind: str  # of diffusers
    config: Mapping[str, Any]
    last: float = 1000.0  # the timestep of pure noise

    def __call__(self, steps: int) -> Data:
        """The network, and two trajectories from noise to a smooth latent."""
        import diffusers

        network = seeded(lambda: getattr(diffusers, self.kind)(**self.config))()
        times = tuple(self.last * (steps - n) / steps - (self.last > 1) for n in range(steps))
        calibration, judged = (
            list(trajectory(network, times, self.last, seed))
            for seed in (CALIBRATION_SEED, JUDGED_SEED)
        )
        return Data(network, calibration, judged, times)


def trajectory(
    network: nn.Module, times: tuple[float, ...], last: float, seed: int
) -> Iterator[Step]:
    """Inputs along a straight way from noise to a latent: cos(a)·x₀ + sin(a)·ε, a = t·π/2."""
    random = torch.Generator().manual_seed(seed)
    given = derive_inputs(network, batch=BATCH, timestep=torch.tensor(times[0]), size=8)
    for name in PROMPT_INPUTS:
        if name in given:
            given[name] = torch.randn(given[name].shape, generator=random)
    name = next(each for each in given if each in LATENT_NAMES)
    clean, noise = (torch.randn(given[name].shape, generator=random) for _ in range(2))
    for time in times:
        angle = time / last * math.pi / 2
        latent = math.cos(angle) * clean + math.sin(angle) * noise
        yield {**given, name: latent, "timestep": torch.full_like(given["timestep"], time)}


HEADS = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2}
SIZES = {"in_channels": 4, "sample_size": 8, "patch_size": 2}
UNET = {
    "block_out_channels": (32, 64), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 64,
}  # fmt: skip

NETWORKS: Mapping[str, Callable[[int], Data]] = {
    "emoji-unet": trained("emoji", "EmojiPipeline", "unet"),
    "emoji-dit": trained("emoji_dit", "EmojiDitPipeline", "transformer"),
    "tiny-sd": Tiny("UNet2DConditionModel", UNET),
    "tiny-sdxl": Tiny("UNet2DConditionModel", {
        **UNET, "use_linear_projection": True, "transformer_layers_per_block": (1, 2),
        "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": 64 + 6 * 32,
    }),
    "tiny-dit": Tiny("DiTTransformer2DModel", {
        **HEADS, **SIZES, "out_channels": 8, "num_embeds_ada_norm": 10,
    }),
    "tiny-pixart": Tiny("PixArtTransformer2DModel", {
        **HEADS, **SIZES, "out_channels": 8, "cross_attention_dim": 64, "caption_channels": 64,
    }),
    "tiny-sd3": Tiny("SD3Transformer2DModel", {
        **HEADS, **SIZES, "out_channels": 4, "joint_attention_dim": 64, "pos_embed_max_size": 8,
        "caption_projection_dim": 64, "pooled_projection_dim": 64,
    }),
    "tiny-flux": Tiny("FluxTransformer2DModel", {
        **HEADS, "num_single_layers": 2, "in_channels": 16, "joint_attention_dim": 64,
        "pooled_projection_dim": 64, "axes_dims_rope": (8, 12, 12), "guidance_embeds": True,
    }, last=1.0),
}  # fmt: skip
