"""Int8 convolution and group norm in Triton, against integers and float64 by numpy."""

from __future__ import annotations

import dataclasses
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from effuse.cost import FORMULAS
from effuse.errors import BackendError
from effuse.kernels import conv_scaled, group_norm_act
from effuse.kernels.launch import run_jit, run_native
from effuse.kernels.tiles import programs

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

LAST = torch.channels_last
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ROWS = (conv_scaled.ROW, group_norm_act.STATS_ROW, group_norm_act.ROW)
some = settings(deadline=None, max_examples=12)
seeds = st.integers(0, 2**31)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


CALLS = pytest.mark.parametrize(
    ("row", "sample"),
    [
        pytest.param(row, sample, id=f"{row.name}-{index}")
        for row in ROWS
        for index, sample in enumerate(row.samples(generator()))
    ],
)


# by hand, in numpy: integers and float64


def conv_by_hand(x, zero, weight, stride, padding):
    """Σ (q - zero) · w of every window, int64; the border is padded with the code `zero`."""
    x, weight = x.numpy().astype(np.int64), weight.numpy().astype(np.int64)
    sides = [(0, 0), (0, 0), *((size, size) for size in padding)]
    centred = np.pad(x - (0 if zero is None else int(zero)), sides)
    windows = np.lib.stride_tricks.sliding_window_view(centred, weight.shape[2:], (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows[:, :, :: stride[0], :: stride[1]], weight)


def activated(y, activation):
    with np.errstate(over="ignore"):
        if activation == "silu":
            return y / (1 + np.exp(-y))
        if activation == "gelu":
            return y * 0.5 * (1 + np.vectorize(math.erf, otypes=[float])(y / math.sqrt(2)))
        if activation == "gelu_tanh":
            return y * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return y


def float64(tensor):
    return tensor.double().numpy()


def vector64(tensor):
    return float64(tensor).reshape(-1, 1, 1)


def total_by_hand(call):
    """Float64 values before the result's type, and the magnitudes that were added to get them."""
    named = dict(zip(conv_scaled.NAMES, call, strict=True))
    parts = []
    for end in ("", "2"):
        if named[f"x{end}"] is None:
            continue
        operand = (named[f"{name}{end}"] for name in ("x", "zero", "weight"))
        sums = conv_by_hand(*operand, named["stride"], named["padding"])
        scale = float64(named[f"scale{end}"]).reshape(()) * vector64(named[f"channels{end}"])
        parts.append(sums * scale)
    if named["bias"] is not None:
        parts.append(vector64(named["bias"]) + 0 * parts[0])
    size = sum(np.abs(part) for part in parts)
    y = activated(sum(parts), named["activation"])
    if named["residual"] is not None:
        residual = float64(named["residual"])
        y, size = y + residual, size + np.abs(residual)
    return y, size


def assert_close(result, exact, size, dtype):
    """Within the rounding of `dtype`, and float32's of the terms that were added."""
    bound = torch.finfo(dtype).eps * np.abs(exact) + 1e-6 * size + 1e-30
    assert result.dtype == dtype
    assert np.all(np.abs(float64(result) - exact) <= bound)


def assert_codes(codes, exact, size, dtype, scale, zero):
    """The codes of `exact`; one code off only where rounding to `dtype` may cross a tie."""
    ratio = exact / float(scale)
    steps = np.clip(np.rint(ratio) + (0 if zero is None else int(zero)), -128, 127)
    slack = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps * np.abs(ratio)
    near = np.abs(np.abs(ratio - np.floor(ratio)) - 0.5) < 1e-4 + slack + 1e-6 * size / float(scale)
    away = np.abs(codes.numpy().astype(np.int64) - steps)
    assert codes.dtype == torch.int8
    assert np.all(away <= np.where(near, np.maximum(1, np.ceil(slack)), 0))


def assert_conv(result, call):
    named = dict(zip(conv_scaled.NAMES, call, strict=True))
    exact, size = total_by_hand(call)
    assert result.shape == exact.shape and result.is_contiguous(memory_format=LAST)
    if named["out_scale"] is None:
        assert_close(result, exact, size, named["dtype"])
    else:
        codes = named["out_scale"], named["out_zero"]
        assert_codes(result, exact, size, named["dtype"], *codes)


@st.composite
def geometries(draw):
    """(image, filters, stride, padding) of a convolution whose result may be ragged everywhere."""
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2), (5, 4)]))
    padding = [draw(st.integers(0, 2)) for _ in kernel]
    sides = [draw(st.integers(max(1, k - 2 * p), 9)) for k, p in zip(kernel, padding, strict=True)]
    depth = draw(st.integers(1, 70) | st.sampled_from([32, 64]))
    image = (draw(st.integers(0, 3)), depth, *sides)
    filters = (draw(st.integers(1, 40)), *kernel)
    return image, filters, [draw(st.integers(1, 3)) for _ in kernel], padding


