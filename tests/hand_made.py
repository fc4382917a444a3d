"""A pipeline of hand-written parts, and where the builders of tiny ones of diffusers lie."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import nn

import effuse

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def tiny_pipelines() -> Any:
    """The module of the builders, which lies among the benchmarks."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module("pipelines_tiny")
    finally:
        sys.path.remove(str(FOLDER))


def built(pipe: Any, call: dict[str, Any], steps: int = 4) -> Any:
    """A diffusers pipeline compiled for one prompt."""
    pipe.set_progress_bar_config(disable=True)
    return effuse.compile_pipeline(
        pipe, "exact", steps=steps, prompts=("a dog",), call=call, progress=False
    )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, ids, scale=1.0):
        return {"states": self.table(ids) * scale, "mask": None}


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.when = nn.Linear(4, 4), nn.Linear(1, 4)

    def forward(self, noisy, moment, states):
        return self.mix(noisy) + self.when(moment.reshape(-1, 1) / 1000) + states.mean(1)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.gain = 1.0

    def decode(self, latents, extra=None):
        return (self.out(latents).sigmoid(), [2 * extra["shift"]])


class Judge(nn.Module):
    """What cannot be captured: what it does depends on the picture."""

    def __init__(self):
        super().__init__()
        self.look = nn.Linear(3, 1)

    def forward(self, pixels):
        return pixels if self.look(pixels).mean() > 0 else 1 - pixels


class HandMade(DiffusionPipeline):
    _optional_components = ("spare",)

    def __init__(self, encoder, network, decoder, judge, scheduler, spare=None):
        super().__init__()
        self.register_modules(encoder=encoder, network=network, decoder=decoder, judge=judge,
                              scheduler=scheduler, spare=spare)  # fmt: skip

    @torch.no_grad()
    def __call__(self, prompt, steps=3, seed=0):
        self.scheduler.set_timesteps(steps)
        states = self.encoder(torch.tensor([[1, len(prompt) % 10]]), scale=2.0)["states"]
        x = torch.randn(1, 4, generator=torch.Generator().manual_seed(seed))
        for when in self.scheduler.timesteps:
            out = self.network(x, when.float(), states)
            x = self.scheduler.step(out, when, x).prev_sample
        pixels, _ = self.decoder.decode(x, extra={"shift": torch.zeros(1)})
        return self.judge(pixels * self.decoder.gain)


def hand_made():
    torch.manual_seed(0)
    parts = (Encoder().eval(), Denoiser().eval(), Decoder().eval(), Judge().eval())
    return HandMade(*parts, DDIMScheduler(clip_sample=False), spare=nn.Linear(2, 2).eval())
