"""The loop that trains a student against its teacher: AdamW, cosine, EMA, and a way back.

What is given back is the moving average of the weights, if its loss on a few calls kept aside is
lower than before, and else the weights as they came: a recovery never makes a network worse there.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from effuse.distill_course import Entry, Quality, Trained, smoothed
from effuse.distill_data import Call, Source
from effuse.distill_loss import SHARES, feature_loss, match_features, output_loss
from effuse.distill_network import Network, Wanted, check_trainable, trainable
from effuse.distill_state import Folder, State
from effuse.errors import CalibrationError, ConfigError, InputError, nearest
from effuse.metrics import sqnr_db
from effuse.program import Program
from effuse.weights import copied

log = logging.getLogger(__name__)

EXPLODED = 10.0  # times the loss that it began with
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a weight
KEEP = 10  # steps between two looks whether the average is the best so far

Progress = Callable[[int, int, float], None]  # done, total, loss


@dataclass(frozen=True)
class Recipe:
    """How a student is trained.

    Args:
        steps: updates.
        rate: AdamW's, at its highest.
        batch: calls of the network in an update; a call is as large as the network was captured.
        ema: the average's decay; less at first: (1 + n) / (10 + n) at update n, as diffusers'.
        weights: of the loss's parts `task` (100), `output` (100) and `features` (1).
        warmup: share of the updates in which the rate rises; then it falls as a cosine, to 0.
        clip: the gradient's greatest norm.
        seed: of the order of the calls.
        every: updates between two states that are written.

    Raises:
        ConfigError: one of them is out of range.
    """

    steps: int = 500
    rate: float = 1e-4
    batch: int = 1
    ema: float = 0.999
    weights: Mapping[str, float] = field(default_factory=dict)
    warmup: float = 0.05
    clip: float = 1.0
    seed: int = 0
    every: int = 50

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"distill: {name}={getattr(self, name)!r}: at least 1")
        for name in ("rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"distill: {name}={getattr(self, name)!r}: a number above 0")
        for name in ("ema", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"distill: {name}={getattr(self, name)!r}: from 0 to below 1")
        for name, value in self.weights.items():
            if name not in SHARES:
                raise ConfigError(
                    f"distill: weights: no {name!r} in the loss{nearest(name, SHARES)}"
                )
            if not 0 <= value < math.inf:
                raise ConfigError(f"distill: weights: {name}={value!r}: 0 or more")

    def rate_at(self, step: int) -> float:
        """AdamW's rate at an update: rising, then half a cosine."""
        rising = max(1, round(self.warmup * self.steps))
        if step < rising:
            return self.rate * (step + 1) / rising
        share = (step - rising) / max(1, self.steps - rising)
        return self.rate * 0.5 * (1 + math.cos(math.pi * share))

    def decay_at(self, step: int) -> float:
        """The average's decay at an update."""
        return min(self.ema, (1 + step) / (10 + step))


def train(
    student: Network,
    teacher: Network,
    source: Source,
    recipe: Recipe | None = None,
    resume: str = "",
    progress: Progress = lambda done, total, loss: None,
    wanted: Wanted = lambda path: True,
) -> Trained:
    """Train the student's layers to give what the teacher gives.

    Args:
        student: its weights stay as they are; the trained ones come back.
        teacher: takes the same inputs and gives outputs of the same shapes.
        source: the calls.
        recipe: how; None: `Recipe()`.
        resume: a folder for the state; a training that was killed goes on there, to the bit.
        progress: called with done, total, loss.
        wanted: of which layers, by their module paths.

    Raises:
        ConfigError: the student cannot be trained, or `resume` holds another training.
        InputError: the outputs' shapes differ.
        CalibrationError: the first loss is not finite.
    """
    recipe = recipe or Recipe()
    check_trainable(student, "student", wanted)
    with torch.enable_grad():  # passes run without
        run = _Run(student, teacher, source, recipe, wanted)
        before = run.quality(run.start)
        if not math.isfinite(before.loss):
            raise CalibrationError(
                f"distill: expected a finite loss at the start, came {before.loss}; check the data "
                "for NaN, and that student and teacher are captured in float32"
            )
        if before.loss == 0:
            return run.unchanged(before, "nothing to recover: the student gives what it should")
        folder = Folder.of(resume, run.settings(before))
        warning = run.learn(before, folder, progress)
        return run.chosen(before, warning)


