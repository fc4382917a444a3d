"""An evaluation as tables and pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.errors import require
from effuse.metrics import CEILING_DB
from effuse.report_charts import step_chart
from effuse.report_plan import variants_text
from effuse.report_text import Table, decibels, duration, listed, seconds, unbroken, without_empty

if TYPE_CHECKING:
    from effuse.evaluate import Evaluation, Run

Manifest = Mapping[str, Any]
Pixels = np.ndarray[Any, Any]


AMPLIFIED = 8  # how many times brighter differences are shown
FIRST_PICTURES = 12  # the rest is folded away
WIDEST = 256  # pixels; larger pictures are shown smaller, to keep the file small


def leads(evaluation: Evaluation) -> list[str]:
    """One sentence a run: what it buys and what it costs."""
    return [f"{run.name}: {lead(evaluation, run)}" for run in evaluation.runs]


def lead(evaluation: Evaluation, run: Run) -> str:
    """What a run buys and what it costs."""
    reference, times = evaluation.reference, evaluation.speedup(run)
    return unbroken(
        f"{len(evaluation.timesteps)} steps take {duration(run.ms_per_run)} instead of "
        f"{duration(reference.ms_per_run)} ({times:.2f} times as fast), the network "
        f"{run.megabytes:.1f} MB instead of {reference.megabytes:.1f} MB; {agreement(run)}."
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
    slowest = max(run.ms_per_run for run in everyone) or 1.0
    largest = max(run.megabytes for run in everyone) or 1.0
    return [
        {
            "name": run.name,
            "variants": variants_text(run.variants),
            "seconds": seconds(run.ms_per_run),
            "ms": f"{run.ms_per_step:.1f}",
            "ms_percent": 100 * run.ms_per_run / slowest,
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
    columns = {
        "network": "name",
        "s a run": "seconds",
        "speed-up": "speedup",
        "ms a step": "ms",
        "MB": "mb",
        "PSNR, dB": "psnr",
        "worst picture": "worst",
        "worst step": "step",
        "calls": "variants",
    }
    rows = [tuple(row[key] for key in columns.values()) for row in comparison_rows(evaluation)]
    return without_empty(Table("Compared by sampling", tuple(columns), rows))


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
