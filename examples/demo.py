"""The main job, end to end: compile a trained text-to-image network, and see what it costs.

Compiles the text-to-emoji UNet with the presets `exact`, `w8a8` and `cache` to ONNX, saves the
artifacts, loads them back, samples the same prompts from the same noise with the original and with
each, and writes one HTML report with the pictures side by side.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from emoji import FOLDER, EmojiPipeline, names
from rich.console import Console
from rich.table import Table

import effuse
from effuse.evaluate import Evaluation, evaluate
from effuse.progress import phases
from effuse.report import Report, write_html

CONSOLE = Console()
PRESETS = ("exact", "w8a8", "cache")
NOISE_SEED, CALIBRATION_SEED = 1, 1234  # pictures are never made from the noise of calibration


def main() -> None:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder to write into")
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps (default: 50)")
    parser.add_argument("--prompts", type=int, default=16, help="number of prompts (default: 16)")
    parser.add_argument("--guidance", type=float, default=1.5, help="guidance scale (default: 1.5)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    run(arguments.out, arguments.steps, arguments.prompts, arguments.guidance)


def run(out: Path, steps: int, prompts: int, guidance: float) -> None:
    """Compile, save, load, sample, compare, report."""
    pipe = EmojiPipeline.open()
    pipe.scheduler.set_timesteps(steps)
    original = pipe.unet
    reports: dict[str, Report] = {}
    models: dict[str, tuple[Any, float]] = {"original": (original, stored_megabytes())}
    for preset in PRESETS:
        path = compile_and_save(pipe, original, preset, prompts, guidance, out)
        loaded = effuse.load(path)
        reports[preset] = loaded.report
        models[preset] = (loaded, loaded.size / 1e6)
    evaluation = compare(pipe, models, chosen(prompts), guidance)
    page = write_html(out / "report.html", reports, evaluation)
    show(evaluation)
    CONSOLE.print(f"report     {page}")


def chosen(prompts: int) -> list[str]:
    """Prompts spread over everything that the network knows."""
    known = names()
    return known[:: max(1, len(known) // prompts)][:prompts]


def compile_and_save(
    pipe: EmojiPipeline, original: Any, preset: str, prompts: int, guidance: float, out: Path
) -> Path:
    """Compile one preset and write its artifact."""

    def calibrate(model: Any) -> None:
        pipe.unet = model
        pipe.latents(names()[1 : prompts + 1], CALIBRATION_SEED, guidance)

    start = time.perf_counter()
    compiled = effuse.compile(
        original,
        preset,
        inputs=pipe.example_inputs(prompts),
        schedule=pipe.scheduler,
        calibration=calibrate,
    )
    path = compiled.save(out / f"{preset}.effuse")
    seconds = time.perf_counter() - start
    CONSOLE.print(f"{preset:<10} {path}  {compiled.size / 1e6:.2f} MB, compiled in {seconds:.1f} s")
    return path


def stored_megabytes() -> float:
    """Size of the original weights on disk (MB)."""
    return (FOLDER / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6


def compare(
    pipe: EmojiPipeline, models: dict[str, tuple[Any, float]], prompts: list[str], guidance: float
) -> Evaluation:
    """Sample with every model from the same noise."""

    def sample(model: Any, on_step: Any) -> torch.Tensor:
        pipe.unet = model
        return pipe.latents(prompts, NOISE_SEED, guidance, on_step)

    with phases(True) as progress:
        return evaluate(models, sample, prompts, progress=progress)


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


if __name__ == "__main__":
    main()
