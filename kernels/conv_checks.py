"""What the kernel of conv2d_scaled takes: types, shapes and memory of its arguments, by name."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from effuse.kernels.activations import ACTIVATIONS
from effuse.kernels.images import check_codes, check_innermost, check_vector, type_name
from effuse.kernels.launch import check

LONGEST = 1 << 16  # products in a sum: 2^16 · 255 · 128 < 2^31
LARGEST = 7  # side of a window


INDEXED = (1 << 31) - 256  # elements that a 32-bit index reaches, with a tile beyond


def check_conv(given: dict[str, Any], y: Tensor) -> None:
    """See that the kernel can fill `y` from the op's arguments, `given` by name.

    Raises:
        BackendError: it cannot; the message says which argument is wrong, and the way out.
    """
    _check_window(given)
    _check_operand(given, "", y)
    _check_second(given, y)
    _check_rest(given, y)
    check(
        max(prod(y.shape[2:]) * len(y), given["weight"].numel()) <= INDEXED,
        f"x, weight: expected at most {INDEXED} pixels of the result and elements of the weight, "
        f"got a result of {tuple(y.shape)}; cut the batch",
    )


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
        _check_image(f"{name}{suffix}", codes)
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
    check_vector(f"scale{suffix}", scale, 1, torch.float32)
    check_vector(f"channels{suffix}", channels, y.shape[1], torch.float32)
    if zero is not None:
        check_vector(f"zero{suffix}", zero, 1, torch.int8)
        check(sums is not None, f"sums{suffix}: zero{suffix} needs the sums of each filter's codes")
        check_vector(f"sums{suffix}", sums, y.shape[1], torch.int32)


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
    residual = given["residual"]
    check(
        given["activation"] in ACTIVATIONS,
        f"activation: expected one of {sorted(ACTIVATIONS)}, got {given['activation']!r}",
    )
    type_name(given["dtype"])
    if given["bias"] is not None:
        check_vector("bias", given["bias"], y.shape[1])
    if residual is not None:
        check_innermost("residual", residual)
        check(
            residual.shape == y.shape and residual.is_floating_point(),
            f"residual: expected floats of the result's shape {tuple(y.shape)}, got "
            f"{residual.dtype} {tuple(residual.shape)}",
        )
    check_codes(given["out_scale"], given["out_zero"], "out_")


def _check_image(name: str, image: Tensor) -> None:
    check(
        image.dim() == 4 and image.dtype == torch.int8,
        f"{name}: expected int8 of four dimensions, got {image.dtype} {tuple(image.shape)}",
    )
    check_innermost(name, image)
    check(
        prod(image.shape[1:]) <= INDEXED,
        f"{name}: expected at most {INDEXED} elements in an image, got {tuple(image.shape)}; cut "
        f"it into tiles",
    )
