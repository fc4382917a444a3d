"""Int8 convolution of images in channels_last memory, in one kernel with what follows it.

    y = act(Σ_i s_i · t_ic · Σ_k (q_ik - z_i) · w_ick + b_c) + r        i: one operand, or two
    y in `dtype`, or clamp(round(y / s') + z', -128, 127) of y in `dtype`

q int8 (n, in, h, w), w int8 (out, in, kh, kw), r and y (n, out, h', w'). An implicit product of
matrices: n·h'·w' rows, a sum over kh·kw·in codes, exact in int32; the rest is float32. The image
is padded with 0.0, that is the code z. Since q - z does not fit int8, Σ (q - z)·w is
Σ q·w - z·Σ w, and the caller gives Σ w of each output channel as `sums`. Two operands (METHODS 1.2:
a shortcut projection split by input channels, each half under a scale of its own) are summed one
after the other in the registers of one program.
"""

from __future__ import annotations

from inspect import signature
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.cost import FORMULAS, conv_flops
from effuse.kernels.activations import ACTIVATIONS, activate
from effuse.kernels.conv_checks import check_conv
from effuse.kernels.images import quantize_one, to_int8, to_type, type_name
from effuse.kernels.launch import Launch, Native, cdiv, check, define, dot, jit, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.quantize import along
from effuse.kernels.tiles import BAND, FILL, Tile, place, programs

OPTIONS = ("activation", "stride", "padding", "dtype")  # arguments that are no tensors
NOTHING = (None,) * 6  # in the place of a second operand
TILES = (  # from the largest
    Tile(128, 128, 128, 8, 3),
    Tile(128, 64, 128, 8, 3),
    Tile(64, 64, 128, 4, 4),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 16, 128, 4, 4),
)
SHALLOW = 32  # the least depth that a product of int8 takes
WASTE = 9 / 8  # columns computed over the fewest that tiles take


