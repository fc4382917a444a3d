"""The branch beside a layer, y + U (D x): how both halves are written, and found again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from effuse.graph import emit, emit_weight
from effuse.kernels import low_rank as low_rank  # registers the ops
from effuse.kernels.low_rank import BRANCH
from effuse.passes.quantize_measure import with_branch
from effuse.passes.quantize_writer import options_of
from effuse.weights import WeightStore

aten, ops = torch.ops.aten, torch.ops.effuse


def emit_down(
    graph: fx.Graph, weights: WeightStore, site: fx.Node, name: str, matrix: Tensor
) -> fx.Node:
    """D x for the layer `site`, with D = `matrix` (r, in · kernel) stored as `name`."""
    made: fx.Node
    if site.target is aten.linear.default:
        stored = emit_weight(graph, weights, name, matrix)
        made = emit(graph, ops.project.default, site.args[0], stored)
        return made
    shape = site.args[1].meta["val"].shape  # type: ignore[union-attr]
    stored = emit_weight(graph, weights, name, matrix.reshape(-1, *shape[1:]))
    stride, padding, dilation, _ = options_of(site)
    made = emit(graph, ops.project_conv.default, site.args[0], stored, stride, padding, dilation)
    return made


def emit_up(
    graph: fx.Graph, weights: WeightStore, half: fx.Node, name: str, matrix: Tensor
) -> fx.Node:
    """U h for the half `half` = D x, with U = `matrix` (out, r) stored as `name`."""
    made: fx.Node
    if half.target is ops.project.default:
        made = emit(graph, half.target, half, emit_weight(graph, weights, name, matrix))
        return made
    stored = emit_weight(graph, weights, name, matrix[:, :, None, None])
    made = emit(graph, ops.project_conv.default, half, stored, [1, 1], [0, 0], [1, 1])
    return made


def factor_names(site: fx.Node) -> tuple[str, str] | None:
    """The names of D and U of the branch beside a layer, or None where it has none."""
    total = with_branch(site)
    if total is None:
        return None
    up: Any = next(each for each in total.all_input_nodes if each.target in BRANCH)
    return str(up.args[0].args[1].target), str(up.args[1].target)
