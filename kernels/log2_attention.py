"""Attention scores in powers of two: most of their values are small, and few are large.

    q = clamp(round(-log2(p / δ)), 0, 2^b - 1)      p̂ = δ · 2^-q                  (METHODS 1.7)

δ is the greatest score but those of the start token, which every query attends to and which is kept
as it is. Powers of two are no closer at any b, and rounding them is not without bias: p̂ / p is 2^u,
u uniform on ±½, of mean 1.020, so that rows sum to 2 % too much (the sheet's bound of 1 % at 16
bits cannot hold). Source: DGQ (ugonfor/DGQ).
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.errors import InputError

LEAST = 2.0**-126  # the least normal float32, in place of δ = 0


def log2_round_trip(p: Tensor, bits: int, delta: Tensor | float) -> Tensor:
    """Scores quantized to δ · 2^-q and back, float32; 0 becomes the least value of the grid.

    Args:
        p: scores ≥ 0, any shape.
        bits: of q, 2 to 8: 8 reach under the least float32 of most δ.
        delta: δ ≥ 0, broadcast over `p`; greater scores become δ.

    Raises:
        InputError: `bits` is out of range.
    """
    if not 2 <= bits <= 8:
        raise InputError(f"bits: expected 2 to 8, came {bits}; more only reach under float32")
    delta = torch.as_tensor(delta, dtype=torch.float32, device=p.device)
    share = p.float() / delta.clamp(min=LEAST)
    return delta * torch.exp2(-torch.round(-torch.log2(share)).clamp(0, 2**bits - 1))


def score_range(p: Tensor, start: int = 1) -> Tensor:
    """δ of each prompt: the greatest score behind the first `start` keys, (batch, 1, …).

    Args:
        p: scores (batch, …, keys).
        start: keys that are left out.

    Raises:
        InputError: no key is left.
    """
    if not 0 <= start < p.shape[-1]:
        raise InputError(
            f"start: expected 0 to {p.shape[-1] - 1}, fewer than the keys, came {start}"
        )
    return p[..., start:].float().amax(dim=tuple(range(1, p.dim())), keepdim=True)


def quantize_scores(p: Tensor, bits: int, start: int = 1) -> Tensor:
    """Scores of `p` (batch, …, keys) quantized under each prompt's own δ, in its dtype.

    The first `start` keys stay as they are, to the bit.

    Raises:
        InputError: `bits` is out of range, or no key is left.
    """
    quantized = log2_round_trip(p[..., start:], bits, score_range(p, start))
    return torch.cat([p[..., :start], quantized.to(p.dtype)], dim=-1)


def attention_log2_reference(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, bits: int,
    start: int,
) -> Tensor:  # fmt: skip
    """Attention whose scores are quantized, those of the first `start` keys excepted.

    q (n, …, s, d), k (n, …, t, d), v (n, …, t, e), mask (…, s, t) of bool or added -> (n, …, s, e)
    in q's dtype; scores, and their sums, in float32. A key that is masked out has no score.
    """
    logits = q.float() @ k.float().transpose(-1, -2) * scale
    if causal:
        logits = logits.masked_fill(~_lower(logits), -torch.inf)
    if mask is not None:
        closed = ~mask if mask.dtype == torch.bool else None
        logits = logits + mask.float() if closed is None else logits.masked_fill(closed, -torch.inf)
    out = logits == -torch.inf
    scores = logits.softmax(-1).masked_fill(out, 0)  # of a query without any key: NaN before
    quantized = quantize_scores(scores, bits, start).masked_fill(out, 0)
    return (quantized @ v.float()).to(q.dtype)


def _lower(logits: Tensor) -> Tensor:
    return torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()


@torch.library.custom_op("effuse::attention_log2", mutates_args=())
def attention_log2(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, bits: int,
    start: int,
) -> Tensor:  # fmt: skip
    """`attention_log2_reference` as a graph op."""
    return attention_log2_reference(q, k, v, mask, causal, scale, bits, start).contiguous()


@attention_log2.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float, bits: int,
    start: int,
) -> Tensor:  # fmt: skip
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
