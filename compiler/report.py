"""Report: what was built, measured and left alone, as data, for the terminal and as one HTML file.

Imports no torch; rich, jinja2, matplotlib and pillow are loaded when they are needed.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.errors import ArtifactError, require
from effuse.metrics import CEILING_DB

if TYPE_CHECKING:
    from effuse.evaluate import Evaluation, Run

Manifest = Mapping[str, Any]
Pixels = np.ndarray[Any, Any]

AMPLIFIED = 8  # how many times brighter differences are shown
FIRST_PICTURES = 12  # the rest is folded away
WIDEST = 256  # pixels; larger pictures are shown smaller, to keep the file small
CHARTED_LAYERS = 24
RATES = ("const", "schedule", "prompt", "step")
WHEN = {"const": "never", "schedule": "per schedule", "prompt": "per prompt", "step": "every step"}

# Columns of figures, set flush right wherever they appear.
FIGURES = {
    *("nodes", "parameters", "MB", "GFLOPs", "SQNR, dB", "layers", "steps", "bytes"),
    *("ms a step", "speed-up", "PSNR, dB", "worst picture", "worst step"),
}


@dataclass(frozen=True)
class Table:
    """A table of strings; a cell may hold several lines."""

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


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
        show = (console or require("rich.console").Console()).print
        show(plain(headline(self.manifest)))
        for line in facts(self.manifest, self.seconds):
            show(plain(line))
        for table in self._tables():
            if table.rows:
                show(rich_table(table))
        if self.evaluation is not None:
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

    def _tables(self) -> list[Table]:
        found = [*tables(self.manifest), kept_table(self.manifest), plan_table(self.manifest)]
        return found if self.evaluation is None else [*found, comparison_table(self.evaluation)]


def write_html(
    path: str | os.PathLike[str], reports: Mapping[str, Report], evaluation: Evaluation | None
) -> Path:
    """One self-contained page on several compiled networks and how they compare.

    Args:
        path: where to write; an earlier file there is replaced at once, or stays as it is.
        reports: name -> report, in the order of the page.
        evaluation: pictures and figures, or None.

    Raises:
        ArtifactError: the page cannot be written there.
        MissingExtra: jinja2, matplotlib or pillow is not installed.
    """
    goal = Path(path)
    check_folder(goal)  # before the work, not after
    write_text(goal, render(reports, evaluation))
    return goal


def render(reports: Mapping[str, Report], evaluation: Evaluation | None) -> str:
    """The page's text."""
    jinja = require("jinja2")
    environment = jinja.Environment(
        loader=jinja.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        title=headline(next(iter(reports.values())).manifest) if reports else "effuse report",
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


# Figures as text


def quantity(number: float) -> str:
    """A count with three digits: `4.03 M`."""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:g}"


def megabytes(size: float) -> str:
    """Bytes in MB (10⁶ bytes)."""
    return f"{size / 1e6:.2f}"


def gigaflops(operations: float) -> str:
    """Operations in 10⁹, three digits."""
    return f"{operations / 1e9:.3g}"


def decibels(value: float | None) -> str:
    """A ratio in dB, or in words where it is no number."""
    if value is None:
        return "–"
    if abs(value) >= CEILING_DB:
        return "equal to the bit" if value > 0 else "not finite"
    return f"{value:.1f}"


def listed(items: Mapping[str, Any]) -> str:
    """`name value` in one line, without the empty ones."""
    found = {key: value for key, value in items.items() if value not in (None, [], "")}
    return ", ".join(f"{key} {value}" for key, value in found.items())


