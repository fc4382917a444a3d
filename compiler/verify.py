"""Checks after every pass: lint, re-derived types, and the numbers against eager.

A graph error carries the node, its module path and source line, the passes so far, and ten lines
of the dump either side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from effuse.dump import around, type_text
from effuse.errors import VerifyError
from effuse.graph import fake_mode, module_path, recorded, source_line
from effuse.metrics import sqnr_db
from effuse.program import Part, Program, run_program
from effuse.rates import dependences

SPACES = ("aten", "effuse", "prims")  # where a graph's ops may come from


def verify(program: Program, after: Iterable[str] = ()) -> None:
    """Raise VerifyError for the first thing that is wrong with any part of the program."""
    passes = tuple(after)
    names = set(program.sources)
    for part in program.parts:
        part.graph.lint()
        for name in part.inputs:
            if name not in names:
                raise VerifyError(f"{part.name} reads {name!r}, which nothing gives")
        _check_rate(program, part)
        for node in part.graph.nodes:
            problem = check_node(node, program)
            if problem:
                raise describe(node, problem, part.name, passes)


def _check_rate(program: Program, part: Part) -> None:
    found = dependences(part.graph, program.sources)[part.graph.output_node()]
    if found | part.depends != part.depends:
        raise VerifyError(f"{part.name} is declared {part.depends}, but computes from {found}")


def check_node(node: fx.Node, program: Program) -> str | None:
    """What is wrong with one node, or None."""
    if node.op == "output":
        return None
    if "val" not in node.meta:
        return "it carries no recorded value"
    if node.op == "get_attr" and str(node.target) not in program.weights:
        return f"no weight is called {node.target!r}"
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in SPACES:
            return f"an op of the namespace {node.target.namespace!r} is not allowed here"
        if node.target._schema.is_mutable:
            return "it writes in place"
    return check_type(node)


def check_type(node: fx.Node) -> str | None:
    """Re-derive the node's shape and dtype from its inputs' recorded values."""
    try:
        with fake_mode(node.graph), torch.no_grad():
            value = node.target(*recorded(node.args), **recorded(node.kwargs))  # type: ignore[operator]
    except GuardOnDataDependentSymNode:
        return None
    except Exception as error:
        return f"it does not accept its inputs: {error}"
    derived, stated = type_text(value), type_text(node.meta["val"])
    return None if derived == stated else f"it is recorded as {stated}, but gives {derived}"


def describe(node: fx.Node, problem: str, part: str, passes: tuple[str, ...]) -> VerifyError:
    """The error for one node, with all that a person needs to find it."""
    error = VerifyError(f"{part}: {node}: {problem}")
    error.add_note(f"in {module_path(node) or 'the network'}; {source_line(node)}")
    error.add_note(f"after the passes: {', '.join(passes) or 'none'}")
    error.add_note(around(node))
    return error


def relative_error(values: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Greatest difference over greatest magnitude, over all outputs."""
    worst = 0.0
    for one, other in zip(values, expected, strict=True):
        scale = other.double().abs().max().item() or 1.0
        worst = max(worst, (one.double() - other.double()).abs().max().item() / scale)
        if not one.isfinite().all():
            return math.inf
    return worst


def compare(program: Program) -> tuple[float, float] | None:
    """Relative error and SQNR (dB) against eager on the example inputs; None without them."""
    if program.expected is None or not program.examples:
        return None
    with torch.no_grad():
        found = run_program(program, program.examples)
    pairs = zip(found, program.expected, strict=True)
    ratio = min(sqnr_db(other.float().numpy(), one.float().numpy()) for one, other in pairs)
    return relative_error(found, program.expected), ratio


def exact_bound(dtype: torch.dtype) -> float:
    """How far an exact pass may move the output of a network of this dtype (relative)."""
    return 32 * torch.finfo(dtype).eps
