"""The networks of the CPU benchmark, and the inputs that they are calibrated and judged on."""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TAEF2 = "EFFUSE_TAEF2"  # environment: the folder with decoder.safetensors and encoder.safetensors
STEPS, JUDGED = 20, 8  # timesteps of the schedule, one calibration input each; inputs of SQNR
PROMPTS = 4  # of the example networks; a batch is twice that
CALIBRATION_SEED, JUDGED_SEED = 1234, 1
RANDOM = "random weights: activations are unnaturally uniform, SQNR flatters every 8-bit row"

Inputs = list[dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Data:
    """What a network is run on; both lists go by forward's names."""

    calibration: Inputs
    judged: Inputs  # never seen in calibration
    timesteps: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Network:
    """How to make a network and its inputs."""

    summary: str
    make: Callable[[], nn.Module]
    data: Callable[[nn.Module], Data]
    transformer: bool = False
    notes: tuple[str, ...] = ()


class Plain(nn.Module):
    """A network with tensors in by place and one tensor out."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)
        known = inspect.signature(module.forward).parameters
        self.fixed = {"return_dict": False} if "return_dict" in known else {}

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        output = self.module(**dict(zip(self.names, tensors, strict=True)), **self.fixed)
        return output[0] if isinstance(output, tuple) else output


# ---- trained networks ----------------------------------------------------------------------------


def example(module: str, pipeline: str, place: str) -> tuple[Any, str]:
    """A pipeline of examples/, and the name of the network in it."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return getattr(__import__(module), pipeline).open(), place


def trained(*where: str) -> Network:
    """A network of examples/, on the inputs that its own sampling gives it."""

    def make() -> nn.Module:
        pipe, place = example(*where)
        network: nn.Module = getattr(pipe, place)
        return network

    def data(network: nn.Module) -> Data:
        pipe, place = example(*where)
        setattr(pipe, place, network)
        known = __import__("emoji").names()
        taped = (
            tape(pipe, network, known[first :: len(known) // PROMPTS][:PROMPTS], seed)
            for first, seed in ((0, CALIBRATION_SEED), (1, JUDGED_SEED))
        )
        calibration, judged = taped
        return Data(calibration, spread(judged), tuple(pipe.scheduler.timesteps.tolist()))

    kind = "transformer" if "dit" in where[0] else "UNet"
    summary = f"the trained {kind} of examples/{where[0]}.py, batch {2 * PROMPTS}"
    return Network(summary, make, data, kind == "transformer")


def tape(
    pipe: Any, network: nn.Module, prompts: Sequence[str], seed: int, steps: int = STEPS
) -> Inputs:
    """What a sampling run hands to the network."""
    found: Inputs = []
    signature = inspect.signature(network.forward)

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        given = signature.bind(*args, **kwargs).arguments
        found.append({k: v.clone() for k, v in given.items() if torch.is_tensor(v)})

    pipe.scheduler.set_timesteps(steps)
    hook = network.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        pipe.latents(prompts, seed)
    finally:
        hook.remove()
    return found


def spread(inputs: Inputs) -> Inputs:
    """JUDGED of the inputs, from the first to the last."""
    places = torch.linspace(0, len(inputs) - 1, min(JUDGED, len(inputs))).round().int()
    return [inputs[place] for place in places.tolist()]


# ---- random networks -----------------------------------------------------------------------------


def unet_36m() -> nn.Module:
    """A UNet of the size of those trained on CIFAR-10."""
    from diffusers import UNet2DModel

    widths = (128, 256, 256, 256)
    ends = {  # the places of attention in google/ddpm-cifar10-32
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(sample_size=32, block_out_channels=widths, layers_per_block=2, **ends)


def dit_s2() -> nn.Module:
    """DiT-S/2: 384 wide, 12 layers, 256 tokens."""
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=6, attention_head_dim=64, num_layers=12, patch_size=2, sample_size=32
    )


class Tiny(nn.Module):
    """Three convolutions and a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 3, 3, padding=1)
        self.middle = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        shift = (timestep.float() / 1000).cos()
        return self.last(F.silu(self.middle(F.silu(self.first(sample) + shift))))


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`make` under a seed, with normal values (std 0.02) in weights that begin as zeros."""

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = make()
            for parameter in network.parameters():
                if parameter.dim() > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
        return network.eval()

    return made


def noised(
    shape: tuple[int, ...], labels: int = 0, vector: bool = False, name: str = "sample",
    steps: int = STEPS,
):  # fmt: skip
    """Data for a random network: smooth random pictures, noised as far as the timestep says."""
    times = tuple(range(1000 - 1000 // steps + 1, 0, -1000 // steps))

    def inputs(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        told = torch.randint(0, labels, shape[:1], generator=generator) if labels else None
        return [one(time, told, generator) for time in times]

    def one(time: int, told: torch.Tensor | None, generator: torch.Generator) -> dict[str, Any]:
        when = torch.tensor(time)
        found = {
            name: noisy(shape, time, generator),
            "timestep": when.repeat(shape[0]) if vector else when,
        }
        return found if told is None else {**found, "class_labels": told}

    return lambda network: Data(inputs(CALIBRATION_SEED), spread(inputs(JUDGED_SEED)), times)


def noisy(shape: tuple[int, ...], time: int, generator: torch.Generator) -> torch.Tensor:
    """√ᾱ·x₀ + √(1-ᾱ)·ε with DDPM's linear betas; x₀ is smooth, of unit variance."""
    coarse = torch.randn(*shape[:2], 4, 4, generator=generator)
    picture = F.interpolate(coarse, shape[2:], mode="bicubic")
    kept = torch.linspace(1e-4, 0.02, 1000)[: time + 1].neg().log1p().sum().exp().item()
    noise = torch.randn(shape, generator=generator)
    return math.sqrt(kept) * picture / picture.std() + math.sqrt(1 - kept) * noise


# ---- TAEF2 ---------------------------------------------------------------------------------------


def taef2_folder() -> Path:
    """Where TAEF2's weights are.

    Raises:
        FileNotFoundError: nobody said, or they are not there.
    """
    folder = Path(os.environ.get(TAEF2, ""))
    missing = [n for n in ("decoder", "encoder") if not (folder / f"{n}.safetensors").is_file()]
    if TAEF2 not in os.environ or missing:
        said = f"no {missing[0]}.safetensors in {folder}" if TAEF2 in os.environ else "not told"
        raise FileNotFoundError(
            f"taef2: the folder with decoder.safetensors and encoder.safetensors: {said}; "
            f"give --taef2 FOLDER or set {TAEF2}"
        )
    return folder


def taef2() -> nn.Module:
    """TAEF2's decoder."""
    from cpu_taef2 import decoder, load

    return load(decoder(), taef2_folder() / "decoder.safetensors")


def taef2_data(network: nn.Module) -> Data:
    """Latents of emoji that the example UNet draws, enlarged to 256 pixels, one at a time."""
    from cpu_taef2 import encoder, load

    pipe, _ = example("emoji", "EmojiPipeline", "unet")
    pipe.scheduler.set_timesteps(STEPS)
    names = __import__("emoji").names()
    chosen = names[:: len(names) // (2 * JUDGED)][: 2 * JUDGED]
    pictures = F.interpolate((pipe.latents(chosen) + 1) / 2, (256, 256), mode="bicubic")
    encode = load(encoder(), taef2_folder() / "encoder.safetensors")
    with torch.no_grad():
        latents = [{"sample": encode(picture[None].clamp(0, 1))} for picture in pictures]
    return Data(latents[::2], latents[1::2])


NETWORKS = {
    "emoji-unet": trained("emoji", "EmojiPipeline", "unet"),
    "emoji-dit": trained("emoji_dit", "EmojiDitPipeline", "transformer"),
    "unet-36m": Network(
        "UNet2DModel of 36 M parameters, random, 32×32, batch 4",
        seeded(unet_36m), noised((4, 3, 32, 32)), notes=(RANDOM,),
    ),
    "unet-36m-50": Network(
        "UNet2DModel of 36 M parameters, random, 32×32, batch 4",
        seeded(unet_36m), noised((4, 3, 32, 32), steps=50), notes=(RANDOM,),
    ),
    "dit-s2": Network(
        "DiTTransformer2DModel, 384 wide, 12 layers, 256 tokens, random, batch 2",
        seeded(dit_s2), noised((2, 4, 32, 32), 1000, True, "hidden_states"), True,
        notes=(RANDOM, "weights that begin as zeros are normal, std 0.02"),
    ),
    "taef2": Network(
        "the decoder of TAEF2, real weights, 32×32 latents to 256×256 pixels, batch 1",
        taef2, taef2_data,
        notes=("latents of pictures drawn by the example UNet, enlarged",),
    ),
    "tiny": Network(
        "three convolutions, random: does everything run?",
        seeded(Tiny), noised((2, 3, 16, 16)), notes=(RANDOM,),
    ),
}  # fmt: skip
