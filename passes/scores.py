"""Attention scores in powers of two (kernels/log2_attention.py), in the place of float ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from effuse.graph import calls, emit, substitute, value_of
from effuse.kernels import log2_attention as log2_attention  # registers the op
from effuse.log import Log
from effuse.plan import Depends
from effuse.rates import dependences

aten, ops = torch.ops.aten, torch.ops.effuse

RULE = "attention scores"


def quantize_scores(graph: fx.Graph, sources: Mapping[str, Depends], bits: int, log: Log) -> None:
    """Every scaled_dot_product_attention -> attention_log2 of so many bits.

    Where the keys come from the prompt alone, the first of them is its start token, whose scores
    stay as they are.
    """
    depends = dependences(graph, sources)
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        if reason := _unfit(node):
            log.reject(RULE, reason)
        elif log.spend(RULE):
            start = int(_cross(node, depends) and value_of(node.args[1]).shape[-2] > 1)  # type: ignore[arg-type]
            with graph.inserting_before(node):
                new = emit(
                    graph, ops.attention_log2.default, *_arguments(node), bits, start, like=node
                )
            substitute(node, new)


def _unfit(node: fx.Node) -> str | None:
    """Why an attention keeps its scores, or None."""
    if (len(node.args) > 4 and node.args[4]) or node.kwargs.get("dropout_p"):
        return "dropout"
    if node.kwargs.get("enable_gqa"):
        return "heads that share keys"
    return None


def _cross(node: fx.Node, depends: Mapping[fx.Node, Depends]) -> bool:
    """Whether the keys are of the prompt and not of the latent."""
    key = depends[node.args[1]]  # type: ignore[index]
    return bool(key & Depends.PROMPT) and not key & Depends.LATENT


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    """Query, key, value, mask, causal and scale."""
    given = (*node.args, *((None, 0.0, False)[len(node.args) - 3 :]))
    mask = node.kwargs.get("attn_mask", given[3])
    causal = bool(node.kwargs.get("is_causal", given[5]))
    scale = node.kwargs.get("scale") or value_of(node.args[0]).shape[-1] ** -0.5  # type: ignore[arg-type]
    return (*given[:3], mask, causal, scale)
