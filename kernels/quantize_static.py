"""effuse::quantize and effuse::dequantize on a GPU: one known scale and zero point for a tensor.

    q = clamp(round(x / scale) + zero_point, qmin, qmax)          x = (q - zero_point) · scale

x of any shape, float; scale and zero_point have one element; q has zero_point's dtype, int8 or
uint8. Arithmetic is float32, to the bit that of kernels/quantize.py, which has the references.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.kernels.launch import Launch, Native, cdiv, check, jit, tl
from effuse.kernels.rows import round_even

BLOCK = 4096


def empty(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """The codes, not filled."""
    return torch.empty_like(x, dtype=zero_point.dtype)


@jit
def quantize_kernel(
    x, scale, zero, codes, elements, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr
):
    """One program: BLOCK elements, in the order of memory."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + at, mask=at < elements, other=0.0).to(tl.float32)
    ratio = tl.div_rn(v, tl.load(scale).to(tl.float32))
    q = tl.clamp(round_even(ratio) + tl.load(zero).to(tl.float32), LOW, HIGH)
    tl.store(codes + at, q.to(codes.dtype.element_ty), mask=at < elements)


def launch(
    results: tuple[Tensor, ...], x: Tensor, scale: Tensor, zero_point: Tensor, axis: int
) -> Launch | None:
    """What fills `results`.

    Raises:
        BackendError: scale or zero_point has several elements, codes are of other types, or memory
            under x has gaps.
    """
    codes = results[0]
    _check(codes, x, scale, zero_point)
    if not x.numel():
        return None
    limits = torch.iinfo(codes.dtype)
    return Launch(
        quantize_kernel,
        (cdiv(x.numel(), BLOCK),),
        {"x": x, "scale": scale, "zero": zero_point, "codes": codes, "elements": x.numel()},
        {"LOW": float(limits.min), "HIGH": float(limits.max), "BLOCK": BLOCK},
    )


@jit
def dequantize_kernel(codes, scale, zero, x, elements, BLOCK: tl.constexpr):
    """One program: BLOCK elements, in the order of memory."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    q = tl.load(codes + at, mask=at < elements, other=0).to(tl.int32)
    v = (q - tl.load(zero).to(tl.int32)).to(tl.float32) * tl.load(scale)
    tl.store(x + at, v, mask=at < elements)


def empty_values(q: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """The values, not filled."""
    return torch.empty_like(q, dtype=scale.dtype)


def launch_values(
    results: tuple[Tensor, ...], q: Tensor, scale: Tensor, zero_point: Tensor, axis: int
) -> Launch | None:
    """What fills `results`.

    Raises:
        BackendError: scale or zero_point has several elements, values or codes are of other types,
            or memory under q has gaps.
    """
    x = results[0]
    _check(q, q, scale, zero_point)
    _check_layout("q", x, q)
    check(x.dtype == torch.float32, f"scale: expected float32, got {x.dtype}")
    if not q.numel():
        return None
    return Launch(
        dequantize_kernel,
        (cdiv(q.numel(), BLOCK),),
        {"codes": q, "scale": scale, "zero": zero_point, "x": x, "elements": q.numel()},
        {"BLOCK": BLOCK},
    )


def _check(codes: Tensor, x: Tensor, scale: Tensor, zero_point: Tensor) -> None:
    for name, tensor in (("scale", scale), ("zero_point", zero_point)):
        check(
            tensor.numel() == 1,
            f"{name}: expected one element for the whole tensor, got {tuple(tensor.shape)}; the "
            f"reference takes one for each channel",
        )
    check(
        codes.dtype in (torch.int8, torch.uint8),
        f"zero_point: expected int8 or uint8, got {codes.dtype}",
    )
    _check_layout("x", codes, x)


def _check_layout(name: str, result: Tensor, given: Tensor) -> None:
    check(
        result.stride() == given.stride(),  # torch keeps the strides of a tensor without gaps
        f"{name}: expected memory without gaps, got shape {tuple(given.shape)} with strides "
        f"{given.stride()}; call .contiguous() first",
    )


NATIVE = Native(empty, launch)
VALUES = Native(empty_values, launch_values)
