"""Histograms merge exactly; range setters keep their order of errors and their bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from effuse.errors import CalibrationError
from effuse.ranges import (
    BINS,
    CANDIDATES,
    SETTERS,
    Histogram,
    Levels,
    Uniform,
    entropy,
    min_max,
    mse,
    percentile,
    shrunken,
    weight_ranges,
    weight_scale_search,
)

few = settings(deadline=None, max_examples=60)

values = st.one_of(
    st.floats(-1e6, 1e6, width=32),
    st.floats(-1.0, 1.0, width=32),
    st.floats(999.0, 1001.0, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 65504.0]),
)
tensors = st.lists(values, max_size=12).map(torch.tensor)
filled = st.lists(values, min_size=1, max_size=12).map(torch.tensor)
roundings = st.one_of(
    st.builds(Uniform, st.integers(2, 8), st.booleans()),
    st.just(Levels((-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0))),
)


def data(histogram):
    return histogram.low, histogram.high, histogram.counts.tolist()


def as_range(low, high):
    return torch.tensor([[low], [high]], dtype=torch.float64)


def error(x, rounding, found, power=2.4):
    low, high = as_range(*found)
    return (rounding(x.double(), low, high) - x).abs().pow(power).mean().item()


def sqnr(x, rounding, found):
    low, high = as_range(*found)
    noise = (x - rounding(x.double(), low, high)).square().sum()
    return 10 * math.log10(x.double().square().sum() / noise)


def student(count=50_000, freedom=3.0):
    torch.manual_seed(0)
    return torch.distributions.StudentT(freedom).sample((count,))


# histograms


@few
@given(tensors, tensors, tensors)
@example(torch.tensor([]), torch.tensor([1000.0]), torch.tensor([999.75]))
@example(torch.tensor([]), torch.tensor([0.0]), torch.tensor([1e-45]))
def test_merging_in_any_way_is_one_pass(one, two, three):
    a, b, c = Histogram.of(one), Histogram.of(two), Histogram.of(three)
    whole = data(Histogram.of(torch.cat([one, two, three])))
    assert data(a.merge(b).merge(c)) == data(a.merge(b.merge(c))) == whole
    assert data(c.merge(a).merge(b)) == whole
    assert data(a.merge(Histogram.empty())) == data(Histogram.empty().merge(a)) == data(a)


@few
@given(filled)
def test_every_value_is_counted_in_its_bin(x):
    found = Histogram.of(x)
    assert found.total == len(x)
    assert (found.low, found.high) == (x.min().item(), x.max().item())
    edges = found.edges()
    for index in found.counts.nonzero().flatten().tolist():
        inside = (x.double() >= edges[index]) & (x.double() < edges[index] + found.width)
        assert inside.sum() == found.counts[index]


@pytest.mark.parametrize("shift", [0.0, 5.0, -1000.0])
def test_bins_are_as_narrow_as_the_values_allow(shift):
    x = torch.rand(10_000, generator=torch.Generator().manual_seed(1)) + shift
    found = Histogram.of(x)
    assert BINS / 2 <= (found.high - found.low) / found.width < BINS
    assert found.counts.shape == (BINS,)


@few
@given(st.lists(values, min_size=3, max_size=3).map(sorted))
@example([0.0, 0.0, 1e-45])
@example([-1e-45, 0.0, 2048.0])
@example([999.75, 1000.0, 1000.0])
def test_bins_never_narrow_as_the_range_widens(found):
    low, middle, high = found
    wide = Histogram.of(torch.tensor([low, high])).width
    for inner in ([middle], [low, middle], [middle, high]):
        assert Histogram.of(torch.tensor(inner)).width <= wide


def test_half_precision_empty_and_constant():
    assert data(Histogram.of(torch.empty(0, 3))) == data(Histogram.empty())
    half = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    assert data(Histogram.of(half)) == data(Histogram.of(half.float()))
    points, weights = Histogram.of(torch.full((7,), 0.3)).points()
    assert points.unique().tolist() == [torch.tensor(0.3).item()]
    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="cannot hold NaN or infinite"):
        Histogram.of(torch.tensor([1.0, bad]))
    with pytest.raises(CalibrationError, match=r"shape \(2, 2\) is empty or holds NaN"):
        weight_ranges(torch.tensor([[1.0, bad], [0.0, 1.0]]), "mse", Uniform(4))


# setters


@few
@given(filled, roundings, st.sampled_from(sorted(SETTERS)))
def test_no_range_leaves_what_was_seen(x, rounding, name):
    low, high = SETTERS[name](Histogram.of(x), rounding)
    assert x.min().item() <= low <= high <= x.max().item()


@few
@given(filled, roundings)
def test_the_first_candidate_is_min_max(x, rounding):
    histogram = Histogram.of(x)
    candidates = list(shrunken(*as_range(histogram.low, histogram.high).unsqueeze(1)))
    assert len(candidates) == CANDIDATES
    assert tuple(each.item() for each in candidates[0]) == min_max(histogram, rounding)


@pytest.mark.parametrize("name", sorted(SETTERS))
@pytest.mark.parametrize("value", [0.0, 3.0, -0.25, 1e-40])
@pytest.mark.parametrize("count", [1, 5])
def test_one_value_is_its_own_range(name, value, count):
    x = torch.full((count,), value)
    for rounding in (Uniform(8), Uniform(4, True), Levels((-1.0, 0.0, 1.0))):
        found = SETTERS[name](Histogram.of(x), rounding)
        assert found == (x[0].item(), x[0].item())
        low, high = as_range(*found)
        assert rounding(x.double(), low, high).isfinite().all()


@pytest.mark.parametrize("name", sorted(SETTERS))
def test_nothing_counted_is_a_clear_error(name):
    with pytest.raises(CalibrationError, match="no value was counted"):
        SETTERS[name](Histogram.empty(), Uniform(8))


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_uniform_values_have_six_decibels_a_bit(bits):
    x = torch.rand(50_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for name in ("minmax", "mse", "percentile"):
        found = sqnr(x, Uniform(bits), SETTERS[name](Histogram.of(x), Uniform(bits)))
        assert found == pytest.approx(6.02 * bits, abs=0.7)  # 2^b - 1 steps: 0.56 less at 4 bits


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_searched_range_of_heavy_tails_has_less_error(bits, symmetric):
    x, rounding = student(), Uniform(bits, symmetric)
    histogram = Histogram.of(x)
    for power in (2.0, 2.4):
        found = mse(histogram, rounding, power)
        whole = error(x, rounding, min_max(histogram), power)
        assert error(x, rounding, found, power) < whole


@pytest.mark.parametrize("x", [student(), student().relu(), student(freedom=30.0)])
def test_histogram_finds_what_the_values_themselves_would(x):
    rounding = Uniform(4)
    candidates = list(shrunken(*as_range(x.min().item(), x.max().item()).unsqueeze(1)))
    exact = [error(x, rounding, (low.item(), high.item())) for low, high in candidates]
    assert error(x, rounding, mse(Histogram.of(x), rounding)) <= 1.01 * min(exact)


def test_percentile_cuts_the_share_it_is_told():
    x = torch.arange(100_000, dtype=torch.float32)
    low, high = percentile(Histogram.of(x), share=0.99)
    assert 0.99 <= ((x >= low) & (x <= high)).float().mean() <= 0.993
    assert low == pytest.approx(500, abs=64) and high == pytest.approx(99_500, abs=64)
    assert percentile(Histogram.of(x), share=1.0) == (0.0, 99_999.0)
    few_values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert percentile(Histogram.of(few_values)) == min_max(Histogram.of(few_values))


def test_entropy_clips_tails_and_leaves_flat_values():
    flat = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    assert entropy(Histogram.of(flat), Uniform(8))[1] > 0.97
    heavy = student()
    low, high = entropy(Histogram.of(heavy), Uniform(8))
    assert low > 0.6 * heavy.min() and high < 0.6 * heavy.max()
    normal = torch.randn(50_000, generator=torch.Generator().manual_seed(0)).relu()
    assert entropy(Histogram.of(normal), Uniform(8))[1] > 3  # the spike at zero does not count


# roundings


@few
@given(filled, st.integers(2, 8), st.booleans())
def test_uniform_grid_holds_zero_and_rounds_by_half_a_step(x, bits, symmetric):
    rounding = Uniform(bits, symmetric)
    low, high = as_range(x.min().item(), x.max().item())
    scale, zero = rounding.scale_zero(low, high)
    assert rounding(torch.zeros(1, dtype=torch.float64), low, high).item() == 0
    found = rounding(x.double(), low, high)
    codes = found / scale + zero
    limit = 2 ** (bits - 1) - 1
    least, most = (-limit, limit) if symmetric else (0, 2**bits - 1)
    assert codes.min() >= least - 1e-6 and codes.max() <= most + 1e-6
    assert ((found - x).abs() <= scale * (1 if not symmetric else 0.501)).all()


@few
@given(filled)
def test_integer_levels_are_the_symmetric_grid(x):
    low, high = as_range(x.min().item(), x.max().item())
    grid = Levels(tuple(float(code) for code in range(-7, 8)))
    one = grid(x.double(), low, high)
    other = Uniform(4, True)(x.double(), low, high)
    step = Uniform(4, True).scale_zero(low, high)[0]
    assert ((one - x).abs() - (other - x).abs()).abs().max() <= 1e-6 * step  # ties may part


# weights

weights = st.integers(1, 4).flatmap(
    lambda rows: st.lists(
        st.lists(st.floats(-100, 100, width=32), min_size=5, max_size=5),
        min_size=rows, max_size=rows,
    )
).map(torch.tensor)  # fmt: skip


def row_errors(weight, rounding, low, high, power=2.4):
    found = rounding(weight, low[:, None], high[:, None])
    return (found - weight).abs().pow(power).mean(1)


@few
@given(weights, roundings)
def test_no_row_is_worse_than_with_its_whole_range(weight, rounding):
    low, high = weight_scale_search(weight, rounding)
    whole = weight_ranges(weight, "minmax", rounding)
    assert (row_errors(weight, rounding, low, high) <= row_errors(weight, rounding, *whole)).all()
    assert (low >= whole[0]).all() and (low <= high).all() and (high <= whole[1]).all()


@few
@given(weights, st.sampled_from(sorted(SETTERS)))
def test_rows_do_not_see_each_other(weight, name):
    low, high = weight_ranges(weight, name, Uniform(4, True))
    assert low.shape == high.shape == (len(weight),) and low.dtype == torch.float32
    for index, row in enumerate(weight):
        alone = weight_ranges(row[None], name, Uniform(4, True))
        assert (alone[0].item(), alone[1].item()) == (low[index].item(), high[index].item())


def test_search_gains_on_heavy_rows_and_keeps_zero_rows():
    weight = torch.cat([student(4096).reshape(4, 1024), torch.zeros(1, 1024)])
    rounding = Uniform(4, True)
    low, high = weight_ranges(weight, "mse", rounding, power=2.0)
    searched = row_errors(weight, rounding, low, high, 2.0)
    whole = row_errors(weight, rounding, *weight_ranges(weight, "minmax", rounding), 2.0)
    assert (searched[:4] < 0.7 * whole[:4]).all()
    assert (low[4], high[4], searched[4]) == (0, 0, 0)
