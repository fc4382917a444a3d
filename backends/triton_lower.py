"""Lowers a program to fused ops: low-bit layers with what is around them, each as one kernel.

Rules are data, in stages; a stage's rules are tried on every call in the order of the graph. All
are exact up to rounding: codes are those of the given program wherever its values are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from effuse.backends import triton_convs as convs
from effuse.backends import triton_fuse as fuse
from effuse.backends import triton_linears as linears
from effuse.backends import triton_producers as producers
from effuse.backends import triton_rotary as rotary
from effuse.backends.triton_layout import laid_out
from effuse.backends.triton_match import Editor, Found, Rule, aten, ops, plain_cast
from effuse.errors import BackendError
from effuse.graph import calls, clone, eliminate
from effuse.log import Log
from effuse.passes.quantize_sites import CONVS
from effuse.passes.quantize_writer import DYNAMIC
from effuse.plan import factor_axes
from effuse.program import Program, prune_weights
from effuse.verify import verify
from effuse.weights import copied

Stage = tuple[Rule, ...]

ACTIVATIONS = (aten.gelu.default, aten.silu.default)
STAGES: tuple[Stage, ...] = (
    (
        Rule("plain_cast", (aten._to_copy.default, aten.type_as.default), plain_cast),
        Rule("signed", (ops.quantize.default,), linears.signed),
    ),
    (
        Rule("linear", (aten.linear.default,), linears.linear),
        Rule("conv", CONVS, convs.conv),
        Rule("dynamic", DYNAMIC, linears.dynamic),
    ),
    # beside codes; D goes before smoothing, whose product it reads
    (Rule("down", (ops.project.default,), producers.down),),
    (Rule("smooth", (ops.quantize_rows.default,), producers.smooth),),
    # a layer's epilogue, from the inside out
    (
        Rule("branch", (aten.add.Tensor,), fuse.branch),
        Rule("shortcut", (aten.add.Tensor,), convs.shortcut),
        Rule("activation", ACTIVATIONS, fuse.activated),
        Rule("gate", (aten.mul.Tensor,), fuse.gated_rows),
        Rule("residual", (aten.add.Tensor,), fuse.added),
        Rule("cast", (aten.to.dtype,), fuse.casted),
    ),
    (Rule("planes", fuse.LINEARS, fuse.planes),),
    (
        Rule("rotary", (aten.add.Tensor,), rotary.added),
        Rule("rotary_pairs", rotary.JOINS, rotary.paired),
        Rule("rotary_complex", rotary.MERGES, rotary.complexes),
    ),
    # producers in float, which pay in every program
    (
        Rule("rms", (aten.mul.Tensor,), producers.rms),
        Rule("scale", (aten.mul.Tensor,), producers.scaled),
        Rule("shift", (aten.add.Tensor,), producers.moved),
        Rule("norm_cast", (aten.to.dtype,), producers.narrowed),
        Rule("gated", (aten.mul.Tensor,), producers.halves),
        Rule("group_norm", (aten.silu.default,), convs.group_norm),
    ),
    # and their codes
    (
        Rule("down_float", (ops.project.default,), producers.down_float),
        Rule("producer", (ops.quantize_rows.default,), producers.quantized),
        Rule("requantize", (ops.quantize.default,), convs.recoded),
        Rule("producer", (ops.quantize.default,), convs.coded_norm),
    ),
)


@dataclass(frozen=True)
class Lowered:
    """A lowered program, and by part what every rule did and why it left sites alone."""

    program: Program
    logs: Mapping[str, Log]


def lower(program: Program, stages: Sequence[Stage] = STAGES) -> Lowered:
    """The program with every part rewritten to fused ops; weights that only they read are repacked.

    Fewer `stages` leave more to PyTorch: the first two lower low-bit layers, and fuse nothing.

    Raises:
        VerifyError: a defect of a rule.
    """
    weights, swappable = copied(program.weights), frozenset(factor_axes(program.adapters))
    known: dict[tuple[str, ...], str] = {}
    parts, logs = [], {}
    for part in program.parts:
        edit = Editor(clone(part.graph)[0], weights, swappable, known=known)
        logs[part.name] = edit.log
        parts.append(replace(part, graph=lowered(edit, stages, part.graph)))
    result = prune_weights(replace(program, parts=tuple(parts), weights=weights))
    verify(result, ("lower",))
    return Lowered(result, logs)


def lowered(edit: Editor, stages: Sequence[Stage], like: fx.Graph) -> fx.Graph:
    """The editor's graph, a copy of `like`, by the stages; operands laid out for the kernels."""
    for stage in stages:
        apply(edit, stage)
    eliminate(edit.graph)
    graph, copies = laid_out(edit.graph, edit.weights, like)
    if copies:
        edit.log.rewrites["copy"] += copies
    return graph


def apply(edit: Editor, stage: Stage) -> None:
    """Try a stage's rules on every call, in order, until one of them applies."""
    for node in calls(edit.graph):
        for rule in stage:
            if node.target in rule.targets and not node._erased and rewrite(edit, rule, node):
                break


def rewrite(edit: Editor, rule: Rule, node: fx.Node) -> bool:
    """Apply a rule to one call, if it can be; what it says is counted."""
    found = tried(edit, rule, node)
    if isinstance(found, fx.Node):
        edit.log.rewrites[rule.name] += 1
        if not node._erased:
            edit.replace(node, found)
        return True
    if found:
        edit.log.reject(rule.name, found)
    return False


def tried(edit: Editor, rule: Rule, node: fx.Node) -> Found:
    """What a rule gives for a call; what the kernel refuses is a reason, too."""
    try:
        with edit.graph.inserting_before(node):
            return rule.rewrite(edit, node)
    except BackendError as error:
        return str(error)
