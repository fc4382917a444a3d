"""Group norm of images in channels_last memory, with the activation and the quantization after it.

    group_stats:     μ = mean(x), r = 1 / √(mean((x - μ)²) + ε)        of each image and group
    group_norm_act:  v = act((x - μ) · r · w_c + b_c)
                     v in x's dtype, or clamp(round(v / s) + z, -128, 127) of that

x is float (n, c, …) with its channels innermost in memory: (n, c), (n, c, l) and images. Arithmetic
is float32. The statistics read x once: each lane of a program keeps a mean and a sum of squares
about it (Welford 1962), and the lanes are joined at the end (Chan, Golub and LeVeque 1979), so that
a mean far larger than the deviation does not cancel. ε and the biased variance are as in torch's.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from effuse.kernels.activations import ACTIVATIONS, activate
from effuse.kernels.images import check_codes, check_innermost, check_vector, quantize_one, to_int8
from effuse.kernels.launch import Launch, Native, cdiv, check, define, jit, power_of_two, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.rows import narrow

LANES = 32 * 32  # elements of a warp: 32 in each thread
WIDEST = 1 << 14  # channels of a group, which are in registers together
WARPS, STATS_WARPS = 4, 8  # few programs find statistics, so that each of them reads more at once


def stats_reference(x: Tensor, groups: int, eps: float) -> Tensor:
    """x (n, c, …) -> float32 (n, groups, 2): mean, and one over the standard deviation."""
    parts = x.float().unflatten(1, (groups, -1)).flatten(2)
    count = max(1, parts.shape[-1])
    mean = parts.sum(-1, keepdim=True) / count
    variance = (parts - mean).square().sum(-1) / count
    return torch.stack([mean.squeeze(-1), torch.rsqrt(variance + eps)], -1)


def reference(
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    zero: Tensor | None,
) -> Tensor:
    """x (n, c, …), stats (n, groups, 2), weight and bias (c,) -> x's shape and layout.

    In x's dtype; or int8 codes, where scale (float32, one element) is given; zero: int8, or 0.
    """
    mean, rstd = stats.reshape(*stats.shape[:2], 2, *[1] * (x.dim() - 1)).unbind(2)
    value = ((x.float().unflatten(1, (groups, -1)) - mean) * rstd).flatten(1, 2)
    wide = (-1, *[1] * (x.dim() - 2))
    value = value if weight is None else value * weight.float().view(wide)
    value = value if bias is None else value + bias.float().view(wide)
    value = ACTIVATIONS[activation](value).to(x.dtype)
    if scale is not None:
        value = quantize_one(value, scale, zero)
    return empty(x, stats, groups, weight, bias, activation, scale, zero).copy_(value)


@jit
def stats_kernel(
    stats, x, eps, pixels, channels,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program finds the mean and rstd of one image's group of WIDTH channels."""
    program = tl.program_id(0)
    offset_p, offset_c = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    start = (program // GROUPS).to(tl.int64) * pixels * channels + program % GROUPS * WIDTH
    mean = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    square = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for block in range(tl.cdiv(pixels, BLOCK_P)):
        pixel = block * BLOCK_P + offset_p
        mask = (pixel < pixels)[:, None] & (offset_c < WIDTH)[None, :]
        at = x + start + pixel.to(tl.int64)[:, None] * channels + offset_c[None, :]
        value = tl.load(at, mask=mask, other=0.0).to(tl.float32)
        change = tl.where(mask, value - mean, 0.0)
        mean += change * (1.0 / (block + 1.0))
        square += change * tl.where(mask, value - mean, 0.0)
    seen = (pixels - offset_p + BLOCK_P - 1) // BLOCK_P  # blocks in which a lane had a pixel
    count = tl.where((offset_c < WIDTH)[None, :], seen[:, None], 0).to(tl.float32)
    total = tl.maximum(tl.sum(tl.sum(count, 1), 0), 1.0)
    centre = tl.sum(tl.sum(mean * count, 1), 0) / total
    away = mean - centre
    variance = tl.sum(tl.sum(square + away * away * count, 1), 0) / total
    tl.store(stats + program * 2, centre)
    tl.store(stats + program * 2 + 1, 1.0 / tl.sqrt(variance + eps))


@jit
def apply_kernel(
    y, x, stats, weight, bias, scale, zero, pixels, channels,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program writes BLOCK_P pixels of one image, BLOCK_C channels of them."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    image = tl.program_id(0) // blocks
    pixel = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    row = (image.to(tl.int64) * pixels + pixel)[:, None] * channels
    mask = (pixel < pixels)[:, None] & known[None, :]
    group = stats + (image * GROUPS + channel // WIDTH) * 2
    factor = tl.load(group + 1, mask=known, other=0.0)
    value = tl.load(x + row + channel[None, :], mask=mask, other=0.0)
    kind = value.dtype
    value = value.to(tl.float32) - tl.load(group, mask=known, other=0.0)[None, :]
    if weight is not None:
        factor *= tl.load(weight + channel, mask=known, other=0.0).to(tl.float32)
    value *= factor[None, :]
    if bias is not None:
        value += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    value = narrow(activate(value, ACTIVATION), kind)
    if scale is not None:
        value = to_int8(value.to(tl.float32), scale, zero)
    tl.store(y + row + channel[None, :], value, mask=mask)


def stats_empty(x: Tensor, groups: int, eps: float) -> Tensor:
    """A result of `stats_reference`, not filled."""
    return x.new_empty((x.shape[0], groups, 2), dtype=torch.float32)


def stats_launch(results: tuple[Tensor, ...], x: Tensor, groups: int, eps: float) -> Launch | None:
    """What fills the statistics of `x`.

    Raises:
        BackendError: the groups do not fill the channels, or x is not dense with channels last.
    """
    _check_image(x, groups)
    width = x.shape[1] // groups
    if not results[0].numel():
        return None
    block = power_of_two(width)
    constants = {
        "GROUPS": groups,
        "WIDTH": width,
        "BLOCK_P": power_of_two(_pixels(x), 1, max(1, STATS_WARPS * LANES // block)),
        "BLOCK_C": block,
    }
    args: dict[str, Any] = {"stats": results[0], "x": x, "eps": eps}
    args |= {"pixels": _pixels(x), "channels": x.shape[1]}
    return Launch(stats_kernel, (x.shape[0] * groups,), args, constants, STATS_WARPS)


def empty(
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    zero: Tensor | None,
) -> Tensor:
    """A result of `reference`, not filled."""
    return torch.empty_like(x, dtype=x.dtype if scale is None else torch.int8)


def launch(
    results: tuple[Tensor, ...],
    x: Tensor,
    stats: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    scale: Tensor | None,
    zero: Tensor | None,
) -> Launch | None:
    """What fills the normalized `x`.

    Raises:
        BackendError: the groups do not fill the channels, x is not dense with channels last,
            a parameter has another shape, or the activation is unknown.
    """
    _check_image(x, groups)
    _check_parameters(x, stats, groups, weight, bias)
    check(
        activation in ACTIVATIONS,
        f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}",
    )
    check_codes(scale, zero)
    if not x.numel():
        return None
    channels, pixels = x.shape[1], _pixels(x)
    block_c = power_of_two(channels, 1, 128 if channels % 128 == 0 else 64)
    block_p = power_of_two(pixels, 1, WARPS * LANES // block_c)
    constants = {
        "GROUPS": groups, "WIDTH": channels // groups, "ACTIVATION": activation,
        "BLOCK_P": block_p, "BLOCK_C": block_c,
    }  # fmt: skip
    args = {
        "y": results[0], "x": x, "stats": stats, "weight": weight, "bias": bias, "scale": scale,
        "zero": zero, "pixels": pixels, "channels": channels,
    }  # fmt: skip
    grid = (x.shape[0] * cdiv(pixels, block_p), cdiv(channels, block_c))
    return Launch(apply_kernel, grid, args, constants, WARPS)


def _pixels(x: Tensor) -> int:
    return prod(x.shape[2:])


def _check_image(x: Tensor, groups: int) -> None:
    check(
        x.dim() > 1 and x.is_floating_point(),
        f"x: expected floats of shape (n, c, …), got {x.dtype} {tuple(x.shape)}",
    )
    check_innermost("x", x)
    check(
        groups > 0 and x.shape[1] % groups == 0,
        f"groups: expected a divisor of the {x.shape[1]} channels, got {groups}",
    )
    check(
        x.shape[1] <= WIDEST * groups,
        f"groups: expected at most {WIDEST} channels in a group, got {x.shape[1] // groups}; "
        f"normalize in float by the unfused op",
    )


def _check_parameters(
    x: Tensor, stats: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None
) -> None:
    shape = (x.shape[0], groups, 2)
    check(
        tuple(stats.shape) == shape and stats.dtype == torch.float32 and stats.is_contiguous(),
        f"stats: expected contiguous float32 {shape} of group_stats, got {stats.dtype} "
        f"{tuple(stats.shape)}",
    )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_vector(name, vector, x.shape[1])


def _layouts(generator: torch.Generator) -> list[tuple[Tensor, int]]:
    """Float tensors with their channels innermost, and groups for them."""
    image = torch.randn(2, 6, 5, 7, generator=generator) * 3 + 2
    tokens = torch.randn(2, 9, 8, generator=generator).mT
    return [
        (image.to(memory_format=torch.channels_last), 2),
        (image.half().to(memory_format=torch.channels_last), 3),
        (tokens.bfloat16(), 4),
        (torch.randn(3, 12, generator=generator), 4),
        (torch.randn(0, 4, 2, 2, generator=generator).to(memory_format=torch.channels_last), 2),
    ]


def stats_samples(generator: torch.Generator) -> list[Sample]:
    """Every layout and type."""
    return [(x, groups, 1e-5) for x, groups in _layouts(generator)]


def samples(generator: torch.Generator) -> list[Sample]:
    """Every layout and type, with and without parameters, activation and quantization."""
    codes = (torch.tensor([0.03]), torch.tensor([-5], dtype=torch.int8))
    kinds = [("silu", None, None), ("silu", *codes), ("", codes[0], None), ("", None, None)]
    calls: list[Sample] = []
    for index, (x, groups) in enumerate(_layouts(generator)):
        affine = torch.randn(2, x.shape[1], generator=generator).to(x.dtype).unbind()
        stats = stats_reference(x, groups, 1e-5)
        weight, bias = affine if index % 4 < 3 else (None, None)
        calls.append((x, stats, groups, weight, bias, *kinds[index % len(kinds)]))
    return calls


STATS_NATIVE, NATIVE = Native(stats_empty, stats_launch), Native(empty, launch)
STATS_TARGET = define("group_stats", stats_reference, STATS_NATIVE)
TARGET = define("group_norm_act", reference, NATIVE)
HOW: Mapping[str, Literal["native", "simulated"]] = {"reference": "simulated", "triton": "native"}
STATS_ROW = Op(
    "group_stats",
    STATS_TARGET,
    stats_reference,
    stats_samples,
    HOW,
    "mean and deviation of an image's groups, read once",
    STATS_NATIVE,
)
ROW = Op(
    "group_norm_act",
    TARGET,
    reference,
    samples,
    HOW,
    "group norm from its statistics, activation and quantization in one pass over an image",
    NATIVE,
)
