"""The class-conditional emoji transformer as a diffusers pipeline: 32×32 pictures from captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel
from PIL import Image

FOLDER = Path(__file__).resolve().parent / "models" / "emoji-dit"
NAMES = FOLDER.parent / "emoji-unet" / "names.json"  # the classes, in order


@dataclass
class Pictures:
    """What a pipeline call returns."""

    images: list[Image.Image]


class EmojiDitPipeline(DiffusionPipeline):
    """Classifier-free guidance and DDIM in pixel space; a caption or its number is a class."""

    def __init__(self, transformer: Any, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self._class = {name: number for number, name in enumerate(names())}

    @classmethod
    def open(cls, folder: Path = FOLDER) -> EmojiDitPipeline:
        """The trained network, in single precision, with its scheduler."""
        transformer = DiTTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32)
        return cls(transformer.eval(), DDIMScheduler.from_pretrained(folder / "scheduler"))

    def labels(self, prompts: Sequence[str | int]) -> torch.Tensor:
        """Classes of the unconditional and the conditional half, (2 · prompts,)."""
        told = [p if isinstance(p, int) else self._class[p] for p in prompts]
        return torch.tensor([len(self._class)] * len(told) + told)

    def example_inputs(self, prompts: int) -> dict[str, Any]:
        """Example inputs for `effuse.compile` at that number of prompts."""
        noise = torch.randn(2 * prompts, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return {
            "hidden_states": noise,
            "timestep": self.scheduler.timesteps[0].repeat(2 * prompts),
            "class_labels": self.labels(range(prompts)),
            "return_dict": False,
        }

    @torch.no_grad()
    def latents(
        self,
        prompts: Sequence[str | int],
        seed: int = 0,
        guidance: float = 1.2,
        on_step: Callable[[int, Any, torch.Tensor], None] = lambda index, time, noise: None,
    ) -> torch.Tensor:
        """Run the scheduler's steps from seeded noise; pixels in [-1, 1], (prompts, 3, 32, 32)."""
        labels = self.labels(prompts)
        x = torch.randn(len(prompts), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        for index, time in enumerate(self.scheduler.timesteps):
            both, times = torch.cat([x, x]), time.repeat(len(labels))
            noise = self.transformer(both, timestep=times, class_labels=labels, return_dict=False)[
                0
            ]
            on_step(index, time, noise)
            free, told = noise.chunk(2)
            x = self.scheduler.step(free + guidance * (told - free), time, x).prev_sample
        return x.clamp(-1, 1)

    def __call__(
        self,
        prompts: Sequence[str | int],
        steps: int = 50,
        seed: int = 0,
        guidance: float = 1.2,
    ) -> Pictures:
        """Pictures for captions or class numbers, one each."""
        self.scheduler.set_timesteps(steps)
        pixels = ((self.latents(prompts, seed, guidance) + 1) * 127.5).byte()
        return Pictures([Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels])


def names() -> list[str]:
    """The captions that the network was trained on; a class is a place in this list."""
    return list(json.loads(NAMES.read_text()))