ZEROS = st.none() | st.integers(-128, 127)


def exact_call(operand, stride, padding, dtype=torch.float32):
    """A call whose result is the integer sum: all scales are 1."""
    x, scale, zero, weight, channels, sums = operand
    ones = (torch.ones_like(scale), zero, weight, torch.ones_like(channels), sums)
    return x, *ones, *conv_scaled.NOTHING, None, None, "", None, None, stride, padding, dtype


@CALLS
def test_schema_and_fake_agree_with_the_op(row, sample):
    torch.library.opcheck(row.target, sample, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_the_op_is_traced(row):
    torch.library.opcheck(row.target, row.samples(generator())[1])


@CALLS
def test_kernels_agree_with_their_references(row, sample):
    result, expected = run_native(row.native, *sample), row.reference(*sample)
    assert result.dtype == expected.dtype and result.stride() == expected.stride()
    resolution = torch.finfo(expected.dtype).eps if expected.is_floating_point() else 0
    atol = 1 if resolution == 0 else 2e-6  # a code more or less: see assert_codes for which
    torch.testing.assert_close(result, expected, rtol=resolution, atol=atol)


@CALLS
def test_launches_need_no_values(row, sample):
    with FakeTensorMode() as mode:
        fake = tuple(mode.from_tensor(each) if torch.is_tensor(each) else each for each in sample)
        launch = row.native.launch((row.native.empty(*fake),), *fake)
    real = row.native.launch((row.native.empty(*sample),), *sample)
    assert (launch is None) == (real is None)
    if launch is not None:
        assert (launch.grid, launch.constants) == (real.grid, real.constants)
        parameters = set(launch.kernel.arg_names)
        assert parameters == {*launch.args, *launch.constants}


# convolution


@some
@given(geometries(), ZEROS, seeds)
def test_sums_are_exact(geometry, zero, seed):
    image, filters, stride, padding = geometry
    call = exact_call(conv_scaled.operand(generator(seed), image, filters, zero), stride, padding)
    expected = conv_by_hand(call[0], call[2], call[3], stride, padding)
    for result in (run_native(conv_scaled.ROW.native, *call), conv_scaled.reference(*call)):
        assert np.array_equal(float64(result), expected.astype(np.float32))


@some
@given(
    geometries(), ZEROS, st.none() | st.tuples(st.integers(1, 40), ZEROS), st.sampled_from(FLOATS),
    st.sampled_from(["", "silu", "gelu", "gelu_tanh"]), st.booleans(), st.booleans(), seeds,
)  # fmt: skip
def test_all_that_follows_the_sum(geometry, zero, second, dtype, activation, quantized, adds, seed):
    image, filters, stride, padding = geometry
    g = generator(seed)
    operand = conv_scaled.operand(g, image, filters, zero)
    other = conv_scaled.NOTHING
    if second is not None:
        depth, zero2 = second
        other = conv_scaled.operand(g, (image[0], depth, *image[2:]), filters, zero2)
    bias = torch.randn(filters[0], generator=g) if adds else None
    codes = (
        (torch.tensor([0.03]), torch.tensor([-7], dtype=torch.int8)) if quantized else (None,) * 2
    )
    rest = [activation, *codes, stride, padding, dtype]
    call = (*operand, *other, bias, None, *rest)
    if adds:
        shape = conv_scaled.empty(*call).shape
        residual = torch.randn(shape, generator=g).to(dtype).contiguous(memory_format=LAST)
        call = (*operand, *other, bias, residual, *rest)
    assert_conv(run_native(conv_scaled.ROW.native, *call), call)
    assert_conv(conv_scaled.reference(*call), call)


@pytest.mark.parametrize(
    ("tile", "depth"), [*zip(conv_scaled.TILES, [64, 32, 64, 128, 32], strict=True)]
)
def test_every_tile_gives_the_same_sums(tile, depth):
    operand = conv_scaled.operand(generator(), (2, 65, 9, 8), (67, 2, 2), 11)
    call = exact_call(operand, [1, 1], [1, 0])
    result = conv_scaled.empty(*call)
    launch = conv_scaled.launch((result,), *call)
    sizes = {"BM": tile.rows, "BN": tile.columns, "BK": depth, "EVEN": False, "EVEN2": False}
    rows = result.numel() // result.shape[1]
    grid = (programs(tile, rows, result.shape[1]),)
    constants = {**launch.constants, **sizes}
    run_jit(dataclasses.replace(launch, grid=grid, constants=constants))
    expected = conv_by_hand(call[0], call[2], call[3], [1, 1], [1, 0])
    assert np.array_equal(float64(result), expected)


@pytest.mark.parametrize("zero", [-128, 5, 127])
def test_the_border_is_the_value_zero(zero):
    x, *rest = conv_scaled.operand(generator(), (1, 5, 4, 3), (6, 3, 3), zero)
    bias = torch.randn(6, generator=generator())
    same = torch.full_like(x, zero)
    call = (same, *rest, *conv_scaled.NOTHING, bias, None, "", None, None, [1, 1], [2, 2],
            torch.float32)  # fmt: skip
    result = run_native(conv_scaled.ROW.native, *call)
    assert torch.equal(result, bias.view(1, -1, 1, 1).expand_as(result))


@pytest.mark.parametrize(
    ("rows", "columns", "depths", "expected"),
    [
        (2 * 128 * 128, 640, [640], (128, 128, 128)),
        (2 * 64 * 64, 320, [320], (128, 64, 64)),  # five blocks of 64 columns: none is wasted
        (2 * 32 * 32, 1280, [1280, 640], (128, 64, 128)),  # two sums need more registers
        (2 * 8 * 8, 1280, [1280], (64, 16, 128)),
        (2 * 64 * 64, 4, [320], (64, 16, 64)),
        (2 * 64 * 64, 320, [4], (128, 64, 32)),
        (2 * 32 * 32, 640, [1280, 48], (128, 64, 32)),
    ],
)
def test_tiles_follow_the_shapes(rows, columns, depths, expected):
    assert conv_scaled.choose_tile(rows, columns, depths)[:3] == expected


def test_operations_are_counted():
    flops = FORMULAS[conv_scaled.TARGET.overloadpacket]
    one = flops((2, 3, 8, 8), (1,), None, (5, 3, 3, 3), (5,), None, out_val=(2, 5, 8, 8))
    assert one == 2 * (2 * 5 * 8 * 8) * 27
    second = ((2, 4, 8, 8), (1,), None, (5, 4, 3, 3), (5,), None)
    both = flops((2, 3, 8, 8), (1,), None, (5, 3, 3, 3), (5,), None, *second, out_val=(2, 5, 8, 8))
    assert both == 2 * (2 * 5 * 8 * 8) * (27 + 36)


def conv_call(**changes):
    g = generator()
    names = conv_scaled.NAMES
    values = (
        *conv_scaled.operand(g, (2, 5, 4, 4), (6, 3, 3), 3), *conv_scaled.NOTHING, None, None, "",
        None, None, [1, 1], [1, 1], torch.float32,
    )  # fmt: skip
    return tuple({**dict(zip(names, values, strict=True)), **changes}.values())


BYTES = torch.int8
SECOND = conv_scaled.operand(generator(), (2, 3, 4, 4), (6, 3, 3), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5, 4, 4, dtype=BYTES)}, "x: .*channels_last"),
        ({"x": torch.zeros(2, 4, 4, 5).permute(0, 3, 1, 2)}, "x: expected int8"),
        ({"weight": torch.zeros(6, 5, 3, 3, dtype=BYTES)}, "weight: .*channels_last"),
        ({"weight": torch.zeros(6, 4, 3, 3, dtype=BYTES).to(memory_format=LAST)}, "weight: .*5"),
        ({"weight": torch.zeros(6, 1, 1, 1, dtype=BYTES).expand(6, 5, 3, 3)}, "weight: .*strides"),
        ({"weight": torch.zeros(6, 5, 8, 1, dtype=BYTES).to(memory_format=LAST),
          "padding": [4, 1]}, "weight: .*7x7"),
        ({"scale": torch.ones(2)}, "scale: expected 1 "),
        ({"scale": torch.ones(1).double()}, "scale: .*float64"),
        ({"channels": torch.ones(5)}, "channels: expected 6"),
        ({"zero": torch.zeros(1)}, "zero: .*int8"),
        ({"sums": None}, "sums: .*zero"),
        ({"sums": torch.zeros(6)}, "sums: .*int32"),
        ({"bias": torch.zeros(1)}, "bias: expected 6"),
        ({"residual": torch.zeros(2, 6, 4, 4)}, "residual: .*channels_last"),
        ({"residual": torch.zeros(1, 6, 4, 4).to(memory_format=LAST)}, "residual: .*shape"),
        ({"activation": "relu"}, "activation: .*relu"),
        ({"out_zero": torch.zeros(1, dtype=BYTES)}, "out_zero: .*out_scale"),
        ({"out_scale": torch.ones(6)}, "out_scale: expected 1 "),
        ({"stride": [1]}, "stride: expected two"),
        ({"stride": [0, 1]}, "stride: .*at least 1"),
        ({"padding": [-1, 0]}, "padding: .*at least 0"),
        ({"dtype": torch.float64}, "dtype: .*float64"),
        ({"x2": SECOND[0]}, "x2, scale2"),
        ({"x2": SECOND[0][:, :, :2], "scale2": SECOND[1], "weight2": SECOND[3],
          "channels2": SECOND[4]}, "x2: "),
        ({"x2": SECOND[0], "scale2": SECOND[1], "weight2": SECOND[3][:, :, :1, :1],
          "channels2": SECOND[4]}, "weight2: "),
    ],
)  # fmt: skip
def test_convolutions_that_are_refused(changes, message):
    call = conv_call(**changes)
    with pytest.raises(BackendError, match=message):
        conv_scaled.launch((conv_scaled.empty(*conv_call()),), *call)


