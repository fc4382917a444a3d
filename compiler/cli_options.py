"""Arguments that several verbs take, and the group of verbs, which prints errors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from effuse.cli_text import complain
from effuse.errors import EffuseError

Artifact = Annotated[str, typer.Argument(metavar="ARTIFACT", help="A folder or zip from compile.")]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="A folder from save_pretrained.")]
ConfigName = Annotated[
    str,
    typer.Option("-c", "--config", metavar="PRESET|FILE.toml", help="What to do: see `presets`."),
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="A folder, or a zip if it ends in .zip.")
]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of the scheduler.")]
SchedulerFolder = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where scheduler_config.json is.")
]
Times = Annotated[
    str | None, typer.Option("--timesteps", metavar="LIST", help='For instance "999,899,799".')
]
Roles = Annotated[
    list[str] | None,
    typer.Option("--role", metavar="NAME=ROLE", help="latent, timestep, prompt or static."),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")]
Page = Annotated[Path | None, typer.Option("--report", metavar="FILE.html", help="Its report too.")]


class Verbs(TyperGroup):
    """Prints effuse's errors as one message, and takes --debug at any place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note --debug, and hide it from the verbs."""
        ctx.meta["effuse.debug"] = "--debug" in args
        return super().parse_args(ctx, [each for each in args if each != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        """Run the verb; 1 after an error."""
        try:
            return super().invoke(ctx)
        except EffuseError as error:
            if ctx.meta["effuse.debug"]:
                raise
            complain(error)
            raise typer.Exit(1) from None