def counted(counts: Mapping[str, int]) -> str:
    """One line each, the most frequent first: `61 × identity`."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(unbroken(f"{count} × {name}") for name, count in ordered)


def without_empty(table: Table) -> Table:
    """The table without the columns that are empty in every row."""
    keep = [any(column) for column in zip(*table.rows, strict=True)]
    rows = [tuple(itertools.compress(row, keep)) for row in table.rows]
    return Table(table.title, tuple(itertools.compress(table.columns, keep)), rows)


def unbroken(text: str) -> str:
    """Text whose units stay on the line of their figures."""
    return re.sub(r"(?<=\d) (?=ms|MB|dB|×)|(?<=×) ", "\N{NO-BREAK SPACE}", text)


# A manifest as tables


def headline(manifest: Manifest) -> str:
    """The network's class."""
    return str(manifest.get("model", {}).get("class", "network"))


def facts(manifest: Manifest, seconds: Mapping[str, float]) -> list[str]:
    """What the build is, in a few lines."""
    model, parity = manifest.get("model", {}), manifest.get("parity", {})
    weights = f", {megabytes(model['weight_bytes'])} MB" if "weight_bytes" in model else ""
    target = f" for {manifest['target']}" if manifest.get("target") else ""
    lines = [
        f"{quantity(model.get('parameters', 0))} parameters, {model.get('dtype', '?')}{weights}",
        f"back end {manifest.get('backend', '?')}{target}, effuse {manifest.get('effuse', '?')}",
    ]
    if manifest.get("fallback"):
        lines.append(f"fell back from the faster back end: {manifest['fallback']}")
    if parity.get("sqnr_db") is not None:
        lines.append(f"agrees with reference to {decibels(parity['sqnr_db'])} dB on the examples")
    if seconds:
        phases = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        lines.append(f"compiled in {sum(seconds.values()):.1f} s ({phases})")
    return lines


def tables(manifest: Manifest) -> list[Table]:
    """Inputs, programs, passes, and what runs natively."""
    return [
        inputs_table(manifest),
        programs_table(manifest),
        passes_table(manifest),
        native_table(manifest),
    ]


def inputs_table(manifest: Manifest) -> Table:
    """Every input with its role."""
    rows = [
        (".".join(item["path"]), item["role"], shape_text(item["shape"]), item["dtype"])
        for item in manifest["program"].get("inputs", ())
    ]
    return Table("Inputs", ("input", "role", "shape", "dtype"), rows)


def shape_text(shape: Sequence[Any]) -> str:
    """`32 × 3 × 32 × 32`, or `scalar`."""
    return " × ".join(str(size) for size in shape) or "scalar"


def programs_table(manifest: Manifest) -> Table:
    """Every program in the order of rates."""
    parts = manifest.get("parts", {}).items()
    rows = [
        (
            name,
            WHEN.get(part["rate"], part["rate"]),
            f"{part['nodes']:,}",
            quantity(part["parameters"]),
            megabytes(part["weight_bytes"]),
            gigaflops(part["flops"]),
        )
        for name, part in sorted(parts, key=lambda item: RATES.index(item[1]["rate"]))
    ]
    return Table("Programs", ("program", "runs", "nodes", "parameters", "MB", "GFLOPs"), rows)


def passes_table(manifest: Manifest) -> Table:
    """What each pass did, and why it left things alone."""
    columns = ("pass", "options", "numbers", "did", "left alone", "SQNR, dB")
    rows = [pass_row(record) for record in manifest.get("passes", ())]
    return without_empty(Table("Passes", columns, rows))


def pass_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    """One pass; reasons of several rules carry the rule's name."""
    reasons = record.get("reasons", {})
    several = len(reasons) > 1
    why = {
        f"{rule}: {reason}" if several else reason: count
        for rule, counts in reasons.items()
        for reason, count in counts.items()
    }
    did = [counted(record.get("rewrites", {})).replace("\n", ", "), *record.get("notes", ())]
    return (
        record["name"],
        listed(record.get("options", {})),
        "exact" if record.get("exact") else "lossy",
        "\n".join(filter(None, did)) or "nothing",
        counted(why) or "–",
        decibels(record.get("sqnr_db")),
    )


