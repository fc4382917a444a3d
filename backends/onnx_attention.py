"""Attention for ONNX Runtime: every scaled_dot_product_attention as one MultiHeadAttention.

Heads stay side by side in the last axis, so the transposes that split and join them go as well.
Measured on 2 cores, (batch, tokens, heads, width): (4, 256, 32, 8) 8.1 -> 3.2 ms, (2, 256, 6, 64)
1.04 -> 0.73 ms, (4, 1024, 8, 64) 47 -> 35 ms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from effuse.graph import calls, emit, substitute, value_of
from effuse.kernels import attention as attention  # registers the op

aten, ops = torch.ops.aten, torch.ops.effuse

HEADS_FIRST = ((1, 2), (2, 1), (-3, -2), (-2, -3))


def give_one_head(graph: fx.Graph) -> None:
    """sdpa(q, k, v) of (batch, tokens, width) -> the same of one head each; exact.

    ONNX's attention, and the exporter, know no other than (batch, heads, tokens, width).
    """
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        *given, mask, dropout, causal = _arguments(node)
        if any(value_of(each).dim() != 3 for each in given):
            continue
        if isinstance(mask, fx.Node) and value_of(mask).dim() == 3:
            given.append(mask)
        with graph.inserting_before(node):
            query, key, value, *masks = (
                emit(graph, aten.unsqueeze.default, each, 1, like=node) for each in given
            )
            found = emit(
                graph, aten.scaled_dot_product_attention.default, query, key, value,
                *(masks or [mask]), dropout, causal, scale=node.kwargs.get("scale"), like=node,
            )  # fmt: skip
            substitute(node, emit(graph, aten.squeeze.dim, found, 1, like=node))


def fuse_attention(graph: fx.Graph) -> None:
    """sdpa(heads(q), heads(k), heads(v)) -> heads(attention(q, k, v))."""
    for node in calls(graph, aten.scaled_dot_product_attention.default):
        if unfit(node) is None:
            with graph.inserting_before(node):
                joined = _joined(graph, node)
            _replace(graph, node, joined)


def unfit(node: fx.Node) -> str | None:
    """Why an attention stays as it is, or None."""
    query, key, value, mask, dropout, causal = _arguments(node)
    if any(value_of(each).dim() != 4 for each in (query, key, value)):
        return "not batch x heads x tokens x width"
    if value_of(query).dtype != torch.float32:
        return "ONNX Runtime's kernel is for float32"
    if isinstance(mask, fx.Node) and value_of(mask).dtype == torch.bool:
        return "a mask of truth values"
    if isinstance(mask, fx.Node) and _shape(mask)[2:] != (_shape(query)[2], _shape(key)[2]):
        return "a mask that is not batch x heads x tokens x tokens"
    if dropout or node.kwargs.get("enable_gqa"):
        return "dropout, or heads that share keys"
    if causal and str(value_of(query).shape[2]) != str(value_of(key).shape[2]):
        return "causal over unequal numbers of tokens"
    if str(value_of(query).shape[1]) != str(value_of(key).shape[1]):
        return "heads that share keys"
    return None


def _arguments(node: fx.Node) -> tuple[Any, ...]:
    given = (*node.args, *((None, 0.0, False)[len(node.args) - 3 :]))
    names = ("attn_mask", "dropout_p", "is_causal")
    rest = (node.kwargs.get(n, g) for n, g in zip(names, given[3:6], strict=True))
    return (*given[:3], *rest)


def _joined(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """attention(q, k, v) with heads side by side: (n, tokens, heads · width)."""
    query, key, value, mask, _, causal = _arguments(node)
    heads, width = value_of(query).shape[1], value_of(query).shape[3]
    scale = node.kwargs.get("scale") or width**-0.5
    packed = [_packed(graph, each) for each in (query, key, value)]
    made: fx.Node = emit(
        graph, ops.attention.default, *packed, mask, heads, scale, bool(causal), like=node
    )
    return made


def _packed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """(n, heads, tokens, width) -> (n, tokens, heads · width), by undoing where it was done."""
    split: Any = node.args[0] if _swaps_heads(node) else emit(graph, aten.transpose.int, node, 1, 2)
    source = split.args[0] if split.target is aten.reshape.default else None
    n, tokens, heads, width = value_of(split).shape
    if source is not None and _shape(source) == _text((n, tokens, heads * width)):
        return source  # type: ignore[no-any-return]
    joined: fx.Node = emit(graph, aten.flatten.using_ints, split, 2, 3, like=node)
    return joined


def _swaps_heads(node: fx.Node) -> bool:
    if node.target is aten.permute.default:
        return list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and node.args[1:] in HEADS_FIRST


def _shape(node: fx.Node) -> tuple[str, ...]:
    return _text(value_of(node).shape)


def _text(shape: Any) -> tuple[str, ...]:
    return tuple(str(size) for size in shape)


def _replace(graph: fx.Graph, node: fx.Node, joined: fx.Node) -> None:
    """Let the readers of `node` read `joined`, those that join the heads without a detour."""
    for swapped in [user for user in node.users if _swaps_heads(user)]:
        for user in list(swapped.users):
            if user.target is aten.reshape.default and _shape(user) == _shape(joined):
                substitute(user, joined)
    heads, width = value_of(node).shape[1], value_of(node).shape[3]
    with graph.inserting_after(joined):
        split = emit(graph, aten.unflatten.int, joined, -1, [heads, width], like=node)
    with graph.inserting_after(split):
        substitute(node, emit(graph, aten.transpose.int, split, 1, 2, like=node))
