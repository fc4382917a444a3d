"""Smoothing and its folds, bias correction, and attention scores in powers of two."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from effuse.errors import CalibrationError, InputError
from effuse.kernels.log2_attention import log2_round_trip, quantize_scores, score_range
from effuse.kernels.quantizers import parse_quantizer, round_trip
from effuse.passes.bias_correction import corrected_bias, mean_output
from effuse.passes.smoothing import (
    CANDIDATES,
    best_smoothing,
    input_absmax,
    into_columns,
    into_modulation,
    into_norm,
    into_rows,
    smooth_scale,
)

INT4, INT8 = parse_quantizer("int4/channel"), parse_quantizer("int8")


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(found, expected):
    return torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


def positive(seed, *shape):
    return random(seed, *shape).exp()


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_smoothing_is_the_equation(seed, alpha, beta):
    x, w = positive(seed, 9), positive(seed + 1, 9)
    expected = [math.pow(a, alpha) / math.pow(b, beta) for a, b in zip(x, w, strict=True)]
    assert smooth_scale(x, w, alpha, beta).tolist() == pytest.approx(expected, rel=1e-6)


def test_exponents_of_one_half_give_both_sides_the_same_range():
    x, w = positive(0, 9), positive(1, 9)
    scale = smooth_scale(x, w, 0.5, 0.5)
    assert torch.allclose(x / scale, w * scale)


def test_channels_that_are_silent_are_left_alone():
    scale = smooth_scale(torch.tensor([0.0, 4.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5, 0.5)
    assert scale.tolist() == [1, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_ranges_that_are_none_are_refused(bad):
    with pytest.raises(CalibrationError, match="x_absmax: expected finite"):
        smooth_scale(torch.tensor([bad]), torch.ones(1), 0.5, 0.5)
    with pytest.raises(CalibrationError, match="w_absmax: expected finite"):
        smooth_scale(torch.ones(1), torch.tensor([bad]), 0.5, 0.5)
    with pytest.raises(CalibrationError, match=r"w_absmax: expected \(1,\)"):
        smooth_scale(torch.ones(1), torch.ones(2), 0.5, 0.5)


def test_candidates_are_the_papers():
    assert len(CANDIDATES) == len(set(CANDIDATES)) == 39
    assert CANDIDATES[0] == (0, 0)
    assert {beta for _, beta in CANDIDATES[1:20]} == {0}
    assert all(sum(each) == pytest.approx(1) for each in CANDIDATES[20:])


def test_the_best_candidate_wins_and_no_smoothing_wins_ties():
    def error(alpha, beta):
        return abs(alpha - 0.3) + abs(beta - 0.7) if alpha else math.nan

    best, found = best_smoothing(error)
    assert best == pytest.approx((0.3, 0.7))
    assert found == error(*best)
    assert best_smoothing(lambda alpha, beta: 1.0) == ((0, 0), 1.0)
    with pytest.raises(CalibrationError, match="came none"):
        best_smoothing(lambda alpha, beta: math.nan)


def test_input_ranges_of_linear_and_convolution_weights():
    weight = random(0, 5, 3, 2, 2)
    expected = [weight[:, channel].abs().max().item() for channel in range(3)]
    assert input_absmax(weight).tolist() == expected
    assert torch.equal(input_absmax(weight[..., 0, 0]), weight[..., 0, 0].abs().amax(0))


def test_smoothing_of_inputs_with_outliers_halves_the_error_at_least():
    x, weight = random(0, 200, 16) * torch.logspace(-1, 1, 16), random(1, 8, 16)
    ranges = x.abs().amax(0), input_absmax(weight)

    def error(alpha, beta):
        scale = smooth_scale(*ranges, alpha, beta)
        smoothed = round_trip(into_columns(weight, scale), parse_quantizer("int8/channel"))
        return (round_trip(x / scale, INT8) @ smoothed.T - x @ weight.T).square().mean().item()

    (alpha, _), least = best_smoothing(error)
    assert alpha > 0
    assert least < 0.5 * error(0, 0)


@pytest.mark.parametrize("bias", [True, False])
def test_folding_behind_a_layer_is_exact(bias):
    first, second = random(0, 6, 4).double(), random(1, 5, 6, 3, 3).double()
    shift = random(2, 6).double() if bias else None
    x, scale = random(3, 2, 4, 7, 7).double(), positive(4, 6)

    def run(one, two, offset):
        inner = functional.conv2d(x, one[:, :, None, None], offset)
        return functional.conv2d(inner, two)

    rows, divided = into_rows(first, shift, scale)
    assert close(run(rows, into_columns(second, scale), divided), run(first, second, shift))


@pytest.mark.parametrize("affine", [True, False])
def test_folding_behind_a_norm_is_exact(affine):
    x, weight, scale = random(0, 3, 6).double(), random(1, 4, 6).double(), positive(2, 6)
    gamma, beta = random(3, 6).double(), random(4, 6).double() if affine else None

    def run(g, b, w):
        return functional.linear(functional.layer_norm(x, (6,), g, b), w)

    folded = into_norm(gamma, beta, scale)
    assert close(run(*folded, into_columns(weight, scale)), run(gamma, beta, weight))


@pytest.mark.parametrize("bias", [True, False])
def test_folding_behind_a_modulated_norm_is_exact(bias):
    x, time = random(0, 3, 6).double(), random(1, 3, 4).double()
    weight, scale = random(2, 5, 6).double(), positive(3, 6)
    a = random(4, 6, 4).double(), random(5, 6).double() if bias else None
    c = random(6, 6, 4).double(), random(7, 6).double() if bias else None

    def run(a, c, w):
        norm = functional.layer_norm(x, (6,))
        modulated = norm * (1 + functional.linear(time, *a)) + functional.linear(time, *c)
        return functional.linear(modulated, w)

    folded = into_modulation(*a, scale), into_rows(*c, scale), into_columns(weight, scale)
    assert close(run(*folded), run(a, c, weight))


@pytest.mark.parametrize("quantized_inputs", [False, True])
def test_the_mean_output_of_a_linear_layer_is_restored(quantized_inputs):
    x, weight, bias = random(0, 500, 12) + 1, random(1, 7, 12), random(2, 7)
    rounded = round_trip(weight, parse_quantizer("int3/channel"))
    seen = round_trip(x, parse_quantizer("int3")) if quantized_inputs else x
    error = (seen - x).mean(0) if quantized_inputs else None
    found = corrected_bias(bias, weight, rounded, x.mean(0), error)
    exact = functional.linear(x, weight, bias).mean(0)
    left = (functional.linear(seen, rounded, found).mean(0) - exact).abs().max()
    plain = (functional.linear(seen, rounded, bias).mean(0) - exact).abs().max()
    assert left < 1e-5 < 1e-2 < plain


@pytest.mark.parametrize("groups", [1, 3])
def test_the_mean_output_of_a_convolution_is_restored_up_to_its_borders(groups):
    x, weight = random(0, 8, 6, 16, 16) + 1, random(1, 9, 6 // groups, 3, 3)
    rounded = round_trip(weight, INT4)
    found = corrected_bias(None, weight, rounded, x.mean((0, 2, 3)), groups=groups)

    def error(bias, padding):
        exact = functional.conv2d(x, weight, padding=padding, groups=groups)
        mine = functional.conv2d(x, rounded, bias, padding=padding, groups=groups)
        return (mine - exact).mean((0, 2, 3)).abs().max().item()

    assert error(found, 0) < 0.05 * error(None, 0)  # windows do not see all pixels equally often
    assert error(found, 1) < 0.25 * error(None, 1)  # padding has another mean
    flat = x.mean((0, 2, 3), keepdim=True).expand_as(x)
    exact = functional.conv2d(flat, weight, groups=groups)[0, :, 0, 0]
    assert torch.allclose(mean_output(weight, flat[0, :, 0, 0], groups).float(), exact, atol=1e-5)


def test_nothing_is_corrected_where_nothing_changed():
    weight, bias = random(0, 3, 4), random(1, 3)
    assert torch.equal(corrected_bias(bias, weight, weight, random(2, 4)), bias)
    assert corrected_bias(None, weight, weight, random(2, 4)).tolist() == [0, 0, 0]
    half = corrected_bias(bias.half(), weight, weight + 1, torch.ones(4))
    assert half.dtype == torch.half
    assert torch.equal(half, bias.half() - 4)


def test_means_that_do_not_fit_are_refused():
    weight = torch.ones(2, 3)
    with pytest.raises(CalibrationError, match=r"expected \(3,\), one for each"):
        corrected_bias(None, weight, weight, torch.ones(2))
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        corrected_bias(None, weight, weight, torch.full((3,), torch.nan))


@given(st.integers(0, 10**6), st.integers(2, 8), st.floats(1e-3, 1))
@settings(max_examples=50, deadline=None)
def test_scores_become_the_nearest_power_of_two(seed, bits, delta):
    p = torch.rand(300, generator=torch.Generator().manual_seed(seed)).pow(6)
    found = log2_round_trip(p, bits, delta)
    exponents = -torch.log2(found.double() / torch.tensor(delta, dtype=torch.float32).double())
    assert torch.allclose(exponents, exponents.round(), atol=1e-5)
    assert exponents.min() >= -1e-5
    assert exponents.max() <= 2**bits - 1 + 1e-5
    inside = (p <= delta) & (p >= delta * 2.0 ** -(2**bits - 1))
    assert ((p / found)[inside].log2().abs() <= 0.5 + 1e-5).all()
    assert (found[p > delta] == torch.tensor(delta, dtype=torch.float32)).all()


@given(st.integers(2, 8), st.integers(0, 3))
def test_powers_of_two_are_kept(bits, exponent):
    assert log2_round_trip(torch.tensor(0.5**exponent), bits, 1.0).item() == 0.5**exponent


def test_zeros_become_the_least_value_and_twice_changes_nothing():
    p = torch.tensor([0.0, 1e-30, 0.3, 1.0])
    found = log2_round_trip(p, 3, 1.0)
    assert found.tolist() == [2**-7, 2**-7, 0.25, 1.0]
    assert torch.equal(log2_round_trip(found, 3, 1.0), found)
    assert torch.equal(log2_round_trip(torch.zeros(3), 4, 0.0), torch.zeros(3))


def softmax_scores():
    """Attention that half goes to the start token: (batch, heads, queries, keys)."""
    logits = random(0, 2, 3, 20, 400)
    logits[..., 0] += 6
    return logits.softmax(-1)


def test_the_start_column_is_kept_to_the_bit():
    p = softmax_scores()
    found = quantize_scores(p, 4)
    assert torch.equal(found[..., 0], p[..., 0])
    assert not torch.equal(found[..., 1], p[..., 1])
    kept = quantize_scores(p, 4, start=0)
    assert not torch.equal(kept[..., 0], p[..., 0])
    errors = [(quantize_scores(p, 2, start) - p)[..., 1:].square().mean() for start in (0, 1)]
    assert errors[1] < 0.5 * errors[0]  # 2 bits reach far enough under the others' own δ


def test_each_prompt_has_its_own_range():
    p = softmax_scores()
    alone = torch.cat([quantize_scores(each, 4) for each in p.split(1)])
    assert torch.equal(quantize_scores(p, 4), alone)
    assert score_range(p).shape == (2, 1, 1, 1)
    assert score_range(p)[1].item() == p[1, ..., 1:].max().item()


def test_rows_sum_to_two_percent_too_much():
    """E[2^u] = (√2 - √½) / ln 2 for u uniform on ±½."""
    p = softmax_scores()
    ratio = quantize_scores(p, 8, start=0).sum(-1) / p.sum(-1)
    flat = log2_round_trip(torch.linspace(-6, -1, 10001).exp2(), 8, 1.0)
    expected = (math.sqrt(2) - math.sqrt(0.5)) / math.log(2)
    ratios = flat / torch.linspace(-6, -1, 10001).exp2()
    assert ratios.mean().item() == pytest.approx(expected, rel=1e-3)
    assert ratio.sub(1).abs().max() < math.sqrt(2) - 1


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="bits: expected 2 to 8, came 9"):
        log2_round_trip(torch.ones(2), 9, 1.0)
    with pytest.raises(InputError, match="start: expected 0 to 2"):
        quantize_scores(torch.ones(1, 3), 4, start=3)
