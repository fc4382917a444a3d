"""Report: what was built, measured and left alone, as data, for the terminal and as one HTML file.

Imports no torch; rich, jinja2, matplotlib and pillow are loaded when they are needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effuse.errors import ArtifactError, require
from effuse.report_charts import layer_caption, layer_chart, plan_chart
from effuse.report_pictures import comparison_table, comparison_view, leads
from effuse.report_plan import guidance_line, plan_line, plan_picture, plan_table
from effuse.report_prune import prune_lines, prune_view, pruned_table
from effuse.report_tables import (
    details_tables,
    facts,
    headline,
    kept_table,
    layers_line,
    layers_table,
    rate_bars,
    tables,
)
from effuse.report_text import Table

if TYPE_CHECKING:
    from effuse.evaluate import Evaluation

Manifest = Mapping[str, Any]


# Columns of figures, set flush right wherever they appear.
FIGURES = {
    *("nodes", "parameters", "MB", "GFLOPs", "layers", "steps", "bytes"),
    *("score", "SQNR, dB", "SQNR of a full step, dB"),
    *("s a run", "ms a step", "speed-up", "PSNR, dB", "worst picture", "worst step"),
}


@dataclass(frozen=True)
class Overview:
    """What stands at the top of a page on several networks that make one whole."""

    title: str
    facts: Sequence[str]
    tables: Sequence[Table]


@dataclass(frozen=True)
class Report:
    """One compiled network: its manifest, how long phases took (seconds), and how it compares."""

    manifest: Manifest
    seconds: Mapping[str, float] = field(default_factory=dict)
    evaluation: Evaluation | None = None

    def data(self) -> dict[str, Any]:
        """Everything as JSON's own types, without pixels."""
        return {
            "manifest": dict(self.manifest),
            "seconds": dict(self.seconds),
            "evaluation": None if self.evaluation is None else self.evaluation.to_json(),
        }

    def summary(self, console: Any = None) -> None:
        """Print the tables on a terminal (rich's Console; None: standard output).

        Raises:
            MissingExtra: rich is not installed.
        """
        console = console or require("rich.console").Console()
        show, picture = console.print, plan_picture(self.manifest, console.width)
        guided = guidance_line(self.manifest)
        found = [*tables(self.manifest), kept_table(self.manifest), pruned_table(self.manifest)]
        show(plain(headline(self.manifest)))
        for line in facts(self.manifest, self.seconds):
            show(plain(line))
        for table in found if picture else (*found, plan_table(self.manifest)):
            if table.rows:
                show(rich_table(table))
        lines = (*prune_lines(self.manifest), plan_line(self.manifest), *picture, guided)
        for line in filter(None, lines):
            show(plain(line))
        if self.evaluation is not None:
            show(rich_table(comparison_table(self.evaluation)))
            for line in leads(self.evaluation):
                show(plain(line))

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one self-contained page, with pictures and charts, and return its path.

        Raises:
            ArtifactError: the page cannot be written there.
            MissingExtra: jinja2, matplotlib or pillow is not installed.
        """
        name = str(self.manifest.get("model", {}).get("class", "network"))
        return write_html(path, {name: self}, self.evaluation)


def write_html(
    path: str | os.PathLike[str], reports: Mapping[str, Report], evaluation: Evaluation | None,
    overview: Overview | None = None,
) -> Path:  # fmt: skip
    """One self-contained page on several compiled networks and how they compare.

    Args:
        path: where to write; an earlier file there is replaced at once, or stays as it is.
        reports: name -> report, in the order of the page.
        evaluation: pictures and figures, or None.
        overview: of what the networks make together.

    Raises:
        ArtifactError: the page cannot be written there.
        MissingExtra: jinja2, matplotlib or pillow is not installed.
    """
    goal = Path(path)
    check_folder(goal)  # before the work, not after
    write_text(goal, render(reports, evaluation, overview))
    return goal


def render(
    reports: Mapping[str, Report], evaluation: Evaluation | None, overview: Overview | None = None
) -> str:
    """The page's text."""
    first = headline(next(iter(reports.values())).manifest) if reports else "effuse report"
    jinja = require("jinja2")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=first if overview is None else overview.title,
        overview=overview,
        compared=None if evaluation is None else comparison_view(evaluation),
        sections=[section_view(name, report) for name, report in reports.items()],
        figures=FIGURES,
    )
    return str(page)


def check_folder(path: Path) -> None:
    """Refuse a path in a folder that is not there."""
    folder = path.parent
    if not folder.is_dir():
        raise ArtifactError(f"{path}: the folder {str(folder)!r} does not exist; create it first")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot write the report ({error.strerror or error}); choose another path or "
            "free some space"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def section_view(name: str, report: Report) -> dict[str, Any]:
    """What the page says of one compiled network."""
    manifest = report.manifest
    inputs, programs, sizes, passes, native, kernels, lowering = tables(manifest)
    return {
        "name": name,
        "facts": facts(manifest, report.seconds),
        "inputs": inputs,
        "programs": programs,
        "sizes": sizes,
        "bars": rate_bars(manifest),
        "passes": passes,
        "native": native,
        "kernels": kernels,
        "lowering": lowering,
        "layers_line": layers_line(manifest),
        "layer_chart": layer_chart(manifest),
        "layer_caption": layer_caption(manifest),
        "pruning": prune_view(manifest),
        "kept": kept_table(manifest),
        "layers": layers_table(manifest),
        "plan": plan_table(manifest),
        "plan_line": plan_line(manifest),
        "guidance": guidance_line(manifest),
        "plan_chart": plan_chart(manifest),
        "details": details_tables(manifest),
        "config": json.dumps(manifest.get("config", {}), indent=2),
    }


# The terminal


def plain(text: str) -> Any:
    """Text that rich does not search for markup."""
    return require("rich.text").Text(text)


def rich_table(table: Table) -> Any:
    """A table as rich prints it."""
    made = require("rich.table").Table(title=table.title, title_justify="left", show_lines=False)
    for column in table.columns:
        made.add_column(column, justify="right" if column in FIGURES else "left", overflow="fold")
    for row in table.rows:
        made.add_row(*map(plain, row))
    return made
