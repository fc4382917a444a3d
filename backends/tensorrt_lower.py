"""A program in the arithmetic that TensorRT has: what changes numbers, before what does not.

TensorRT multiplies in 8 bits what a QuantizeLinear and a DequantizeLinear of stored scale come
before, symmetric, one scale for an activation; 4-bit weights meet activations in float. So:

    activation uint8 (s, z), by step or not  ->  int8 under max over the steps of |x̂| / 127
    activation of a layer with 4-bit weights ->  float
    output of a layer that no layer reads in 8 bits  ->  float
    bias int32                               ->  float

What has ranges that are found at run time is refused: a scale is a constant of the engine.
Sources: TensorRT documentation, "Working with Quantized Types"; the parser of onnx-tensorrt.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from effuse.errors import BackendError
from effuse.graph import (
    calls,
    cast,
    clone,
    eliminate,
    emit,
    emit_weight,
    inputs,
    substitute,
    value_of,
)
from effuse.kernels import dynamic as dynamic  # registers the ops
from effuse.kernels import log2_attention as log2_attention
from effuse.kernels import low_bit as low_bit
from effuse.kernels.quantizers import Quantizer, parse_quantizer
from effuse.metrics import sqnr_db
from effuse.passes.quantize_sites import SITES
from effuse.passes.quantize_writer import DYNAMIC
from effuse.plan import STEP_INPUT
from effuse.program import Part, Program, Record, prune_weights, run_program
from effuse.weights import WeightStore, copied

aten, ops = torch.ops.aten, torch.ops.effuse

INT8_HIGH = 127
FORMATS = "w8a8, w8a16, w4a16, fp8 with activations='static', nvfp4"
ACTIVATIONS = ("int8", "uint8", "e4m3")  # grids of which an engine's activations can be
E4M3 = "e4m3/tensor"
NOTES = {
    "symmetric": "activations made symmetric int8: TensorRT has no zero points",
    "by step": "ranges by step became one that covers all steps: an engine's scales are constants",
    "weight only": "activations beside 4-bit weights left in float: TensorRT's are weight-only",
    "outputs": "roundings that no 8-bit layer reads left out",
}


def adapt(program: Program) -> Program:
    """The program in TensorRT's arithmetic; what that costs is recorded, in dB on the examples.

    Raises:
        BackendError: a format that TensorRT has nothing for, with the nearest.
    """
    weights = copied(program.weights)
    counts: Counter[str] = Counter()
    parts = tuple(_adapted(part, weights, counts) for part in program.parts)
    changed = prune_weights(replace(program, parts=parts, weights=weights))
    if not counts:
        return changed
    return replace(changed, records=(*program.records, _record(program, changed, counts)))


def _adapted(part: Part, weights: WeightStore, counts: Counter[str]) -> Part:
    graph, _ = clone(part.graph)
    if missing := unsupported(graph):
        raise BackendError(f"tensorrt: {missing} (in the part {part.name!r})")
    writer = Writer(part.name, graph, weights, counts)
    for site in calls(graph, *SITES):
        writer.activation(site)
        writer.bias(site)
    writer.outputs()
    eliminate(graph)
    for node in inputs(graph):  # what looked scales up by step
        if node.target == STEP_INPUT and not node.users:
            graph.erase_node(node)
    return replace(part, graph=graph, exact=part.exact and not counts)


def _record(program: Program, changed: Program, counts: Counter[str]) -> Record:
    error = ratio = None
    if program.examples:
        with torch.no_grad():
            pairs = zip(
                run_program(program, program.examples),
                run_program(changed, program.examples),
                strict=True,
            )
            ratio = min(sqnr_db(one.float().numpy(), two.float().numpy()) for one, two in pairs)
        error = float(f"{10 ** (-ratio / 20):.2g}")
        ratio = round(ratio, 1)
    notes = tuple(f"{counts[rule]}: {text}" for rule, text in NOTES.items() if counts[rule])
    return Record("tensorrt", {}, False, dict(counts), {}, notes, error, ratio)


# ---- what there is nothing for -------------------------------------------------------------------


def unsupported(graph: fx.Graph) -> str | None:
    """What of a graph TensorRT has nothing for, with the way out, or None."""
    for node in calls(graph, *DYNAMIC):
        return (
            f"the layer {node.name!r} finds the range of its input at run time, and an engine's "
            "scales are constants; quantize with activations='static'"
        )
    for node in calls(graph, ops.attention_log2.default):
        return (
            f"TensorRT has no attention scores in powers of two ({node.args[6]} bits); leave "
            "Quantize(scores=…) out"
        )
    for node in calls(graph, ops.unpack.default):
        how = parse_quantizer(str(node.args[4]))
        if not packs(how):
            return f"TensorRT has no weights {how}; the nearest formats that it has are {FORMATS}"
    reasons = (_no_activation(node) for node in calls(graph, ops.fake_quantize.default))
    return next((reason for reason in reasons if reason), None)


def packs(how: Quantizer) -> bool:
    """Whether TensorRT has weights of this quantizer: int4 by group, e4m3 by channel, NVFP4."""
    if str(how.grid) == "e2m1":
        return how.scale == "e4m3" and how.group == 16
    if how.scale != "float32" or not how.symmetric:
        return False
    if str(how.grid) == "int4":
        return how.granularity == "group"
    return str(how.grid) == "e4m3" and how.granularity == "channel"


def _no_activation(node: fx.Node) -> str | None:
    """Why what a rounding gives cannot be had, or None."""
    how = parse_quantizer(str(node.args[3]))
    if how.grid.bits == 8 and all(weight_only(user) for user in _layers_of(node)):
        return None
    if str(how.grid) not in ACTIVATIONS:
        return f"TensorRT has no activations {how}; the nearest formats that it has are {FORMATS}"
    if how.ranges == "dynamic" or how.granularity != "tensor":
        return (
            f"activations {how} need ranges found at run time, and an engine's scales are "
            "constants, one for a tensor; quantize with activations='static'"
        )
    return None


def _layers_of(node: fx.Node) -> list[fx.Node]:
    """The layers that read a rounded value, directly or as another float type."""
    users = [user for each in node.users for user in ([each] if _is_layer(each) else each.users)]
    return [user for user in users if _is_layer(user)]


def _is_layer(node: fx.Node) -> bool:
    return node.target in SITES


def weight_only(site: fx.Node) -> bool:
    """Whether a layer's weight is of 4 bits that no arithmetic is done in."""
    weight = uncast(site.args[1])
    if weight.target is not ops.unpack.default:
        return False
    return parse_quantizer(str(weight.args[4])).grid.bits < 8


