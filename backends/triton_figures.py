"""What a lowered program costs on a GPU, for the manifest and the report: counted, not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import fx

from effuse.backends.triton_lower import Lowered
from effuse.backends.triton_plan import native_of, plan_arena, storage, tensors
from effuse.cost import node_bytes
from effuse.graph import calls
from effuse.kernels.table import BY_TARGET
from effuse.log import Log
from effuse.program import Program


def traffic(graph: fx.Graph) -> dict[str, int]:
    """How many kernels a graph launches, one a call that is no view, and the bytes they move.

    Every operand is read once and every result written once; caches are not thought of.
    """
    working = [node for node in calls(graph) if not is_view(node)]
    return {"launches": len(working), "bytes": sum(node_bytes(node) for node in working)}


def is_view(node: fx.Node) -> bool:
    """Whether a call's results all lie in memory that it reads, or are no tensors."""
    read = {storage(tensor) for each in node.all_input_nodes for tensor in tensors(each)}
    return all(storage(tensor) in read for tensor in tensors(node))


def figures(program: Program, lowered: Lowered, table: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest's entries about kernels.

    `native`: of each effuse op of the lowered program, whether a kernel runs it. `kernels`: of each
    part, launches and bytes moved, of which kernels of ours, PyTorch's, and effuse ops that have
    no kernel; what the rules of the lowering did and why they left sites alone; the arena; and the
    most that a kernel asks of the GPU.
    """
    found = {
        part.name: {**part_figures(part.graph), **rules(lowered.logs[part.name])}
        for part in lowered.program.parts
    }
    kernels = table["kernels"].values()
    most = {word: max((each[word] for each in kernels), default=0)
            for word in ("registers", "spills", "shared")}  # fmt: skip
    return {
        "native": native(lowered.program),
        "kernels": {
            "target": table["target"],
            "distinct": len(kernels),
            "most": most,
            "parts": found,
            "before": {part.name: traffic(part.graph) for part in program.parts},
        },
    }


def rules(log: Log) -> dict[str, Any]:
    """What each rule did, and why it left sites alone."""
    reasons = {rule: dict(sorted(counts.items())) for rule, counts in sorted(log.reasons.items())}
    return {"rules": dict(sorted(log.rewrites.items())), "reasons": reasons}


def part_figures(graph: fx.Graph) -> dict[str, Any]:
    """Launches, bytes and fallbacks of one lowered part."""
    ours, fallback = Counter[str](), Counter[str]()
    for node in calls(graph):
        row = BY_TARGET.get(node.target)
        if row is not None:
            (fallback if native_of(node) is None else ours)[row.name] += 1
    return {
        **traffic(graph),
        "fused": dict(sorted(ours.items())),
        "fallback": dict(sorted(fallback.items())),
        "arena": plan_arena(graph).bytes,
    }


def native(program: Program) -> dict[str, str]:
    """Each effuse op of a lowered program: native where a kernel of ours runs it."""
    found = {node.target for part in program.parts for node in calls(part.graph)}
    rows = [BY_TARGET[target] for target in found if target in BY_TARGET]
    return {row.name: row.implementations.get("triton", "simulated") for row in rows}
