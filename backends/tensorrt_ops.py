"""How parts are written for TensorRT's parser: standard ops, explicit types, stored low-bit codes.

Weights lie as the engine multiplies them, (in, out) for a linear, in their own types:

    int8, e4m3 by channel    dequantize(W, s, axis=out)
    int4 by group            dequantize(W, s, axis=in, block_size=group)
    NVFP4                    dequantize(W, dequantize(s_e4m3, s_float32), axis=in, block_size=16)

The exporter sees codes as bytes; `retype` then says what they are. Convolutions that no 8-bit input
meets have float weights: TensorRT has none with weights alone in few bits. Scales are of the type
that is multiplied in, for networks are strongly typed.
"""

from __future__ import annotations

import re
from typing import Any

import ml_dtypes
import torch
from onnxscript import opset21 as op
from torch import fx

from effuse.backends.onnx_ops import TRANSLATIONS as RUNTIME
from effuse.backends.onnx_ops import idle_squeezes
from effuse.backends.tensorrt_half import halve_layers
from effuse.backends.tensorrt_lower import uncast
from effuse.errors import require
from effuse.graph import calls, cast, eliminate, emit, emit_weight, substitute, value_of
from effuse.kernels import packing
from effuse.kernels.grids import decode
from effuse.kernels.low_bit import unpack_reference, widen_reference
from effuse.kernels.quantize import dequantize_reference
from effuse.kernels.quantizers import parse_quantizer
from effuse.passes.quantize_sites import CONVS
from effuse.weights import WeightStore

aten, ops = torch.ops.aten, torch.ops.effuse

CODES = re.compile(r"(?:.*__)?(int4|e4m3|e2m1)__codes(?:\.[0-9a-f]+)?")
TYPES = {
    "int4": ml_dtypes.int4,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
FLOAT4_OPSET, FLOAT4_IR = 23, 11  # that have e2m1; nothing else here changed since opset 21


def quantize_e4m3(x: Any, scale: Any, zero: Any, quantizer: str) -> Any:
    """effuse::fake_quantize of e4m3 under one stored scale."""
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)


def unpack(codes: Any, scale: Any, zero: Any, over: Any, quantizer: str, shape: Any) -> Any:
    """effuse::unpack of codes that `prepare` has laid out."""
    how = parse_quantizer(quantizer)
    if how.scale == "e4m3":
        blocks = op.DequantizeLinear(scale, over)
        return op.DequantizeLinear(codes, blocks, axis=1, block_size=how.group)
    if how.group:
        return op.DequantizeLinear(codes, scale, axis=0, block_size=how.group)
    return op.DequantizeLinear(codes, scale, axis=0 if len(shape) > 2 else 1)


TRANSLATIONS: dict[Any, Any] = {
    key: RUNTIME[key]
    for key in (
        aten.copy.default,
        aten.group_norm.default,
        ops.quantize.default,
        ops.dequantize.default,
    )
} | {ops.fake_quantize.default: quantize_e4m3, ops.unpack.default: unpack}


def prepare(graph: fx.Graph, weights: WeightStore, half: bool = False) -> None:
    """Rewrite a copy of an adapted part for TensorRT's parser; exact, but for `half`: float16."""
    idle_squeezes(graph)
    layout = Layout(graph, weights)
    for node in calls(graph, ops.project.default):
        layout.project(node)
    for node in calls(graph, ops.project_conv.default):
        layout.project_conv(node)
    if half:
        halve_layers(graph, weights)
        eliminate(graph)
    for node in calls(graph, ops.fake_quantize.default):
        layout.zero(node)
    for node in calls(graph, aten.linear.default):
        layout.linear(node)
    for node in calls(graph, *CONVS):
        layout.convolution(node)
    eliminate(graph)


