"""Prune: a smaller network, by structure (METHODS 3.1, 3.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from effuse.errors import ConfigError, PassError
from effuse.passes.base import Pass, Work
from effuse.passes.options import check_choice, check_whole
from effuse.passes.prune_candidates import Candidate, Kind, find_candidates
from effuse.passes.prune_choice import choose, offer
from effuse.passes.prune_figures import (
    additivity,
    figure,
    hollow,
    rows,
    shares,
    size_of,
    tell_additivity,
)
from effuse.passes.prune_scores import latent_shifts, losses, magnitudes, record_inputs
from effuse.passes.prune_surgery import pruned
from effuse.passes.resume import Store
from effuse.program import Program

By = Literal["loss", "latent", "magnitude", "random"]
Array = np.ndarray[Any, Any]

WHOLE = ("span", "block")  # they hold heads, units and channels, and each other


@dataclass(frozen=True)
class Prune(Pass):
    """Leave out what the network needs least, and store it no more; lossy.

    Give one budget, `parameters` or `flops`. What goes has the least sum of scores that saves it:
    a 0-1 knapsack, solved by dynamic programming (LAPTOP-Diff).

    Args:
        parameters: share of the weights to remove (0 to 1).
        flops: share of a step's arithmetic to remove (0 to 1).
        by: the score of a candidate. `loss`: relative squared error of the output without it, over
            recorded inputs (LAPTOP-Diff); `latent`: shift of mean and deviation where sampling
            ends (LD-Pruner); `magnitude`: squared weights; `random`: none.
        what: residual branches (`span`), runs of them that repeat (`block`), attention heads
            (`head`), hidden units of MLPs (`unit`), channels inside branches, by whole norm groups
            (`channel`); or several of the last three.
        calls: inputs that a loss is measured on.
        groups: at most so many groups of hidden units or channels in one layer, of like magnitude.
        seed: of the random choices.
        resume: a folder that keeps finished scores, so that a build that was interrupted goes on.
    """

    name: ClassVar[str] = "prune"
    exact: ClassVar[bool] = False

    parameters: float | None = None
    flops: float | None = None
    by: By = "loss"
    what: Kind | tuple[Kind, ...] = "span"
    calls: int = 4
    groups: int = 16
    seed: int = 0
    resume: str = field(default="", metadata={"recorded": False})

    def __post_init__(self) -> None:
        check_choice("prune", "by", self.by, get_args(By))
        for kind in self.kinds:
            check_choice("prune", "what", kind, get_args(Kind))
        if not self.kinds or (len(self.kinds) > 1 and set(self.kinds) & set(WHOLE)):
            raise ConfigError(
                f"prune: what={self.what!r}: spans and blocks hold what the other kinds cut; "
                "expected 'span', 'block', or some of 'head', 'unit' and 'channel'"
            )
        check_whole("prune", "calls", self.calls, 1)
        check_whole("prune", "groups", self.groups, 2)
        check_whole("prune", "seed", self.seed, 0)
        if (self.parameters is None) == (self.flops is None):
            raise ConfigError("prune: give one budget, either parameters=… or flops=…")
        if not 0 < self.share < 1:
            raise ConfigError(
                f"prune: {self.measure}={self.share!r}: expected a share to remove between 0 and 1"
            )

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """The kinds of candidates."""
        return (self.what,) if isinstance(self.what, str) else tuple(self.what)

    @property
    def measure(self) -> str:
        """What the budget is in."""
        return "flops" if self.parameters is None else "parameters"

    @property
    def share(self) -> float:
        """The share to remove."""
        return float(self.flops or 0.0) if self.parameters is None else self.parameters

    def requires(self, program: Program) -> str | None:
        """The network as captured and canonicalized: behind no other pass."""
        before = [each.name for each in program.records if each.name != "canonicalize"]
        if before:
            return (
                f"it changes the network's layers, so it runs before {', '.join(before)}; hand "
                "compile the network itself with all passes, which then run in the legal order"
            )
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Find candidates, score them, and leave the least costly ones out."""
        candidates = self.candidates(program, work)
        scores, probes = self.scored(program, candidates, work)
        offered = offer(candidates, scores, work)
        picked = self.picked(program, [candidates[each] for each in offered], scores[offered])
        chosen = [offered[each] for each in picked]
        spent = [each for each in chosen if work.log.spend(candidates[each].kind)]
        result = pruned(program, [candidates[each] for each in spent])
        self.tell(program, result, candidates, scores, spent, work)
        if probes and spent:
            numbers = (offered, spent)
            found = additivity(program, candidates, scores, numbers, probes, self.seed)
            work.log.data["additivity"] = found
            tell_additivity(found, work.log)
        return result

    def candidates(self, program: Program, work: Work) -> list[Candidate]:
        """What may go.

        Raises:
            PassError: there is nothing.
        """
        found = find_candidates(program, self.kinds, work.log, self.groups)
        if not found:
            words = " or ".join(self.kinds)
            raise PassError(f"prune: the network has no {words} to prune; try another what=")
        wanted = [each for each in found if self.unwanted(each.path) is None]
        if not wanted:
            names = ", ".join(dict.fromkeys(each.path for each in found))
            raise PassError(f"prune: include and exclude leave none of {names}")
        return wanted

    def scored(
        self, program: Program, candidates: Sequence[Candidate], work: Work
    ) -> tuple[Array, Sequence[Any]]:
        """The candidates' scores, and the inputs that they were measured on, if any."""
        store = Store.of(self.resume)
        if self.by == "loss":
            probes = record_inputs(program, self.calls, work)
            return losses(program, candidates, probes, work, store), probes
        if self.by == "latent":
            return latent_shifts(program, candidates, work, self.seed, store), ()
        if self.by == "magnitude":
            return magnitudes(program, candidates), ()
        sizes = np.array([getattr(each, self.measure) for each in candidates], dtype=float)
        return sizes * np.random.default_rng(self.seed).random(len(candidates)), ()

    def picked(self, program: Program, offered: Sequence[Candidate], scores: Array) -> list[int]:
        """The numbers of the candidates that go.

        Raises:
            PassError: all of them together are less than the budget.
        """
        total = size_of(program, self.measure)
        need = math.ceil(self.share * total)
        ghost = hollow(program)

        def removed(numbers: Sequence[int]) -> int:
            less = pruned(ghost, [offered[each] for each in numbers])
            return total - size_of(less, self.measure)

        most = removed(range(len(offered)))
        if most < need:
            raise PassError(
                f"prune: {self.measure}={self.share}: without all {len(offered)} candidates (of "
                f"{' and '.join(self.kinds)}) {most / total:.1%} is removed at most; lower it, or "
                "try another what="
            )
        sizes = [getattr(each, self.measure) for each in offered]
        return choose(scores.tolist(), sizes, need, removed)

    def tell(
        self, before: Program, after: Program, candidates: Sequence[Candidate], scores: Array,
        gone: Sequence[int], work: Work,
    ) -> None:  # fmt: skip
        """What went, how much that is; and every score, as data."""
        removed = shares(before, after)
        words = " and ".join(f"{share:.1%} of the {each}" for each, share in removed.items())
        work.log.note(f"{len(gone)} of {len(candidates)} candidates went: {words}")
        work.log.data |= {
            "by": self.by,
            "measure": self.measure,
            "budget": self.share,
            "candidates": rows(candidates, scores, gone),
            "removed": {each: figure(share) for each, share in removed.items()},
        }
