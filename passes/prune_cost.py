"""What it takes to score candidates: forward passes counted, and told as time before they run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from torch import Tensor, fx

from effuse.cost import node_flops
from effuse.graph import calls, evaluate
from effuse.passes.base import Work
from effuse.passes.prune_candidates import Candidate, live, readers
from effuse.program import Part, Program

Values = Mapping[str, Tensor]


def graph_flops(graph: fx.Graph) -> int:
    """Operations of one run."""
    return sum(map(node_flops, calls(graph)))


def forwards(part: Part, candidates: Iterable[Candidate]) -> float:
    """How often the network could run while the candidates' losses on one input are measured.

    Once to compare with, once to hand out values, and for each candidate what comes behind the
    first value that it changes, by arithmetic.
    """
    order = {node.name: index for index, node in enumerate(part.graph.nodes)}
    costs = [node_flops(node) if node.op == "call_function" else 0 for node in part.graph.nodes]
    behind = [*accumulate(reversed(costs), initial=0)][::-1]
    places: dict[int, int] = {}
    found = 0
    for each in candidates:
        if each.block is not None:
            place = min(order[join.node] for join in each.block.joins)
            alive = live(part.graph, each.block)
            found += sum(costs[order[name]] for name in alive if order[name] >= place)
        elif each.site is not None:
            key = id(each.site)
            if key not in places:
                places[key] = min(order[layer.name] for layer in readers(part, each.site))
            found += behind[places[key]]
    return 2 + found / max(1, behind[0])


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
