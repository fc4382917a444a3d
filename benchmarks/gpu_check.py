"""Every kernel against its reference, on fresh random inputs, before gpu.py times anything.

References run on the CPU: products of codes are summed in float64, which is exact for integers.
Each kernel runs at two ragged sizes and a big one, into memory that was filled with other values.
How results are compared, by kind:

    exact   equal to the last bit: integer sums, and codes of values that were given
    close   ‖y - want‖ ≤ bound · ‖want‖, and no element further off than 16 bound (|want| + rms)
    codes   of values that are themselves rounded (a norm, an activation): at most one step apart
            in few places, and as close as that in what they stand for
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from gpu_args import BF16, E4M3, e4m3_codes, int8_codes, positive
from gpu_args import image as random_image
from gpu_time import Bench
from torch import Tensor

from effuse.kernels import (
    conv_scaled,
    gated,
    group_norm_act,
    linear_packed,
    linear_scaled,
    quantize_rows,
    quantize_static,
    rotary,
    row_norm,
)
from effuse.kernels.launch import Native, as_tuple, run_jit
from effuse.kernels.low_bit import pack_weight
from effuse.kernels.op import Op
from effuse.kernels.quantize import quantize_reference
from effuse.kernels.quantizers import find_scale, parse_quantizer, to_codes

RESOLUTION = {torch.float32: 1e-5, torch.float16: 1e-3, BF16: 4e-3}
ADDED_UP = 1e-4  # of a long sum of exact products in float32 tensor cores
E4M3_SUMS = 1e-3  # tensor cores keep some 14 bits of a sum of e4m3 products
FURTHEST = 16  # times the bound: one element
DIFFERING = 0.05  # of the codes of rounded values
POISON = 0x55
TOKEN, FP8, GROUP = "int8/token/dynamic", "e4m3/token/dynamic", "int8/group64/dynamic"
INT4, NVFP4 = "int4/group64", "e2m1/group16/scale-e4m3"


class Sizes(NamedTuple):
    """A product's M, N and K, and an image's batch, channels and side."""

    m: int
    n: int
    k: int
    image: tuple[int, int, int]


REAL = (
    Sizes(77, 130, 192, (1, 40, 9)),
    Sizes(129, 334, 320, (3, 96, 17)),
    Sizes(1024, 3072, 3072, (2, 320, 64)),
)


class Case(NamedTuple):
    """A call of a kernel, and how each of its results is compared.

    Args:
        bounds: relative, one for each result; 0 for exact, None for codes.
    """

    name: str
    native: Native
    reference: Callable[..., Any]
    args: tuple[Any, ...]
    bounds: tuple[float | None, ...]


class Wrong(Exception):
    """A kernel computes something else than its reference."""


# ---- the cases -----------------------------------------------------------------------------------


def cases(sizes: Sequence[Sizes] = REAL) -> Iterator[Case]:
    """All cases, their inputs drawn as they come."""
    for number, size in enumerate(sizes):
        for made in (_scaled, _packed, _rows, _norms, _turned, _convolutions, _images):
            for case in made(size):
                yield case._replace(name=f"{case.name} at {_told(case, number)}")


def _told(case: Case, number: int) -> str:
    first = next(each for each in case.args if isinstance(each, Tensor))
    return f"size {number + 1}, {'x'.join(map(str, first.shape))}"


def _case(name: str, op: Op, args: tuple[Any, ...], *bounds: float | None) -> Case:
    assert op.native is not None
    return Case(name, op.native, op.reference, args, bounds)


def _float(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape).to(dtype)


def _tail(size: Sizes, rank: int) -> tuple[Tensor, ...]:
    """bias, low, up, gate, residual."""
    m, n = size.m, size.n
    return (_float(n), _float(m, rank), _float(n, rank), _float(1, n), _float(m, n))


def _scaled(size: Sizes) -> Iterator[Case]:
    m, n, k = size[:3]
    op, none = linear_scaled.ROW, (None,) * 5
    codes, weight = int8_codes("cpu", m, k), int8_codes("cpu", n, k)
    ones = (torch.ones(m, 1), None, weight, torch.ones(n), None)
    yield _case("linear int8", op, (codes, *ones, *none, "", 1, torch.float32), 0)
    zero, sums = torch.tensor([11], dtype=torch.int8), weight.sum(1, dtype=torch.int32)
    static = (torch.ones(1), zero, weight, torch.ones(n), sums)
    yield _case("linear int8, zero point", op, (codes, *static, *none, "", 1, torch.float32), 0)
    for name, given, w, bound in (
        ("int8", codes, weight, RESOLUTION[BF16]),
        ("fp8", e4m3_codes("cpu", m, k), e4m3_codes("cpu", n, k), RESOLUTION[BF16]),
    ):
        scales = (positive("cpu", m, 1), None, w, positive("cpu", n), None)
        args = (given, *scales, *_tail(size, 32), "gelu_tanh", 1, BF16)
        yield _case(f"linear {name}, branch, GELU, gate, residual", op, args, bound)
        if name == "fp8":
            args = (given, *scales, *none, "", 1, torch.float32)
            yield _case("linear fp8", op, args, E4M3_SUMS)
        parts = (_float(n), *none[1:], "", 2, BF16)
        yield _case(f"linear {name}, in two planes", op, (given, *scales, *parts), bound)


def _packed(size: Sizes) -> Iterator[Case]:
    m, n, k = size[:3]
    x = _float(m, k)
    for name, weight, given in (
        ("w4a8", INT4, GROUP), ("w4a8 by token", INT4, TOKEN), ("w4a16", INT4, ""),
        ("nvfp4", NVFP4, FP8), ("nvfp4, float activations", NVFP4, ""),
    ):  # fmt: skip
        stored = pack_weight(torch.randn(n, k), parse_quantizer(weight))
        args = (*_given(x, given), stored.packed, stored.scale, stored.over)
        plain = (*args, *(None,) * 5, weight, "", 1, torch.float32)
        yield _case(f"linear {name}", linear_packed.ROW, plain, ADDED_UP)
        full = (*args, *_tail(size, 32), weight, "silu", 1, BF16)
        name = f"linear {name}, branch, SiLU, gate, residual"
        yield _case(name, linear_packed.ROW, full, RESOLUTION[BF16])


def _given(x: Tensor, quantizer: str) -> tuple[Tensor, Tensor | None]:
    if not quantizer:
        return x, None
    how = parse_quantizer(quantizer)
    scale, _ = find_scale(x, how)
    codes = to_codes(x, scale, None, how)
    return codes if how.grid.kind == "int" else codes.view(E4M3), scale


def _rows(size: Sizes) -> Iterator[Case]:
    x, smooth, down = _float(size.m, size.k), torch.rand(size.k) + 0.5, _float(32, size.k)
    low = RESOLUTION[BF16]
    for quantizer in (TOKEN, FP8, GROUP, "int4/group16/dynamic"):
        args = (x, smooth, down, quantizer)
        yield _case(f"quantize_rows {quantizer}", quantize_rows.ROW, args, 0, 0, low)
    scale, zero = torch.tensor(0.02), torch.tensor(7, dtype=torch.int8)
    yield Case("quantize", quantize_static.NATIVE, quantize_reference, (x, scale, zero, 0), (0,))


def _norms(size: Sizes) -> Iterator[Case]:
    m, k = size.m, size.k
    x, weight, bias = _float(m, k) + 0.3, _float(k), _float(k)
    scale, shift, down = _float(1, k), _float(1, k), _float(16, k)
    float_, rounded = (RESOLUTION[BF16], 0, 0), (None, 2 * RESOLUTION[BF16], RESOLUTION[BF16])
    for kind in row_norm.KINDS:
        args = (x, weight, bias, None, None, None, 1e-6, kind, 1.0, "")
        yield _case(f"row_norm {kind}", row_norm.ROW, args, *float_)
        for quantizer in (TOKEN, FP8):
            args = (x, None, None, scale, shift, down, 1e-6, kind, 1.0, quantizer)
            name = f"row_norm {kind}, modulated, {quantizer}"
            yield _case(name, row_norm.ROW, args, *rounded)
    wide = _float(m, 2 * k)
    for kind, given in (("geglu", wide), ("swiglu_first", wide), ("gelu_tanh", x)):
        yield _case(f"gated {kind}", gated.ROW, (given, None, None, kind, ""), *float_)
        args = (given, None, down, kind, TOKEN)
        yield _case(f"gated {kind}, {TOKEN}", gated.ROW, args, *rounded)


def _turned(size: Sizes) -> Iterator[Case]:
    x, (cos, sin) = _float(1, size.m, 3, 64), torch.randn(2, size.m, 64).unbind()
    for pairs in rotary.PAIRS:
        args = (x.transpose(1, 2), cos, sin, pairs, 2)
        yield _case(f"rotary {pairs}", rotary.ROW, args, RESOLUTION[BF16])


def _convolutions(size: Sizes) -> Iterator[Case]:
    n, c, side = size.image
    x, zero = random_image("cpu", n, c, side, codes=True), torch.tensor([5], dtype=torch.int8)
    for window, stride in ((3, 1), (3, 2), (1, 1)):
        weight = random_image("cpu", c + 2, c, window, codes=True)
        sums, places = weight.sum((1, 2, 3), dtype=torch.int32), ([stride] * 2, [window // 2] * 2)
        one = (x, torch.ones(1), zero, weight, torch.ones(c + 2), sums, *(None,) * 6)
        plain = (*one, None, None, "", None, None, *places, torch.float32)
        name = f"conv2d {window}x{window} by {stride}"
        yield _case(name, conv_scaled.ROW, plain, 0)
        scales = (torch.tensor([0.02]), zero, weight, positive("cpu", c + 2), sums)
        out = (side + 2 * (window // 2) - window) // stride + 1
        tail = (torch.randn(c + 2), random_image("cpu", n, c + 2, out), "silu", None, None)
        args = (x, *scales, *(None,) * 6, *tail, *places, BF16)
        yield _case(f"{name}, SiLU, residual", conv_scaled.ROW, args, RESOLUTION[BF16])


def _images(size: Sizes) -> Iterator[Case]:
    n, c, side = size.image
    x = random_image("cpu", n, c, side) + 2
    yield _case("group_stats", group_norm_act.STATS_ROW, (x, 8, 1e-5), ADDED_UP)
    stats = group_norm_act.stats_reference(x, 8, 1e-5)
    weight, bias = _float(c), _float(c)
    args = (x, stats, 8, weight, bias, "silu", None, None)
    yield _case("group_norm_act", group_norm_act.ROW, args, RESOLUTION[BF16])
    codes = (torch.tensor([0.03]), torch.tensor([-5], dtype=torch.int8))
    args = (x, stats, 8, weight, bias, "silu", *codes)
    yield _case("group_norm_act, int8", group_norm_act.ROW, args, None)


# ---- running and comparing -----------------------------------------------------------------------


def correct(bench: Bench, sizes: Sequence[Sizes] = REAL, only: str = "") -> list[dict[str, Any]]:
    """A row for each case, with its errors.

    Raises:
        Wrong: the first case that is not what its reference says.
    """
    todo = [case for case in cases(sizes) if only in case.name]
    bench.compile(launch for case in todo if (launch := _launch(case, empty_of(case))) is not None)
    return [{"name": case.name, "errors": checked(case, bench.device)} for case in todo]


def empty_of(case: Case) -> tuple[Tensor, ...]:
    """Results of a case, not filled."""
    return as_tuple(case.native.empty(*case.args))


def _launch(case: Case, results: tuple[Tensor, ...]) -> Any:
    return case.native.launch(results, *case.args)


def checked(case: Case, device: Any) -> list[float]:
    """The relative error of each result of one case.

    Raises:
        Wrong: it is too large, or the kernel failed.
    """
    moved = case._replace(args=tuple(_to(each, device) for each in case.args))
    results = tuple(poisoned(each) for each in empty_of(moved))
    try:
        launch = _launch(moved, results)
        if launch is not None:
            run_jit(launch)
        found = [each.cpu() for each in results]
    except Exception as error:
        raise Wrong(f"{case.name}: {type(error).__name__}: {error}") from error
    wanted = as_tuple(case.reference(*case.args))
    scales = (found[1], wanted[1]) if len(found) > 1 and found[1].numel() else (None, None)
    return [
        compared(case.name, got, want, bound, *scales)
        for got, want, bound in zip(found, wanted, case.bounds, strict=True)
        if want.numel()
    ]


def _to(value: Any, device: Any) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def poisoned(result: Tensor) -> Tensor:
    """A result's memory, filled with what no kernel leaves there by chance: NaN, or one code."""
    if result.dtype in RESOLUTION:
        return result.fill_(float("nan"))
    return result.view(torch.uint8).fill_(POISON).view(result.dtype)


