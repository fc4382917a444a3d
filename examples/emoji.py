"""The text-to-emoji network as a diffusers pipeline: 32×32 pictures from words."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

FOLDER = Path(__file__).resolve().parent / "models" / "emoji-unet"
WORDS = 8  # tokens a prompt: <bos>, up to seven words, padding


@dataclass
class Pictures:
    """What a pipeline call returns."""

    images: list[Image.Image]


class EmojiPipeline(DiffusionPipeline):
    """Classifier-free guidance and DDIM in pixel space; prompts are looked up word by word."""

    def __init__(self, unet: Any, scheduler: DDIMScheduler, folder: Path = FOLDER) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self._table = load_file(folder / "words.safetensors")["weight"]
        words = json.loads((folder / "words.json").read_text())
        self._index = {word: number for number, word in enumerate(words)}

    @classmethod
    def open(cls, folder: Path = FOLDER) -> EmojiPipeline:
        """The trained network with its scheduler."""
        unet = UNet2DConditionModel.from_pretrained(folder).eval()
        return cls(unet, DDIMScheduler.from_pretrained(folder / "scheduler"), folder)

    def embed(self, prompt: str) -> torch.Tensor:
        """A prompt as (8, 64) embeddings; the empty prompt is the unconditional one."""
        known = [self._index[w] for w in prompt.replace("-", " ").split() if w in self._index]
        ids = [self._index["<bos>"], *known[: WORDS - 1]]
        return self._table[torch.tensor(ids + [self._index["<pad>"]] * (WORDS - len(ids)))]

    def states(self, prompts: Sequence[str]) -> torch.Tensor:
        """Embeddings of the unconditional and the conditional half, (2 · prompts, 8, 64)."""
        return torch.stack([self.embed("") for _ in prompts] + [self.embed(p) for p in prompts])

    def example_inputs(self, prompts: int) -> dict[str, Any]:
        """Example inputs for `effuse.compile` at that number of prompts."""
        noise = torch.randn(2 * prompts, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {
            "sample": noise,
            "timestep": self.scheduler.timesteps[0],
            "encoder_hidden_states": self.states(names()[:prompts]),
            "return_dict": False,
        }

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        guidance: float = 1.5,
        on_step: Callable[[int, Any, torch.Tensor], None] = lambda index, time, noise: None,
    ) -> torch.Tensor:
        """Run the scheduler's steps from seeded noise; pixels in [-1, 1], (prompts, 3, 32, 32)."""
        states = self.states(prompts)
        x = torch.randn(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for index, time in enumerate(self.scheduler.timesteps):
            both = torch.cat([x, x])
            noise = self.unet(both, time, encoder_hidden_states=states, return_dict=False)[0]
            on_step(index, time, noise)
            free, told = noise.chunk(2)
            x = self.scheduler.step(free + guidance * (told - free), time, x).prev_sample
        return x.clamp(-1, 1)

    def __call__(
        self, prompts: Sequence[str], steps: int = 50, seed: int = 0, guidance: float = 1.5
    ) -> Pictures:
        """Pictures for prompts, one each."""
        self.scheduler.set_timesteps(steps)
        pixels = ((self.latents(prompts, seed, guidance) + 1) * 127.5).byte()
        return Pictures([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels])


def names(folder: Path = FOLDER) -> list[str]:
    """The captions that the network was trained on."""
    return list(json.loads((folder / "names.json").read_text()))
