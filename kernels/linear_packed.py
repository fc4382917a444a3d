"""A linear layer on a 4-bit weight, unpacked in registers, with its epilogue in one kernel.

    y_mn = epilogue(Σ_k x̂_mk · ŵ_nk),   ŵ_nk = code_nk · t_n,k/G (· over),   x̂_mk = x_mk · s

`packed` (N, K / 2) holds codes on int4 or e2m1, low half first; t (N, K / G) or (N, 1) is stored
as kernels/low_bit.py has it. What x is decides the arithmetic:

    x any float, no scale           products in x's type, to which ŵ is rounded
    x int8, s (…, K / G) or (…, 1)  int8 products, exact in int32 over each group
    x e4m3, s (…, 1), weights e2m1  products of x and code · t in bfloat16, which holds both exactly

Sums are in float32. Epilogue: kernels/epilogue.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effuse.cost import FORMULAS, matmul_flops
from effuse.kernels.epilogue import Epilogue, finish, result_shape
from effuse.kernels.launch import Launch, Native, define
from effuse.kernels.low_bit import pack_weight, unpack_reference
from effuse.kernels.op import Op, Sample
from effuse.kernels.quantizers import find_scale, parse_quantizer, to_codes


def reference(
    x: Tensor,
    scale: Tensor | None,
    packed: Tensor,
    w_scale: Tensor,
    over: Tensor | None,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    weight: str,
    activation: str,
    parts: int,
    dtype: torch.dtype,
) -> Tensor:
    """x (…, K) -> (…, N) in `dtype`; the sum is in float64. `weight` is the weight's quantizer."""
    columns = x.shape[-1]
    real = unpack_reference(packed, w_scale, None, over, weight, [len(packed), columns])
    real = real.double() if scale is not None else real.to(x.dtype).double()
    given = x.double() if scale is None else x.double() * _spread(scale, columns)
    total = (given @ real.T).float()
    return finish(total, Epilogue(bias, low, up, gate, residual, activation, parts), dtype)


def _spread(scale: Tensor, columns: int) -> Tensor:
    return scale.double().repeat_interleave(columns // max(1, scale.shape[-1]), -1)


def empty(x: Tensor, scale: Tensor | None, packed: Tensor, *args: Any) -> Tensor:
    """The result of `reference`, not filled."""
    parts, dtype = args[-2:]
    return x.new_empty(result_shape((*x.shape[:-1], packed.shape[0]), parts), dtype=dtype)


def launch(results: tuple[Tensor, ...], *args: Any) -> Launch | None:
    """What fills the result.

    Raises:
        BackendError: the kernel cannot take the arguments.
    """
    raise NotImplementedError


TARGET = define("linear_packed", reference, Native(empty, launch))
FORMULAS[torch.ops.effuse.linear_packed] = matmul_flops


def samples(g: torch.Generator) -> list[Sample]:
    """Arguments to try the op with."""
    int4, nvfp4, mxfp4 = "int4/group32", "e2m1/group16/scale-e4m3", "e2m1/group32/scale-e8m0"
    half, e4m3 = torch.bfloat16, "e4m3/token/dynamic"
    return [
        _sample(g, (5,), 64, 33, int4, dtype=torch.float32, bias=_random(g, 33)),
        _sample(g, (2, 3), 48, 24, nvfp4, x_type=half, activation="gelu", parts=3),
        _sample(g, (1,), 40, 8, "int4/channel", x_type=torch.float16, gate=_random(g, 1, 8),
                residual=_random(g, 1, 8)),
        _sample(g, (5,), 64, 33, int4, "int8/group32/dynamic", low=_random(g, 5, 4),
                up=_random(g, 33, 4)),
        _sample(g, (2, 3), 64, 24, "int4/group16", "int8/group16/dynamic", gate=_random(g, 2, 24)),
        _sample(g, (3,), 64, 24, int4, "int8/token/dynamic", activation="silu"),
        _sample(g, (3,), 64, 24, mxfp4, e4m3, activation="gelu_tanh"),
        _sample(g, (5,), 48, 33, nvfp4, e4m3, dtype=torch.float32),
        _sample(g, (0,), 64, 8, mxfp4, x_type=half),
    ]  # fmt: skip


def _sample(
    g: torch.Generator,
    lead: tuple[int, ...],
    depth: int,
    columns: int,
    weight: str,
    given: str = "",
    x_type: torch.dtype = torch.float32,
    activation: str = "",
    parts: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    **tail: Tensor,
) -> Sample:
    stored = pack_weight(_random(g, columns, depth), parse_quantizer(weight))
    names = ("bias", "low", "up", "gate", "residual")
    return (
        *_activations(_random(g, *lead, depth).to(x_type), given),
        stored.packed,
        stored.scale,
        stored.over,
        *(tail.get(name) for name in names),
        weight,
        activation,
        parts,
        dtype,
    )


def _activations(x: Tensor, quantizer: str) -> tuple[Tensor, Tensor | None]:
    """x as it is, or its codes and their scales."""
    if not quantizer:
        return x, None
    how = parse_quantizer(quantizer)
    scale, _ = find_scale(x, how)
    codes = to_codes(x, scale, None, how)
    return codes if how.grid.kind == "int" else codes.view(torch.float8_e4m3fn), scale


def _random(g: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=g)


ROW = Op(
    "linear_packed",
    TARGET,
    reference,
    samples,
    {"reference": "simulated", "triton": "native"},
    "4-bit weights unpacked in registers: int8 or 16-bit tensor cores",
    Native(empty, launch),
)