def native_table(manifest: Manifest) -> Table:
    """Which ops of effuse the back end has, and which it only imitates."""
    rows = sorted(manifest.get("native", {}).items())
    return Table("Low-bit operations", ("operation", "arithmetic"), rows)


def kept_table(manifest: Manifest) -> Table:
    """The layers left in float, by reason."""
    kept: dict[str, list[Mapping[str, Any]]] = {}
    for layer in manifest.get("layers", ()):
        if layer.get("reason"):
            kept.setdefault(layer["reason"].partition(":")[0], []).append(layer)
    rows = [
        (reason, str(len(layers)), quantity(sum(layer["parameters"] for layer in layers)))
        for reason, layers in sorted(kept.items(), key=lambda item: -len(item[1]))
    ]
    return Table("Layers left in float", ("reason", "layers", "parameters"), rows)


def worst_first(manifest: Manifest) -> list[Mapping[str, Any]]:
    """The layers by SQNR; those that were not measured come last."""
    last = math.inf
    measured = (layer.get("sqnr_db") for layer in manifest.get("layers", ()))
    pairs = zip(measured, manifest.get("layers", ()), strict=True)
    ordered = sorted(pairs, key=lambda pair: last if pair[0] is None else pair[0])
    return [layer for _, layer in ordered]


def layers_table(manifest: Manifest) -> Table:
    """Every layer, worst first."""
    rows = [
        (
            layer["name"],
            layer["op"],
            layer["format"],
            quantity(layer["parameters"]),
            decibels(layer.get("sqnr_db")),
            layer.get("reason", ""),
        )
        for layer in worst_first(manifest)
    ]
    columns = ("layer", "op", "format", "parameters", "SQNR, dB", "why not")
    return without_empty(Table("All layers, worst first", columns, rows))


def layers_line(manifest: Manifest) -> str:
    """How many layers changed, and how good they are."""
    layers = manifest.get("layers", ())
    if not layers:
        return ""
    formats = Counter(layer["format"] for layer in layers)
    counts = ", ".join(f"{count} in {name}" for name, count in formats.most_common())
    ratios = [each["sqnr_db"] for each in layers if each.get("sqnr_db") is not None]
    quality = (
        f" Their own outputs keep {min(ratios):.1f} dB at worst, {statistics.median(ratios):.1f} "
        "dB in the middle (SQNR on calibration's probes, before the choice)."
        if ratios
        else ""
    )
    return f"{len(layers)} layers: {counts}.{quality}"


def plan_table(manifest: Manifest) -> Table:
    """The plan; equal steps in a row are one row."""
    program = manifest["program"]
    plan, times = program.get("plan", {}), program.get("timesteps") or ()
    default = plan.get("default", "full")
    steps = plan.get("steps") or [{"variant": default}] * len(times)
    rows, start = [], 0
    for key, group in itertools.groupby(steps, key=plan_key):
        end = start + len(list(group))
        rows.append((span(range(start, end)), span(times[start:end]), str(end - start), *key))
        start = end
    columns = ("step", "timestep", "steps", "runs", "fills", "reads")
    whole = [("every step", "any", "–", default, "", "")]
    return without_empty(Table("Plan", columns, rows or whole))


def plan_key(step: Mapping[str, Any]) -> tuple[str, str, str]:
    """What makes two steps equal."""
    fills, reads = (", ".join(step.get(key, ())) for key in ("fills", "reads"))
    return step["variant"], fills, reads


def span(values: Sequence[float]) -> str:
    """First and last: `3`, or `3 – 7`."""
    ends = [f"{values[index]:g}" for index in (0, -1)] if values else ["–"]
    return " – ".join(dict.fromkeys(ends))


def variants(manifest: Manifest) -> list[dict[str, Any]]:
    """One entry a step for the strip: its text, and its variant's number."""
    plan = manifest["program"].get("plan", {})
    steps = plan.get("steps", ())
    names = list(dict.fromkeys(step["variant"] for step in steps))
    return [
        {"text": f"step {index}: {step['variant']}", "color": names.index(step["variant"])}
        for index, step in enumerate(steps)
    ]


