"""One launch of a Triton kernel as data, which the JIT runs and the ahead-of-time build compiles.

A launcher is a function (results, *arguments of the op) -> Launch. It allocates nothing and reads
no values, so that it works on real tensors and on recorded fake ones: the shapes of a program give
every kernel that it needs (DESIGN 6). Without Triton the kernels are plain functions that nothing
calls; with TRITON_INTERPRET=1 in the environment, before the first import, they run on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from effuse.errors import BackendError, require

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

INTERPRETED = triton is not None and bool(triton.knobs.runtime.interpret)
FP_FUSION = True  # a·b + c in one rounding: said, since Triton 3.10 will change the default

Launcher = Callable[..., "Launch | None"]

__all__ = [
    "FP_FUSION", "INTERPRETED", "IN_INTERPRETER", "Launch", "Launcher", "Native", "as_tuple",
    "cdiv", "check", "constant", "contiguous", "define", "dot", "jit", "power_of_two", "rows_of",
    "run_jit", "run_native", "run_traced", "tl", "triton",
]  # fmt: skip


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is not installed."""
    return function if triton is None else triton.jit(function)


def constant(value: Any) -> Any:
    """A global that kernels may read."""
    return value if triton is None else tl.constexpr(value)


IN_INTERPRETER = constant(INTERPRETED)


@jit
def dot(a, b, acc):
    """acc + a · b, which keeps acc's type: int32 of int8, float32 of floats.

    The interpreter multiplies the bit patterns of bfloat16; in float32 its products are exact.
    """
    if IN_INTERPRETER and a.dtype == tl.bfloat16:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee", out_dtype=acc.dtype)


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        kernel: made by `jit`.
        grid: programs along one to three axes.
        args: by parameter: a tensor (whose first element's address is handed over), an int, a
            float, or None for what is left out.
        constants: by parameter: what the kernel is compiled for.
        warps: of 32 threads, in a program.
        stages: of software pipelining.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Tensor | int | float | None]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def power_of_two(size: int, least: int = 1, most: int = 1 << 30) -> int:
    """The least power of two that is not under `size`, within the bounds."""
    return max(least, min(most, 1 << max(0, size - 1).bit_length()))


def rows_of(tensor: Tensor) -> int:
    """How many rows of its last axis a tensor has."""
    return tensor.numel() // tensor.shape[-1] if tensor.shape[-1] else 0


def run_jit(launch: Launch) -> None:
    """Compile the kernel for the tensors' device if that has not been done, and launch it."""
    require("triton", "triton")
    launch.kernel[launch.grid](
        **launch.args,
        **launch.constants,
        num_warps=launch.warps,
        num_stages=launch.stages,
        enable_fp_fusion=FP_FUSION,
    )


@dataclass(frozen=True)
class Native:
    """What a Triton back end needs of an op.

    Args:
        empty: (*the op's arguments) -> its results, allocated and not filled.
        launch: (results, *the op's arguments) -> what fills them; None where nothing is to do.
    """

    empty: Callable[..., Any]
    launch: Launcher


def run_native(native: Native, *args: Any, run: Callable[[Launch], None] = run_jit) -> Any:
    """The op's results, computed by its kernel."""
    results = native.empty(*args)
    launch = native.launch(as_tuple(results), *args)
    if launch is not None:
        run(launch)
    return results


def as_tuple(results: Any) -> tuple[Tensor, ...]:
    """One result or several, as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


def run_traced(launch: Launch) -> None:
    """Launch the kernel, or let a compiler that traces see it: Inductor fuses around it."""
    kernel = torch.library.wrap_triton(launch.kernel)
    kernel[launch.grid](
        **launch.args, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
    )


def define(name: str, reference: Callable[..., Any], native: Native) -> Any:
    """Register `effuse::name`: its kernel on CUDA devices, else its reference; the overload.

    For compilers that trace it is what `torch.library.triton_op` makes, whose call takes two
    seconds because it imports Inductor: on CUDA devices they see the kernel in place of the op.
    """

    @wraps(reference)
    def compute(*args: Any) -> Any:
        return run_native(native, *args) if on_cuda(args) else reference(*args)

    def traced(mode: Any, op: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if kwargs or not on_cuda(args):
            return mode.__torch_dispatch__(op, types, args, kwargs)
        with mode:
            return run_native(native, *args, run=run_traced)

    op: Any = torch.library.custom_op(f"effuse::{name}", compute, mutates_args=())
    op.register_fake(native.empty)
    op.register_torch_dispatch(FunctionalTensorMode, traced)
    return op._opoverload


def on_cuda(args: Sequence[Any]) -> bool:
    """Whether any of the arguments is on a CUDA device."""
    return any(isinstance(each, Tensor) and each.device.type == "cuda" for each in args)


def check(condition: bool, message: str) -> None:
    """Refuse arguments that a kernel cannot take.

    Raises:
        BackendError: `condition` does not hold.
    """
    if not condition:
        raise BackendError(message)


def contiguous(**tensors: Tensor | None) -> None:
    """See that the kernels may count on dense rows.

    Raises:
        BackendError: one of `tensors` is not contiguous.
    """
    for name, tensor in tensors.items():
        check(
            tensor is None or tensor.is_contiguous(),
            f"{name}: expected a contiguous tensor; call .contiguous() first",
        )