def uncast(node: Any) -> fx.Node:
    """What a value was before it was made another float type."""
    casts = node.target is aten.to.dtype and value_of(node).is_floating_point()
    return uncast(node.args[0]) if casts else node


# ---- the rewrites --------------------------------------------------------------------------------


@dataclass
class Rounding:
    """A value that is rounded: what it was, and the greatest magnitude that the grid reaches."""

    source: fx.Node
    first: fx.Node  # of the nodes that round
    scale: torch.Tensor
    reach: torch.Tensor
    grid: str
    by_step: bool


@dataclass
class Writer:
    """Rewrites the layers of one graph."""

    part: str
    graph: fx.Graph
    weights: WeightStore
    counts: Counter[str]
    _done: dict[tuple[fx.Node, str], fx.Node] = field(default_factory=dict)

    def activation(self, site: fx.Node) -> None:
        """Let a layer read its input rounded as an engine rounds, or in float."""
        found = self._rounding(uncast(site.args[0]))
        if found is None:
            return
        if weight_only(site):
            self.counts["weight only"] += 1
            site.update_arg(0, self._as(found.source, site, found.first))
            return
        key = (found.source, "e4m3" if found.grid == "e4m3" else "int8")
        if key not in self._done:
            self._done[key] = self._rounded(found, value_of(site.args[0]).dtype)  # type: ignore[arg-type]
        site.update_arg(0, self._done[key])

    def bias(self, site: fx.Node) -> None:
        """Make a stored bias of int32 a float."""
        node = site.args[2] if len(site.args) > 2 else None
        given = uncast(node) if isinstance(node, fx.Node) else None
        if given is None or given.target is not ops.dequantize.default:
            return
        (codes, _), (scale, by_step) = (self._stored(each) for each in given.args[:2])
        if by_step:  # the finest, which is the closest to what it was
            row = int(scale.sum(1).argmin())
            codes, scale = codes[row], scale[row]
        real = (codes.double() * scale.double()).to(value_of(site).dtype)
        with self.graph.inserting_before(site):
            new = emit_weight(self.graph, self.weights, f"bias.{self.part}.{site.name}.real", real)
        site.update_arg(2, new)

    def outputs(self) -> None:
        """Take away the roundings that no layer reads in 8 bits."""
        for node in calls(self.graph, ops.dequantize.default):
            steps = node.args[0]
            if node in self._done.values() or not node.users:
                continue
            if isinstance(steps, fx.Node) and steps.target is ops.quantize.default:
                self.counts["outputs"] += 1
                substitute(node, steps.args[0])  # type: ignore[arg-type]

    def _rounding(self, node: fx.Node) -> Rounding | None:
        """How a value was rounded, if it was."""
        if node.target is ops.fake_quantize.default:
            source, scale, zero, text = node.args
            return self._described(node, source, scale, zero, parse_quantizer(str(text)))
        steps = node.args[0] if node.target is ops.dequantize.default else None
        if not isinstance(steps, fx.Node) or steps.target is not ops.quantize.default:
            return None
        source, scale, zero, _ = steps.args
        dtype = str(value_of(steps).dtype).removeprefix("torch.")
        return self._described(steps, source, scale, zero, parse_quantizer(f"{dtype}/tensor"))

    def _described(
        self, first: fx.Node, source: Any, scale: Any, zero: Any, how: Quantizer
    ) -> Rounding:
        if scale is None:  # found at run time: unsupported() has let it through as weight only
            return Rounding(source, first, torch.ones(()), torch.ones(()), str(how.grid), False)
        numbers, by_step = self._stored(scale)
        offset = self._stored(zero)[0].float() if isinstance(zero, fx.Node) else torch.zeros(())
        reach = torch.maximum(offset - how.grid.low, how.grid.high - offset) * numbers
        return Rounding(source, first, numbers, reach, str(how.grid), by_step)

    def _rounded(self, found: Rounding, dtype: torch.dtype) -> fx.Node:
        """The value rounded once, under a constant scale, for all layers that read it so."""
        source = uncast(found.source)
        if found.by_step:
            self.counts["by step"] += 1
        with self.graph.inserting_before(found.first):
            real = cast(source, dtype)
            name = f"scale.{self.part}.{source.name}"
            if found.grid == "e4m3":
                scale = self._weight(f"{name}.e4m3", found.scale.max().float())
                return self._emit(real, ops.fake_quantize.default, real, scale, None, E4M3)
            if found.grid != "int8":
                self.counts["symmetric"] += 1
            scale = self._weight(f"{name}.int8", (found.reach.max() / INT8_HIGH).to(dtype))
            zero = self._weight("zero.int8", torch.zeros((), dtype=torch.int8))
            steps = self._emit(real, ops.quantize.default, real, scale, zero, 0)
            return self._emit(real, ops.dequantize.default, steps, scale, zero, 0)

    def _as(self, source: fx.Node, site: fx.Node, place: fx.Node) -> fx.Node:
        """A value in the type that a layer reads."""
        with self.graph.inserting_before(place):
            return cast(uncast(source), value_of(site.args[0]).dtype)  # type: ignore[arg-type]

    def _emit(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        node: fx.Node = emit(self.graph, target, *args, like=like)
        return node

    def _weight(self, name: str, value: torch.Tensor) -> fx.Node:
        return emit_weight(self.graph, self.weights, name, value)

    def _stored(self, node: Any) -> tuple[torch.Tensor, bool]:
        """The numbers that a node reads; by step, a row of them for each group of steps."""
        if node.op == "get_attr":
            return self.weights[str(node.target)], False
        row = node.args[0] if node.target is aten.squeeze.dim else node
        if row.target is aten.index_select.default and row.args[0].op == "get_attr":
            return self.weights[str(row.args[0].target)], True
        raise BackendError(
            f"tensorrt: {node.name!r}, a scale in the part {self.part!r}, is neither stored nor "
            "looked up by step; please report it with `effuse dump`"
        )
