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
from math import gcd, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effuse.cost import FORMULAS, conv_flops
from effuse.errors import nearest
from effuse.kernels.epilogue import ACTIVATIONS
from effuse.kernels.launch import Launch, Native, cdiv, check, define, dot, jit, tl
from effuse.kernels.op import Op, Sample
from effuse.kernels.quantize import along, quantize_reference

LONGEST = 1 << 16  # products in a sum: 2^16 · 255 · 128 < 2^31
LARGEST = 7  # side of a window
GROUP = 8  # blocks of rows that share weights in the cache
STAGES = 3
OPTIONS = ("activation", "stride", "padding", "dtype")  # arguments that are no tensors
NOTHING = (None,) * 6  # in the place of a second operand


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


def quantize_one(values: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """int8 codes of `values` under one scale; no zero point is 0."""
    zero = torch.zeros(1, dtype=torch.int8, device=values.device) if zero is None else zero
    return quantize_reference(values, scale.reshape(()), zero.reshape(()), 0)


@jit
def activate(value, KIND: tl.constexpr):
    """The activation of float32 values, by its name."""
    if KIND == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif KIND == "gelu":
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh u) / 2 is the sigmoid of 2u
        cubic = 1.5957691216057308 * (value + 0.044715 * value * value * value)
        value = value / (1.0 + tl.exp(-cubic))
    return value


@jit
def rounded(value, DTYPE: tl.constexpr):
    """float32 values after a stay in the type of that name."""
    if DTYPE == "float16":
        value = value.to(tl.float16).to(tl.float32)
    elif DTYPE == "bfloat16":
        value = value.to(tl.bfloat16).to(tl.float32)
    return value


@jit
def to_int8(value, scale, zero):
    """clamp(round(value / scale) + zero, -128, 127), ties to even, of float32 values."""
    steps = tl.div_rn(value, tl.load(scale) + tl.zeros_like(value))
    steps = tl.minimum(tl.maximum(steps, -512.0), 512.0)  # beyond, any zero point clamps it
    steps = (steps + 12582912.0) - 12582912.0  # 1.5 · 2^23: float32 has no halves there
    if zero is not None:
        steps += tl.load(zero).to(tl.float32)
    return tl.minimum(tl.maximum(steps, -128.0), 127.0).to(tl.int8)


