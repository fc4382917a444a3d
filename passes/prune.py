"""Prune: a smaller network, by structure (METHODS 3.1, 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np

from effuse.distill_masks import MaskRecipe
from effuse.errors import ConfigError, PassError
from effuse.passes.base import Pass, Work
from effuse.passes.options import check_choice, check_whole
from effuse.passes.prune_budget import Budget, counted_budget, met, timed_budget
from effuse.passes.prune_candidates import Candidate, Kind, find_candidates
from effuse.passes.prune_choice import offer
from effuse.passes.prune_figures import (
    additivity,
    figure,
    rows,
    shares,
    tell_additivity,
    tell_time,
)
from effuse.passes.prune_masks import by_masks, learned
from effuse.passes.prune_scores import latent_shifts, losses, magnitudes, record_inputs
from effuse.passes.prune_surgery import pruned
from effuse.passes.prune_time import check_here
from effuse.passes.resume import Store
from effuse.program import Program

By = Literal["loss", "latent", "masks", "magnitude", "random"]
Array = np.ndarray[Any, Any]

BUDGETS = ("parameters", "flops", "milliseconds")
WHOLE = ("span", "block")  # they hold heads, units and channels, and each other
MASKED = ("head", "unit")  # what masks are learned for


@dataclass(frozen=True)
class Prune(Pass):
    """Leave out what the network needs least, and store it no more; lossy.

    Give one budget, `parameters`, `flops` or `milliseconds`. What goes has the least sum of scores
    that saves it: a 0-1 knapsack, solved by dynamic programming (LAPTOP-Diff).

    Args:
        parameters: share of the weights to remove (0 to 1).
        flops: share of a step's arithmetic to remove (0 to 1).
        milliseconds: share of a step's time to remove (0 to 1), measured on the machine that
            builds, by the back end that the build is for.
        by: the score of a candidate. `loss`: relative squared error of the output without it, over
            recorded inputs (LAPTOP-Diff); `latent`: shift of mean and deviation where sampling
            ends (LD-Pruner); `masks`: how far gates stay open that are learned over whole
            trajectories, for heads and units, by size (EcoDiff); `magnitude`: squared weights;
            `random`: none.
        what: residual branches (`span`), runs of them that repeat (`block`), attention heads
            (`head`), hidden units of MLPs (`unit`), channels inside branches, by whole norm groups
            (`channel`); or several of the last three.
        calls: inputs that a loss is measured on, or trajectories that masks are learned over.
        groups: at most so many groups of hidden units or channels in one layer, of like magnitude,
            or of like masks.
        updates: of learning masks.
        seed: of the random choices.
        resume: a folder that keeps finished scores, so that a build that was interrupted goes on.
    """

    name: ClassVar[str] = "prune"
    exact: ClassVar[bool] = False

    parameters: float | None = None
    flops: float | None = None
    milliseconds: float | None = None
    by: By = "loss"
    what: Kind | tuple[Kind, ...] = "span"
    calls: int = 4
    groups: int = 16
    updates: int = 100
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
        check_whole("prune", "updates", self.updates, 1)
        check_whole("prune", "seed", self.seed, 0)
        if self.by == "masks" and not set(self.kinds) <= set(MASKED):
            raise ConfigError(
                f"prune: what={self.what!r}: masks are learned for heads and hidden units; set "
                "what='head', what='unit' or both, or choose by='loss'"
            )
        if sum(getattr(self, name) is not None for name in BUDGETS) != 1:
            raise ConfigError("prune: give one budget: parameters=…, flops=… or milliseconds=…")
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
        return next(name for name in BUDGETS if getattr(self, name) is not None)

    @property
    def share(self) -> float:
        """The share to remove."""
        return float(getattr(self, self.measure))

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
        if self.measure == "milliseconds":
            check_here(work.purpose)
        store = Store.of(self.resume)
        found = self.candidates(program, work)
        candidates, scores, probes = self.scored(program, found, work, store)
        budget = self.budget(program, candidates, work, store)
        costs = self.costs(scores, budget)
        offered = offer(candidates, costs, work)
        chosen = self.chosen(costs, offered, budget, work)
        spent = [each for each in chosen if work.log.spend(candidates[each].kind)]
        result = pruned(program, [candidates[each] for each in spent])
        self.tell(program, result, candidates, scores, spent, work)
        if probes and spent:
            numbers = (offered, spent)
            sums = additivity(program, candidates, scores, numbers, probes, self.seed)
            work.log.data["additivity"] = sums
            tell_additivity(sums, work.log)
        return result

    def candidates(self, program: Program, work: Work) -> list[Candidate]:
        """What may go; units one by one where masks will say which are alike.

        Raises:
            PassError: there is nothing.
        """
        groups = None if self.by == "masks" else self.groups
        found = find_candidates(program, self.kinds, work.log, groups)
        if not found:
            words = " or ".join(self.kinds)
            raise PassError(f"prune: the network has no {words} to prune; try another what=")
        wanted = [each for each in found if self.unwanted(each.path) is None]
        if not wanted:
            names = ", ".join(dict.fromkeys(each.path for each in found))
            raise PassError(f"prune: include and exclude leave none of {names}")
        return wanted

    def scored(
        self, program: Program, candidates: list[Candidate], work: Work, store: Store | None
    ) -> tuple[list[Candidate], Array, Sequence[Any]]:
        """Candidates, their scores, and the inputs that losses were measured on, if any."""
        if self.by == "loss":
            probes = record_inputs(program, self.calls, work)
            return candidates, losses(program, candidates, probes, work, store), probes
        if self.by == "latent":
            return candidates, latent_shifts(program, candidates, work, self.seed, store), ()
        if self.by == "magnitude":
            return candidates, magnitudes(program, candidates), ()
        if self.by == "masks":
            sites = list({id(each.site): each.site for each in candidates if each.site}.values())
            recipe = MaskRecipe(self.updates, seed=self.seed)
            openness = learned(program, sites, recipe, self.calls, work, store)
            return *by_masks(program, sites, self.groups, openness), ()
        return candidates, np.random.default_rng(self.seed).random(len(candidates)), ()

    def costs(self, scores: Array, budget: Budget) -> Array:
        """What the knapsack sums: a score that is a figure of each weight counts by size."""
        by_size = self.by in ("masks", "random")
        return scores * np.array(budget.sizes, dtype=float) if by_size else scores

    def budget(
        self, program: Program, candidates: Sequence[Candidate], work: Work, store: Store | None
    ) -> Budget:
        """What has to go."""
        if self.measure == "milliseconds":
            return timed_budget(program, candidates, self.share, work, store)
        return counted_budget(program, candidates, self.measure, self.share)

    def chosen(self, costs: Array, offered: Sequence[int], budget: Budget, work: Work) -> list[int]:
        """The numbers of the candidates that go.

        Raises:
            PassError: all of them together are less than the budget.
        """
        most = budget.removed(offered)
        if most < budget.need:
            raise PassError(
                f"prune: {self.measure}={self.share}: without all {len(offered)} candidates (of "
                f"{' and '.join(self.kinds)}) {most / budget.total:.1%} is removed at most; lower "
                "it, or try another what="
            )
        picked, share = met(budget, costs, offered)
        if share is not None:
            tell_time(budget.total, budget.sizes, (budget.removed(picked), share), work.log)
        return picked

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
