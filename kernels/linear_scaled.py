"""A linear layer on 8-bit codes: int8 or e4m3 products, scales, and the epilogue in one kernel.

    y_mn = epilogue(s_m · c_n · (Σ_k q_mk · w_nk - z · Σ_k w_nk))

q (…, K) and w (N, K) int8 or float8_e4m3fn; s float32, one element or one for each row (…, 1);
c (N,) float32; z int8, one element, with the sums (N,) int32 that it multiplies, or None for 0.
int8 products are summed in int32, exactly (K <= 2^16); e4m3 products in float32, 128 at a time
where the tensor cores add with fewer bits. Epilogue: kernels/epilogue.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effuse.cost import FORMULAS, matmul_flops
from effuse.kernels.epilogue import Epilogue, finish, result_shape
from effuse.kernels.launch import Launch, Native, define
from effuse.kernels.op import Op, Sample

DEEPEST = 1 << 16  # columns whose int8 products surely fit an int32


def reference(
    codes: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    weight: Tensor,
    channels: Tensor,
    sums: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    activation: str,
    parts: int,
    dtype: torch.dtype,
) -> Tensor:
    """codes (…, K), weight (N, K) -> (…, N) in `dtype`; the sums of products are in float64."""
    total = codes.double() @ weight.double().T
    if zero is not None and sums is not None:
        total = total - zero.double() * sums.double()
    if scale.numel() == 1:
        scale = scale.reshape(())
    scaled = total.float() * scale * channels
    return finish(scaled, Epilogue(bias, low, up, gate, residual, activation, parts), dtype)


def empty(codes: Tensor, *args: Any) -> Tensor:
    """The result of `reference`, not filled."""
    weight, parts, dtype = args[2], args[-2], args[-1]
    shape = result_shape((*codes.shape[:-1], weight.shape[0]), parts)
    return codes.new_empty(shape, dtype=dtype)


def launch(results: tuple[Tensor, ...], *args: Any) -> Launch | None:
    """What fills the result.

    Raises:
        BackendError: the kernel cannot take the arguments.
    """
    raise NotImplementedError


TARGET = define("linear_scaled", reference, Native(empty, launch))
FORMULAS[torch.ops.effuse.linear_scaled] = matmul_flops


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    one, two = (5, 48, 33), (6, 32, 24)
    zero = torch.tensor([11], dtype=torch.int8)
    e4m3, row, half = torch.float8_e4m3fn, (2, 3, 1), torch.bfloat16
    return [
        _sample(g, one, (1,), torch.int8, dtype=torch.float32, zero=zero, bias=_random(g, 33)),
        _sample(g, two, row, torch.int8, (2, 3), activation="gelu", low=_random(g, 2, 3, 4).half(),
                up=_random(g, 24, 4), dtype=torch.float16),
        _sample(g, two, row, torch.int8, (2, 3), parts=3, bias=_random(g, 24), activation="silu"),
        _sample(g, two, row, e4m3, (2, 3), activation="gelu_tanh", dtype=torch.float32,
                gate=_random(g, 2, 24), residual=_random(g, 2, 3, 24)),
        _sample(g, one, (1,), e4m3, low=_random(g, 5, 70).to(half), up=_random(g, 33, 70).to(half)),
        _sample(g, (1, 16, 8), (1, 1), e4m3, dtype=torch.float32),
        _sample(g, (0, 16, 8), (0, 1), torch.int8),
    ]  # fmt: skip


def _sample(
    g: torch.Generator,
    sizes: tuple[int, int, int],
    scale: tuple[int, ...],
    codes: torch.dtype,
    lead: tuple[int, ...] | None = None,
    zero: Tensor | None = None,
    activation: str = "",
    parts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **tail: Tensor,
) -> Sample:
    rows, depth, columns = sizes
    weight = _codes(g, codes, columns, depth)
    sums = None if zero is None else weight.sum(1, dtype=torch.int32)
    names = ("bias", "low", "up", "gate", "residual")
    return (
        _codes(g, codes, *(lead or (rows,)), depth),
        torch.rand(scale, generator=g) * 0.01 + 0.001,
        zero,
        weight,
        torch.rand(columns, generator=g) * 0.1 + 0.01,
        sums,
        *(tail.get(name) for name in names),
        activation,
        parts,
        dtype,
    )


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


def _codes(g: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
    return (_random(g, *shape) * 60).clamp(-448, 448).to(dtype)


ROW = Op(
    "linear_scaled",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "8-bit linear layer with its epilogue: int8 or fp8 tensor cores",
    Native(empty, launch),
)