def rate_bars(manifest: Manifest) -> list[dict[str, Any]]:
    """Shares of the rates in parameters and in operations."""
    rates = manifest.get("rates", {})
    bars = [
        rate_bar(rates, "parameters", "parameters", quantity),
        rate_bar(rates, "flops", "GFLOPs", gigaflops),
    ]
    return [bar for bar in bars if bar["shares"]]


def rate_bar(
    rates: Mapping[str, Mapping[str, int]], key: str, label: str, text: Callable[[float], str]
) -> dict[str, Any]:
    """One bar: the rates' figures as text and in percent."""
    values = {rate: rates.get(rate, {}).get(key, 0) for rate in RATES}
    whole = sum(values.values())
    shares = [
        {"rate": rate, "percent": 100 * value / whole, "text": text(value)}
        for rate, value in values.items()
        if value
    ]
    return {"label": label, "shares": shares, "whole": text(whole)}


def details_tables(manifest: Manifest) -> list[Table]:
    """Versions and files."""
    files = [
        (name, f"{entry['bytes']:,}", entry["sha256"])
        for name, entry in manifest.get("files", {}).items()
    ]
    versions = [(name, str(version)) for name, version in manifest.get("versions", {}).items()]
    return [
        Table("Files", ("file", "bytes", "SHA-256"), files),
        Table("Versions", ("built with", "version"), versions),
    ]


def section_view(name: str, report: Report) -> dict[str, Any]:
    """What the page says of one compiled network."""
    manifest = report.manifest
    inputs, programs, passes, native = tables(manifest)
    return {
        "name": name,
        "facts": facts(manifest, report.seconds),
        "inputs": inputs,
        "programs": programs,
        "bars": rate_bars(manifest),
        "passes": passes,
        "native": native,
        "layers_line": layers_line(manifest),
        "layer_chart": layer_chart(manifest),
        "layer_caption": layer_caption(manifest),
        "kept": kept_table(manifest),
        "layers": layers_table(manifest),
        "plan": plan_table(manifest),
        "strip": variants(manifest),
        "details": details_tables(manifest),
        "config": json.dumps(manifest.get("config", {}), indent=2),
    }


# An evaluation as tables and pictures


def leads(evaluation: Evaluation) -> list[str]:
    """One sentence a run: what it buys and what it costs."""
    return [f"{run.name}: {lead(evaluation, run)}" for run in evaluation.runs]


def lead(evaluation: Evaluation, run: Run) -> str:
    """What a run buys and what it costs."""
    reference, times = evaluation.reference, evaluation.speedup(run)
    return unbroken(
        f"a step takes {run.ms_per_step:.0f} ms instead of {reference.ms_per_step:.0f} ms "
        f"({times:.2f} times as fast), the network {run.megabytes:.1f} MB instead of "
        f"{reference.megabytes:.1f} MB; {agreement(run)}."
    )


def agreement(run: Run) -> str:
    """How near a run's pictures are, as the end of a sentence."""
    if run.psnr_db >= CEILING_DB:
        return "its pictures are equal to the bit"
    if run.psnr_db <= -CEILING_DB:
        return "its pictures hold values that are not finite"
    return f"its pictures agree to {run.psnr_db:.1f} dB (PSNR)"


def comparison_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """The figures of every run, the reference first, and its bars in percent of the longest."""
    everyone = (evaluation.reference, *evaluation.runs)
    slowest = max(run.ms_per_step for run in everyone) or 1.0
    largest = max(run.megabytes for run in everyone) or 1.0
    return [
        {
            "name": run.name,
            "ms": f"{run.ms_per_step:.1f}",
            "ms_percent": 100 * run.ms_per_step / slowest,
            "speedup": f"{evaluation.speedup(run):.2f}",
            "mb": f"{run.megabytes:.2f}",
            "mb_percent": 100 * run.megabytes / largest,
            **quality(run, run is evaluation.reference),
        }
        for run in everyone
    ]


