"""Learned rounding: of one weight, and of a unit's weights against its outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effuse.errors import PassError
from effuse.passes.adaround import Rounding
from effuse.passes.gptq import per_column

E2M1 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
E3M0 = torch.tensor([0.0, *(2.0**k for k in range(-4, 3))])
E3M0 = torch.cat([-E3M0[1:].flip(0), E3M0])
INT4 = torch.arange(-7.0, 8.0)
UINT4 = torch.arange(16.0)
GRIDS = st.sampled_from([INT4, E2M1, E3M0])


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped(seed, levels, group=8):
    """A weight, and scales under which some of its values saturate."""
    weight = random(seed, 6, 4, 2, 2)
    scale = 0.7 * weight.view(6, -1, group).abs().amax(2) / levels[-1]
    return weight, scale, Rounding(weight, scale, levels, group)


def clamped(weight, scale, levels, group=8):
    steps = per_column(scale, 16, group).view_as(weight)
    return (weight / steps).clamp(levels[0], levels[-1]) * steps, steps


@given(st.integers(0, 10**6), GRIDS)
@settings(max_examples=30, deadline=None)
def test_the_soft_weight_starts_as_the_clamped_weight(seed, levels):
    weight, scale, rounding = grouped(seed, levels)
    expected, steps = clamped(weight, scale, levels)
    error = (rounding.soft() - expected).abs() / (steps * rounding.span)
    assert error.max() < 2e-6  # of a step: float32 through a logarithm and a sigmoid


@given(st.integers(0, 10**6), GRIDS, st.floats(0.01, 100))
@settings(max_examples=30, deadline=None)
def test_whatever_is_learned_is_a_neighbour_on_the_grid(seed, levels, spread):
    weight, scale, rounding = grouped(seed, levels)
    with torch.no_grad():
        rounding.v += spread * random(seed + 1, *weight.shape)
    expected, steps = clamped(weight, scale, levels)
    hard = rounding.hard()
    index = ((hard / steps)[..., None] - levels).abs().argmin(-1)
    assert torch.equal(levels[index] * steps, hard)
    codes = expected / steps
    plain = (codes[..., None] - levels).abs().argmin(-1)
    assert (index - plain).abs().max() <= 1
    tight = 1e-6 * codes.abs()
    assert (levels[(index - 1).clamp(min=0)] <= codes + tight).all()
    assert (codes - tight <= levels[(index + 1).clamp(max=len(levels) - 1)]).all()


@pytest.mark.parametrize("levels", [INT4, E2M1, E3M0])
def test_neighbours_across_binades_signs_and_the_ends(levels):
    middles = (levels[1:] + levels[:-1]) / 2
    values = torch.cat([levels, middles, torch.tensor([-100.0, 100.0])])
    rounding = Rounding(values[None], torch.ones(1, 1), levels)
    low, high = rounding.low[0], rounding.high[0]
    inside = values.clamp(levels[0], levels[-1])
    assert (low <= inside).all()
    assert (inside <= high).all()
    assert torch.equal(torch.searchsorted(levels, high), torch.searchsorted(levels, low) + 1)
    exact = len(levels)
    assert torch.equal(rounding.hard()[0, :exact], levels)
    assert torch.equal(rounding.hard()[0, -2:], levels[[0, -1]])


@given(st.integers(0, 10**6), GRIDS)
@settings(max_examples=30, deadline=None)
def test_untrained_it_rounds_to_nearest(seed, levels):
    weight, scale, rounding = grouped(seed, levels)
    expected, steps = clamped(weight, scale, levels)
    index = ((expected / steps)[..., None] - levels).abs().argmin(-1)
    assert torch.equal(rounding.hard(), levels[index] * steps)


def test_zero_points_shift_the_grid():
    weight = random(0, 5, 12) + 1
    low = weight.amin(1, keepdim=True).clamp(max=0)
    scale = (weight.amax(1, keepdim=True) - low) / 15
    zero = (-low / scale).round()
    found = Rounding(weight, scale, UINT4, zero=zero).hard()
    assert torch.equal(found, ((weight / scale + zero).round().clamp(0, 15) - zero) * scale)


def test_one_rate_moves_every_binade_alike():
    """A step of V against the gradient changes Ŵ by the same amount at any local step."""
    values = torch.tensor([[0.25, 1.75, 2.5, 5.0]])  # half way, where steps are 0.5, 0.5, 1, 2
    rounding = Rounding(values, torch.ones(1, 1), E2M1)
    rounding.soft().sum().backward()
    assert torch.allclose(rounding.v.grad, rounding.v.grad[0, 0].expand(1, 4))


def test_the_regulariser_counts_what_has_not_settled():
    rounding = Rounding(torch.tensor([[0.5, 1.5, 3.0]]), torch.ones(1, 1), INT4)
    assert rounding.regulariser(2.0).item() == pytest.approx(2)
    with torch.no_grad():
        rounding.v[:] = torch.tensor([-20.0, 20.0, 20.0])
    assert rounding.regulariser(2.0).item() == 0


def test_groups_that_do_not_fit_are_refused():
    with pytest.raises(PassError, match=r"expected \(rows, 1\) or \(rows, 3\)"):
        Rounding(torch.ones(2, 12), torch.ones(2, 2), INT4, group=4)
