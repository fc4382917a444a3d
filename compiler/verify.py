"""Checks after every pass: lint, re-derived types, and the numbers against eager.

A graph error carries the node, its module path and source line, the passes so far, and ten lines
of the dump either side.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from effuse.dump import around, type_text
from effuse.errors import VerifyError
from effuse.graph import module_path, outputs, recorded, source_line, typing
from effuse.metrics import CEILING_DB, sqnr_db
from effuse.plan import FORECAST_INPUT, STEP_INPUT, Plan, PlanStep, Rate
from effuse.program import Part, Program, run_program, same_step
from effuse.rates import dependences
from effuse.weights import Weights, peek

SPACES = ("aten", "effuse", "prims")  # where a graph's ops may come from


def verify(program: Program, after: Iterable[str] = ()) -> None:
    """Raise VerifyError for the first thing that is wrong with any part of the program."""
    passes = tuple(after)
    known = {item.name for item in program.inputs} | {STEP_INPUT}
    known |= {FORECAST_INPUT} | {name for slot in program.plan.slots for name in slot.past}
    for part in program.parts:
        for node in part.graph.nodes:
            problem = check_node(node, program, known)
            if problem:
                raise describe(node, problem, part.name, passes)
        if problem := check_part(part, program):
            raise describe(part.graph.output_node(), problem, part.name, passes)
        known |= set(part.outputs) if part.rate < Rate.STEP else set()
    if problem := check_plan(program):
        raise _noted(VerifyError(f"the plan: {problem}"), passes)
    if problem := check_adapters(program):
        raise _noted(VerifyError(f"the slots for LoRAs: {problem}"), passes)


def check_part(part: Part, program: Program) -> str | None:
    """What is wrong with a part as a whole, or None."""
    try:
        part.graph.lint()
    except RuntimeError as error:
        return f"the graph is not well formed: {error}"
    if len(part.outputs) != len(outputs(part.graph)):
        return f"{len(part.outputs)} outputs are named, but {len(outputs(part.graph))} returned"
    found = dependences(part.graph, program.sources)[part.graph.output_node()]
    if found | part.depends != part.depends:
        return f"it is declared {part.depends}, but computes from {found}"
    return None


def check_plan(program: Program) -> str | None:
    """What is wrong with the plan, or None: variants exist, slots are filled before a read."""
    plan, variants = program.plan, {part.name: part for part in program.variants}
    filled: dict[str, list[int]] = {slot.name: [] for slot in plan.slots}
    for index, step in enumerate((PlanStep(plan.default), *plan.steps), start=-1):
        part = variants.get(step.variant)
        if part is None:
            return f"no variant is called {step.variant!r}"
        if problem := check_entry(step, part, program) or check_sources(index, step, plan, filled):
            return problem
        for name in step.fills:
            filled[name].insert(0, index)
    return None


def check_adapters(program: Program) -> str | None:
    """What is wrong with the layers' swappable factors, or None."""
    for each in program.adapters:
        if not each.down:
            continue
        if missing := {each.down, each.up, each.rows, each.columns} - {"", *program.weights}:
            return f"{each.path}: no weight is called {', '.join(sorted(missing))}"
        down, up = (peek(program.weights, name).shape for name in (each.down, each.up))
        if (up[0], *down[1:]) != each.shape or up[1] != down[0]:
            return f"{each.path} {each.shape}: D is {tuple(down)} and U {tuple(up)}"
    return None


def check_entry(step: PlanStep, part: Part, program: Program) -> str | None:
    """What is wrong between one step of the plan and the variant that it runs, or None."""
    slots = {slot.name for slot in program.plan.slots}
    read = {s.name for s in program.plan.slots if set(s.past) & set(part.inputs)}
    if missing := set(program.outputs) - set(part.outputs):
        return f"{part.name} does not give {', '.join(sorted(missing))}"
    if missing := set(step.fills) - (slots & set(part.outputs)):
        return f"{part.name} does not fill {', '.join(sorted(missing))}"
    if missing := read - set(step.reads):
        return f"{part.name} reads {', '.join(sorted(missing))}, which the plan does not say"
    return None


