"""Regions that torch.export keeps as graphs of their own, for a mode of torch, put in line.

`torch.no_grad()` changes no value, and neither does autocast where it is off, meant for another
device, or to the dtype that there is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from effuse.errors import CaptureError
from effuse.graph import source_line

higher = torch.ops.higher_order


def inline_modes(module: fx.GraphModule, device: str = "cpu") -> None:
    """Put every such region of a graph in its place, those within others first.

    Raises:
        CaptureError: autocast is on in one, and would round what the network computes.
    """
    for node in list(module.graph.nodes):
        if node.target is higher.wrap_with_autocast:
            kind, dtype, enabled = node.args[:3]
            if enabled and kind == device and dtype not in (None, torch.float32):
                raise CaptureError(
                    f"forward turns autocast to {dtype} on at {source_line(node)}; convert the "
                    "network to that dtype instead"
                )
            inline(module, node, node.args[4], node.args[5:], device)
        elif node.target is higher.wrap_with_set_grad_enabled:
            inline(module, node, node.args[1], node.args[2:], device)


def inline(
    module: fx.GraphModule, call: fx.Node, inner: Any, args: tuple[Any, ...], device: str
) -> None:
    """The nodes of the region `inner` in place of its call."""
    region = getattr(module, str(inner.target))
    inline_modes(region, device)
    places = (node for node in region.graph.nodes if node.op == "placeholder")
    mapping: dict[fx.Node, Any] = dict(zip(places, args, strict=True))
    with module.graph.inserting_before(call):
        for node in region.graph.nodes:
            if node.op == "output":
                results = fx.map_arg(node.args[0], mapping.__getitem__)
            elif node.op != "placeholder":
                mapping[node] = module.graph.node_copy(node, mapping.__getitem__)
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(results[user.args[1]])
            module.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(results[0] if isinstance(results, (list, tuple)) else results)
    module.graph.erase_node(call)
