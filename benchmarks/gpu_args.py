"""Random arguments of the kernels that gpu.py times, made on the device that they are for.

Codes are those of Gaussian values (zeros would run faster than a network's numbers do); nibbles of
4-bit weights are uniform. Works on recorded (fake) tensors too: the shapes tell every launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from gpu_rows import Conv, Format, Image, Rowwise, Turn
from gpu_time import Call
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from effuse.kernels import (
    conv_scaled,
    gated,
    group_norm_act,
    linear_packed,
    linear_scaled,
    quantize_rows,
    rotary,
    row_norm,
)
from effuse.kernels.launch import Launch, Native, as_tuple, run_native

Args = tuple[Any, ...]
Work = tuple[Native, Args]  # an op's kernel, and what it is called with
Given = tuple[Tensor, Tensor | None]  # what comes in, and its scales
Weight = tuple[Tensor, Tensor, Tensor | None]  # codes, scales, the scale over them
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def normal(device: Any, *shape: int) -> Tensor:
    """Gaussian values in bfloat16."""
    return torch.randn(shape, device=device, dtype=BF16)


def int8_codes(device: Any, *shape: int) -> Tensor:
    """Codes of Gaussian values whose greatest is about three deviations."""
    return (torch.randn(shape, device=device) * 40).round().clamp(-127, 127).to(torch.int8)


def e4m3_codes(device: Any, *shape: int) -> Tensor:
    """Gaussian values over most of e4m3's range."""
    return (torch.randn(shape, device=device) * 120).clamp(-448, 448).to(E4M3)


def positive(device: Any, *shape: int) -> Tensor:
    """Scales between 0.001 and 0.011."""
    return torch.rand(shape, device=device) * 0.01 + 0.001


def weight_of(format: Format, n: int, k: int, device: Any) -> Weight:
    """Codes, scales, and the scale over them: a weight (N, K) as the kernel takes it."""
    if format.name in ("int8", "fp8"):
        make = int8_codes if format.name == "int8" else e4m3_codes
        return make(device, n, k), positive(device, n), None
    packed = torch.randint(0, 256, (n, k // 2), device=device, dtype=torch.uint8)
    group = int(format.weight.split("/group")[1].split("/")[0])
    if format.name != "nvfp4":
        return packed, positive(device, n, k // group), None
    scales = torch.rand(n, k // group, device=device) * 3 + 0.5
    return packed, scales.to(E4M3).view(torch.uint8), torch.tensor(0.002, device=device)


def given_of(format: Format, m: int, k: int, device: Any) -> Given:
    """What comes in (M, K), as the kernel takes it, and its scales."""
    if not format.given:
        return normal(device, m, k), None
    make = int8_codes if format.given.startswith("int8") else e4m3_codes
    group = format.given.partition("/group")[2].split("/")[0]
    return make(device, m, k), positive(device, m, k // int(group) if group else 1)


def linear(
    format: Format, given: Given, weight: Weight, low: Tensor | None = None,
    up: Tensor | None = None,
) -> Work:  # fmt: skip
    """A linear layer of ours without bias, with or without a branch's second half."""
    codes, scale = given
    packed, w_scale, over = weight
    tail = (None, low, up, None, None)
    if format.name in ("int8", "fp8"):
        args = (codes, scale, None, packed, w_scale, None, *tail, "", 1, BF16)
        return linear_scaled.ROW.native, args
    args = (codes, scale, packed, w_scale, over, *tail, format.weight, "", 1, BF16)
    return linear_packed.ROW.native, args


def random_linear(format: Format, m: int, n: int, k: int, device: Any) -> Work:
    """A linear layer of ours, with everything that it needs."""
    return linear(format, given_of(format, m, k, device), weight_of(format, n, k, device))


def quantize(x: Tensor, quantizer: str, down: Tensor | None = None) -> Work:
    """The codes of x, and a branch's first half."""
    return quantize_rows.ROW.native, (x, None, down, quantizer)


def rowwise(case: Rowwise, device: Any) -> Work:
    """An operation over rows."""
    gates = case.kind in gated.HALVES
    x = normal(device, case.rows, case.columns * (2 if gates else 1))
    if not case.kind:
        return quantize(x, case.quantizer)
    if case.kind not in row_norm.KINDS:
        return gated.ROW.native, (x, None, None, case.kind, case.quantizer)
    weight = None if case.modulated else normal(device, case.columns)
    scale, shift = (normal(device, 1, case.columns) if case.modulated else None for _ in range(2))
    args = (x, weight, None, scale, shift, None, 1e-6, case.kind, 1.0, case.quantizer)
    return row_norm.ROW.native, args


def turn(case: Turn, device: Any) -> Work:
    """A rotary embedding, angles as (tokens, head)."""
    x = normal(device, 1, case.tokens, case.heads, case.head)
    cos, sin = (torch.randn(case.tokens, case.head, device=device) for _ in range(2))
    return rotary.ROW.native, (x, cos, sin, "interleaved", 1)


def image(device: Any, n: int, c: int, side: int, codes: bool = False) -> Tensor:
    """A random image in channels_last memory."""
    make = int8_codes if codes else normal
    return make(device, n, c, side, side).contiguous(memory_format=torch.channels_last)


def group_norm(case: Image, device: Any) -> tuple[Work, Work]:
    """The statistics, and the norm with its SiLU."""
    x = image(device, case.batch, case.channels, case.side)
    weight, bias = (normal(device, case.channels) for _ in range(2))
    scale = torch.tensor([0.03], device=device) if case.codes else None
    zero = torch.tensor([3], device=device, dtype=torch.int8) if case.codes else None
    stats = torch.zeros(case.batch, 32, 2, device=device) + 1
    return (
        (group_norm_act.STATS_ROW.native, (x, 32, 1e-5)),
        (group_norm_act.ROW.native, (x, stats, 32, weight, bias, "silu", scale, zero)),
    )


def convolution(case: Conv, device: Any) -> Work:
    """An int8 convolution with its bias."""
    x = image(device, case.batch, case.inner, case.side, codes=True)
    weight = int8_codes(device, case.outer, case.inner, case.window, case.window)
    weight = weight.contiguous(memory_format=torch.channels_last)
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    scale = torch.tensor([0.02], device=device)
    zero = torch.tensor([5], device=device, dtype=torch.int8)
    pad, bias = case.window // 2, torch.randn(case.outer, device=device)
    one = (x, scale, zero, weight, positive(device, case.outer), sums)
    return conv_scaled.ROW.native, (
        *one, *[None] * 6, bias, None, "", None, None, [case.stride] * 2, [pad] * 2, BF16,
    )  # fmt: skip


def launch_of(work: Work) -> Launch | None:
    """The launch of a kernel for its arguments."""
    native, args = work
    return native.launch(as_tuple(native.empty(*args)), *args)


def launches(makes: Iterable[Callable[[], Iterable[Work]]]) -> list[Launch]:
    """The launches of what would be made, by recorded tensors: they take no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = [launch_of(work) for make in makes for work in make()]
    return [launch for launch in found if launch is not None]


def ours(*works: Work) -> Call:
    """Kernels of ours, one after the other."""
    return lambda: [run_native(native, *args) for native, args in works]


def flat(work: Work) -> tuple[Any, ...]:
    """An op's kernel and its arguments in a row."""
    native, args = work
    return (native, *args)
