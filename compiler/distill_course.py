"""A training's course: the losses of its updates, what it gave, and how a report tells it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from effuse.distill_loss import Matched
from effuse.metrics import CEILING_DB

SMOOTH = 0.9  # of the losses' moving average, by which a training is watched
CHARTED = 200  # points of the loss's course in the record


@dataclass(frozen=True)
class Entry:
    """One update: its rate, and the loss before it by parts, averaged over its calls."""

    step: int
    rate: float
    loss: float
    task: float
    output: float
    features: float


@dataclass(frozen=True)
class Quality:
    """Loss, and the outputs' SQNR (dB) against the teacher, on the calls kept aside."""

    loss: float
    sqnr_db: float


@dataclass(frozen=True)
class Trained:
    """Weights by name, how good they are, and how they came about."""

    weights: Mapping[str, Tensor]
    history: tuple[Entry, ...]
    before: Quality
    after: Quality
    matched: Matched
    warning: str = ""  # why the training stopped early, or was for nothing


def smoothed(history: Iterable[Entry], start: float) -> float:
    """The moving average of the losses, from `start` on."""
    return reduce(_smoother, (each.loss for each in history), start)


def _smoother(found: float, loss: float) -> float:
    return SMOOTH * found + (1 - SMOOTH) * loss


def notes(found: Trained) -> list[str]:
    """Sentences for the report."""
    kind, count = found.matched.kind, len(found.matched.names)
    beside = f"the outputs and {count} {kind} features" if count else "the outputs"
    told = [
        f"{len(found.history)} updates of {len(found.weights)} weights against {beside}: "
        f"loss {found.before.loss:.3g} to {found.after.loss:.3g}, "
        f"{found.before.sqnr_db:.1f} to {found.after.sqnr_db:.1f} dB"
    ]
    return [*told, found.warning] if found.warning else told


def course(found: Trained) -> dict[str, Any]:
    """The training as data: the smoothed loss over the updates, and the outputs' relative error."""
    every = (each.loss for each in found.history)
    losses = list(accumulate(every, _smoother, initial=found.before.loss))
    count = len(found.history)
    shown = sorted({round(each) for each in torch.linspace(0, count, CHARTED).tolist()})
    return {
        "updates": shown,
        "loss": [_figure(losses[each]) for each in shown],
        "before": _relative_error(found.before),
        "after": _relative_error(found.after),
        "updates_total": count,
    }


def _relative_error(quality: Quality) -> float | None:
    """‖given - wanted‖ / ‖wanted‖ over all outputs; None where it is not finite."""
    return None if quality.sqnr_db <= -CEILING_DB else _figure(10 ** (-quality.sqnr_db / 20))


def _figure(value: float) -> float | None:
    """Four digits of a number; None where it is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
