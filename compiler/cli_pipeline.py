"""The verbs run, inspect, report and bench on a pipeline's artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from effuse import api, artifact
from effuse.cli_bench import machine, measure, show_machine, step_call
from effuse.cli_sample import write_grid
from effuse.cli_text import check_place, out, size_text, table, whole_file
from effuse.devices import CPU
from effuse.errors import ConfigError
from effuse.pipeline_report import facts as facts_of
from effuse.pipeline_report import figures, reports, to_html
from effuse.pipeline_report import overview_tables as tables_of
from effuse.report import plain, rich_table


def run_pipeline(
    path: str, output: Path, prompts: Sequence[str], negative: str | None,
    guidance: float | None, seed: int, cpu: bool, images: int | None = None,
) -> bool:  # fmt: skip
    """Sample pictures, and write them as one PNG; False if the artifact is no pipeline's.

    Raises:
        ConfigError: a prompt for an artifact that takes none.
        InputError: the pipeline has no run without torch, and why.
    """
    if not artifact.is_pipeline(path):
        if prompts or negative is not None or images is not None:
            raise ConfigError(
                f"--prompt: {path} is no pipeline's artifact; give its inputs as --inputs FILE, or "
                "compile the whole pipeline: effuse.compile_pipeline"
            )
        return False
    check_place(output)
    console = out()
    pipeline = api.load(path, providers=(CPU,) if cpu else ())
    start = time.perf_counter()
    found = pipeline.run(  # type: ignore[attr-defined]
        list(prompts) or "", negative, seed=seed, guidance=guidance, images=images
    )
    seconds = time.perf_counter() - start
    pictures = found.reshape(-1, *found.shape[-3:])  # of a video: every frame
    write_grid(np.moveaxis(pictures, -1, 1) * 2 - 1, output, console)
    console.print(
        f"[bold]wrote[/] {escape(str(output))} ({size_text(output.stat().st_size)}, "
        f"{len(pictures)} pictures, {seconds:.1f} s)"
    )
    return True


def look(target: str, as_json: bool) -> None:
    """Print what a pipeline is made of, as tables or as one JSON document."""
    opened = artifact.Opened(target)
    data = figures(opened.folder, opened.manifest)
    if as_json:
        print(json.dumps(data))
    else:
        show_overview(out(), data)


def show_overview(console: Console, data: dict[str, Any]) -> None:
    """A pipeline's facts and tables."""
    for line in facts_of(data):
        console.print(plain(line))
    for each in tables_of(data):
        if each.rows:
            console.print(rich_table(each))


def show_figures(target: str) -> None:
    """Print the reports on a pipeline and all its parts as one JSON document."""
    opened = artifact.Opened(target)
    parts = {name: each.data() for name, each in reports(opened.folder, opened.manifest).items()}
    print(json.dumps({"pipeline": figures(opened.folder, opened.manifest), "parts": parts}))


def show_report(target: str, page: Path | None) -> None:
    """A pipeline's report on the terminal, part by part, and as HTML where a path is given."""
    check_place(page)
    console, opened = out(), artifact.Opened(target)
    show_overview(console, figures(opened.folder, opened.manifest))
    for name, each in reports(opened.folder, opened.manifest).items():
        console.print(f"\n[bold]{escape(name)}[/]")
        each.summary(console)
    if page is None:
        return
    with whole_file(page) as staged:
        to_html(opened.folder, opened.manifest, staged)
    console.print(f"[bold]wrote[/] {escape(str(page))} ({size_text(page.stat().st_size)})")


def bench(targets: Sequence[str], repeat: int, warmup: int, threads: int, as_json: bool) -> None:
    """Time every part of pipelines, all in turns, and add up what a picture takes.

    Raises:
        ConfigError: some of the artifacts are no pipelines.
    """
    for target in targets:
        if not artifact.is_pipeline(target):
            raise ConfigError(
                f"{target}: no pipeline, and another artifact is one; time pipelines together, or "
                "networks: a pipeline's lie in its folder, by the names that `effuse inspect` shows"
            )
    loaded = [api.load(target, threads=threads) for target in targets]
    parts = [(n, *each) for n, pipeline in enumerate(loaded) for each in parts_of(pipeline)]
    seconds = measure([step_call(each[-1]) for each in parts], repeat, warmup)
    found: list[dict[str, Any]] = [
        {"artifact": target, "picture_ms": 0.0, "parts": []} for target in targets
    ]
    for (number, folder, calls, compiled), times in zip(parts, seconds, strict=True):
        middle = 1000 * float(np.median(times))
        found[number]["picture_ms"] += calls * middle
        found[number]["parts"].append({"part": folder, "calls": calls, "median_ms": middle,
                                       "bytes": compiled.size})  # fmt: skip
    data = {"machine": machine(threads), "repeat": repeat, "warmup": warmup, "artifacts": found}
    if as_json:
        print(json.dumps(data))
    else:
        show_bench(out(), data)


def parts_of(pipeline: Any) -> Iterator[tuple[str, int, api.Compiled]]:
    """The folder of every part, how often a picture calls it, and the compiled network."""
    for component in pipeline.components.values():
        for entry in component.entries:
            yield entry.described["folder"], entry.described["calls"], entry.compiled


def show_bench(console: Console, data: dict[str, Any]) -> None:
    """What a call and what a picture takes, part by part."""
    columns = ("ms a call", "calls", "ms a picture", "size")
    rows = table(*columns, "part", "artifact", right=columns)
    for each in data["artifacts"]:
        for part in each["parts"]:
            whole = f"{part['median_ms'] * part['calls']:.1f}"
            names = escape(part["part"]), escape(each["artifact"])
            rows.add_row(f"{part['median_ms']:.2f}", str(part["calls"]), whole,
                         size_text(part["bytes"]), *names)  # fmt: skip
    console.print(rows)
    first = data["artifacts"][0]["picture_ms"]
    for each in data["artifacts"]:
        whole = each["picture_ms"]
        console.print(
            f"[bold]{whole:.1f} ms[/] a picture in the parts of {escape(each['artifact'])} "
            f"({first / whole:.2f}×); what stands between them is not counted"
        )
    show_machine(console, data)
