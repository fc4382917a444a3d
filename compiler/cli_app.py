"""The command line as a typer app: the list of its verbs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from effuse import __version__, cli_artifact, cli_export, cli_lint, cli_network
from effuse.cli_options import Verbs

VERBS: tuple[tuple[str, Callable[..., None]], ...] = (
    ("compile", cli_network.compile_),
    ("inspect", cli_network.inspect),
    ("run", cli_artifact.run),
    ("bench", cli_artifact.bench),
    ("report", cli_artifact.report),
    ("dump", cli_network.dump),
    ("diff", cli_artifact.diff),
    ("export", cli_export.export),
    ("bisect", cli_network.bisect),
    ("lint", cli_lint.lint),
    ("passes", cli_artifact.passes),
    ("presets", cli_artifact.presets),
    ("doctor", cli_artifact.doctor),
)

app = typer.Typer(
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"effuse {__version__}")
        raise typer.Exit


@app.callback()
def effuse(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Tracebacks of errors.")] = False,
) -> None:
    """Compile diffusion networks ahead of time, into artifacts that a device runs without torch.

    \b
    From a network to pictures:
      effuse inspect unet/                             what of it changes how often
      effuse compile unet/ -c w8a8 --steps 50 -o unet.effuse
      effuse bench unet.effuse                         milliseconds a step
      effuse run unet.effuse -o pictures.png
    """


for name, verb in VERBS:
    app.command(name)(verb)