def test_a_window_that_does_not_fit_is_refused():
    call = conv_call(weight=torch.zeros(6, 5, 3, 7, dtype=BYTES).to(memory_format=LAST))
    with pytest.raises(BackendError, match="padding: a window"):
        conv_scaled.empty(*call)


# group norm


def innermost(values):
    """(n, …, c) in memory, seen as (n, c, …)."""
    return values.movedim(-1, 1)


@st.composite
def normal_inputs(draw):
    """x with its channels innermost, and how many groups they have."""
    groups, width = draw(st.integers(1, 5)), draw(st.integers(1, 24))
    spatial = draw(st.lists(st.integers(1, 12), max_size=2))
    shape = (draw(st.integers(0, 3)), *spatial, groups * width)
    values = torch.randn(shape, generator=generator(draw(seeds))) * draw(st.floats(0.5, 4))
    return innermost((values + draw(st.floats(-3, 3))).to(draw(st.sampled_from(FLOATS)))), groups


def stats_by_hand(x, groups, eps):
    parts = float64(x).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    return parts.mean(-1), 1 / np.sqrt(parts.var(-1) + eps)


def norm_by_hand(x, groups, eps, weight, bias, activation):
    mean, rstd = stats_by_hand(x, groups, eps)
    parts = float64(x).reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    value = ((parts - mean[..., None]) * rstd[..., None]).reshape(x.shape)
    wide = (-1, *[1] * (x.dim() - 2))
    value = value if weight is None else value * float64(weight).reshape(wide)
    value = value if bias is None else value + float64(bias).reshape(wide)
    return activated(value, activation)


