"""The OpenVINO back end: one ONNX model per program and variant, weights stored once beside them.

OpenVINO reads ONNX as it is. Its low-precision transformations take Q/DQ pairs with stored scales
for integer convolutions and linears (uint8 in, int8 weights), so quantized layers stay pairs;
weights in groups of 4 bits become MatMulNBits, which it keeps in 4 bits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from onnxscript import opset21 as op
from torch import fx

from effuse.backends import onnx_ops
from effuse.backends.onnx import strip, to_model
from effuse.backends.onnx_complex import check_outputs, pair_ends, widen_pairs
from effuse.backends.onnx_integer import (
    NATIVE,
    STORED,
    bind_nbits,
    looked_up,
    restore_weights,
    unsupported,
)
from effuse.backends.openvino_attention import ATTENTION, share_transposes, write_attention
from effuse.backends.openvino_ranges import merge_ranges
from effuse.backends.openvino_sums import float_sums
from effuse.backends.openvino_tables import join_tables
from effuse.devices import BRAIN
from effuse.errors import BackendError, require
from effuse.graph import calls, clone, eliminate, emit, emit_weight, substitute, value_of
from effuse.kernels.low_bit import widen_reference
from effuse.kernels.quantizers import parse_quantizer
from effuse.onnx_store import Store
from effuse.openvino_run import EXTRA, Settings, open_session, write_settings
from effuse.passes.quantize_sites import SITES
from effuse.passes.quantize_writer import DYNAMIC
from effuse.plan import ProgramSpec, factor_axes
from effuse.program import Part, Program
from effuse.runtime import Session
from effuse.weights import WeightStore, copied

aten, ops = torch.ops.aten, torch.ops.effuse

LAYOUT = (
    aten.reshape.default, aten.view.default, aten.permute.default, aten.transpose.int,
    aten.flatten.using_ints, aten.unflatten.int, aten.unsqueeze.default, aten.squeeze.dim,
)  # fmt: skip


def adapt(program: Program) -> Program:
    """What the back end changes before it is checked: roundings that its kernels do not ask for."""
    return merge_ranges(float_sums(program))


def absent(target: str | None) -> str | None:
    """Why what was built for `target` does not run here: it does."""
    return None


def available() -> str | None:
    """Why this back end cannot be used here, or None."""
    needed = {"onnx": "compiler", "onnx_ir": "compiler", "onnxscript": "compiler", EXTRA: EXTRA}
    for module, extra in needed.items():
        try:
            require(module, extra)
        except ImportError as error:
            return str(error)
    return None


def build(
    program: Program, folder: Path, progress: Any = lambda what, done, total: None,
    target: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `<part>.onnx` for every part, `weights.safetensors` and `openvino.json`.

    Raises:
        BackendError: OpenVINO would not compute what the program says.
    """
    check_outputs(program, "openvino")
    store = Store()
    models, groups = {}, {}
    for number, part in enumerate(program.parts):
        progress("export to ONNX", number, len(program.parts))
        models[part.name], groups[part.name] = export_part(part, program)
        store.take(models[part.name])
    adapters = require("onnx_ir.tensor_adapters")
    for name in swappable_names(program):
        store.add(name, adapters.TorchTensor(program.weights[name].contiguous(), name=name))
    store.write(folder / "weights.safetensors")
    for name, model in models.items():
        store.save(model, folder / f"{name}.onnx")
    grouped = {name: size for name, size in groups.items() if size}
    precision = "bf16" if (target or "").endswith(BRAIN) else "f32"
    write_settings(folder, Settings(precision, grouped))
    progress("export to ONNX", len(program.parts), len(program.parts))
    return {}


def swappable_names(program: Program) -> set[str]:
    """The weights that LoRAs are made of: factors, and the vectors that others were scaled by."""
    found = {
        name for slot in program.adapters for name in (slot.down, slot.up, slot.rows, slot.columns)
    }
    return found - {""}


def export_part(part: Part, program: Program) -> tuple[Any, int]:
    """One part as an onnx_ir model; the size of the groups in which inputs are rounded, or 0.

    The adapters' factors are inputs of any rank.
    """
    graph, _ = clone(part.graph)
    own = copied(program.weights)
    prepare(graph, own)
    if reason := unfit(graph) or wide_slot(graph, factor_axes(program.adapters)):
        raise BackendError(f"openvino: {reason} (in the part {part.name!r})")
    lowered = Part(part.name, part.depends, graph, part.outputs)
    model, _ = to_model(lowered, own, program.adapters, OURS, "openvino")
    strip(model)
    return model, group_of(graph)


def prepare(graph: fx.Graph, weights: WeightStore) -> None:
    """Rewrite a copy of a part for OpenVINO; exact."""
    onnx_ops.idle_squeezes(graph)
    pair_ends(graph)
    widen_pairs(graph)
    join_tables(graph, weights)
    lift_pairs(graph)
    write_attention(graph)
    share_transposes(graph)
    store_widened(graph, weights)
    bind_nbits(graph, weights)
    restore_weights(graph)
    eliminate(graph)