def reference(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    channels: Tensor,
    sums: Tensor | None,
    x2: Tensor | None,
    scale2: Tensor | None,
    zero2: Tensor | None,
    weight2: Tensor | None,
    channels2: Tensor | None,
    sums2: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_scale: Tensor | None,
    out_zero: Tensor | None,
    stride: list[int],
    padding: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """Codes and weights -> (n, out, h', w') in channels_last memory; int8 where out_scale is given.

    scale, zero, out_scale, out_zero: one element (float32, int8; no zero is 0). channels (out,)
    float32, sums (out,) int32, bias (out,).
    """
    y = _scaled(x, scale, zero, weight, channels, stride, padding)
    if x2 is not None and scale2 is not None and weight2 is not None and channels2 is not None:
        y = y + _scaled(x2, scale2, zero2, weight2, channels2, stride, padding)
    y = ACTIVATIONS[activation](y if bias is None else y + along(bias.float(), 4, 1))
    y = (y if residual is None else y + residual.float()).to(dtype)
    if out_scale is not None:
        y = quantize_one(y, out_scale, out_zero)
    return torch.empty_like(y, memory_format=torch.channels_last).copy_(y)


def _scaled(
    x: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, channels: Tensor,
    stride: list[int], padding: list[int],
) -> Tensor:  # fmt: skip
    """One operand's part of the sum, float32; float64 holds the integers exactly."""
    centred = x.double() if zero is None else x.double() - zero.double().reshape(())
    sums = F.conv2d(centred, weight.double(), None, stride, padding)
    return sums.float() * along(scale.reshape(()) * channels, 4, 1)


@jit
def load(pointers, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Codes, 0 outside; a mask that nothing needs costs nothing."""
    if ROWS and COLUMNS:
        codes = tl.load(pointers, mask=rows & columns, other=0)
    elif ROWS:
        codes = tl.load(pointers, mask=rows, other=0)
    elif COLUMNS:
        codes = tl.load(pointers, mask=columns, other=0)
    else:
        codes = tl.load(pointers)
    return codes


@jit
def accumulate(
    x, scale, zero, weight, channels, sums, image, top, left, n, height, width, depth,
    KH: tl.constexpr, KW: tl.constexpr, EVEN: tl.constexpr, PADDED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One operand's part of a tile (BM, BN): rows' windows begin at (top, left) of `image`."""
    start = x + image.to(tl.int64) * height * width * depth
    filters = weight + n * (KH * KW * depth)
    blocks = tl.cdiv(depth, BK)
    acc = tl.zeros((BM, BN), tl.int32)
    for step in range(KH * KW * blocks):
        tap, k = step // blocks, step % blocks * BK + tl.arange(0, BK)
        i, j = top + tap // KW, left + tap % KW
        inside = ((i >= 0) & (i < height) & (j >= 0) & (j < width))[:, None]
        pixel = start + (i * width + j) * depth
        q = load(pixel[:, None] + k[None, :], inside, (k < depth)[None, :], PADDED, not EVEN)
        if zero is not None and PADDED:
            q = tl.where(inside, q, tl.load(zero))
        taken = filters[None, :] + (tap * depth + k)[:, None]
        w = load(taken, False, (k < depth)[:, None], False, not EVEN)
        acc = dot(q, w, acc)
    if zero is not None:
        acc -= (tl.load(zero).to(tl.int32) * tl.load(sums + n))[None, :]
    return acc.to(tl.float32) * (tl.load(scale) * tl.load(channels + n))[None, :]


@jit
def conv_kernel(
    y, x, scale, zero, weight, channels, sums, x2, scale2, zero2, weight2, channels2, sums2,
    bias, residual, out_scale, out_zero, rows, columns, height, width, depth, depth2,
    out_height, out_width, stride_h, stride_w, padding_h, padding_w,
    KH: tl.constexpr, KW: tl.constexpr, EVEN: tl.constexpr, EVEN2: tl.constexpr,
    PADDED: tl.constexpr, ACTIVATION: tl.constexpr, TYPE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """One program makes BM pixels of BN output channels."""
    row, column = place(rows, columns, BM, BN, BAND)
    m, n = row % rows, column % columns  # what lies beyond repeats the first, and is not stored
    image, at = m // (out_height * out_width), m % (out_height * out_width)
    top = at // out_width * stride_h - padding_h
    left = at % out_width * stride_w - padding_w
    total = accumulate(
        x, scale, zero, weight, channels, sums, image, top, left, n, height, width, depth,
        KH, KW, EVEN, PADDED, BM, BN, BK,
    )  # fmt: skip
    if x2 is not None:
        total += accumulate(
            x2, scale2, zero2, weight2, channels2, sums2, image, top, left, n, height, width,
            depth2, KH, KW, EVEN2, PADDED, BM, BN, BK,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + n).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if residual is not None:
        total += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    value = to_type(total, TYPE)
    if out_scale is not None:
        value = to_int8(value.to(tl.float32), out_scale, out_zero)
    tl.store(y + offset, value, mask=mask)


NAMES = tuple(signature(reference).parameters)


def empty(*args: Any) -> Tensor:
    """A result of `reference`, not filled, for its arguments.

    Raises:
        BackendError: the window is larger than the padded image.
    """
    given = dict(zip(NAMES, args, strict=True))
    x, weight = given["x"], given["weight"]
    sizes = zip(x.shape[2:], weight.shape[2:], given["stride"], given["padding"], strict=True)
    sides = [(size + 2 * padding - k) // stride + 1 for size, k, stride, padding in sizes]
    check(
        min(sides) > 0,
        f"padding: a window of {tuple(weight.shape[2:])} does not fit an image of "
        f"{tuple(x.shape[2:])} padded by {given['padding']}",
    )
    return torch.empty(
        (x.shape[0], weight.shape[0], *sides),
        dtype=given["dtype"] if given["out_scale"] is None else torch.int8,
        device=x.device,
        memory_format=torch.channels_last,
    )


def launch(results: tuple[Tensor, ...], *args: Any) -> Launch | None:
    """What fills a result of `empty`, for the arguments of `reference`.

    Raises:
        BackendError: an argument has a type, shape or memory layout that the kernel does not take.
    """
    given = dict(zip(NAMES, args, strict=True))
    (y,) = results
    check_conv(given, y)
    return _launch(given, y) if y.numel() else None


def _launch(given: dict[str, Any], y: Tensor) -> Launch:
    """The launch for arguments that the kernel takes."""
    x, weight, (height, width) = given["x"], given["weight"], y.shape[2:]
    rows, columns = y.numel() // y.shape[1], y.shape[1]
    depths = [given[name].shape[1] for name in ("x", "x2") if given[name] is not None]
    tile = choose_tile(rows, columns, depths)
    tensors = {name: given[name] for name in NAMES if name not in OPTIONS}
    sizes = {
        "rows": rows, "columns": columns, "height": x.shape[2], "width": x.shape[3],
        "depth": depths[0], "depth2": depths[-1], "out_height": height, "out_width": width,
        "stride_h": given["stride"][0], "stride_w": given["stride"][1],
        "padding_h": given["padding"][0], "padding_w": given["padding"][1],
    }  # fmt: skip
    constants = {
        "KH": weight.shape[2], "KW": weight.shape[3], "PADDED": any(given["padding"]),
        "EVEN": depths[0] % tile.depth == 0, "EVEN2": depths[-1] % tile.depth == 0,
        "ACTIVATION": given["activation"], "TYPE": type_name(given["dtype"]),
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "BAND": BAND,
    }  # fmt: skip
    grid = (programs(tile, rows, columns),)
    args = {"y": y, **tensors, **sizes}
    return Launch(conv_kernel, grid, args, constants, tile.warps, tile.stages)


def choose_tile(rows: int, columns: int, depths: list[int]) -> Tile:
    """The largest tile that wastes few columns and still fills a GPU, for the operands' depths.

    Two operands' sums, and depths that are read byte by byte, need the registers of the largest.
    """
    depth = gcd(TILES[0].depth, *depths)
    tiles = TILES if len(depths) == 1 and depth >= SHALLOW else TILES[1:]
    least = WASTE * cdiv(columns, TILES[-1].columns) * TILES[-1].columns
    fitting = [tile for tile in tiles if cdiv(columns, tile.columns) * tile.columns <= least]
    filling = [tile for tile in fitting if programs(tile, rows, columns) >= FILL]
    tile = (filling or fitting[-1:])[0]
    return tile._replace(depth=depth) if depth >= SHALLOW else tile._replace(depth=SHALLOW, warps=8)


def operand(
    generator: torch.Generator, image: tuple[int, ...], filters: tuple[int, ...], zero: int | None
) -> Sample:
    """x (n, c, h, w) and a weight (out, kh, kw) with what belongs to them: six arguments."""
    out, kh, kw = filters
    shape = (out, image[1], kh, kw)
    x, weight = (
        torch.randint(-127, 128, size, generator=generator, dtype=torch.int8)
        .contiguous(memory_format=torch.channels_last)
        for size in (image, shape)
    )  # fmt: skip
    channels = torch.rand(out, generator=generator) * 1e-3 + 1e-4
    scale = torch.rand(1, generator=generator) * 0.02 + 0.01
    if zero is None:
        return x, scale, None, weight, channels, None
    sums = weight.sum((1, 2, 3), dtype=torch.int32)
    return x, scale, torch.tensor([zero], dtype=torch.int8), weight, channels, sums


def samples(generator: torch.Generator) -> list[Sample]:
    """Calls that take every branch of the kernel."""
    g, full = generator, torch.float32
    bias, codes = torch.randn(6, generator=g), (torch.tensor([0.05]), torch.tensor([3]).char())
    residual = torch.randn(2, 6, 4, 5, generator=g).to(memory_format=torch.channels_last)
    wide, square, one = operand(g, (2, 5, 4, 5), (6, 3, 3), 7), [1, 1], [0, 0]
    plain = operand(g, (1, 64, 5, 4), (6, 1, 1), None)
    return [
        (*wide, *NOTHING, bias, residual, "silu", None, None, square, square, full),
        (*wide, *NOTHING, bias, residual.half(), "", *codes, square, square, torch.float16),
        (*wide, *NOTHING, None, None, "gelu", codes[0], None, [2, 2], [1, 0], torch.bfloat16),
        (*plain, *NOTHING, None, None, "", None, None, square, one, torch.float16),
        (*plain, *operand(g, (1, 3, 5, 4), (6, 1, 1), -20), bias, None, "gelu_tanh", None, None,
         square, one, torch.bfloat16),
        (*operand(g, (0, 5, 4, 4), (6, 3, 3), 0), *NOTHING, None, None, "", None, None, square,
         square, full),
    ]  # fmt: skip


def _flops(*shapes: Any, out_val: Any, **_: Any) -> int:
    given = dict(zip(NAMES, shapes, strict=False))
    weights = (given["weight"], given.get("weight2"))
    return sum(conv_flops((), each, out_val=out_val) for each in weights if each is not None)


TARGET = define("conv2d_scaled", reference, Native(empty, launch))
FORMULAS[TARGET.overloadpacket] = _flops
ROW = Op(
    "conv2d_scaled",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "int8 MMA over images in channels_last memory, with all that follows in its epilogue",
    Native(empty, launch),
)