@some
@given(normal_inputs())
def test_statistics(given_input):
    x, groups = given_input
    mean, rstd = stats_by_hand(x, groups, 1e-3)
    for result in (
        run_native(group_norm_act.STATS_NATIVE, x, groups, 1e-3),
        group_norm_act.stats_reference(x, groups, 1e-3),
    ):
        assert np.allclose(result[..., 0].numpy(), mean, rtol=1e-6, atol=2e-6)
        assert np.allclose(result[..., 1].numpy(), rstd, rtol=1e-5)


@pytest.mark.parametrize("layout", ["many pixels", "many channels"])
def test_a_large_mean_does_not_cancel(layout):
    shape = (2, 23, 13, 64) if layout == "many pixels" else (2, 3, 5, 640)
    x = innermost(torch.randn(shape, generator=generator()) + 1e3)
    mean, rstd = stats_by_hand(x, 1, 1e-5)
    for result in (
        run_native(group_norm_act.STATS_NATIVE, x, 1, 1e-5),
        group_norm_act.stats_reference(x, 1, 1e-5),
    ):
        assert np.allclose(result[..., 0].numpy(), mean, rtol=3e-7)
        assert np.allclose(result[..., 1].numpy(), rstd, rtol=1e-5)
    naive = x.float().square().mean((1, 2, 3)) - x.float().mean((1, 2, 3)).square()
    assert not np.allclose(naive.rsqrt().numpy(), rstd[:, 0], rtol=1e-3)  # so the test can fail


