"""Sums whose first addend is multiplied by 0, and so is not read."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effuse.graph import emit

aten = torch.ops.aten

PRODUCTS: dict[Any, Any] = {
    aten.baddbmm.default: aten.bmm.default,
    aten.addmm.default: aten.mm.default,
}


def without_addend(node: fx.Node) -> fx.Node | None:
    """baddbmm(x, a, b, beta=0) -> alpha · bmm(a, b): x may hold what is no number.

    Attention in diffusers' first form is written so, with nothing for a mask. Where x is multiplied
    by 0 after all, as in ONNX, a NaN in it stays one.
    """
    if node.target not in PRODUCTS or node.kwargs.get("beta", 1) != 0:
        return None
    graph, alpha = node.graph, node.kwargs.get("alpha", 1)
    with graph.inserting_before(node):
        product: fx.Node = emit(graph, PRODUCTS[node.target], *node.args[1:], like=node)
        if alpha != 1:
            product = emit(graph, aten.mul.Tensor, product, alpha, like=node)
    return product