def lift_pairs(graph: fx.Graph) -> None:
    """dequantize(quantize(layout(x))) -> layout(dequantize(quantize(x))), of one scale.

    OpenVINO does so itself, and where a sum comes before leaves types behind that its folding of
    constants then stumbles over: `Check 'convert->constant_fold(…)' failed`. Behind attention they
    stay: its kernel writes the layout that is read, if nothing comes between.
    """
    for node in calls(graph, ops.dequantize.default):
        steps: Any = node.args[0]
        if steps.target is not ops.quantize.default or value_of(steps.args[1]).dim():
            continue
        source, moves = steps.args[0], []
        while source.target in LAYOUT:
            moves.append(source)
            source = source.args[0]
        if not moves or source.target is ATTENTION:
            continue
        with graph.inserting_before(node):
            codes = emit(graph, steps.target, source, *steps.args[1:], like=steps)
            new = emit(graph, node.target, codes, *node.args[1:], like=node)
            for move in reversed(moves):
                new = emit(graph, move.target, new, *move.args[1:], like=move)
        substitute(node, new)


def store_widened(graph: fx.Graph, weights: WeightStore) -> None:
    """4-bit weights that meet 8-bit inputs, as int8: of computed ones it makes float32."""
    for site in calls(graph, *SITES):
        if not all(each.target is ops.dequantize.default for each in site.args[:2]):  # type: ignore[union-attr]
            continue
        codes: Any = site.args[1].args[0]  # type: ignore[union-attr]
        if codes.target is ops.widen.default:
            packed, bits, shape = codes.args
            whole = widen_reference(weights[packed.target], bits, shape)
            with graph.inserting_before(codes):
                substitute(codes, emit_weight(graph, weights, f"{packed.target}.whole", whole))


def unfit(graph: fx.Graph) -> str | None:
    """What OpenVINO has no low-bit form for, and what else there is; or None."""
    if missing := unsupported(graph):
        return (
            f"it computes nothing with {missing}; the nearest formats that it has are "
            f"{', '.join(NATIVE + STORED)}; or study this one with backend='reference'"
        )
    by_step = any(looked_up(node) for node in calls(graph, ops.dequantize.default))
    if by_step or calls(graph, *DYNAMIC):
        when = "looked up by step" if by_step else "found at run time"
        return (
            f"ranges of 8-bit activations are {when}, and its integer kernels take stored ones "
            "only; set activations='static', or build for backend='onnx'"
        )
    if len(sizes := groups_of(graph)) > 1:
        return (
            f"it rounds the inputs of linear layers in groups of one size, and there are "
            f"{sorted(sizes)}; give all layers of a part one format"
        )
    return None


def wide_slot(graph: fx.Graph, swappable: Collection[str]) -> str | None:
    """Why a factor of open rank cannot be run, or None."""
    for node in calls(graph, ops.project_conv.default):
        matrix: Any = node.args[1]
        if matrix.target in swappable and not is_plain(value_of(matrix).shape, *node.args[2:4]):
            return (
                "its convolutions take no weights of open size, as LoRAs' are: leave the slot "
                f"{str(matrix.target)!r} out (Lora(convolutions=False)), or build for "
                "backend='onnx'"
            )
    return None


def is_plain(shape: Sequence[Any], stride: Any, padding: Any) -> bool:
    """Whether a convolution is a linear layer of each pixel."""
    return list(shape[2:]) == [1, 1] and set(stride) == {1} and set(padding) == {0}


def project_conv(x: Any, matrix: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """effuse::project_conv; with factors of open rank, which are 1×1, as a product of matrices."""
    if all(isinstance(size, int) for size in matrix.shape):
        return onnx_ops.project_conv(x, matrix, stride, padding, dilation)
    pixels = op.Reshape(x, op.Constant(value_ints=[0, 0, -1]))
    rows = op.Squeeze(op.CastLike(matrix, x), op.Constant(value_ints=[2, 3]))
    size = op.Concat(
        op.Shape(x, start=0, end=1), op.Constant(value_ints=[-1]), op.Shape(x, start=2), axis=0
    )
    return op.Reshape(op.MatMul(rows, pixels), size)


OURS = {**onnx_ops.TRANSLATIONS, ops.project_conv.default: project_conv}


def groups_of(graph: fx.Graph) -> set[int]:
    """The sizes of groups in which inputs of linear layers are rounded at run time; 0: in none."""
    nodes = calls(graph, ops.linear_nbits.default)
    return {parse_quantizer(str(each.args[5])).group if each.args[5] else 0 for each in nodes}


def group_of(graph: fx.Graph) -> int:
    """The one of `groups_of`."""
    return max(groups_of(graph), default=0)


def load_session(spec: ProgramSpec, folder: Path) -> Session:
    """A Session over the built files."""
    return open_session(spec, folder)


rehearse = load_session
