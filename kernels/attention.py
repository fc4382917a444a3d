"""Multi-head attention on packed heads, as one op.

    y_h = softmax(s · q_h k_hᵀ + bias_h) v_h,   heads side by side in the last axis

Scores and softmax are float32 in the reference and in ONNX Runtime's MultiHeadAttention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, scale: float, causal: bool
) -> Tensor:
    """q (n, s, heads·d), k (n, t, heads·d), v (n, t, heads·e), bias (n|1, heads|1, s, t)
    -> (n, s, heads·e).
    """
    query, key, value = (_split(each, heads) for each in (q, k, v))
    y = scaled_dot_product_attention(
        query, key, value, attn_mask=bias, is_causal=causal, scale=scale
    )
    return y.transpose(1, 2).flatten(2)


def _split(x: Tensor, heads: int) -> Tensor:
    """(n, tokens, heads · width) -> (n, heads, tokens, width)."""
    n, tokens, width = x.shape
    return x.view(n, tokens, heads, width // heads).transpose(1, 2)


@torch.library.custom_op("effuse::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, scale: float, causal: bool
) -> Tensor:
    """`attention_reference` as a graph op."""
    return attention_reference(q, k, v, bias, heads, scale, causal).contiguous()


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, heads: int, scale: float, causal: bool
) -> Tensor:
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
