# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What ops over rows end in: values v (…, K) stored, or quantized by row or group, and projected.

    s = amax |v| / limit (1 for a row of zeros)    q = nearest(v / s)    low = v · downᵀ

v has x's dtype. Results are always three: codes (int8 or e4m3) or v itself, (…, K); the scales,
float32 (…, 1) of a token or (…, K/N) of groups; low (…, R) in x's dtype, summed in float32. What
is not asked for is empty, (0,). Codes and scales are those of kernels/quantizers.py, to the bit.
Fusing {smooth, quantize, down-projection} is SVDQuant's (METHODS 1.12).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.kernels.launch import check
from effuse.kernels.quantizers import Quantizer, find_scale, parse_quantizer, to_codes

Results = tuple[Tensor, Tensor, Tensor]

GROUPS = tuple(2**n for n in range(4, 11))
TAKEN = (
    "int8/token/dynamic", "e4m3/token/dynamic",
    *(f"int{bits}/group{size}/dynamic" for bits in (8, 4) for size in GROUPS),
)  # fmt: skip


def row_quantizer(text: str) -> Quantizer | None:
    """The quantizer of a text, None of an empty one.

    Raises:
        BackendError: kernels over rows have no such quantizer.
    """
    how = parse_quantizer(text) if text else None
    check(
        how is None or str(how) in TAKEN,
        f"quantizer: expected int8/token/dynamic, e4m3/token/dynamic, int8/groupN/dynamic or "
        f"int4/groupN/dynamic with N a power of two from {GROUPS[0]} to {GROUPS[-1]}, got "
        f"{text!r}; quantize in an op of its own (effuse::fake_quantize)",
    )
    return how


def finish_reference(values: Tensor, down: Tensor | None, quantizer: str) -> Results:
    """The results for fresh `values` (…, K) in x's dtype; `down` is (R, K) or None."""
    values = values.contiguous()
    low = values.new_empty(0) if down is None else project_rows(values, down)
    how = row_quantizer(quantizer)
    if how is None:
        return values, values.new_empty(0, dtype=torch.float32), low
    scale, _ = find_scale(values, how)
    codes = to_codes(values, scale, None, how)
    return codes.view(_dtype(values, how)), scale, low


def project_rows(values: Tensor, down: Tensor) -> Tensor:
    """values (…, K) · down (R, K)ᵀ in values' dtype, summed in float32."""
    return F.linear(values.float(), down.to(values.dtype).float()).to(values.dtype)


def smoothed(values: Tensor, smooth: Tensor | None) -> Tensor:
    """values · smooth (K,), rounded to values' dtype."""
    return values if smooth is None else (values.float() * smooth.float()).to(values.dtype)


def empty_results(x: Tensor, columns: int, down: Tensor | None, quantizer: str) -> Results:
    """The results for rows of `columns` values made of the rows of `x`, not filled."""
    lead, how = x.shape[:-1], row_quantizer(quantizer)
    low = x.new_empty(0 if down is None else (*lead, down.shape[0]))
    scales: int | tuple[int, ...] = 0
    if how is not None:
        scales = (*lead, columns // how.group if how.group else 1)
    codes = x.new_empty((*lead, columns), dtype=_dtype(x, how))
    return codes, x.new_empty(scales, dtype=torch.float32), low


def _dtype(x: Tensor, how: Quantizer | None) -> torch.dtype:
    if how is None:
        return x.dtype
    return torch.int8 if how.grid.kind == "int" else torch.float8_e4m3fn
