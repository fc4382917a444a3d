"""What the kernel for packed weights can take: checks of shapes and types, which need no values."""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.kernels.launch import check, contiguous
from effuse.kernels.quantizers import Quantizer

TAKEN = ("int4/channel", "int4/groupG", "e2m1/groupG/scale-e4m3", "e2m1/groupG/scale-e8m0")


def check_weight(
    x: Tensor, packed: Tensor, w_scale: Tensor, over: Tensor | None, how: Quantizer
) -> None:
    """See that x (…, K) can be multiplied by a packed weight (N, K / 2) of quantizer `how`.

    Raises:
        BackendError: it cannot; the message names the argument and the way out.
    """
    contiguous(packed=packed, w_scale=w_scale)
    depth, rows = x.shape[-1], packed.shape[0]
    blocks = how.granularity == "channel" or _is_block(how.group)
    check(
        str(how.grid) in ("int4", "e2m1") and how.symmetric and blocks,
        f"weight: expected one of {TAKEN} with G a power of two >= 16, got {str(how)!r}",
    )
    check(
        packed.dtype == torch.uint8
        and depth % 2 == 0
        and tuple(packed.shape) == (rows, depth // 2),
        f"packed: expected uint8 (N, {depth} / 2), half of x's last axis, which is even, got "
        f"{packed.dtype} {tuple(packed.shape)}; pad the columns",
    )
    stored = torch.float32 if how.scale == "float32" else torch.uint8
    shape = (rows, depth // how.group if how.group else 1)
    check(
        w_scale.dtype == stored and tuple(w_scale.shape) == shape,
        f"w_scale: expected {stored} {shape} for {str(how)!r}, got {w_scale.dtype} "
        f"{tuple(w_scale.shape)}; hand over what pack_weight stored",
    )
    check(
        over is None or (over.dtype == torch.float32 and over.numel() == 1),
        "over: expected one float32 element; hand over what pack_weight stored",
    )


def _is_block(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def check_activations(x: Tensor, scale: Tensor | None, how: Quantizer) -> None:
    """See that x (…, K) is what a weight of quantizer `how` can be multiplied by.

    Raises:
        BackendError: it is not; the message names the argument and the way out.
    """
    contiguous(x=x, scale=scale)
    kinds = {torch.int8: "int", torch.float8_e4m3fn: "float"}
    needed = "float16, bfloat16 or float32 without a scale; " + (
        "int8 with one" if how.grid.kind == "int" else "float8_e4m3fn with one"
    )
    codes = scale is not None and kinds.get(x.dtype) == how.grid.kind
    floats = scale is None and x.dtype in (torch.float16, torch.bfloat16, torch.float32)
    check(
        codes or floats,
        f"x: expected {needed} beside {str(how.grid)!r} weights, got {x.dtype} "
        f"{'without' if scale is None else 'with'} a scale; quantize it so, or not at all",
    )
    if scale is not None:
        _check_scale(x, scale)


def _check_scale(x: Tensor, scale: Tensor) -> None:
    depth, count = x.shape[-1], scale.shape[-1]
    grouped = x.dtype == torch.int8 and count > 0 and depth % count == 0
    check(
        scale.dtype == torch.float32
        and scale.shape[:-1] == x.shape[:-1]
        and (count == 1 or (grouped and _is_block(depth // count))),
        "scale: expected float32, one for each row (…, 1) or, of int8, for each group of a power "
        f"of two >= 16 columns, got {scale.dtype} {tuple(scale.shape)} for x {tuple(x.shape)}; "
        "requantize",
    )