class _Run:
    """One training under way."""

    def __init__(
        self, student: Network, teacher: Network, source: Source, recipe: Recipe, wanted: Wanted
    ) -> None:
        self.student, self.teacher, self.source, self.recipe = student, teacher, source, recipe
        self.matched = match_features(student, teacher)
        self.probes = tuple(source.probes())
        self.start = {name: student.weights[name].clone() for name in trainable(student, wanted)}
        self.weights = {n: torch.nn.Parameter(each.clone()) for n, each in self.start.items()}
        self.average = {name: each.clone() for name, each in self.start.items()}
        self.best = {name: each.clone() for name, each in self.start.items()}
        self.lowest = math.inf
        self.history: list[Entry] = []
        self.adam = torch.optim.AdamW(self.weights.values(), recipe.rate)

    # ---- the loss of calls ----

    def losses(self, call: Call, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts of one call's loss."""
        with torch.no_grad():
            wanted, theirs = self.teacher(call.values, taps=self.matched.teacher)
        given, mine = self.student(call.values, weights, self.matched.student)
        _check_outputs(given, wanted)
        target = None if call.target is None else call.target.to(given[0])
        return {
            "task": output_loss(given[:1], [target]) if target is not None else torch.zeros(()),
            "output": output_loss(given, wanted),
            "features": feature_loss(mine, theirs),
        }

    def total(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum."""
        shares = {**SHARES, **self.recipe.weights}
        terms = [shares[name] * each.to(self.student.device, torch.float64)
                 for name, each in parts.items()]  # fmt: skip
        return torch.stack(terms).sum()

    @torch.no_grad()
    def quality(self, weights: Mapping[str, Tensor]) -> Quality:
        """How good weights are on the calls kept aside."""
        losses, pairs = [], []
        for call in self.probes:
            losses.append(float(self.total(self.losses(call, weights))))
            wanted, given = self.teacher(call.values)[0], self.student(call.values, weights)[0]
            pairs.append([_flat(each) for each in (wanted, given)])
        wanted_all, given_all = (torch.cat(each).numpy() for each in zip(*pairs, strict=True))
        return Quality(sum(losses) / len(losses), sqnr_db(wanted_all, given_all))

    # ---- updates ----

    def learn(self, before: Quality, folder: Folder | None, progress: Progress) -> str:
        """All updates that are left; why it stopped early, or an empty string."""
        if folder is not None and (state := folder.read()) is not None:
            self.restore(state)
        smooth = smoothed(self.history, before.loss)
        for step in range(len(self.history), self.recipe.steps):
            entry = self.gradients(step)
            smooth = smoothed([entry], smooth)
            if problem := self.problem(entry, smooth, before):
                return problem
            self.update(step, entry)
            if (step + 1) % KEEP == 0 and smooth < self.lowest:
                self.lowest = smooth
                self.best = {name: each.clone() for name, each in self.average.items()}
            if folder is not None and ((step + 1) % self.recipe.every == 0 or self.finished):
                folder.write(self.state())
            progress(step + 1, self.recipe.steps, smooth)
        return ""

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return len(self.history) == self.recipe.steps

    def gradients(self, step: int) -> Entry:
        """Leave the gradients of one batch in the weights; its losses."""
        self.adam.zero_grad()
        sums = dict.fromkeys(SHARES, 0.0)
        loss = 0.0
        for number in range(step * self.recipe.batch, (step + 1) * self.recipe.batch):
            parts = self.losses(self.source.at(number), self.weights)
            total = self.total(parts) / self.recipe.batch
            torch.autograd.backward(total)
            loss += float(total.detach())
            for name, each in parts.items():
                sums[name] += float(each.detach()) / self.recipe.batch
        return Entry(step, self.recipe.rate_at(step), loss, **sums)

    def problem(self, entry: Entry, smooth: float, before: Quality) -> str:
        """Why to stop before the update, or an empty string."""
        norms = [each.grad.norm() for each in self.weights.values() if each.grad is not None]
        finite = math.isfinite(entry.loss) and bool(torch.stack(norms).isfinite().all())
        if finite and smooth <= EXPLODED * before.loss:
            return ""
        what = f"a loss of {smooth:.3g}, from {before.loss:.3g}" if finite else "NaN or infinity"
        return (
            f"the training diverged at step {entry.step} of {self.recipe.steps} ({what}); the last "
            f"good average is kept; try a lower rate than {self.recipe.rate:g}"
        )

    def update(self, step: int, entry: Entry) -> None:
        """One step of AdamW, and of the average."""
        torch.nn.utils.clip_grad_norm_(self.weights.values(), self.recipe.clip)
        for group in self.adam.param_groups:
            group["lr"] = entry.rate
        self.adam.step()
        decay = self.recipe.decay_at(step)
        with torch.no_grad():
            for name, each in self.average.items():
                each.lerp_(self.weights[name], 1 - decay)
        self.history.append(entry)

    # ---- results ----

    def chosen(self, before: Quality, warning: str) -> Trained:
        """The average (of a training that diverged, its best), if it is better than the start."""
        found = self.best if warning else self.average
        after = self.quality(found)
        if after.loss < before.loss:
            return self.result(found, before, after, warning)
        why = warning or "the training made nothing better; the weights are as they came"
        return self.unchanged(before, why)

    def unchanged(self, before: Quality, warning: str) -> Trained:
        """The weights as they came."""
        return self.result(self.start, before, before, warning)

    def result(
        self, weights: Mapping[str, Tensor], before: Quality, after: Quality, warning: str
    ) -> Trained:
        """What the training gives back."""
        if warning:
            log.warning("distill: %s", warning)
        kept = {name: each.detach().to(self.student.home) for name, each in weights.items()}
        return Trained(kept, tuple(self.history), before, after, self.matched, warning)

    # ---- the state ----

    def settings(self, before: Quality) -> dict[str, Any]:
        """What decides the course of a training."""
        told = {**asdict(self.recipe), "weights": dict(self.recipe.weights)}
        del told["every"]
        return {**told, "data": self.source.key(), "features": len(self.matched.names),
                "trained": len(self.start), "first loss": float(f"{before.loss:.4g}")}  # fmt: skip

    def state(self) -> State:
        """Everything that the next update depends on."""
        tensors: dict[str, Tensor] = {}
        for name, each in self.weights.items():
            tensors |= {f"weight.{name}": each, f"average.{name}": self.average[name],
                        f"best.{name}": self.best[name]}  # fmt: skip
            for moment in MOMENTS:  # none where no gradient arrives
                if each in self.adam.state:
                    tensors[f"{moment}.{name}"] = self.adam.state[each][moment]
        entries = [list(asdict(each).values()) for each in self.history]
        lowest = None if math.isinf(self.lowest) else self.lowest
        return State(tensors, {"history": entries, "lowest": lowest})

    def restore(self, state: State) -> None:
        """Go on from a state."""
        self.history = [Entry(*each) for each in state.data["history"]]
        lowest = state.data["lowest"]
        self.lowest = math.inf if lowest is None else lowest
        for name, each in self.weights.items():
            with torch.no_grad():
                each.copy_(state.tensors[f"weight.{name}"])
                self.average[name].copy_(state.tensors[f"average.{name}"])
                self.best[name].copy_(state.tensors[f"best.{name}"])
            if f"{MOMENTS[0]}.{name}" in state.tensors:
                self.adam.state[each] = {
                    "step": torch.tensor(float(len(self.history))),
                    **{m: state.tensors[f"{m}.{name}"].to(each.device) for m in MOMENTS},
                }


def retrained(program: Program, found: Trained) -> Program:
    """The program with the weights that a training gave."""
    stored = copied(program.weights)
    for name, tensor in found.weights.items():
        stored[name] = tensor
    return replace(program, weights=stored)


def _flat(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([each.detach().double().cpu().flatten() for each in outputs])


def _check_outputs(mine: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Refuse a teacher whose outputs are none that the student could give."""
    shapes = [[tuple(each.shape) for each in outputs] for outputs in (mine, theirs)]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"teacher: gives outputs of shapes {shapes[1]}, the student of {shapes[0]}; hand the "
            "network that the student was made from"
        )
