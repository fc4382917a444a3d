"""The verbs bench and report: how fast artifacts are, and what their compilation did."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from effuse import api
from effuse.cli_sample import open_sizes, shape_of
from effuse.cli_tables import processor
from effuse.cli_text import check_place, out, size_text, table, versions, whole_file
from effuse.plan import Input, Role
from effuse.sampler import nested, one

KEPT_TIMESTEP = 500.0  # where the artifact has no schedule


def bench(targets: Sequence[str], repeat: int, warmup: int, threads: int, as_json: bool) -> None:
    """Time the steps of artifacts, turn by turn, and print a table or one JSON document."""
    loaded = [api.load(target, threads=threads) for target in targets]
    calls = [step_call(compiled) for compiled in loaded]
    seconds = measure(calls, repeat, warmup)
    first = float(np.median(seconds[0]))
    rows = []
    for target, compiled, found in zip(targets, loaded, seconds, strict=True):
        low, middle, high = (1000 * float(np.percentile(found, p)) for p in (10, 50, 90))
        rows.append({
            "artifact": target, "backend": compiled.manifest["backend"],
            "median_ms": middle, "p10_ms": low, "p90_ms": high,
            "speedup": 1000 * first / middle, "bytes": compiled.size,
        })  # fmt: skip
    data = {"machine": machine(threads), "repeat": repeat, "warmup": warmup, "artifacts": rows}
    if as_json:
        print(json.dumps(data))
    else:
        show_bench(out(), data)


def machine(threads: int) -> dict[str, Any]:
    """What was measured on."""
    return {"processor": processor()[0], "cores": os.cpu_count(),
            "threads": threads or "chosen by onnxruntime", "versions": versions()}  # fmt: skip


def step_call(compiled: Any) -> Callable[[int], Any]:
    """A function of the turn's number that runs one step on random inputs."""
    spec = compiled.session.spec
    generator = np.random.default_rng(0)
    sizes = open_sizes(spec, {}, {})
    fixed = {item.label: random_array(item, sizes, generator) for item in spec.inputs}
    when = one(spec, Role.TIMESTEP) if any(i.role is Role.TIMESTEP for i in spec.inputs) else None
    times = spec.timesteps or (KEPT_TIMESTEP,)

    def call(turn: int) -> Any:
        if when is not None:
            value = times[turn % len(times)]
            fixed[when.label] = np.full(shape_of(when, sizes), value, when.dtype)
        return compiled(**nested(spec, fixed))

    return call


def random_array(item: Input, sizes: Mapping[str, int], generator: np.random.Generator) -> Any:
    """Noise of the input's shape; zeros for indices, ones for masks."""
    shape = shape_of(item, sizes)
    if item.label.endswith("mask"):
        return np.ones(shape, item.dtype)
    if np.dtype(item.dtype).kind != "f":
        return np.zeros(shape, item.dtype)
    return generator.standard_normal(shape).astype(item.dtype)


def measure(calls: Sequence[Callable[[int], Any]], repeat: int, warmup: int) -> list[list[float]]:
    """Seconds of each call, turn by turn, so that a machine that gets busy does so for all."""
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeat):
        for place, call in enumerate(calls):
            start = time.perf_counter()
            call(turn)
            if turn >= warmup:
                seconds[place].append(time.perf_counter() - start)
    return seconds


def show_bench(console: Console, data: Mapping[str, Any]) -> None:
    """The figures as a table, ratios to the first artifact first."""
    figures = ("speed-up", "median ms", "p10", "p90", "size")
    rows = table(*figures, "back end", "artifact", right=figures)
    for row in data["artifacts"]:
        times = (f"{row[key]:.2f}" for key in ("median_ms", "p10_ms", "p90_ms"))
        size = size_text(row["bytes"])
        rows.add_row(
            f"{row['speedup']:.2f}×", *times, size, row["backend"], escape(row["artifact"])
        )
    console.print(rows)
    show_machine(console, data)


def show_machine(console: Console, data: Mapping[str, Any]) -> None:
    """How it was measured, and on what."""
    used = data["machine"]
    words = ", ".join(f"{name} {version}" for name, version in used["versions"].items())
    console.print(f"\nms a step of {data['repeat']} after {data['warmup']} to warm up, in turns")
    console.print(f"{used['processor']}, {used['cores']} cores; threads: {used['threads']}")
    console.print(words, style="dim")


def show_report(target: str, page: Path | None) -> None:
    """An artifact's report on the terminal, and as HTML where a path is given."""
    check_place(page)
    console, compiled = out(), api.load(target)
    compiled.report.summary(console)
    if page is None:
        return
    with whole_file(page) as staged:
        compiled.report.to_html(staged)
    console.print(f"[bold]wrote[/] {escape(str(page))} ({size_text(page.stat().st_size)})")
