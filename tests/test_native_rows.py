"""Kernels over rows in Triton's interpreter: against float64, and to the bit where exact."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.special import erf, expit
from torch.nn import functional as F

pytest.importorskip("triton")

from effuse.errors import BackendError
from effuse.kernels import gated, quantize_rows, quantize_static, row_norm, rows
from effuse.kernels.launch import run_native
from effuse.kernels.quantize import dequantize_reference, quantize_reference
from effuse.kernels.quantizers import TINY

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # a sigmoid's end
few = settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.too_slow])
MODULES = (quantize_rows, row_norm, gated)
CASES = [
    pytest.param(module, index, id=f"{module.ROW.name}-{index}")
    for module in MODULES
    for index in range(len(module.samples(torch.Generator())))
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
QUANTIZERS = (
    "int8/token/dynamic", "e4m3/token/dynamic", "int8/group16/dynamic", "int4/group32/dynamic",
)  # fmt: skip
KINDS = (*gated.HALVES, *gated.ACTIVATIONS)
LIMITS = {"int8": 127.0, "int4": 7.0, "e4m3": 448.0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(g, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=g).to(dtype)


def run(module, *args):
    return run_native(module.NATIVE, *args)


def wide(tensor):
    return None if tensor is None else tensor.double().numpy()


def equal(results, expected):
    """To the bit, and in shape and dtype."""
    for result, each in zip(results, expected, strict=True):
        assert (result.shape, result.dtype) == (each.shape, each.dtype)
        assert torch.equal(bits(result), bits(each))


def bits(tensor):
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def close(result, exact, dtype, length=1):
    """Within the dtype's resolution, and float32's times the number of terms."""
    rtol = torch.finfo(dtype).eps
    atol = 4 * torch.finfo(torch.float32).eps * length
    np.testing.assert_allclose(wide(result), exact, rtol=max(rtol, 1e-6), atol=atol)


def check_low(low, values, down):
    if down is None:
        assert low.shape == (0,)
    else:
        exact = wide(values) @ wide(down).T
        reach = float((values.abs().max() * down.abs().max()).clamp(min=1)) if values.numel() else 1
        close(low, exact, low.dtype, values.shape[-1] * reach)


# independent re-computation, in float64


def act_by_hand(x, name):
    if name == "gelu":
        return x * (1 + erf(x / np.sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2
    return x * expit(x)


def gated_by_hand(x, kind):
    if kind in gated.ACTIVATIONS:
        return act_by_hand(x, kind)
    left, right = np.split(x, 2, -1)
    if kind == "swiglu_first":
        return act_by_hand(left, "silu") * right
    return left * act_by_hand(right, {"geglu": "gelu", "geglu_tanh": "gelu_tanh"}.get(kind))


def norm_by_hand(x, weight, bias, scale, shift, eps, kind, offset):
    x, weight, bias, scale, shift = (wide(each) for each in (x, weight, bias, scale, shift))
    mean = x.mean(-1, keepdims=True) if kind == "layer" else 0.0
    n = (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps)
    n = n * (1 if weight is None else weight) + (0 if bias is None else bias)
    n = n.reshape(-1, x.shape[-1])
    if scale is not None:
        n = n * (offset + np.repeat(scale, len(n) // len(scale), 0))
    if shift is not None:
        n = n + np.repeat(shift, len(n) // len(shift), 0)
    return n.reshape(x.shape)


def codes_by_hand(values, quantizer):
    """The quotients (float64) whose nearest codes are right, and the scales."""
    name, how, _ = quantizer.split("/")
    v = values.astype(np.float32)
    group = v.shape[-1] if how == "token" else int(how[5:])
    parts = v.reshape(*v.shape[:-1], -1, group)
    scale = np.abs(parts).max(-1) / np.float32(LIMITS[name])
    scale = np.where(scale < TINY, np.float32(1), scale)
    return (parts.astype(np.float64) / scale[..., None]).reshape(v.shape), scale


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_of_quantized_rows(quantizer, dtype):
    x, smooth = uniform(generator(), 3, 5, 64, dtype=dtype), torch.rand(64, generator=generator())
    values = (x.float() * smooth).to(dtype)
    codes, scale, _ = quantize_rows.reference(x, smooth, None, quantizer)
    quotient, expected = codes_by_hand(wide(values), quantizer)
    np.testing.assert_array_equal(scale.numpy(), expected)
    away = np.abs(wide(codes.float()) - quotient)
    step = np.maximum(np.exp2(np.floor(np.log2(np.abs(quotient) + 1e-30)) - 3), 2.0**-9)
    step = step if quantizer.startswith("e4m3") else 1.0
    assert (away <= 0.5 * step * (1 + 1e-6)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_reference_of_activations(kind):
    x = uniform(generator(), 4, 24) * 3
    values, scale, low = gated.reference(x, None, None, kind, "")
    close(values, gated_by_hand(wide(x), kind), torch.float32, 4)
    assert scale.shape == low.shape == (0,)


@pytest.mark.parametrize("kind", row_norm.KINDS)
def test_reference_of_norms(kind):
    x, weight, bias = (uniform(generator(seed), *shape) for seed, shape in
                       enumerate([(2, 6, 40), (40,), (40,)]))  # fmt: skip
    scale, shift = uniform(generator(3), 4, 40), uniform(generator(4), 2, 40)
    args = (weight, bias, scale, shift)
    values, *_ = row_norm.reference(x, *args, None, 1e-3, kind, 1.0, "")
    close(values, norm_by_hand(x, *args, 1e-3, kind, 1.0), torch.float32, 8)


def test_reference_is_the_unfused_graph():
    x, scale, shift = (uniform(generator(n), *shape) for n, shape in
                       enumerate([(2, 6, 40), (2, 40), (2, 40)]))  # fmt: skip
    graph = F.layer_norm(x, (40,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    values, *_ = row_norm.reference(x, None, None, scale, shift, None, 1e-6, "layer", 1.0, "")
    torch.testing.assert_close(values, graph, rtol=1e-6, atol=1e-6)


# every row of the table


@pytest.mark.parametrize(("module", "index"), CASES)
def test_samples(module, index):
    sample = module.samples(generator())[index]
    torch.library.opcheck(module.TARGET, sample, test_utils=("test_schema", "test_faketensor"))
    values, scale, low = run(module, *sample)
    expected = module.reference(*sample)
    for result, each in zip((values, scale, low), expected, strict=True):
        assert (result.shape, result.dtype) == (each.shape, each.dtype)
    close(scale, wide(expected[1]), torch.float32)
    close(low, wide(expected[2]), low.dtype, 4 * sample[0].shape[-1])
    if values.dtype in DTYPES:
        close(values, wide(expected[0]), values.dtype, 8)
    else:  # a tie may fall to either side
        step = (0.0, 1.0) if values.dtype == torch.int8 else (2.0**-3, 2.0**-9)
        np.testing.assert_allclose(wide(values.float()), wide(expected[0].float()), *step)


# generated shapes


@st.composite
def shaped(draw, times=1):
    """x, whose rows may be parts of longer ones, and its quantizer."""
    quantizer = draw(st.sampled_from(QUANTIZERS))
    columns = draw(st.sampled_from((32, 64)) if "group" in quantizer else st.integers(1, 70))
    lead = draw(st.sampled_from(((), (1,), (5,), (2, 3), (33,), (2, 0))))
    g = generator(draw(st.integers(0, 9)))
    extra = draw(st.sampled_from((0, 3)))
    x = uniform(g, *lead, times * columns + extra, dtype=draw(st.sampled_from(DTYPES)))
    rank = draw(st.sampled_from((0, 1, 5, 40)))
    down = uniform(g, rank, columns, dtype=x.dtype) if rank else None
    smooth = torch.rand(columns, generator=g) + 0.5 if draw(st.booleans()) else None
    return x[..., : times * columns] * 4, smooth, down, quantizer


@few
@given(shaped())
def test_rows_are_quantized_to_the_bit(args):
    x, smooth, down, _ = args
    codes, scale, low = run(quantize_rows, *args)
    equal((codes, scale), quantize_rows.reference(*args)[:2])
    check_low(low, rows.smoothed(x, smooth), down)


@few
@given(shaped(times=2), st.sampled_from(tuple(gated.HALVES)))
def test_gated_rows(args, kind):
    x, smooth, down, quantizer = args
    plain, *_ = run(gated, x, None, down, kind, "")
    close(plain, gated_by_hand(wide(x), kind), x.dtype, 16)
    codes, scale, low = run(gated, x, smooth, down, kind, quantizer)
    values = rows.smoothed(plain, smooth)
    equal((codes, scale), rows.finish_reference(values, None, quantizer)[:2])
    check_low(low, values, down)


@few
@given(shaped(), st.sampled_from(tuple(gated.ACTIVATIONS)))
def test_activated_rows(args, kind):
    x, smooth, down, quantizer = args
    plain, *_ = run(gated, x, None, down, kind, "")
    close(plain, gated_by_hand(wide(x), kind), x.dtype, 4)
    values, _, low = run(gated, x, smooth, down, kind, "")
    equal([values], [rows.smoothed(plain, smooth)])
    check_low(low, values, down)
    equal(run(gated, x, smooth, down, kind, quantizer)[:2],
          rows.finish_reference(values, None, quantizer)[:2])  # fmt: skip


@few
@given(shaped(), st.sampled_from(row_norm.KINDS), st.lists(st.booleans(), min_size=4, max_size=4),
       st.sampled_from((0.0, 1.0)))  # fmt: skip
def test_normed_rows(args, kind, given_, offset):
    x, smooth, down, quantizer = args
    columns, count = x.shape[-1], x[..., 0].numel()
    g = generator(1)
    blocks = 2 if count % 2 == 0 else 1
    modulation = uniform(g, blocks, 3 * columns, dtype=x.dtype)
    full = (smooth, uniform(g, columns), modulation[:, :columns], modulation[:1, columns:-columns])
    operands = tuple(each if some else None for each, some in zip(full, given_, strict=True))
    plain, *_ = run(row_norm, x, *operands, down, 1e-3, kind, offset, "")
    if count:
        close(plain, norm_by_hand(x, *operands, 1e-3, kind, offset), x.dtype, 64)
    codes, scale, low = run(row_norm, x, *operands, down, 1e-3, kind, offset, quantizer)
    equal((codes, scale), rows.finish_reference(plain, None, quantizer)[:2])
    check_low(low, plain, down)


def test_long_rows_are_taken_in_blocks(monkeypatch):
    x, weight = uniform(generator(), 3, 70), torch.rand(70)
    norm = (x, weight, None, None, None, None, 1e-6, "layer", 1.0)
    whole = [run(row_norm, *norm, text) for text in ("", "int8/token/dynamic")]
    gelu = run(gated, x, None, None, "geglu", "e4m3/token/dynamic")
    monkeypatch.setattr(rows, "WHOLE_ROW", 32)
    monkeypatch.setattr(rows, "LOOP", 16)
    assert rows.row_tile(3, 70, 0, 0, 4).columns == 16
    equal(run(gated, x, None, None, "geglu", "e4m3/token/dynamic"), gelu)
    values, *_ = run(row_norm, *norm, "")
    torch.testing.assert_close(values, whole[0][0], rtol=1e-6, atol=1e-6)
    codes, scale, _ = run(row_norm, *norm, "int8/token/dynamic")
    torch.testing.assert_close(scale, whole[1][1], rtol=1e-6, atol=0.0)
    assert (codes - whole[1][0]).abs().max() <= 1
    equal((codes, scale), rows.finish_reference(values, None, "int8/token/dynamic")[:2])


@pytest.mark.parametrize("block", [16, 128])
def test_a_large_mean_does_not_cancel(monkeypatch, block):
    monkeypatch.setattr(rows, "WHOLE_ROW", block)
    monkeypatch.setattr(rows, "LOOP", block)
    x = uniform(generator(), 2, 100) + 1000
    values, *_ = run(row_norm, x, None, None, None, None, None, 1e-6, "layer", 1.0, "")
    exact = norm_by_hand(x, None, None, None, None, 1e-6, "layer", 1.0)
    np.testing.assert_allclose(wide(values), exact, atol=2e-4)  # x itself is known to 6e-5


# rounding, exactly


def test_ties_of_e4m3_go_to_the_even_code():
    patterns = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (patterns[1:] + patterns[:-1]) / 2
    nudged = torch.cat([between, between * (1 + 2.0**-23), between * (1 - 2.0**-23), patterns])
    x = torch.cat([nudged, -nudged])[None]  # the greatest is 448: the scale is 1
    codes, scale, _ = run(quantize_rows, x, None, None, "e4m3/token/dynamic")
    assert scale.item() == 1
    assert torch.equal(bits(codes), bits(x.to(torch.float8_e4m3fn)))


def test_ties_of_integers_go_to_the_even_code():
    halves = torch.arange(-254, 255) / 2
    x = torch.cat([halves, halves[1:-1] * (1 + 2.0**-23), halves * (1 - 2.0**-23)])[None]
    codes, scale, _ = run(quantize_rows, x, None, None, "int8/token/dynamic")
    assert scale.item() == 1
    assert torch.equal(codes, torch.round(x).to(torch.int8))


def test_smoothed_values_are_rounded_to_even():
    x, smooth = torch.arange(128, 256).bfloat16()[None], torch.full((128,), 1.5)
    *_, low = run(quantize_rows, x, smooth, torch.eye(128).bfloat16(), "int8/token/dynamic")
    assert torch.equal(low, (x.float() * 1.5).bfloat16())  # every second one is a tie


def test_rows_of_zeros_and_of_tiny_values():
    x = torch.zeros(3, 48)
    x[1, 3], x[2] = 2.0**-140, 2.0**-119
    for quantizer in QUANTIZERS[:3]:
        args = (x, None, None, quantizer)
        equal(run(quantize_rows, *args), quantize_rows.reference(*args))
    codes, scale, _ = run(quantize_rows, x[:2], None, None, "int8/token/dynamic")
    assert not codes.any()
    assert torch.equal(scale, torch.ones(2, 1))


# a known scale


@few
@given(
    st.sampled_from(((), (7,), (3, 5), (2, 3, 4, 5), (0, 4), (4099,))),
    st.integers(0, 9),
    st.sampled_from(DTYPES),
    st.sampled_from((torch.int8, torch.uint8)),
    st.booleans(),
)
def test_static_quantization_to_the_bit(shape, seed, dtype, code, vector):
    x = (torch.randn(shape, generator=generator(seed)) * 5).to(dtype)
    scale, zero = torch.tensor(0.03 + seed / 100), torch.tensor(17 * seed % 100, dtype=code)
    scale, zero = (each.view(1) if vector else each for each in (scale, zero))
    got = run(quantize_static, x, scale, zero, 0)
    expected = quantize_reference(x, scale.view(()), zero.view(()), 0)
    assert got.dtype == code
    assert torch.equal(got, expected)


def test_static_quantization_saturates_and_keeps_the_layout():
    x = torch.tensor([1e30, -1e30, 3e7, -3e7, 0.5, 1.5, float("inf"), -float("inf")])
    x = x.view(1, 2, 2, 2).contiguous(memory_format=torch.channels_last)
    scale, zero = torch.tensor(1.0), torch.tensor(-3, dtype=torch.int8)
    got = run(quantize_static, x, scale, zero, 0)
    assert got.stride() == x.stride()
    assert torch.equal(got, quantize_reference(x, scale, zero, 0))


@few
@given(
    st.sampled_from(((), (7,), (3, 5), (2, 3, 4, 5), (0, 4), (4099,))),
    st.integers(0, 9),
    st.sampled_from((torch.int8, torch.uint8)),
)
def test_static_dequantization_to_the_bit(shape, seed, code):
    limits = torch.iinfo(code)
    q = torch.randint(limits.min, limits.max + 1, shape, generator=generator(seed), dtype=code)
    scale, zero = torch.tensor(0.03 + seed / 100), torch.tensor(17 * seed % 100, dtype=code)
    images = q.contiguous(memory_format=torch.channels_last) if q.dim() == 4 else q
    got = run_native(quantize_static.VALUES, images, scale, zero, 0)
    assert got.stride() == images.stride()
    assert torch.equal(got, dequantize_reference(q, scale, zero, 0))


def test_a_scale_for_each_channel_is_left_to_pytorch():
    vectors = (torch.ones(4), torch.zeros(4, dtype=torch.int8))
    with pytest.raises(BackendError, match="scale: expected one element"):
        run_native(quantize_static.VALUES, torch.zeros(4, 6, dtype=torch.int8), *vectors, 0)


# what is refused


TOKEN = "int8/token/dynamic"
X = torch.zeros(4, 6, 32)
REFUSED = {
    "x: expected dense rows": (quantize_rows, (X.transpose(0, 1), None, None, TOKEN)),
    "x: expected dense rows .* strides": (quantize_rows, (X.mT, None, None, TOKEN)),
    "x: expected float32": (quantize_rows, (X.double(), None, None, TOKEN)),
    "down: expected a contiguous": (quantize_rows, (X, None, torch.zeros(32, 3).T, TOKEN)),
    "down: expected .R, 32.": (quantize_rows, (X, None, torch.zeros(3, 31), TOKEN)),
    "smooth: expected .32.": (gated, (X, torch.zeros(31), None, "gelu", "")),
    "kind: .* 'relu'": (gated, (X, None, None, "relu", "")),
    "x: expected two halves": (gated, (X[..., :31], None, None, "geglu", "")),
    "quantizer: .* got ''": (quantize_rows, (X, None, None, "")),
    "quantizer: .* 'int3": (gated, (X, None, None, "gelu", "int3/token/dynamic")),
    "quantizer: .* 'int8/group8": (gated, (X, None, None, "gelu", "int8/group8/dynamic")),
    "kind: .* 'group'": (row_norm, (X, *[None] * 5, 1e-6, "group", 1.0, "")),
    "scale: .* 24 rows": (
        row_norm, (X, None, None, torch.zeros(5, 32), None, None, 1e-6, "rms", 1.0, "")),
    "weight: expected": (row_norm, (X, torch.zeros(31), *[None] * 4, 1e-6, "rms", 1.0, "")),
    "scale: expected one element": (
        quantize_static, (X, torch.ones(4), torch.zeros(4, dtype=torch.int8), 0)),
    "zero_point: expected int8": (
        quantize_static, (X, torch.ones(1), torch.zeros(1, dtype=torch.int32), 0)),
    "x: expected memory without gaps": (
        quantize_static, (X[:, ::2], torch.ones(1), torch.zeros(1, dtype=torch.int8), 0)),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    module, args = REFUSED[message]
    with pytest.raises(BackendError, match=message):
        run(module, *args)
