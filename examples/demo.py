"""The main job, end to end: compile a trained text-to-image network, and see what it costs.

Compiles the text-to-emoji UNet with the presets `exact`, `w8a8` and `cache` to ONNX, saves the
artifacts, loads them back, samples the same prompts from the same noise with the original and with
each, and writes one HTML report with the pictures side by side.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from emoji import FOLDER, names
from study import CONSOLE, Study, chosen, show

from effuse.report import write_html

PRESETS = ("exact", "w8a8", "cache")


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
    study = Study.open("unet", steps, chosen(prompts), [names()[1 : prompts + 1]], guidance)
    built = {preset: study.build(out / f"{preset}.effuse", preset) for preset in PRESETS}
    models = {"original": (study.original, stored_megabytes())}
    models |= {name: (each, each.size / 1e6) for name, each in built.items()}
    evaluation = study.compare(models)
    reports = {name: each.report for name, each in built.items()}
    page = write_html(out / "report.html", reports, evaluation)
    show(evaluation)
    CONSOLE.print(f"report     {page}")


def stored_megabytes() -> float:
    """Size of the original weights on disk (MB)."""
    return (FOLDER / "diffusion_pytorch_model.safetensors").stat().st_size / 1e6


if __name__ == "__main__":
    main()
