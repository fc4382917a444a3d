"""What gpu.py compares with: cuBLAS through PyTorch, torchao, and PyTorch's unfused operations."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from gpu_args import BF16, e4m3_codes, int8_codes, normal, positive
from gpu_blocks import rotated
from gpu_rows import Conv, Image, Rowwise, Turn
from gpu_time import Call
from torch import Tensor, nn
from torch.nn import functional as F

from effuse.kernels.gated import ACTIVATIONS, HALVES

TORCHAO = {
    "torchao int8": "Int8DynamicActivationInt8WeightConfig",
    "torchao fp8": "Float8DynamicActivationFloat8WeightConfig",
}


# ---- products ------------------------------------------------------------------------------------


def bf16(m: int, n: int, k: int, device: Any) -> Call:
    """cuBLAS: a bfloat16 layer."""
    x, w = normal(device, m, k), normal(device, n, k)
    return lambda: F.linear(x, w)


def fp8(m: int, n: int, k: int, device: Any, rowwise: bool = True, fast: bool = True) -> Call:
    """torch._scaled_mm: e4m3 products with scales of rows, or of whole tensors."""
    x, w = e4m3_codes(device, m, k), e4m3_codes(device, n, k)
    shapes = ((m, 1), (1, n)) if rowwise else ((), ())
    left, right = (positive(device, *shape) for shape in shapes)
    return lambda: torch._scaled_mm(
        x, w.t(), scale_a=left, scale_b=right, out_dtype=BF16, use_fast_accum=fast
    )


def int8(m: int, n: int, k: int, device: Any) -> Call:
    """torch._int_mm: int8 products, int32 results, no scales."""
    x, w = int8_codes(device, m, k), int8_codes(device, n, k)
    return lambda: torch._int_mm(x, w.t())


def torchao(name: str, m: int, n: int, k: int, device: Any) -> Call:
    """A layer that torchao quantizes at run time, compiled by torch.compile.

    Raises:
        ImportError: torchao is not installed.
    """
    layer = nn.Linear(k, n, bias=False, device=device, dtype=BF16)
    quantize_by_torchao(layer, name)
    x = normal(device, m, k)
    compiled = torch.compile(layer)
    return lambda: compiled(x)


def quantize_by_torchao(module: nn.Module, name: str) -> None:
    """Quantize a module's layers in place.

    Raises:
        ImportError: torchao is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise ImportError("torchao is not installed")
    from torchao import quantization

    options = {"granularity": quantization.PerRow()} if name.endswith("fp8") else {}
    quantization.quantize_(module, getattr(quantization, TORCHAO[name])(**options))


# ---- unfused operations --------------------------------------------------------------------------


def quantized(x: Tensor, quantizer: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows or groups, operation by operation."""
    group = quantizer.partition("/group")[2].split("/")[0]
    blocks = x.float().unflatten(-1, (-1, int(group) if group else x.shape[-1]))
    high = 448.0 if quantizer.startswith("e4m3") else 127.0
    scale = (blocks.abs().amax(-1, keepdim=True) / high).clamp(min=1e-12)
    steps = (blocks / scale).clamp(-high, high)
    codes = steps.to(torch.float8_e4m3fn) if high > 127 else steps.round().to(torch.int8)
    return codes.flatten(-2), scale.flatten(-2)


def chain(case: Rowwise, device: Any) -> Call:
    """A fused operation over rows as PyTorch runs it eagerly."""
    wide = case.columns * (2 if case.kind in HALVES else 1)
    x, weight = normal(device, case.rows, wide), normal(device, case.columns)
    scale, shift = normal(device, 1, case.columns), normal(device, 1, case.columns)

    def values() -> Tensor:
        if not case.kind:
            return x
        if case.kind in HALVES:
            hidden, gate = x.chunk(2, -1)
            return hidden * ACTIVATIONS[HALVES[case.kind][0]](gate)
        if case.kind in ACTIVATIONS:
            return ACTIVATIONS[case.kind](x)
        own = None if case.modulated else weight
        shape = (case.columns,)
        n = F.layer_norm(x, shape, own) if case.kind == "layer" else F.rms_norm(x, shape, own)
        return n * (1 + scale) + shift if case.modulated else n

    return lambda: quantized(values(), case.quantizer) if case.quantizer else values()


def turned(case: Turn, device: Any) -> Call:
    """A rotary embedding as diffusers writes it, run eagerly."""
    x = normal(device, 1, case.tokens, case.heads, case.head)
    cos, sin = (torch.randn(case.tokens, 1, case.head, device=device) for _ in range(2))
    return lambda: rotated(x, cos, sin)


def image_chain(case: Image, x: Tensor) -> Call:
    """Group norm and SiLU, and codes under one scale, as PyTorch runs them eagerly."""
    weight, bias = (normal(x.device, case.channels) for _ in range(2))

    def run() -> Tensor:
        y = F.silu(F.group_norm(x, 32, weight, bias))
        return ((y / 0.03).round() + 3).clamp(-128, 127).to(torch.int8) if case.codes else y

    return run


def conv(case: Conv, device: Any) -> Call:
    """cuDNN: a bfloat16 convolution in channels_last memory."""
    last = torch.channels_last
    x = normal(device, case.batch, case.inner, case.side, case.side).to(memory_format=last)
    w = normal(device, case.outer, case.inner, case.window, case.window).to(memory_format=last)
    bias = normal(device, case.outer)
    return lambda: F.conv2d(x, w, bias, case.stride, case.window // 2)