class Layout:
    """Lays out the weights of one graph."""

    def __init__(self, graph: fx.Graph, weights: WeightStore) -> None:
        self._graph = graph
        self._weights = weights

    def zero(self, node: fx.Node) -> None:
        """A zero point of e4m3, from which a parser tells the type; the scale in the value's."""
        with self._graph.inserting_before(node):
            node.update_arg(1, self._scale(node.args[1], value_of(node).dtype))
            node.update_arg(2, self._weight("zero.e4m3.codes", torch.zeros((), dtype=torch.uint8)))

    def linear(self, site: fx.Node) -> None:
        """linear(x, dequantize(W)) -> matmul(x, dequantize(Wᵀ)) + b."""
        x, given, *rest = site.args
        weight = uncast(given)
        if weight.target not in (ops.dequantize.default, ops.unpack.default):
            return
        with self._graph.inserting_before(site):
            stored = weight.target is ops.dequantize.default
            dtype = value_of(site).dtype
            real = self._int8_of(weight, dtype) if stored else self._unpacked(weight, dtype)
            real = cast(real, dtype)
            new = emit(self._graph, aten.matmul.default, x, real, like=site)
            if rest and rest[0] is not None:
                new = emit(self._graph, aten.add.Tensor, new, rest[0], like=site)
        substitute(site, new)

    def convolution(self, site: fx.Node) -> None:
        """conv(x, dequantize(W)): stored in 8 bits if x is, else in float."""
        weight = uncast(site.args[1])
        if weight.target not in (ops.dequantize.default, ops.unpack.default):
            return
        rounded = uncast(site.args[0]).target in (
            ops.dequantize.default,
            ops.fake_quantize.default,
        )
        dtype = value_of(site).dtype
        with self._graph.inserting_before(site):
            if not rounded:
                new = self._real(weight, dtype)
            elif weight.target is ops.dequantize.default:
                new = self._int8_of(weight, dtype, transposed=False)
            else:
                new = self._by_channel(weight, dtype, transposed=False)
            new = cast(new, dtype)
        site.update_arg(1, new)

    def project(self, node: fx.Node) -> None:
        """project(x, M) -> matmul(x, Mᵀ), Mᵀ stored in the type of x."""
        x, matrix = node.args
        flipped = self._weights[str(matrix.target)].t().to(value_of(node).dtype)  # type: ignore[union-attr]
        with self._graph.inserting_before(node):
            stored = self._weight(factor_name(str(matrix.target)), flipped.contiguous())  # type: ignore[union-attr]
            substitute(node, emit(self._graph, aten.matmul.default, x, stored, like=node))

    def project_conv(self, node: fx.Node) -> None:
        """project_conv(x, M) -> conv2d(x, M), M stored in the type of x."""
        x, matrix, *options = node.args
        real = self._weights[str(matrix.target)].to(value_of(node).dtype)  # type: ignore[union-attr]
        with self._graph.inserting_before(node):
            stored = self._weight(factor_name(str(matrix.target)), real)  # type: ignore[union-attr]
            new = emit(self._graph, aten.conv2d.default, x, stored, None, *options, like=node)
        substitute(node, new)

    def _int8_of(self, weight: fx.Node, dtype: torch.dtype, *, transposed: bool = True) -> fx.Node:
        """A weight of int8 by channel: (in, out) of a linear's, as it is of a convolution's."""
        stored, scale, zeros, _ = weight.args
        codes, name = self._int8(stored), f"{self._name(stored)}.whole"
        if transposed:
            codes, name = codes.t().contiguous(), f"{name}.t"
        kept, axis = self._weight(name, codes), int(transposed)
        made: fx.Node = emit(
            self._graph, ops.dequantize.default, kept, self._scale(scale, dtype), zeros, axis
        )
        return made

    def _unpacked(self, weight: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A packed weight as (in, out)."""
        how = parse_quantizer(str(weight.args[4]))
        if how.grid.bits == 8:
            return self._by_channel(weight, dtype, transposed=True)
        if how.scale == "e4m3":
            return self._nvfp4(weight, dtype)
        scale, name = self._tensor(weight.args[1]), self._name(weight.args[0])
        signed = decode(self._codes(weight), how.grid).to(torch.int8)
        return self._dequantized(
            weight,
            self._weight(f"{name}.t.int4.codes", signed.t().contiguous()),
            self._typed(f"{name}.t.scale", scale.t().contiguous(), dtype),
        )

    def _by_channel(self, weight: fx.Node, dtype: torch.dtype, *, transposed: bool) -> fx.Node:
        codes, name = self._codes(weight), self._name(weight.args[0])
        codes = codes.t() if transposed else codes.reshape(weight.args[5])  # type: ignore[arg-type]
        return self._dequantized(
            weight,
            self._weight(f"{name}.{'t.' * transposed}e4m3.codes", codes.contiguous()),
            self._typed(f"{name}.scale", self._tensor(weight.args[1]).flatten(), dtype),
        )

    def _nvfp4(self, weight: fx.Node, dtype: torch.dtype) -> fx.Node:
        name = self._name(weight.args[0])
        real = self._dequantized(
            weight,
            self._weight(f"{name}.e2m1.codes", self._codes(weight)),
            self._weight(f"{name}.scale.e4m3.codes", self._tensor(weight.args[1])),
            self._typed(f"{name}.over", self._tensor(weight.args[3]), dtype),
        )
        made: fx.Node = emit(self._graph, aten.permute.default, real, [1, 0])
        return made

    def _dequantized(
        self, weight: fx.Node, codes: fx.Node, scale: fx.Node, over: fx.Node | None = None
    ) -> fx.Node:
        shape = list(value_of(codes).shape)
        made: fx.Node = emit(
            self._graph, ops.unpack.default, codes, scale, None, over, weight.args[4], shape
        )
        return made

    def _scale(self, node: Any, dtype: torch.dtype) -> fx.Node:
        return self._typed(str(node.target), self._tensor(node), dtype)

    def _typed(self, name: str, scale: torch.Tensor, dtype: torch.dtype) -> fx.Node:
        """A stored scale in a type, in which it stays positive."""
        least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        kind = str(dtype).removeprefix("torch.")
        return self._weight(f"{name}.{kind}", scale.clamp(min=least).to(dtype))

    def _real(self, weight: fx.Node, dtype: torch.dtype) -> fx.Node:
        """A weight in float, stored so."""
        if weight.target is ops.unpack.default:
            *stored, text, shape = weight.args
            packed, scale, zero, over = (None if n is None else self._tensor(n) for n in stored)
            assert packed is not None and scale is not None
            real = unpack_reference(packed, scale, zero, over, str(text), list(shape))  # type: ignore[arg-type]
        else:
            codes, steps, zeros, _ = weight.args
            numbers = self._tensor(steps), self._tensor(zeros)
            real = dequantize_reference(self._int8(codes), *numbers, 0)
        return self._weight(f"{self._name(weight.args[0])}.real", real.to(dtype))

    def _codes(self, weight: fx.Node) -> torch.Tensor:
        """The codes of a packed weight, uint8 (rows, columns)."""
        packed, _, _, _, text, shape = weight.args
        columns = torch.Size(shape[1:]).numel()  # type: ignore[index,arg-type]
        return packing.unpack(self._tensor(packed), parse_quantizer(str(text)).grid.bits, columns)

    def _int8(self, codes: Any) -> torch.Tensor:
        """The codes of a weight by channel as int8, however they are stored."""
        if codes.target is ops.widen.default:
            packed, bits, shape = codes.args
            return widen_reference(self._tensor(packed), bits, shape)
        return self._tensor(codes)

    def _name(self, node: Any) -> str:
        return str((node.args[0] if node.target is ops.widen.default else node).target)

    def _tensor(self, node: Any) -> torch.Tensor:
        return self._weights[str(node.target)]

    def _weight(self, name: str, value: torch.Tensor) -> fx.Node:
        return emit_weight(self._graph, self._weights, name, value)


def factor_name(name: str) -> str:
    """What the stored form of a low-rank factor is called."""
    return f"{name}.factor"


def retype(model: Any) -> None:
    """Let the bytes that are codes be of the types that they are codes of."""
    ir = require("onnx_ir")
    for name, value in model.graph.initializers.items():
        found = CODES.fullmatch(name)
        if found is None:
            continue
        array, kind = value.const_value.numpy(), TYPES[found[1]]
        typed = array.astype(kind) if found[1] == "int4" else array.view(kind)
        value.const_value = ir.tensor(typed, name=name)
        value.type = ir.TensorType(value.const_value.dtype)
        if found[1] == "e2m1":
            model.opset_imports[""] = FLOAT4_OPSET
            model.ir_version = max(FLOAT4_IR, model.ir_version)