def test_statistics_of_no_pixels_are_finite():
    result = run_native(group_norm_act.STATS_NATIVE, innermost(torch.zeros(2, 0, 3, 4)), 2, 1e-4)
    expected = torch.tensor([0.0, 100.0]).expand(2, 2, 2)
    torch.testing.assert_close(result, expected)


@some
@given(normal_inputs(), st.sampled_from(["", "silu"]), st.booleans(), st.booleans(), seeds)
def test_norm_activation_and_codes(given_input, activation, affine, quantized, seed):
    x, groups = given_input
    g = generator(seed)
    weight, bias = torch.randn(2, x.shape[1], generator=g).to(x.dtype) if affine else (None, None)
    scale, zero = torch.tensor([0.02]), torch.tensor([9], dtype=torch.int8)
    codes = (scale, zero) if quantized else (None, None)
    exact = norm_by_hand(x, groups, 0.1, weight, bias, activation)
    size = 8 + np.abs(exact)
    stats = run_native(group_norm_act.STATS_NATIVE, x, groups, 0.1)
    call = (x, stats, groups, weight, bias, activation, *codes)
    for result in (
        run_native(group_norm_act.NATIVE, *call),
        group_norm_act.reference(*call),
    ):
        assert result.shape == x.shape and result.stride() == x.stride()
        if quantized:
            assert_codes(result, exact, size, x.dtype, scale, zero)
        else:
            assert_close(result, exact, size, x.dtype)


def test_the_pair_is_torchs_group_norm():
    x = innermost(torch.randn(2, 7, 9, 96, generator=generator()) + 5)
    weight, bias = torch.randn(2, 96, generator=generator())
    stats = run_native(group_norm_act.STATS_NATIVE, x, 8, 1e-6)
    result = run_native(group_norm_act.NATIVE, x, stats, 8, weight, bias, "silu", None, None)
    expected = torch.nn.functional.silu(torch.nn.functional.group_norm(x, 8, weight, bias, 1e-6))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert result.is_contiguous(memory_format=LAST)


def norm_call(**changes):
    x = innermost(torch.randn(2, 3, 4, 6))
    names = ("x", "stats", "groups", "weight", "bias", "activation", "scale", "zero")
    values = (x, torch.zeros(2, 3, 2), 3, torch.ones(6), torch.zeros(6), "silu", None, None)
    return tuple({**dict(zip(names, values, strict=True)), **changes}.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(2, 6, 3, 4)}, "x: .*channels_last"),
        ({"x": torch.randn(6)}, "x: expected floats of shape"),
        ({"x": torch.zeros(2, 6, dtype=torch.int8)}, "x: expected floats"),
        ({"groups": 4}, "groups: expected a divisor of the 6"),
        ({"groups": 0}, "groups: "),
        ({"stats": torch.zeros(2, 6, 2)}, "stats: "),
        ({"stats": torch.zeros(2, 3, 2).half()}, "stats: "),
        ({"weight": torch.ones(3)}, "weight: expected 6"),
        ({"bias": torch.ones(12)[::2]}, "bias: expected 6 contiguous"),
        ({"activation": "mish"}, "activation: .*mish"),
        ({"scale": torch.ones(6)}, "scale: expected 1 "),
        ({"zero": torch.zeros(1, dtype=BYTES)}, "zero: .*scale"),
    ],
)
def test_norms_that_are_refused(changes, message):
    call = norm_call(**changes)
    with pytest.raises(BackendError, match=message):
        group_norm_act.launch((group_norm_act.empty(*norm_call()),), *call)


def test_statistics_that_are_refused():
    wide = innermost(torch.zeros(1, 2, 1 << 15))
    with pytest.raises(BackendError, match="groups: expected at most"):
        run_native(group_norm_act.STATS_NATIVE, wide, 1, 1e-5)
