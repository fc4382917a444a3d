"""GPTQ: rounding by columns under a layer's input statistics."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from effuse.errors import CalibrationError, PassError
from effuse.kernels.grids import nearest as nearest_code
from effuse.kernels.quantizers import find_scale, parse_quantizer, round_trip
from effuse.passes.adaround import Rounding
from effuse.passes.gptq import (
    Hessian,
    compensated,
    gptq,
    inverse_factor,
    output_error,
    per_column,
    unfolded,
)

E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
INT4 = torch.arange(-7.0, 8.0)
UINT4 = torch.arange(16.0)


def nearest_of(levels):
    def nearest(x):
        return levels[(x[..., None] - levels).abs().argmin(-1)]

    return nearest


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales(weight, levels, group=0):
    return weight.reshape(len(weight), -1, group or weight.shape[1]).abs().amax(2) / levels.max()


def to_nearest(weight, scale, levels, group=0):
    steps = per_column(scale, weight.shape[1], group)
    return nearest_of(levels)(weight / steps) * steps


def correlated(seed, columns, rows=300):
    """Inputs of few directions, noise, and channels of very different power."""
    few = random(seed, rows, columns // 4) @ random(seed + 1, columns // 4, columns)
    return (few + 0.3 * random(seed + 2, rows, columns)) * random(seed + 3, columns).exp()


def hessian_of(x):
    hessian = Hessian(x.shape[-1])
    hessian.add(x)
    return hessian


def diagonal(values):
    hessian = Hessian(len(values))
    hessian.value, hessian.count = torch.diag(values), 1
    return hessian


@pytest.mark.parametrize("levels", [INT4, E2M1])
@pytest.mark.parametrize("group", [0, 8])
def test_inputs_without_correlation_give_round_to_nearest(levels, group):
    weight = random(0, 12, 40)
    scale = scales(weight, levels, group)
    hessian = diagonal(torch.ones(40))
    found = gptq(weight, hessian, scale, group, nearest_of(levels), block=16)
    assert torch.equal(found, to_nearest(weight, scale, levels, group))


@pytest.mark.parametrize("text", ["int3", "int4/channel", "uint4/channel/asymmetric",
                                  "uint4/group8/asymmetric", "e2m1/group8/scale-e4m3"])  # fmt: skip
def test_it_reproduces_round_to_nearest_of_every_format(text):
    weight, quantizer = random(0, 12, 40) + 0.2, parse_quantizer(text)
    scale, zero = find_scale(weight, quantizer)
    grid = partial(nearest_code, grid=quantizer.grid)
    found = gptq(weight, diagonal(torch.ones(40)), scale, quantizer.group, grid, zero)
    assert torch.equal(found, round_trip(weight, quantizer, scale, zero))


@given(st.integers(0, 1000), st.permutations(range(24)))
@settings(max_examples=25, deadline=None)
def test_the_order_of_columns_does_not_matter_to_a_diagonal(seed, order):
    weight, power = random(seed, 6, 24), random(seed + 1, 24).square()
    scale = scales(weight, INT4)
    straight = gptq(weight, diagonal(power), scale, 0, nearest_of(INT4), block=5)
    mixed = gptq(weight[:, order], diagonal(power[list(order)]), scale, 0, nearest_of(INT4))
    assert torch.equal(straight[:, order], mixed)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("levels", "group"), [(INT4, 0), (INT4, 16), (E2M1, 16)])
def test_the_output_of_correlated_inputs_changes_far_less(seed, levels, group):
    weight, hessian = random(seed + 50, 24, 64), hessian_of(correlated(seed, 64))
    scale = scales(weight, levels, group)
    found = gptq(weight, hessian, scale, group, nearest_of(levels))
    plain = output_error(weight - to_nearest(weight, scale, levels, group), hessian)
    assert output_error(weight - found, hessian).sum() < 0.2 * plain.sum()


@given(st.integers(0, 1000), st.sampled_from([1, 7, 128]), st.sampled_from([0, 8, 10]))
@settings(max_examples=25, deadline=None)
def test_every_value_is_on_its_own_groups_grid(seed, block, group):
    weight, hessian = random(seed, 5, 24), hessian_of(correlated(seed, 24, rows=40))
    scale = random(seed + 1, 5, -(-24 // group) if group else 1).abs() + 0.05
    found = gptq(weight, hessian, scale, group, nearest_of(E2M1), block=block)
    codes = found / per_column(scale, 24, group)
    assert torch.isclose(codes[..., None], E2M1, rtol=1e-6, atol=0).any(-1).all()


def test_zero_points_shift_the_grid():
    weight, hessian = random(0, 5, 24) + 0.5, hessian_of(correlated(0, 24))
    low = weight.amin(1, keepdim=True).clamp(max=0)
    scale = (weight.amax(1, keepdim=True) - low) / 15
    zero = (-low / scale).round()
    found = gptq(weight, hessian, scale, 0, nearest_of(UINT4), zero)
    codes = found / scale + zero
    assert torch.allclose(codes, codes.round().clamp(0, 15), atol=1e-5)
    plain = (nearest_of(UINT4)(weight / scale + zero) - zero) * scale
    assert output_error(weight - found, hessian).sum() < output_error(weight - plain, hessian).sum()


def test_the_compensated_weight_rounds_to_the_result():
    weight, x = random(1, 8, 48), correlated(1, 48)
    hessian, scale = hessian_of(x), scales(weight, INT4)
    found = gptq(weight, hessian, scale, 0, nearest_of(INT4))
    settled = compensated(weight, hessian, scale, 0, nearest_of(INT4))
    assert torch.equal(to_nearest(settled, scale, INT4), found)
    assert torch.equal(Rounding(settled, scale, INT4).hard(), found)
    first = hessian.value.diagonal().argmax()
    assert torch.equal(settled[:, first], weight[:, first])  # nothing was before it
    assert not torch.equal(settled, weight)


@pytest.mark.parametrize("block", [1, 5, 16])
def test_blocks_only_put_off_the_work(block):
    weight, hessian = random(1, 8, 48), hessian_of(correlated(1, 48))
    scale = scales(weight, INT4)
    whole = gptq(weight, hessian, scale, 0, nearest_of(INT4), block=48)
    assert torch.equal(gptq(weight, hessian, scale, 0, nearest_of(INT4), block=block), whole)


def test_columns_never_seen_are_rounded_to_nearest():
    x = correlated(0, 16)
    x[:, [3, 9]] = 0
    weight = random(4, 6, 16)
    scale = scales(weight, INT4)
    found = gptq(weight, hessian_of(x), scale, 0, nearest_of(INT4))
    plain = to_nearest(weight, scale, INT4)
    assert torch.equal(found[:, [3, 9]], plain[:, [3, 9]])
    assert not torch.equal(found, plain)
    silent = gptq(weight, hessian_of(torch.zeros(4, 16)), scale, 0, nearest_of(INT4))
    assert torch.equal(silent, plain)


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = hessian_of(correlated(0, 20)).value
    factor = inverse_factor(hessian, 0.01)
    damped = hessian.double() + 0.01 * hessian.diagonal().double().mean() * torch.eye(
        20, dtype=torch.float64
    )
    assert torch.equal(factor, factor.triu())
    assert torch.allclose(factor.T @ factor, damped.inverse(), rtol=1e-8)


def test_the_output_error_is_twice_the_mean_square():
    x, error = correlated(0, 12), random(1, 5, 12)
    expected = 2 * (x.double() @ error.double().T).square().mean(0)
    assert torch.allclose(output_error(error, hessian_of(x)), expected, rtol=1e-5)


def test_damping_is_raised_until_it_suffices():
    broken = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # eigenvalues 2.5 and -0.5
    factor = inverse_factor(broken, 0.01)  # 0.01 and 0.1 of the mean diagonal do not suffice
    raised = broken.double() + torch.eye(2)
    assert torch.allclose(factor.T @ factor, raised.inverse(), rtol=1e-8)
    assert inverse_factor(torch.ones(3, 3), 0.0).isfinite().all()  # of rank one, and no damping
    with pytest.raises(PassError, match="positive definite"):
        inverse_factor(broken, 1e-9)


def test_statistics_do_not_depend_on_how_they_were_cut():
    x = correlated(0, 12, rows=200) + 1
    whole, parts, other = hessian_of(x), Hessian(12), hessian_of(x[150:])
    for rows in x[:150].view(3, 10, 5, 12):
        parts.add(rows)
    parts.merge(other)
    parts.merge(Hessian(12))
    assert parts.count == whole.count == 200
    exact = 2 * x.double().T @ x.double() / 200
    for found in (whole, parts):
        assert torch.allclose(found.value.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"stride": (2, 1)}, {"padding": (1, 2)},
                                     {"dilation": (2, 1), "padding": (2, 0)}])  # fmt: skip
@pytest.mark.parametrize("values", [1, 300, 10**6])
def test_unfolded_inputs_times_the_flat_weight_are_the_convolution(options, values):
    x, weight = random(0, 2, 3, 9, 7), random(1, 4, 3, 3, 2)
    expected = functional.conv2d(x, weight, **options)
    rows = torch.cat(list(unfolded(x, (3, 2), **options, values=values))) @ weight.flatten(1).T
    found = rows.unflatten(0, (2, *expected.shape[2:])).permute(0, 3, 1, 2)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("values", [1, 10**6])
def test_unfolded_videos_times_the_flat_weight_are_the_convolution(values):
    x, weight = random(0, 2, 3, 5, 7, 6), random(1, 4, 3, 3, 1, 2)
    options = {"stride": (1, 2, 1), "padding": (2, 0, 1), "dilation": (2, 1, 3)}
    expected = functional.conv3d(x, weight, **options)
    rows = torch.cat(list(unfolded(x, (3, 1, 2), **options, values=values))) @ weight.flatten(1).T
    found = rows.unflatten(0, (2, *expected.shape[2:])).movedim(-1, 1)
    assert torch.allclose(found, expected, atol=1e-5)


def test_unfolding_is_done_by_rows_of_the_image():
    blocks = [len(block) for block in unfolded(torch.ones(2, 4, 10, 8), (3, 3), values=600)]
    assert blocks == [12] * 4 * 2  # 2 rows of 6 positions, 36 values each: 432 of 600


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_refused(bad):
    x = torch.ones(4, 3)
    x[2, 1] = bad
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        Hessian(3).add(x)


def test_what_does_not_fit_is_refused():
    weight, nearest = torch.ones(2, 4), nearest_of(INT4)
    seen, scale = hessian_of(torch.ones(3, 4)), torch.ones(2, 1)
    with pytest.raises(CalibrationError, match=r"expected \(\.\.\., 4\), came \(3, 5\)"):
        seen.add(torch.ones(3, 5))
    with pytest.raises(CalibrationError, match="expected 4 columns, came 5"):
        seen.merge(Hessian(5))
    with pytest.raises(CalibrationError, match="came none"):
        gptq(weight, Hessian(4), scale, 0, nearest)
    with pytest.raises(CalibrationError, match="expected 4 columns as the weight"):
        gptq(weight, Hessian(5), scale, 0, nearest)
    with pytest.raises(PassError, match="positive"):
        gptq(weight, seen, 0 * scale, 0, nearest)
    with pytest.raises(PassError, match=r"expected \(rows, 1\) or \(rows, 2\)"):
        gptq(weight, seen, torch.ones(2, 3), 2, nearest)
