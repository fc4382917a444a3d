"""What kernels over images share: memory with the channels innermost, and codes under one scale.

q = clamp(round(v / s) + z, -128, 127)        v rounded before to the type it would be kept in
"""

from __future__ import annotations

import torch
from torch import Tensor

from effuse.kernels.launch import check, jit, tl
from effuse.kernels.quantize import quantize_reference
from effuse.kernels.rows import narrow, round_even


def quantize_one(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """int8 codes of `values` under one scale (float32) and zero point (int8; None: 0)."""
    zero = torch.zeros(1, dtype=torch.int8, device=values.device) if zero is None else zero
    return quantize_reference(values, scale.reshape(()), zero.reshape(()), 0)


@jit
def to_type(v, TYPE: tl.constexpr):
    """float32 values in the float type of that name."""
    if TYPE == "float16":
        v = narrow(v, tl.float16)
    elif TYPE == "bfloat16":
        v = narrow(v, tl.bfloat16)
    return v


@jit
def to_int8(v, scale, zero):
    """`quantize_one` of float32 values; `scale` and `zero` point to one element."""
    ratio = tl.div_rn(v, tl.load(scale))
    steps = round_even(tl.clamp(ratio, -1024.0, 1024.0))  # saturates all the same
    if zero is not None:
        steps += tl.load(zero).to(tl.float32)
    return tl.clamp(steps, -128.0, 127.0).to(tl.int8)


def type_name(dtype: torch.dtype) -> str:
    """What `to_type` calls a type.

    Raises:
        BackendError: kernels do not keep values in it.
    """
    known = dtype in (torch.float32, torch.float16, torch.bfloat16)
    check(known, f"dtype: expected float32, float16 or bfloat16, got {dtype}")
    return str(dtype).removeprefix("torch.")


def check_innermost(name: str, x: Tensor) -> None:
    """See that the channels of `x` (n, c, …) are innermost in memory, without gaps.

    Raises:
        BackendError: they are not.
    """
    check(
        x.dim() > 1 and x.movedim(1, -1).is_contiguous(),
        f"{name}: expected its channels innermost in memory, got shape {tuple(x.shape)} with "
        f"strides {x.stride()}; call .contiguous(memory_format=torch.channels_last) of an image "
        f"first, .mT.contiguous().mT of (n, c, l)",
    )


def check_vector(name: str, vector: Tensor, size: int, dtype: torch.dtype | None = None) -> None:
    """See that `vector` has `size` elements in a row, of `dtype` if that is given, else floats.

    Raises:
        BackendError: it has not.
    """
    typed = vector.is_floating_point() if dtype is None else vector.dtype == dtype
    check(
        vector.numel() == size and vector.is_contiguous() and typed,
        f"{name}: expected {size} contiguous elements of {dtype or 'a float type'}, got "
        f"{vector.dtype} {tuple(vector.shape)}",
    )


def check_codes(scale: Tensor | None, zero: Tensor | None, prefix: str = "") -> None:
    """See that results can be quantized under `scale` and `zero`.

    Raises:
        BackendError: one of them has several elements or another type, or zero stands alone.
    """
    check(
        scale is not None or zero is None,
        f"{prefix}zero: got a zero point without {prefix}scale; give both or neither",
    )
    if scale is not None:
        check_vector(f"{prefix}scale", scale, 1, torch.float32)
    if zero is not None:
        check_vector(f"{prefix}zero", zero, 1, torch.int8)
