"""The low-bit linear layers' kernels, interpreted, against float64 and exact integers."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from effuse.errors import BackendError
from effuse.kernels import linear_packed, linear_scaled
from effuse.kernels.launch import run_native
from effuse.kernels.low_bit import pack_weight
from effuse.kernels.quantizers import find_scale, parse_quantizer, to_codes
from effuse.kernels.tiles import Tile, pick, programs

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
E4M3 = torch.float8_e4m3fn
INT4, NVFP4, MXFP4 = "int4/group32", "e2m1/group16/scale-e4m3", "e2m1/group32/scale-e8m0"
MODULES = (linear_scaled, linear_packed)
SAMPLES = [
    pytest.param(module, index, id=f"{module.ROW.name}-{index}")
    for module in MODULES
    for index in range(len(module.samples(torch.Generator())))
]
few = settings(max_examples=10, deadline=None)
sizes = st.integers(1, 70)


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=drawn(seed))


def int8(seed: int, *shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, generator=drawn(seed), dtype=torch.int8)


def e4m3(seed: int, *shape: int) -> Tensor:
    return (60 * random(seed, *shape)).clamp(-448, 448).to(E4M3)


def scaled(codes: Tensor, scale: Tensor, weight: Tensor, channels: Tensor, **given: Any) -> Tensor:
    """The kernel of linear_scaled, what is not given left out."""
    rest = ("bias", "low", "up", "gate", "residual")
    return run_native(
        linear_scaled.ROW.native,
        *(codes, scale, given.get("zero"), weight, channels, given.get("sums")),
        *(given.get(name) for name in rest),
        *(given.get("activation", ""), given.get("parts", 1), given.get("dtype", torch.float32)),
    )


def packed_args(x: Tensor, scale: Tensor | None, weight: Tensor, text: str,
                dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:  # fmt: skip
    """Arguments of linear_packed for a weight that is quantized here, without an epilogue."""
    stored = pack_weight(weight, parse_quantizer(text))
    return (x, scale, stored.packed, stored.scale, stored.over, *[None] * 5, text, "", 1, dtype)


def quantized(x: Tensor, text: str) -> tuple[Tensor, Tensor]:
    how = parse_quantizer(text)
    scale, _ = find_scale(x, how)
    codes = to_codes(x, scale, None, how)
    return (codes if how.grid.kind == "int" else codes.view(E4M3)), scale


def numpy_weight(packed: Tensor, scale: Tensor, over: Tensor | None, text: str) -> np.ndarray:
    """A packed weight in float64, without effuse's own unpacking."""
    codes = np.stack([packed.numpy() & 15, packed.numpy() >> 4], -1).reshape(len(packed), -1)
    integers = np.arange(16.0) - 16.0 * (np.arange(16) > 7)
    floats = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = integers if text.startswith("int4") else np.concatenate([floats, -floats])
    steps = scale.view(E4M3).double().numpy() if "e4m3" in text else scale.double().numpy()
    steps = 2.0 ** (scale.double().numpy() - 127) if "e8m0" in text else steps
    steps = np.repeat(steps, codes.shape[1] // steps.shape[1], 1)
    return table[codes] * steps * (1.0 if over is None else over.item())


def numpy_tail(total: np.ndarray, tail: dict[str, Any]) -> np.ndarray:
    """The epilogue in float64 on (M, N)."""
    numbers = {key: value.double().numpy() for key, value in tail.items() if torch.is_tensor(value)}
    if "low" in numbers:
        total = total + numbers["low"] @ numbers["up"].T
    y = torch.from_numpy(total + numbers.get("bias", 0.0))
    act = {"gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu,
           "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh")}  # fmt: skip
    y = act[tail["activation"]](y) if tail["activation"] else y
    gated = y.numpy()
    if "gate" in numbers:
        gated = gated * np.repeat(numbers["gate"], len(gated) // len(numbers["gate"]), 0)
    return gated + numbers.get("residual", 0.0)


def assert_near(got: Tensor, want: Tensor | np.ndarray, depth: int) -> None:
    """One rounding to got's type, after a float32 sum of `depth` products."""
    want = torch.as_tensor(want).double()
    size = float(want.abs().max()) if want.numel() else 0.0
    torch.testing.assert_close(
        got.double(), want, rtol=torch.finfo(got.dtype).eps, atol=1.2e-7 * depth * max(size, 1.0)
    )


@pytest.mark.parametrize(("module", "index"), SAMPLES)
def test_kernels_agree_with_their_references(module: Any, index: int) -> None:
    sample = module.samples(drawn(3))[index]
    got, want = run_native(module.ROW.native, *sample), module.reference(*sample)
    assert got.shape == want.shape and got.dtype == want.dtype and got.is_contiguous()
    assert_near(got, want, sample[0].shape[-1])


@pytest.mark.parametrize(("module", "index"), SAMPLES)
def test_schema_and_fake(module: Any, index: int) -> None:
    sample = module.samples(drawn(4))[index]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    skipped = sample[0].dtype == E4M3  # torch cannot compare float8 inputs before and after
    torch.library.opcheck(module.TARGET, sample, test_utils=tests[skipped:])


@given(sizes, sizes, sizes, st.booleans(), st.booleans(), st.integers(0, 99))
@few
def test_int8_sums_are_exact(
    rows: int, columns: int, depth: int, shifted: bool, per_row: bool, seed: int
) -> None:
    codes, weight = int8(seed, rows, depth), int8(seed + 1, columns, depth)
    zero = torch.tensor([seed - 50], dtype=torch.int8) if shifted else None
    sums = weight.sum(1, dtype=torch.int32) if shifted else None
    scale = random(seed, rows, 1).abs() if per_row and not shifted else torch.tensor(0.037)
    channels = random(seed + 2, columns)
    got = scaled(codes, scale, weight, channels, zero=zero, sums=sums)
    exact = (codes.long() - (0 if zero is None else int(zero))) @ weight.long().T
    assert torch.equal(got, exact.float() * scale * channels)


@given(sizes, sizes, st.integers(1, 300), st.sampled_from(FLOATS), st.integers(0, 99))
@few
def test_e4m3_against_float64(
    rows: int, columns: int, depth: int, dtype: torch.dtype, seed: int
) -> None:
    codes, weight = e4m3(seed, rows, depth), e4m3(seed + 1, columns, depth)
    scale, channels = random(seed, rows, 1).abs() / 999, random(seed, columns).abs() / 99
    got = scaled(codes, scale, weight, channels, dtype=dtype)
    exact = codes.double().numpy() @ weight.double().numpy().T
    assert_near(got, exact * scale.double().numpy() * channels.double().numpy(), depth)


@st.composite
def tails(draw: Callable[..., Any], rows: int, columns: int) -> dict[str, Any]:
    """Any epilogue of (rows, columns)."""
    seed, kind = draw(st.integers(0, 99)), draw(st.sampled_from(FLOATS))
    rank = draw(st.sampled_from((0, 1, 7, 16, 70)))
    blocks = draw(st.sampled_from([0, *(b for b in range(1, rows + 1) if rows % b == 0)]))
    tail: dict[str, Any] = {"activation": draw(st.sampled_from(["", "gelu", "gelu_tanh", "silu"]))}
    if draw(st.booleans()):
        tail["bias"] = random(seed, columns).to(kind)
    if rank:
        tail["low"] = random(seed + 1, rows, rank).to(kind)
        tail["up"] = random(seed + 2, columns, rank).to(kind)
    if blocks:
        tail["gate"] = random(seed + 3, blocks, columns).to(kind)
    if draw(st.booleans()):
        tail["residual"] = random(seed + 4, rows, columns).to(kind)
    return tail


@given(st.data(), sizes, sizes, st.sampled_from(FLOATS))
@settings(max_examples=15, deadline=None)
def test_epilogues_against_float64(
    data: st.DataObject, rows: int, columns: int, dtype: torch.dtype
) -> None:
    tail = data.draw(tails(rows, columns))
    codes, weight = int8(1, rows, 20), int8(2, columns, 20)
    scale, channels = torch.tensor([0.01]), random(3, columns).abs() / 300
    total = codes.double().numpy() @ weight.double().numpy().T * 0.01 * channels.double().numpy()
    args = {name: tail.get(name) for name in ("bias", "low", "up", "gate", "residual")}
    want = numpy_tail(total, tail)
    assert_near(scaled(codes, scale, weight, channels, **tail, dtype=dtype), want, 100)
    reference = linear_scaled.reference(
        codes, scale, None, weight, channels, None, *args.values(), tail["activation"], 1, dtype
    )
    assert_near(reference, want, 100)


@given(st.integers(1, 20), st.sampled_from((2, 3)), st.integers(1, 12), st.integers(0, 9))
@few
def test_parts_are_the_planes_of_one_product(rows: int, parts: int, plane: int, seed: int) -> None:
    columns = parts * plane
    args = (int8(seed, 2, rows, 24), random(seed, 2, rows, 1).abs(), int8(seed, columns, 24))
    bias, channels = random(seed + 1, columns), random(seed + 2, columns)
    whole = scaled(*args, channels, bias=bias, activation="silu")
    cut = scaled(*args, channels, bias=bias, activation="silu", parts=parts)
    assert cut.shape == (parts, 2, rows, plane) and cut.is_contiguous()
    assert torch.equal(torch.cat(list(cut), -1), whole)


@given(sizes, sizes, st.integers(1, 5), st.integers(0, 99), st.data())
@settings(max_examples=15, deadline=None)
def test_packed_weights_against_float64(
    rows: int, columns: int, groups: int, seed: int, data: st.DataObject
) -> None:
    text, how = data.draw(st.sampled_from([
        (INT4, ""), ("int4/group16", ""), ("int4/channel", ""), (NVFP4, ""), (MXFP4, ""),
        (INT4, "int8/group32/dynamic"), (INT4, "int4/group16/dynamic"),
        (INT4, "int8/token/dynamic"), ("int4/group128", "int8/group64/dynamic"),
        ("int4/channel", "int8/group16/dynamic"),
        ("int4/channel", "int8/token/dynamic"), (NVFP4, "e4m3/token/dynamic"),
        (MXFP4, "e4m3/token/dynamic"),
    ]))  # fmt: skip
    dtype = data.draw(st.sampled_from(FLOATS))
    depth = groups * (128 if "128" in text else 32)
    x, weight = random(seed, rows, depth), random(seed + 1, columns, depth)
    x, scale = quantized(x, how) if how else (x.to(dtype), None)
    args = packed_args(x, scale, weight, text, dtype)
    got = run_native(linear_packed.ROW.native, *args)
    real = numpy_weight(args[2], args[3], args[4], text)
    if scale is None:
        real = torch.from_numpy(real).float().to(x.dtype).double().numpy()
    given = x.double().numpy()
    if scale is not None:
        given = given * np.repeat(scale.double().numpy(), depth // scale.shape[-1], 1)
    assert_near(got, given @ real.T, depth)
    assert_near(linear_packed.reference(*args), given @ real.T, depth)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("text", "patterns"), [(INT4, None), (NVFP4, range(127)), (MXFP4, range(7, 247))]
)
def test_every_code_under_every_scale(
    text: str, patterns: range | None, dtype: torch.dtype
) -> None:
    """A product with the identity gives the weight, rounded to x's type, to the bit."""
    how = parse_quantizer(text)
    codes = torch.arange(16, dtype=torch.uint8).repeat(how.group // 16)
    row = codes[::2] | codes[1::2] << 4
    if patterns and "e8m0" in text and dtype == torch.float16:
        patterns = range(95, 140)  # others overflow it
    steps = torch.tensor(patterns, dtype=torch.uint8) if patterns else random(1, 40).abs()
    packed = row.repeat(len(steps), 1)
    over = torch.tensor(0.37) if "e4m3" in text else None
    eye = torch.eye(how.group).to(dtype)
    args = (eye, None, packed, steps[:, None], over, *[None] * 5, text, "", 1, torch.float32)
    got = run_native(linear_packed.ROW.native, *args)
    weight = torch.from_numpy(numpy_weight(packed, steps[:, None], None, text))
    value = weight.float() if over is None else weight.float() / steps.view(E4M3).float()[:, None]
    if over is not None:  # scales are joined first, as kernels/quantizers.py does
        value = torch.where(steps[:, None] > 0, value, 0.0)
        value = value * (steps.view(E4M3).float() * over)[:, None]
    assert torch.equal(got, value.to(dtype).float().T)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("shape", [(130, 131, 192), (33, 70, 96)])
def test_tiles_do_not_change_the_result(
    module: Any, shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, columns, depth = shape
    for tile in linear_scaled.TILES:
        if module is linear_scaled:
            monkeypatch.setattr(module, "TILES", (tile,))
            codes, weight = int8(1, rows, depth), int8(2, columns, depth)
            got = scaled(codes, random(3, rows, 1), weight, random(4, columns))
            want = (
                (codes.long() @ weight.long().T).float() * random(3, rows, 1) * random(4, columns)
            )
            assert torch.equal(got, want)
        else:
            x, scale = quantized(random(1, rows, depth), "int8/group32/dynamic")
            args = packed_args(x, scale, random(2, columns, depth), INT4)
            monkeypatch.setitem(module.TILES, torch.int8, (tile,))
            assert_near(run_native(module.ROW.native, *args), module.reference(*args), depth)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, E4M3])
def test_tiles_of_floats_do_not_change_the_result(
    kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, scale = random(1, 130, 96).to(kind), random(2, 130, 1).abs() if kind == E4M3 else None
    args = packed_args(x, scale, random(3, 131, 96), NVFP4)
    want = linear_packed.reference(*args)
    for tile in linear_packed.TILES[kind]:
        monkeypatch.setitem(linear_packed.TILES, kind, (tile,))
        assert_near(run_native(linear_packed.ROW.native, *args), want, 96)


def test_tiles_fit_the_shape() -> None:
    for rows in (1, 16, 77, 1024, 4096):
        for columns in (640, 3072, 21504):
            tile = pick(linear_scaled.TILES, rows, columns)
            assert tile.rows < 2 * max(rows, 16)
            assert programs(tile, rows, columns) >= min(96, columns // 64)
    assert pick(linear_scaled.TILES, 4096, 3072) == linear_scaled.TILES[0]
    assert pick((Tile(64, 64, 64, 4, 2),), 1, 64).rows == 64


@pytest.mark.parametrize(("module", "index"), SAMPLES)
def test_launches_need_no_values(module: Any, index: int) -> None:
    sample = module.samples(drawn(5))[index]
    real = module.launch((module.empty(*sample),), *sample)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) if torch.is_tensor(each) else each for each in sample]
        fake = module.launch((module.empty(*fakes),), *fakes)
    if real is None:
        assert fake is None and prod(sample[0].shape[:-1]) == 0
    else:
        assert (fake.grid, fake.constants, fake.warps) == (real.grid, real.constants, real.warps)
        names = set(real.kernel.arg_names)
        assert set(real.args) | set(real.constants) == names


def altered(module: Any, index: int, **changes: Any) -> tuple[Any, ...]:
    names = module.reference.__code__.co_varnames
    sample = list(module.samples(drawn(6))[index])
    for name, value in changes.items():
        old = sample[names.index(name)]
        sample[names.index(name)] = value(old) if callable(value) else value
    return tuple(sample)


def across(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize(("module", "index", "changes", "words"), [
    (linear_scaled, 0, {"codes": across}, "codes: expected a contiguous"),
    (linear_scaled, 0, {"codes": lambda x: x.float()}, "expected both int8 or both float8"),
    (linear_scaled, 0, {"weight": lambda w: w[:, 1:].contiguous()}, "weight: expected"),
    (linear_scaled, 0, {"scale": torch.ones(7)}, "scale: expected float32"),
    (linear_scaled, 0, {"channels": torch.ones(1)}, "channels: expected"),
    (linear_scaled, 0, {"sums": None}, "expected both or neither"),
    (linear_scaled, 0, {"scale": torch.ones(5, 1)}, "zero: expected one int8"),
    (linear_scaled, 0, {"bias": torch.ones(3)}, "bias: expected shape"),
    (linear_scaled, 0, {"activation": "relu"}, "activation: expected one of"),
    (linear_scaled, 1, {"up": None}, "low, up: expected both or neither"),
    (linear_scaled, 1, {"low": lambda low: low[:1]}, "low: expected shape"),
    (linear_scaled, 2, {"parts": 5}, "parts: expected a divisor"),
    (linear_scaled, 2, {"gate": torch.ones(1, 24)}, "parts: expected 1 beside a gate"),
    (linear_scaled, 3, {"gate": torch.ones(4, 24)}, "gate: expected a row for each"),
    (linear_scaled, 3, {"residual": torch.ones(24)}, "residual: expected shape"),
    (linear_packed, 0, {"x": across}, "x: expected a contiguous"),
    (linear_packed, 0, {"x": lambda x: x.double()}, "x: expected float16"),
    (linear_packed, 0, {"weight": "int4/group48"}, "weight: expected one of"),
    (linear_packed, 0, {"weight": "int8/group32"}, "weight: expected one of"),
    (linear_packed, 0, {"packed": lambda p: p[:, 1:].contiguous()}, "packed: expected uint8"),
    (linear_packed, 0, {"w_scale": lambda s: s[:, :1].contiguous()}, "w_scale: expected"),
    (linear_packed, 3, {"scale": lambda s: torch.ones(*s.shape[:-1], 16)}, "scale: expected float"),
    (linear_packed, 6, {"x": lambda x: x.view(torch.int8)}, "float8_e4m3fn with one"),
    (linear_packed, 7, {"over": torch.ones(2)}, "over: expected one float32"),
])  # fmt: skip
def test_what_kernels_cannot_take_is_refused(
    module: Any, index: int, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(BackendError, match=words):
        run_native(module.ROW.native, *altered(module, index, **changes))


def test_sums_that_would_overflow_are_refused() -> None:
    wide = torch.zeros(1, (1 << 16) + 1, dtype=torch.int8)
    with pytest.raises(BackendError, match="at most 65536 int8 columns"):
        scaled(wide, torch.ones(1), wide, torch.ones(1))
