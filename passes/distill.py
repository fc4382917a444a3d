"""Distill: recover what a lossy pass before it has cost, by training against the network itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from effuse.distill_course import course, notes
from effuse.distill_data import Listener, Pool
from effuse.distill_network import Network
from effuse.distill_train import Recipe, retrained, train
from effuse.errors import PassError
from effuse.passes.base import Pass, Work
from effuse.program import Program


@dataclass(frozen=True)
class Distill(Pass):
    """Train the weights of layers towards what the captured network gives (METHODS 3.1, 3.4).

        L = b · ‖ε_S - ε_T‖²  +  c · Σ_l ‖f_T - f_S‖² / ‖f_T‖²

    over f, what self-attentions give in both.

    The calls are those of calibration, sampled by the captured network. `effuse.distill` is the
    same, with more to say about data. `include` and `exclude` say which layers may change.

    Args:
        steps: updates of AdamW.
        rate: its rate, at its highest; it warms up, then falls as a cosine.
        batch: calls of the network in an update.
        ema: decay of the weights' moving average, which is kept.
        output: b, the weight of the outputs in the loss.
        features: c, the weight of the features.
        seed: of the order of the calls.
        resume: a folder for the state, where a build that was interrupted goes on.
    """

    name: ClassVar[str] = "distill"
    exact: ClassVar[bool] = False

    steps: int = 500
    rate: float = 1e-4
    batch: int = 1
    ema: float = 0.999
    output: float = 100.0
    features: float = 1.0
    seed: int = 0
    resume: str = field(default="", metadata={"recorded": False})

    def __post_init__(self) -> None:
        self.recipe()

    def recipe(self) -> Recipe:
        """How to train."""
        shares = {"output": self.output, "features": self.features}
        return Recipe(self.steps, self.rate, self.batch, self.ema, shares, seed=self.seed)

    def requires(self, program: Program) -> str | None:
        """Something to recover from."""
        if all(record.exact for record in program.records):
            return (
                "nothing to recover: no pass before it has changed what the network gives; put "
                "Prune before it, or leave it out"
            )
        return None

    def run(self, program: Program, work: Work) -> Program:
        """The program with trained weights."""
        if work.original is None or work.drive is None:
            raise PassError(
                "distill: trains on calibration's calls against the captured network, and has "
                "neither here; run it in effuse.compile, or call effuse.distill"
            )
        if not work.log.spend("train"):
            return program
        listener = Listener()
        work.drive(work.original, listener)
        found = train(
            Network(program), Network(work.original), Pool(listener.calls, self.seed),
            self.recipe(), self.resume,
            lambda done, total, loss: work.progress(self.name, done, total),
            lambda path: self.unwanted(path) is None,
        )  # fmt: skip
        for note in notes(found):
            work.log.note(note)
        work.log.data.update(course(found))
        return retrained(program, found)
