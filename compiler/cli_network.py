"""The verbs that start from a network, with their help; the work is loaded when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from effuse.cli_options import (
    ConfigName,
    Json,
    Model,
    Output,
    Page,
    Roles,
    SchedulerFolder,
    Steps,
    Times,
)
from effuse.cli_text import numbers, ranges, shapes, values
from effuse.cli_text import pairs as texts


def compile_(
    model: Model,
    config: ConfigName = "exact",
    output: Output = None,
    steps: Steps = None,
    scheduler: SchedulerFolder = None,
    timesteps: Times = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, onnx, openvino, tensorrt, triton or reference.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(metavar="CHIP", help="Build for it, here or not: sm_90, cpu-avx2.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch of the example inputs.")] = None,
    dynamic: Annotated[
        list[str] | None, typer.Option(metavar="NAME=LOW:HIGH", help="Leave a size open.")
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SIZE,…", help="Build for these sizes; may be given repeatedly."),
    ] = None,
    role: Roles = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Layer by layer, for networks larger than memory.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --stream, instead of OUT.part.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done.")] = False,
    report: Page = None,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")] = False,
) -> None:
    """Compile a network into an artifact.

    The artifact is a folder or zip that a device runs with numpy and onnxruntime, without torch.
    With --steps the timesteps are those of the scheduler in MODEL/scheduler, or of --scheduler;
    what depends on the timestep only is then computed at build time. With --stream weights are
    read from MODEL as they are needed; nothing calibrates then, which leaves the presets exact and
    w4a16; what is finished is kept in OUT.part, and the same command goes on after an
    interruption. With --backend triton every kernel is compiled for the GPU --target, which need
    not be here; there the artifact needs torch, and compiles nothing. With --backend tensorrt
    --target is tensorrt-10 or tensorrt-11, with -fp16 for float16; engines are built where the GPU
    is, by the artifact's build_engines.py or when it is first run.

    \b
    Examples:
      effuse compile unet/ -o unet.effuse
      effuse compile unet/ -c w8a8 --steps 50 -o unet.zip --report unet.html
      effuse compile unet/ -c w4a16 --stream --steps 30 -o unet.effuse
      effuse compile transformer/ -c w8a8 --backend triton --target sm_90 -o dit.effuse
      effuse compile unet/ -c mine.toml --dynamic batch=1:8 --dry-run
      effuse compile unet/ --shape height=64,width=64 --shape height=96,width=64 -o unet.effuse
    """
    from effuse import cli_build

    if output is None and not dry_run:
        raise typer.BadParameter("say where to write: -o OUT (or try --dry-run)")
    request = _request(model, config, steps, scheduler, timesteps, role, backend=backend,
                       shapes=shapes(shape or (), "--shape"),
                       target=target, batch=batch, dynamic=ranges(dynamic or (), "--dynamic"),
                       stream=stream, resume=resume)  # fmt: skip
    if dry_run or output is None:
        cli_build.dry_run(request, output, report)
    else:
        cli_build.compile_to(request, output, report, quiet)


def _request(
    model: str, config: str, steps: int | None, scheduler: Path | None, timesteps: str | None,
    role: list[str] | None, **rest: Any,
) -> Any:  # fmt: skip
    """What compile and bisect have in common."""
    from effuse.cli_build import Request

    if timesteps is not None and (steps is not None or scheduler is not None):
        raise typer.BadParameter("--timesteps says it all: leave out --steps and --scheduler")
    times = None if timesteps is None else numbers(timesteps, "--timesteps")
    roles = texts(role or (), "--role")
    return Request(model, config, steps, scheduler, times, roles=roles, **rest)


def inspect(
    target: Annotated[
        str, typer.Argument(metavar="TARGET", help="A folder, class, JSON file or artifact.")
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change its config.")
    ] = None,
    role: Roles = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="What could be pruned, with its cost.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show how much of a network changes how often.

    Weights and FLOPs at each rate, and the inputs with their roles; with --prune, what the pass
    prune could leave out. No weights are needed: the target is a folder from save_pretrained, a
    class of diffusers, a JSON file with a class and its settings, or a compiled artifact.

    \b
    Examples:
      effuse inspect unet/
      effuse inspect diffusers.FluxTransformer2DModel --set num_layers=2
      effuse inspect examples/configs/sdxl.json --json
      effuse inspect examples/configs/sd15.json --prune
    """
    if prune:
        from effuse.cli_prune import look
    else:
        from effuse.cli_tables import look

    look(target, values(settings or (), "--set"), texts(role or (), "--role"), as_json)


def dump(
    target: Annotated[
        str, typer.Argument(metavar="ARTIFACT|MODEL", help="An artifact, or what inspect takes.")
    ],
    part: Annotated[str | None, typer.Option(help="One part only, for instance full.")] = None,
) -> None:
    """Print the graphs as text.

    An artifact's, or those of a network as captured; one line a node, with its type and shape.

    \b
    Examples:
      effuse dump unet.effuse --part full
      effuse dump unet/ > before.txt
    """
    from effuse.cli_diff import graph_text, one_part
    from effuse.cli_tables import is_artifact

    if is_artifact(target):
        text = graph_text(target)
    else:
        from effuse.cli_build import network_text

        text = network_text(target)
    typer.echo(text if part is None else one_part(text, part), nl=False)


def bisect(
    model: Model,
    min_db: Annotated[float, typer.Option(help="The least SQNR (dB) that is good enough.")],
    config: ConfigName = "exact",
    steps: Steps = None,
    scheduler: SchedulerFolder = None,
    timesteps: Times = None,
    role: Roles = None,
) -> None:
    """Find the first rewrite that costs too much accuracy.

    It is the one that takes the output under --min-db dB (SQNR) of the original's. The passes run
    again and again with fewer rewrites allowed, and each result is compared with eager PyTorch on
    the example inputs.

    \b
    Example:
      effuse bisect unet/ -c w8a8 --steps 50 --min-db 30
    """
    from effuse.cli_bisect import hunt

    hunt(_request(model, config, steps, scheduler, timesteps, role), min_db)
