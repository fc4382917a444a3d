"""The verbs that start from artifacts or from nothing, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from effuse.artifact import is_pipeline
from effuse.cli_options import Artifact, Json, SchedulerFolder, Steps
from effuse.cli_text import out, scaled, sizes


def run(
    artifact: Artifact,
    output: Annotated[Path, typer.Option("-o", "--output", help="The PNG to write.")],
    steps: Steps = None,
    scheduler: SchedulerFolder = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE", help=".npz or .safetensors: arrays by input.")
    ] = None,
    uncond: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The same without a prompt, for guidance.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Over 1: with and without the prompt.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    size: Annotated[
        list[str] | None, typer.Option(metavar="NAME=NUMBER", help="A size left open.")
    ] = None,
    lora: Annotated[
        list[str] | None, typer.Option(metavar="FILE[:SCALE]", help="A LoRA to load; again.")
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="On the CPU, whatever it is built for.")
    ] = False,
    prompt: Annotated[
        list[str] | None, typer.Option(help="Of a pipeline's artifact; again for more.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=1, help="Of each prompt.")] = None,
    negative: Annotated[str | None, typer.Option(help="What to lead away from.")] = None,
) -> None:
    """Sample pictures from an artifact into one PNG.

    An artifact that was compiled with a scheduler samples by it, and needs neither torch nor
    diffusers. Otherwise, and with --scheduler or other --steps, diffusers does: a plain
    DDIMScheduler unless another is named. An artifact that was compiled for a schedule needs the
    same timesteps. Inputs that no file gives are zeros.

    \b
    Examples:
      effuse run unet.effuse -o pictures.png --scheduler unet/scheduler
      effuse run unet.effuse -o pictures.png --inputs prompts.npz --guidance 3 --seed 7
      effuse run unet.effuse -o pictures.png --lora style.safetensors:0.8
      effuse run pipeline.effuse -o picture.png --prompt "a lighthouse at dusk" --seed 7
    """
    from effuse.cli_pipeline import run_pipeline

    if run_pipeline(artifact, output, prompt or (), negative, guidance, seed, cpu, images):
        return
    from effuse.cli_sample import Sampling, sample

    sample(Sampling(artifact, output, steps, scheduler, inputs, uncond, guidance or 1.0, seed,
                    sizes(size or (), "--size"), scaled(lora or ()), cpu))  # fmt: skip


def bench(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT…", help="Folders or zips from compile.")
    ],
    repeat: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 30,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="For one operator; 0: the library's.")] = 0,
    as_json: Json = False,
) -> None:
    """Time the steps of artifacts on random inputs.

    The median, and the 10th and 90th percentile, in milliseconds. Several artifacts run in turns,
    so that a machine that gets busy does so for all of them; ratios to the first stand first.
    Programs that run once a picture are not part of a step. Of a pipeline every part is timed, and
    what a picture takes in them.

    \b
    Examples:
      effuse bench unet.effuse
      effuse bench exact.effuse w8a8.effuse --repeat 100 --threads 2
    """
    if any(map(is_pipeline, artifacts)):
        from effuse.cli_pipeline import bench as bench_artifacts
    else:
        from effuse.cli_bench import bench as bench_artifacts

    bench_artifacts(artifacts, repeat, warmup, threads, as_json)


def report(
    artifact: Artifact,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.html", help="Write HTML too.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what compiling an artifact did.

    Passes, figures, the plan by step, and what was left alone and why. Of a pipeline: what it is
    made of, and the same of each part.

    \b
    Examples:
      effuse report unet.effuse
      effuse report unet.effuse -o unet.html
      effuse report unet.effuse --json
    """
    if as_json and output is not None:
        raise typer.BadParameter("--json: prints the figures; give -o in a call of its own")
    if is_pipeline(artifact):
        from effuse.cli_pipeline import show_figures, show_report
    else:
        from effuse.cli_bench import show_report
        from effuse.cli_tables import show_figures

    if as_json:
        show_figures(artifact)
    else:
        show_report(artifact, output)


def diff(
    left: Annotated[str, typer.Argument(metavar="A", help="An artifact, or text from dump.")],
    right: Annotated[str, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Show how the graphs of two artifacts differ.

    The exit code is 1 if they do, 0 if not. Nodes are numbered by position: a line that only got
    other numbers is not a difference.

    \b
    Examples:
      effuse diff exact.effuse w8a8.effuse
      effuse diff before.txt after.txt
    """
    from effuse.cli_diff import show_difference

    if show_difference(out(), left, right):
        raise typer.Exit(1)


def passes() -> None:
    """List the passes and their options.

    What each does, whether it is exact or lossy, and its options for TOML files and Python.

    \b
    Example of a mine.toml for `effuse compile -c mine.toml`:
      backend = "onnx"
      passes = [{name = "hoist"}, {name = "quantize", min_sqnr_db = 25.0}]
    """
    from effuse.cli_tables import show_passes

    show_passes()


def presets() -> None:
    """List the presets: names for lists of passes.

    \b
    Example:
      effuse compile unet/ -c w8a8 -o unet.effuse
    """
    from effuse.cli_tables import show_presets

    show_presets()


def doctor() -> None:
    """Show what this machine and version can do.

    Libraries, processor, back ends, ops, and what is not there yet.

    \b
    Example:
      effuse doctor
    """
    from effuse.cli_tables import show_doctor

    show_doctor()