def compared(
    name: str, got: Tensor, want: Tensor, bound: float | None,
    scale: Tensor | None = None, expected: Tensor | None = None,
) -> float:  # fmt: skip
    """The relative error of one result; `scale` and `expected` are those of codes.

    Raises:
        Wrong: it is too large.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        raise Wrong(f"{name}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {want.shape}")
    if bound is None:
        return _codes(name, got, want, scale, expected)
    one, other = got.double(), want.double()
    if bound == 0:
        wrong = int((one != other).sum())
        if wrong or one.isnan().any():
            raise Wrong(f"{name}: {wrong} of {one.numel()} elements differ; expected none")
        return 0.0
    return _close(name, one, other, bound)


def _close(name: str, got: Tensor, want: Tensor, bound: float) -> float:
    size = want.norm() / want.numel() ** 0.5
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    off = (got - want).abs() / (want.abs() + size).clamp(min=1e-30)
    furthest = float(off.max())
    if not (error <= bound and furthest <= FURTHEST * bound):  # NaN is wrong, too
        raise Wrong(f"{name}: relative error {error:.2e}, one element {furthest:.2e}; expected at "
                    f"most {bound:.0e} and {FURTHEST * bound:.0e}")  # fmt: skip
    return error


def _codes(
    name: str, got: Tensor, want: Tensor, scale: Tensor | None, expected: Tensor | None
) -> float:
    """Codes of values that were rounded: by neighbours in few places, close in what they mean."""
    bits = [each.view(torch.int8).int() for each in (got, want)]
    apart = (bits[0] - bits[1]).abs()
    share = float((apart > 0).double().mean())
    if int(apart.max()) > 1 or share > DIFFERING:
        raise Wrong(f"{name}: codes differ by up to {int(apart.max())}, {share:.1%} of them; "
                    f"expected neighbours, at most {DIFFERING:.0%}")  # fmt: skip
    one, other = got.double(), want.double()
    if scale is not None and expected is not None:
        one, other = one * scale.double(), other * expected.double()
    return _close(name, one, other, 2 * DIFFERING)