def check_sources(
    index: int, step: PlanStep, plan: Plan, filled: Mapping[str, list[int]]
) -> str | None:
    """What is wrong with what a step reads, given the steps that `filled` each slot; or None."""
    for slot in plan.slots:
        if slot.name not in step.reads:
            continue
        last = tuple(filled[slot.name][: len(step.sources) or 1])
        if not last or (step.sources and last != step.sources):
            return (
                f"step {index} reads {slot.name} of {step.sources or 'an earlier step'}, but the "
                f"last steps that fill it are {last}"
            )
        if len(step.sources) > slot.depth or len(step.weights) not in (0, slot.depth):
            return f"step {index} reads more of {slot.name} than the {slot.depth} values kept"
    return None


def check_node(node: fx.Node, program: Program, known: Collection[str]) -> str | None:
    """What is wrong with a node of a part that may read the values of `known` names, or None."""
    if node.op == "output":
        return None
    if node.op not in ("placeholder", "get_attr", "call_function"):
        return f"a {node.op} is not allowed here"
    if "val" not in node.meta:
        return "it carries no recorded value"
    if node.op == "placeholder":
        return None if node.target in known else f"nothing before it gives {node.target!r}"
    if node.op == "get_attr":
        return check_weight(node, program.weights)
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in SPACES:
            return f"an op of the namespace {node.target.namespace!r} is not allowed here"
        if node.target._schema.is_mutable:
            return "it writes in place"
    return check_type(node)


def check_weight(node: fx.Node, weights: Weights) -> str | None:
    """What is wrong with a node that reads a weight, or None."""
    if str(node.target) not in weights:
        return f"no weight is called {node.target!r}"
    stored, stated = type_text(peek(weights, str(node.target))), type_text(node.meta["val"])
    return None if stored == stated else f"it is recorded as {stated}, but stored as {stored}"


def check_type(node: fx.Node) -> str | None:
    """Re-derive the node's shape and dtype from its inputs' recorded values."""
    try:
        with typing(node.graph):
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
    _noted(error, passes).add_note(around(node))
    return error


def _noted(error: VerifyError, passes: tuple[str, ...]) -> VerifyError:
    error.add_note(f"after the passes: {', '.join(passes) or 'none'}")
    return error


def relative_error(values: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> float:
    """Greatest difference over greatest magnitude, over all outputs; infinite if shapes differ."""
    worst = 0.0
    for one, other in zip(values, expected, strict=True):
        if one.shape != other.shape or not (one.isfinite().all() and other.isfinite().all()):
            return math.inf
        if one.numel() == 0:
            continue
        scale = doubled(other).abs().max().item() or 1.0
        worst = max(worst, (doubled(one) - doubled(other)).abs().max().item() / scale)
    return worst


def doubled(value: torch.Tensor) -> torch.Tensor:
    """The numbers in double precision, complex ones as pairs: a cast would drop half of each."""
    return (torch.view_as_real(value.resolve_conj()) if value.is_complex() else value).double()


def compare(program: Program) -> tuple[float, float] | None:
    """Relative error and SQNR (dB) against eager on the example inputs; None without them."""
    if program.expected is None or not program.examples:
        return None
    with torch.no_grad():
        found = run_program(program, program.examples)
    if [type_text(value) for value in found] != [type_text(value) for value in program.expected]:
        return math.inf, -CEILING_DB
    pairs = zip(found, program.expected, strict=True)
    ratio = min(sqnr_db(doubled(other).numpy(), doubled(one).numpy()) for one, other in pairs)
    return relative_error(found, program.expected), ratio


def check_variants(program: Program) -> str | None:
    """What is wrong with the variants that read slots, or None.

    Fed with slots that the default variant fills at the same step, each has to give what the
    default variant gives, to the dtype's rounding.
    """
    past = {name for slot in program.plan.slots for name in slot.past}
    reading = [part for part in program.variants if part.exact and past & set(part.inputs)]
    if not reading or not program.examples:
        return None
    with torch.no_grad():
        values = same_step(program, program.examples)
        expected = run_program(program, program.examples)
        for part in reading:
            error = relative_error(run_program(program, values, variant=part.name), expected)
            if error > exact_bound(getattr(torch, program.model["dtype"])):
                return f"{part.name}, fed with the same step's slots, is off by {error:.1e}"
    return None


def exact_bound(dtype: torch.dtype) -> float:
    """How far an exact pass may move the output of a network of this dtype (relative)."""
    return 32 * torch.finfo(dtype).eps
