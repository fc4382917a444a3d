"""An example network compiled in several ways, sampled from the same noise, side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from emoji import EmojiPipeline, names
from emoji_dit import EmojiDitPipeline
from rich.console import Console
from rich.table import Table

import effuse
from effuse.evaluate import Evaluation, evaluate
from effuse.progress import phases

CONSOLE = Console()
NETWORKS: dict[str, tuple[Any, str, float]] = {  # pipeline, the network's place in it, guidance
    "unet": (EmojiPipeline, "unet", 1.5),
    "dit": (EmojiDitPipeline, "transformer", 1.2),
}
NOISE_SEED, CALIBRATION_SEED = 1, 1234  # pictures are never made from the noise of calibration


def chosen(count: int) -> list[str]:
    """Prompts spread over everything that the networks know."""
    known = names()
    return known[:: max(1, len(known) // count)][:count]


@dataclass
class Study:
    """A trained pipeline, and what is sampled with it.

    Args:
        pipe: the pipeline, its timesteps set.
        place: the attribute that holds its network.
        guidance: its scale.
        prompts: of the pictures.
        rounds: prompts of calibration, as many in each round as of the pictures.
    """

    pipe: Any
    place: str
    guidance: float
    prompts: Sequence[str]
    rounds: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        self.original = getattr(self.pipe, self.place)

    @classmethod
    def open(
        cls,
        network: str,
        steps: int,
        prompts: Sequence[str],
        rounds: Sequence[Sequence[str]],
        guidance: float | None = None,
    ) -> Study:
        """One of the example networks."""
        pipeline, place, usual = NETWORKS[network]
        pipe = pipeline.open()
        pipe.scheduler.set_timesteps(steps)
        return cls(pipe, place, usual if guidance is None else guidance, prompts, rounds)

    def calibrate(self, model: Any) -> None:
        """Sample the prompts of calibration, each round from noise of its own."""
        for number, prompts in enumerate(self.rounds):
            self.latents(model, prompts, CALIBRATION_SEED + number)

    def sample(self, model: Any, on_step: Callable[[int, Any, torch.Tensor], None]) -> torch.Tensor:
        """The pictures, (prompts, 3, 32, 32), from the same noise each time."""
        return self.latents(model, self.prompts, NOISE_SEED, on_step)

    def latents(self, model: Any, prompts: Sequence[str], seed: int, *watch: Any) -> torch.Tensor:
        """The whole loop with a model."""
        setattr(self.pipe, self.place, model)
        found: torch.Tensor = self.pipe.latents(prompts, seed, self.guidance, *watch)
        return found

    def build(self, path: Path, config: Any) -> effuse.Compiled:
        """Compile, save, and load as a device does."""
        start = time.perf_counter()
        compiled = effuse.compile(
            self.original,
            config,
            inputs=self.pipe.example_inputs(len(self.prompts)),
            schedule=self.pipe.scheduler,
            calibration=self.calibrate,
        )
        saved = compiled.save(path)
        size, seconds = compiled.size / 1e6, time.perf_counter() - start
        CONSOLE.print(f"{path.stem:<10} {saved}  {size:.2f} MB, compiled in {seconds:.1f} s")
        return effuse.load(saved)

    def compare(self, models: Mapping[str, tuple[Any, float]]) -> Evaluation:
        """Sample with every model from the same noise; the first is the reference."""
        with phases(True) as progress:
            return evaluate(models, self.sample, self.prompts, progress=progress)


def show(evaluation: Evaluation) -> None:
    """The table of the figures."""
    table = Table(title="the same prompts from the same noise")
    for column in ("", "s a run", "speed-up", "MB", "PSNR, dB"):
        table.add_column(column, justify="left" if not column else "right")
    for each in (evaluation.reference, *evaluation.runs):
        psnr = "" if each is evaluation.reference else f"{each.psnr_db:.1f}"
        speed = f"{evaluation.speedup(each):.2f}×"
        table.add_row(
            each.name, f"{each.ms_per_run / 1000:.1f}", speed, f"{each.megabytes:.2f}", psnr
        )
    CONSOLE.print(table)