def quality(run: Run, is_reference: bool) -> dict[str, str]:
    """PSNR of all pictures and of the worst, and the worst step's SQNR, in dB."""
    if is_reference:
        return {"psnr": "–", "worst": "–", "step": "–"}
    steps = [value for value in run.step_sqnr_db if value is not None]
    return {
        "psnr": decibels(run.psnr_db),
        "worst": decibels(min(run.psnr_each, default=None)),
        "step": decibels(min(steps, default=None)),
    }


def comparison_table(evaluation: Evaluation) -> Table:
    """The figures of every run, for a terminal."""
    columns = ("network", "ms a step", "speed-up", "MB", "PSNR, dB", "worst picture", "worst step")
    keys = ("name", "ms", "speedup", "mb", "psnr", "worst", "step")
    rows = [tuple(row[key] for key in keys) for row in comparison_rows(evaluation)]
    return Table("Compared by sampling", columns, rows)


def comparison_view(evaluation: Evaluation) -> dict[str, Any]:
    """What the page says of an evaluation."""
    cards = picture_cards(evaluation)
    width = max(evaluation.reference.pictures.shape[1:3])
    return {
        "leads": [(run.name, lead(evaluation, run)) for run in evaluation.runs],
        "rows": comparison_rows(evaluation),
        "reference": evaluation.reference.name,
        "steps": len(evaluation.timesteps),
        "machine": listed(evaluation.machine),
        "amplified": AMPLIFIED,
        "first": cards[:FIRST_PICTURES],
        "rest": cards[FIRST_PICTURES:],
        "shrunk": WIDEST if width > WIDEST else 0,
        "chart": step_chart(evaluation),
    }


def picture_cards(evaluation: Evaluation) -> list[dict[str, Any]]:
    """For each prompt: the original, then each run with its difference."""
    return [
        {"prompt": prompt, "cells": picture_cells(evaluation, index)}
        for index, prompt in enumerate(evaluation.prompts)
    ]


def picture_cells(evaluation: Evaluation, index: int) -> list[dict[str, str]]:
    """The pictures of one prompt, as data URIs with their labels."""
    original = evaluation.reference.pictures[index]
    cells = [{"label": evaluation.reference.name, "note": "", "uri": data_uri(original)}]
    for run in evaluation.runs:
        note = decibels(run.psnr_each[index])
        unit = " dB" if note[-1].isdigit() else ""
        cells.append({"label": run.name, "note": note + unit, "uri": data_uri(run.pictures[index])})
        apart = difference(original, run.pictures[index])
        cells.append({"label": f"× {AMPLIFIED}", "note": "difference", "uri": data_uri(apart)})
    return cells


def difference(picture: Pixels, other: Pixels) -> Pixels:
    """|picture - other| amplified, uint8; black where they are equal."""
    apart = np.abs(picture.astype(np.int32) - other.astype(np.int32))
    bright: Pixels = np.minimum(apart * AMPLIFIED, 255).astype(np.uint8)
    return bright


def data_uri(picture: Pixels) -> str:
    """A picture, uint8 (h, w, 3), as a PNG inside a URI."""
    image = require("PIL.Image").fromarray(picture)
    image.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# Charts: drawn in stand-in colours, which become the page's own, light or dark

INK, FAINT, PAPER = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0b1{number}" for number in range(6))
COLORS = {INK: "var(--soft)", FAINT: "var(--line)", PAPER: "var(--paper)"}
COLORS |= {color: f"var(--series-{number})" for number, color in enumerate(SERIES)}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "effuse",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "axes.grid": True,
    "axes.axisbelow": True,
}