@jit
def load_masked(pointers, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
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
    x, scale, zero, weight, channels, sums,
    image, top, left, n, height, width, depth,
    KH: tl.constexpr, KW: tl.constexpr, EVEN: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One operand's part of a tile: rows' filters start at (top, left) of `image`."""
    offset = tl.arange(0, BLOCK_K)
    start = x + image.to(tl.int64) * height * width * depth
    filters = weight + n * (KH * KW * depth)
    blocks = tl.cdiv(depth, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for step in range(KH * KW * blocks):
        tap, k = step // blocks, step % blocks * BLOCK_K + offset
        i, j = top + tap // KW, left + tap % KW
        inside = (i >= 0) & (i < height) & (j >= 0) & (j < width)
        pixel = start + (i * width + j) * depth
        q = load_masked(
            pixel[:, None] + k[None, :], inside[:, None], (k < depth)[None, :], PADDED, not EVEN
        )
        if zero is not None and PADDED:
            q = tl.where(inside[:, None], q, tl.load(zero))
        w = load_masked(
            filters[None, :] + (tap * depth + k)[:, None], False, (k < depth)[:, None], False,
            not EVEN,
        )  # fmt: skip
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
    PADDED: tl.constexpr, ACTIVATION: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """One program makes BLOCK_M pixels of BLOCK_N output channels."""
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    first = tl.program_id(0) // (GROUP * tiles_n) * GROUP
    tall = tl.minimum(tiles_m - first, GROUP)
    place = tl.program_id(0) % (GROUP * tiles_n)
    row = (first + place % tall) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = place // tall * BLOCK_N + tl.arange(0, BLOCK_N)
    m, n = row % rows, column % columns  # what lies beyond repeats the first, and is not stored
    image, at = m // (out_height * out_width), m % (out_height * out_width)
    top = at // out_width * stride_h - padding_h
    left = at % out_width * stride_w - padding_w
    total = accumulate(
        x, scale, zero, weight, channels, sums, image, top, left, n, height, width, depth,
        KH, KW, EVEN, PADDED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if x2 is not None:
        total += accumulate(
            x2, scale2, zero2, weight2, channels2, sums2, image, top, left, n, height, width,
            depth2, KH, KW, EVEN2, PADDED, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + n).to(tl.float32)[None, :]
    total = activate(total, ACTIVATION)
    offset = row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    if residual is not None:
        total += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    if out_scale is not None:
        tl.store(y + offset, to_int8(rounded(total, DTYPE), out_scale, out_zero), mask=mask)
    else:
        tl.store(y + offset, total.to(y.dtype.element_ty), mask=mask)


NAMES = tuple(signature(reference).parameters)


def empty(*args: Any) -> Tensor:
    """A result of `reference`, not filled, for its arguments."""
    given = dict(zip(NAMES, args, strict=True))
    x, weight = given["x"], given["weight"]
    sizes = zip(x.shape[2:], weight.shape[2:], given["stride"], given["padding"], strict=True)
    sides = [(size + 2 * padding - k) // stride + 1 for size, k, stride, padding in sizes]
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
    _check_window(given)
    _check_operand(given, "", y)
    _check_second(given, y)
    _check_rest(given, y)
    return _launch(given, y) if y.numel() else None


def _launch(given: dict[str, Any], y: Tensor) -> Launch:
    """The launch for arguments that the kernel takes."""
    (height, width), columns = y.shape[2:], y.shape[1]
    depths = [given[name].shape[1] for name in ("x", "x2") if given[name] is not None]
    tile = choose_tile(y.numel() // columns, columns, depths)
    tensors = {name: given[name] for name in NAMES if name not in OPTIONS}
    sizes = {
        "rows": y.numel() // columns, "columns": columns, "height": given["x"].shape[2],
        "width": given["x"].shape[3], "depth": depths[0], "depth2": depths[-1],
        "out_height": height, "out_width": width,
    }  # fmt: skip
    for side, name in enumerate("hw"):
        sizes[f"stride_{name}"] = given["stride"][side]
        sizes[f"padding_{name}"] = given["padding"][side]
    constants = {
        "KH": given["weight"].shape[2],
        "KW": given["weight"].shape[3],
        "EVEN": depths[0] % tile.k == 0,
        "EVEN2": depths[-1] % tile.k == 0,
        "PADDED": any(given["padding"]),
        "ACTIVATION": given["activation"],
        "DTYPE": str(given["dtype"]).removeprefix("torch."),
        "BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "GROUP": GROUP,
    }  # fmt: skip
    grid = (cdiv(sizes["rows"], tile.m) * cdiv(columns, tile.n),)
    return Launch(conv_kernel, grid, {"y": y, **tensors, **sizes}, constants, tile.warps, STAGES)


class Tile(NamedTuple):
    """What one program makes: m rows by n columns, in steps of k."""

    m: int
    n: int
    k: int
    warps: int


TILES = ((128, 128, 8), (128, 64, 4), (64, 64, 4), (64, 32, 4), (32, 32, 4))  # m, n, warps
FILLED = 128  # programs that occupy a large chip


def choose_tile(rows: int, columns: int, depths: list[int]) -> Tile:
    """The largest tile that fits the columns and leaves enough programs; chosen by shapes alone."""
    k = max(32, min(128, gcd(128, *depths))) if min(depths) > 64 else 64 if min(depths) > 32 else 32
    for m, n, warps in TILES:
        if cdiv(columns, n) * n - columns < n // 2 and cdiv(rows, m) * cdiv(columns, n) >= FILLED:
            return Tile(m, n, k, warps)
    return Tile(*TILES[-1][:2], k, TILES[-1][2])


def _check_window(given: dict[str, Any]) -> None:
    for name, least in (("stride", 1), ("padding", 0)):
        check(
            len(given[name]) == 2 and min(given[name]) >= least,
            f"{name}: expected two integers of at least {least}, got {given[name]}",
        )


def _check_operand(given: dict[str, Any], suffix: str, y: Tensor) -> None:
    x, scale, zero, weight, channels, sums = (
        given[f"{name}{suffix}"] for name in ("x", "scale", "zero", "weight", "channels", "sums")
    )
    for name, codes in (("x", x), ("weight", weight)):
        _check_image(f"{name}{suffix}", codes, torch.int8)
    check(
        weight.shape[1] == x.shape[1],
        f"weight{suffix}: expected {x.shape[1]} input channels, as x{suffix} has, got "
        f"{weight.shape[1]}; convolutions in groups run unfused",
    )
    check(
        max(weight.shape[2:]) <= LARGEST and prod(weight.shape[1:]) <= LONGEST,
        f"weight{suffix}: expected a window of at most {LARGEST}x{LARGEST} and sums of at most "
        f"{LONGEST} products, got {tuple(weight.shape)}; run this convolution in float",
    )
    _check_vector(f"scale{suffix}", scale, 1, torch.float32)
    _check_vector(f"channels{suffix}", channels, y.shape[1], torch.float32)
    if zero is not None:
        _check_vector(f"zero{suffix}", zero, 1, torch.int8)
        check(sums is not None, f"sums{suffix}: zero{suffix} needs the sums of each filter's codes")
        _check_vector(f"sums{suffix}", sums, y.shape[1], torch.int32)


def _check_second(given: dict[str, Any], y: Tensor) -> None:
    needed = [given[name] is not None for name in ("x2", "scale2", "weight2", "channels2")]
    check(
        all(needed) or not any(needed),
        "x2, scale2, weight2, channels2: expected all of them or none",
    )
    if not any(needed):
        return
    _check_operand(given, "2", y)
    x, x2, weight, weight2 = (given[name] for name in ("x", "x2", "weight", "weight2"))
    for name, one, two in (("x2", x, x2), ("weight2", weight, weight2)):
        expected = (one.shape[0], two.shape[1], *one.shape[2:])
        check(
            tuple(two.shape) == expected,
            f"{name}: expected shape {expected}, got {tuple(two.shape)}; only the input channels "
            f"of two operands may differ",
        )


def _check_rest(given: dict[str, Any], y: Tensor) -> None:
    activation, residual = given["activation"], given["residual"]
    known = activation in ACTIVATIONS
    check(known, f"activation: unknown {activation!r}{nearest(activation, ACTIVATIONS)}")
    if given["bias"] is not None:
        _check_vector("bias", given["bias"], y.shape[1])
    if residual is not None:
        _check_image("residual", residual)
        check(
            residual.shape == y.shape,
            f"residual: expected the result's shape {tuple(y.shape)}, got {tuple(residual.shape)}",
        )
    if given["out_scale"] is not None:
        _check_vector("out_scale", given["out_scale"], 1, torch.float32)
    if given["out_zero"] is not None:
        check(given["out_scale"] is not None, "out_zero: give out_scale too, or neither")
        _check_vector("out_zero", given["out_zero"], 1, torch.int8)


def _check_image(name: str, image: Tensor, dtype: torch.dtype | None = None) -> None:
    check(
        image.dim() == 4 and image.dtype == (dtype or image.dtype),
        f"{name}: expected a {dtype or 'float'} image of four dimensions, got {image.dtype} "
        f"{tuple(image.shape)}",
    )
    check(
        image.movedim(1, -1).is_contiguous(),
        f"{name}: expected channels_last memory, got strides {image.stride()}; call "
        f".contiguous(memory_format=torch.channels_last) first",
    )
    check(
        prod(image.shape[1:]) < 1 << 31,
        f"{name}: expected fewer than 2^31 elements in an image, got {tuple(image.shape)}; cut it "
        f"into tiles",
    )


def _check_vector(name: str, vector: Tensor, size: int, dtype: torch.dtype | None = None) -> None:
    check(
        vector.numel() == size
        and vector.is_contiguous()
        and vector.dtype == (dtype or vector.dtype),
        f"{name}: expected {size} contiguous elements of {dtype or 'any float type'}, got "
        f"{vector.dtype} {tuple(vector.shape)}",
    )


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
    scale = torch.tensor([0.02])
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


def _flops(
    x,
    scale,
    zero,
    weight,
    channels,
    sums,
    x2=None,
    scale2=None,
    zero2=None,
    weight2=None,
    *_,
    out_val,
    **__,
) -> int:
    second = 0 if x2 is None else conv_flops(x2, weight2, out_val=out_val)
    return conv_flops(x, weight, out_val=out_val) + second


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
