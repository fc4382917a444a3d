"""The verb export: an artifact in another runtime's format."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from effuse.cli_options import Artifact
from effuse.cli_text import out, size_text, table

if TYPE_CHECKING:
    from effuse.export_ort import Exported

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|KB|MB|GB)?")
UNITS = {"B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9}
WASTE = 1.2  # of what the artifact takes: more is worth a word


def export(
    artifact: Artifact,
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder, or a zip if it ends in .zip.")
    ],
    format: Annotated[str, typer.Option("--format", help="ort, or pte for ExecuTorch.")] = "ort",
    size_budget: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Most bytes for the device: 20MB.")
    ] = None,
) -> None:
    """Write an artifact for a small build of a runtime.

    With --format ort each part becomes a .ort file, optimized already, and
    required_operators.config lists the operators and types for a build of ONNX Runtime with
    --include_ops_by_config that has nothing else. The result loads as any artifact. The format
    embeds weights, so that parts no longer share them on disk; the sizes are printed. With --format
    pte an artifact of --backend reference, in float, becomes .pte files for ExecuTorch and XNNPACK.

    \b
    Examples:
      effuse export unet.effuse unet-ort.effuse
      effuse export unet.effuse unet-ort.zip --size-budget 20MB
    """
    if format not in ("ort", "pte"):
        raise typer.BadParameter(f"--format: expected ort or pte, got {format!r}")
    budget = read_size(size_budget)
    if format == "pte" and budget is not None:
        raise typer.BadParameter("--size-budget: of --format ort")
    if format == "ort":
        from effuse import export_ort

        show(export_ort.export(Path(artifact), output, budget))
        return
    from effuse import export_pte

    out().print(files_table(export_pte.export(Path(artifact), output)))
    out().print(f"[bold]wrote[/] {escape(str(output))}")


def read_size(text: str | None) -> int | None:
    """`20MB`, `1.5 GB` or `800000` as bytes; units are powers of ten."""
    if text is None:
        return None
    match = SIZE.fullmatch(text.strip())
    if match is None:
        raise typer.BadParameter(f"--size-budget: expected a size such as 20MB, got {text!r}")
    return round(float(match[1]) * UNITS[match[2] or "B"])


def files_table(files: Mapping[str, int]) -> Table:
    """The files with their sizes."""
    rows = table("file", "size", right=("size",))
    for name, size in files.items():
        rows.add_row(name, size_text(size))
    return rows


def show(written: Exported) -> None:
    """What was written, file by file, and what the format costs."""
    console = out()
    console.print(files_table(written.files))
    if written.duplicated > (WASTE - 1) * written.shared:
        console.print(
            f"weights that parts shared, or that were stored in few bits, take "
            f"{size_text(written.duplicated)} more in this format", style="yellow",
        )  # fmt: skip
    console.print(
        f"[bold]wrote[/] {escape(str(written.path))}: {size_text(written.total)} for the device "
        f"({size_text(written.shared)} of models and weights before)"
    )