def step_chart(evaluation: Evaluation) -> Any:
    """SQNR by step, one line a run, as inline SVG."""

    def draw(axes: Any) -> None:
        for number, run in enumerate(evaluation.runs):
            points = [(i, v) for i, v in enumerate(run.step_sqnr_db) if drawn(v)]
            label = run.name if points else f"{run.name} (equal to the bit)"
            steps, ratios = zip(*points, strict=True) if points else ((), ())
            axes.plot(steps, ratios, "-o", color=SERIES[number % 6], ms=3.5, lw=1.6, label=label)
        axes.set(xlabel="step", ylabel="SQNR, dB (higher is better)")
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.margins(x=0.02)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=6, frameon=False)

    return chart(draw, 3.2) if evaluation.timesteps and evaluation.runs else ""


def drawn(value: float | None) -> bool:
    """Whether a ratio in dB has a place on an axis."""
    return value is not None and abs(value) < CEILING_DB


def layer_chart(manifest: Manifest) -> Any:
    """SQNR of the worst layers, as inline SVG."""
    measured = [layer for layer in worst_first(manifest) if drawn(layer.get("sqnr_db"))]
    worst = measured[:CHARTED_LAYERS]
    options = [record.get("options", {}) for record in manifest.get("passes", ())]

    def draw(axes: Any) -> None:
        draw_layers(axes, worst, SERIES[0], "low-bit", kept=False)
        draw_layers(axes, worst, SERIES[1], "left in float", kept=True)
        for bound in filter(None, (each.get("min_sqnr_db") for each in options)):
            draw_bound(axes, bound, len(worst))
        axes.set_yticks(range(len(worst)), [layer["name"] for layer in worst], fontsize=9)
        axes.set(xlabel="SQNR of the layer's own output, dB (higher is better)", xlim=(0, None))
        axes.set_ylim(len(worst) - 0.3, -0.7)
        axes.grid(visible=False, axis="y")
        axes.tick_params(length=0)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)

    return chart(draw, 0.9 + 0.21 * len(worst)) if worst else ""


def draw_layers(
    axes: Any, layers: Sequence[Mapping[str, Any]], color: str, label: str, *, kept: bool
) -> None:
    """A dot on a stem for each layer that was kept in float, or was not."""
    found = [(i, x["sqnr_db"]) for i, x in enumerate(layers) if bool(x.get("reason")) is kept]
    for place, ratio in found:
        axes.plot((0, ratio), (place, place), color=color, lw=1.2, alpha=0.45)
    if found:
        places, ratios = zip(*found, strict=True)
        axes.plot(ratios, places, "o", color=color, ms=5.5, label=label)


def draw_bound(axes: Any, bound: float, places: int) -> None:
    """The ratio under which layers stay in float."""
    axes.axvline(bound, color=INK, lw=1, ls=(0, (4, 3)))
    text, at = f"bound {bound:g} dB", (bound, places - 0.4)
    axes.annotate(text, at, (4, 0), textcoords="offset points", fontsize=9)


def layer_caption(manifest: Manifest) -> str:
    """What the chart leaves out, if anything."""
    count = sum(drawn(layer.get("sqnr_db")) for layer in manifest.get("layers", ()))
    return f"The chart shows the {CHARTED_LAYERS} worst." if count > CHARTED_LAYERS else ""


def chart(draw: Any, height: float) -> Any:
    """A matplotlib chart, `height` inches high, as markup in the page's colours and font."""
    matplotlib, figures = require("matplotlib"), require("matplotlib.figure")
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = figures.Figure(figsize=(10.4, height), layout="constrained")
        draw(figure.subplots())
        figure.savefig(buffer, format="svg", transparent=True)
    return require("markupsafe").Markup(page_svg(buffer.getvalue()))


def page_svg(text: str) -> str:
    """matplotlib's SVG without preamble, metadata and names, its stand-in colours replaced."""
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    body = re.sub(r' id="[a-zA-Z0-9]+_\d+"', "", body)  # the same in every chart
    for color, name in COLORS.items():
        body = body.replace(color, name)
    return body


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
