"""What it takes to score candidates: forward passes counted, and told as time before they run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, fx

from effuse.cost import node_flops
from effuse.graph import calls, evaluate
from effuse.passes.base import Work
from effuse.passes.prune_candidates import Candidate
from effuse.program import Program

Values = Mapping[str, Tensor]


def graph_flops(graph: fx.Graph) -> int:
    """Operations of one run."""
    return sum(map(node_flops, calls(graph)))


def share_of(whole: fx.Graph, rests: Iterable[tuple[fx.Graph, int]]) -> float:
    """How often `whole` could run while each of `rests` runs as many times as stands with it."""
    total = graph_flops(whole)
    return sum(count * graph_flops(rest) for rest, count in rests) / max(1, total)


def timed_forward(program: Program, values: Values) -> tuple[tuple[Tensor, ...], float]:
    """What the default variant gives, and the seconds that it took."""
    begun = time.perf_counter()
    found = evaluate(program.part(program.plan.default).graph, program.weights, values)
    return found, time.perf_counter() - begun


def tell_cost(work: Work, what: str, count: float, unit: str, seconds: float) -> None:
    """Show how long the work that begins will take, at so many seconds a unit."""
    text = f"prune: {what}: about {count:.0f} {unit} of {seconds:.2g} s = {count * seconds:.0f} s"
    work.progress(text, 1, 1)


def counted(candidates: Sequence[Candidate]) -> str:
    """`70 spans`, `8 heads and 32 units`."""
    found = Counter(each.kind for each in candidates)
    return " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in found.items())
