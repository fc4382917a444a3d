"""The example networks of the cache benchmark: sampling with them, compiling them."""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

import effuse

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
NETWORKS = {  # module, pipeline, the network's place in it
    "unet": ("emoji", "EmojiPipeline", "unet"),
    "dit": ("emoji_dit", "EmojiDitPipeline", "transformer"),
}
NOISE_SEED, CALIBRATION_SEED = 1, 1234  # pictures are never made from the noise of calibration

Sampler = Callable[[Any, Callable[..., None]], torch.Tensor]


@dataclass
class Bench:
    """A pipeline, what is sampled with it, and what has been found so far."""

    network: str
    arguments: argparse.Namespace
    folder: Path  # of artifacts; temporary
    pipe: Any = None
    original: Any = None
    noise: Any = None  # the scheduler's config
    prompts: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # that no picture is of: calibration's
    trajectories: int = 1  # that calibration samples, each of other prompts and other noise
    reference: Any = None  # the exact artifact's pictures, (n, 3, h, w)
    own: dict[str, Any] = field(default_factory=dict)  # pictures of a solver's full run
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if str(EXAMPLES) not in sys.path:
            sys.path.append(str(EXAMPLES))
        module, pipeline, _ = NETWORKS[self.network]
        self.pipe = getattr(importlib.import_module(module), pipeline).open()
        self.original, self.noise = getattr(self.pipe, self.place), self.pipe.scheduler.config
        known, count = importlib.import_module("emoji").names(), self.arguments.prompts
        self.prompts = known[:: max(1, len(known) // count)][:count]
        self.others = [name for name in known if name not in self.prompts]
        self.set_solver("ddim", self.arguments.steps)

    @property
    def place(self) -> str:
        """The attribute of the pipeline that holds the network."""
        return NETWORKS[self.network][2]

    def set_solver(self, solver: str, steps: int) -> None:
        """Give the pipeline a fresh scheduler with its timesteps set."""
        self.pipe.scheduler = scheduler(solver, self.noise)
        self.pipe.scheduler.set_timesteps(steps)

    def sampler(self, solver: str, steps: int) -> Sampler:
        """The whole loop with a model, from the noise of the evaluation."""

        def sample(model: Any, on_step: Callable[..., None]) -> torch.Tensor:
            self.set_solver(solver, steps)
            setattr(self.pipe, self.place, model)
            return self.pipe.latents(self.prompts, NOISE_SEED, on_step=on_step)

        return sample

    def calibrate(self, model: Any) -> None:
        """Sample other prompts from other noise."""
        setattr(self.pipe, self.place, model)
        for number in range(self.trajectories):
            self.set_solver("ddim", self.arguments.steps)
            self.pipe.latents(self.held_back(number), CALIBRATION_SEED + number)

    @property
    def unseen(self) -> list[str]:
        """The prompts of the first trajectory."""
        return self.held_back(0)

    def held_back(self, number: int) -> list[str]:
        """As many prompts as are pictured, none of them; other ones for each number."""
        count, start = self.arguments.prompts, number * self.arguments.prompts
        return [self.others[each % len(self.others)] for each in range(start, start + count)]

    def compile(self, name: str, passes: Any, times: Any = None) -> tuple[effuse.Compiled, float]:
        """Compile, save, load as a device does; the artifact, and the seconds of compiling."""
        self.set_solver("ddim", self.arguments.steps)
        start = time.perf_counter()
        compiled = effuse.compile(
            self.original,
            effuse.Config(passes=passes),
            inputs=self.pipe.example_inputs(self.arguments.prompts),
            schedule=self.pipe.scheduler if times is None else times,
            calibration=self.calibrate,
            progress=False,
        )
        path = compiled.save(self.folder / name)
        seconds = time.perf_counter() - start
        return effuse.load(path, threads=self.arguments.threads), seconds


def scheduler(solver: str, config: Any) -> Any:
    """The solver on the network's own noise schedule, clipping x₀ as DDIM's config does."""
    if solver == "ddim":
        return DDIMScheduler.from_config(config)
    clip = {"thresholding": bool(config.clip_sample), "sample_max_value": config.clip_sample_range}
    return DPMSolverMultistepScheduler.from_config(  # a quantile clamped to [1, 1]: plain clipping
        config, algorithm_type="dpmsolver++", solver_order=2, **clip
    )
