"""Ranges of activations by step made one range over all steps, which OpenVINO's kernels take.

    low = min_g (0 - z_g) · s_g        high = max_g (255 - z_g) · s_g        over groups g of steps

What that costs is recorded, in dB on the examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from effuse.graph import calls, clone, eliminate, emit_weight, inputs, substitute
from effuse.kernels.quantizers import parse_quantizer, scale_of_range
from effuse.metrics import sqnr_db
from effuse.passes.quantize_writer import BIAS_LIMIT
from effuse.plan import STEP_INPUT
from effuse.program import Part, Program, Record, prune_weights, run_program
from effuse.weights import WeightStore, copied

aten, ops = torch.ops.aten, torch.ops.effuse

UINT8, INT32 = torch.uint8, torch.int32
HOW = parse_quantizer("uint8/tensor/asymmetric")
NOTE = "ranges by step became one that covers all steps: OpenVINO takes stored ones only"


def merge_ranges(program: Program) -> Program:
    """The program with one range over all steps wherever there is one for each group of them."""
    weights = copied(program.weights)
    found = [_merged(part, weights) for part in program.parts]
    count = sum(number for _, number in found)
    if not count:
        return program
    changed = replace(program, parts=tuple(part for part, _ in found), weights=weights)
    changed = prune_weights(changed)
    return measured(program, changed, {"ranges": count}, NOTE)


def _merged(part: Part, weights: WeightStore) -> tuple[Part, int]:
    graph, _ = clone(part.graph)
    biases = [
        n for n in calls(graph, ops.dequantize.default) if _dtype(n.args[0], weights) == INT32
    ]
    by_step = [n for n in calls(graph, ops.quantize.default) if _dtype(n.args[2], weights) == UINT8]
    pairs: dict[Any, None] = dict.fromkeys((node.args[1], node.args[2]) for node in by_step)
    for scale, zero in pairs:
        _one_range(graph, weights, scale, zero)
    for node in biases:
        _one_bias(graph, weights, node)
    eliminate(graph)
    for node in inputs(graph):
        if node.target == STEP_INPUT and not node.users:  # it was there for the ranges alone
            graph.erase_node(node)
    return replace(part, graph=graph, exact=part.exact and not pairs), len(pairs)


def table_of(node: object) -> str | None:
    """The name of the stored table of which a value is the row of the step's group, or None."""
    row = node.args[0] if isinstance(node, fx.Node) and node.target is aten.squeeze.dim else None
    if not isinstance(row, fx.Node) or row.target is not aten.index_select.default:
        return None
    stored = row.args[0]
    return str(stored.target) if isinstance(stored, fx.Node) and stored.op == "get_attr" else None


def _one_range(graph: fx.Graph, weights: WeightStore, scale: fx.Node, zero: fx.Node) -> None:
    names = [str(table_of(scale)), str(table_of(zero))]
    steps, offsets = weights[names[0]].double(), weights[names[1]].double()
    low, high = (-offsets * steps).min(), ((255 - offsets) * steps).max()
    for node, name, value in zip((scale, zero), names, scale_of_range(low, high, HOW), strict=True):
        with graph.inserting_before(node):
            substitute(node, emit_weight(graph, weights, f"{name}.merged", value))


def _dtype(node: object, weights: WeightStore) -> torch.dtype | None:
    """The type of a table of steps; None of another value."""
    table = table_of(node)
    return None if table is None else weights[table].dtype


def _one_bias(graph: fx.Graph, weights: WeightStore, node: fx.Node) -> None:
    """The bias in int32 at the scale of the products, which are now the same at all steps."""
    names = [str(table_of(each)) for each in node.args[:2]]
    codes, scales = (weights[name] for name in names)
    finest = int(scales.sum(1).argmin())
    real = codes[finest].double() * scales[finest].double()
    (site,) = node.users
    scale = _stored(site.args[0], weights) * _stored(site.args[1], weights)
    steps = torch.round(real / scale.double()).clamp(-BIAS_LIMIT, BIAS_LIMIT).to(INT32)
    for old, name, value in zip(node.args[:2], names, (steps, scale), strict=True):
        with graph.inserting_before(node):
            new = emit_weight(graph, weights, f"{name}.merged", value)
        node.replace_input_with(old, new)  # type: ignore[arg-type]


def _stored(node: object, weights: WeightStore) -> torch.Tensor:
    """The scale of a dequantized value."""
    assert isinstance(node, fx.Node) and isinstance(node.args[1], fx.Node)
    return weights[str(node.args[1].target)]


def measured(program: Program, changed: Program, rewrites: Mapping[str, int], note: str) -> Program:
    """`changed` with a record of what was changed, and of the cost on the examples."""
    error = ratio = None
    if program.examples:
        with torch.no_grad():
            runs = [run_program(each, program.examples) for each in (program, changed)]
        pairs = zip(*runs, strict=True)
        ratio = min(sqnr_db(one.float().numpy(), two.float().numpy()) for one, two in pairs)
        error, ratio = float(f"{10 ** (-ratio / 20):.2g}"), round(ratio, 1)
    record = Record("openvino", {}, False, rewrites, {}, (note,), error, ratio)
    return replace(changed, records=(*program.records, record))
