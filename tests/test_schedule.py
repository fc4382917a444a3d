"""Published schedules to the letter, forecasts exact, and searches that equal brute force."""

from __future__ import annotations

import doctest
import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effuse import schedule
from effuse.errors import CalibrationError, ConfigError
from effuse.schedule import (
    FASTER_DIFFUSION_KEYS,
    explicit,
    fitted,
    fitted_error,
    fitted_groups,
    fitted_to,
    group_bounds,
    group_costs_l1,
    lagrange,
    nonuniform,
    propagation_keys,
    sources,
    uniform,
)

STEPS = 8
ORDERS = (0, 1, 2)
few = settings(deadline=None, max_examples=40)


def features(seed, steps=STEPS, size=5):
    """A random walk: neighbouring steps are alike, as in sampling."""
    return np.random.default_rng(seed).normal(size=(steps, size)).cumsum(axis=0)


def gram(rows):
    return rows @ rows.T


def schedules(steps, count, warmup=1, longest=None):
    """All of them, by enumeration."""
    for rest in combinations(range(warmup, steps), count - warmup):
        keys = (*range(warmup), *rest)
        if max(np.diff((*keys, steps))) <= (longest or steps):
            yield keys


def forecast_error(rows, keys, order, weights, clock):
    """What `fitted_error` says, from the features themselves and numpy's polynomials."""
    total = 0.0
    for step in sorted(set(range(len(rows))) - set(keys)):
        known = sorted(key for key in keys if key < step)[-order - 1 :]
        fit = np.polyfit(clock[known] - clock[step], rows[known], len(known) - 1)
        total += weights[step] * float(((rows[step] - fit[-1]) ** 2).sum())
    return total


def test_the_examples_of_the_docstrings_hold():
    assert doctest.testmod(schedule).failed == 0


# ---- schedules by rule ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ((10, 3), (0, 3, 6, 9)),
        ((10, 3, 4), (0, 1, 2, 3, 6, 9)),
        ((10, 20), (0,)),
        ((3, 5, 3), (0, 1, 2)),
        ((1, 1), (0,)),
    ],
)
def test_uniform(options, keys):
    assert uniform(*options) == keys


@given(steps=st.integers(1, 60), data=st.data())
@few
def test_interval_one_is_every_step(steps, data):
    assert uniform(steps, 1, data.draw(st.integers(1, steps))) == tuple(range(steps))


@pytest.mark.parametrize(
    ("options", "released", "keys"),
    [
        ((50, 10, 15, 1.4), True, (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)),
        ((50, 5, 15, 1.4), True, (0, 9, 17, 26, 37)),
        ((50, 10, 10, 1.2), True, (0, 5, 9, 12, 16, 21, 26, 32, 38, 43)),
        ((20, 6, 1, 1.5), True, (0, 1, 3, 7, 10, 15)),  # only with the ends dropped after merging
        (
            (250, 13, 120, 1.5),
            True,
            (0, 21, 41, 60, 79, 97, 115, 131, 149, 168, 187, 207, 228),
        ),
        ((50, 10, 15, 1.4), False, (0, 6, 11, 14, 15, 19, 24, 29, 35, 42)),
    ],
)
def test_nonuniform_is_the_published_schedule(options, released, keys):
    assert nonuniform(*options, released=released) == keys


@given(
    steps=st.integers(1, 120),
    interval=st.integers(2, 12),
    released=st.booleans(),
    data=st.data(),
)
@few
def test_nonuniform_has_the_count_or_says_so(steps, interval, released, data):
    count, center = -(-steps // interval), data.draw(st.integers(0, steps - 1))
    try:
        keys = nonuniform(steps, count, center, released=released)
    except ConfigError as error:
        assert f"count={count}" in str(error)
    else:
        assert keys == explicit(steps, keys) and len(keys) == count


def test_explicit_adds_step_zero_and_sorts():
    assert explicit(10, [7, 3]) == (0, 3, 7)
    assert explicit(10, (0, np.int64(4))) == (0, 4)
    assert explicit(10, ()) == (0,)


def test_propagation_keys_are_faster_diffusions():
    assert propagation_keys(50) == FASTER_DIFFUSION_KEYS
    assert propagation_keys(100) == tuple(2 * key for key in FASTER_DIFFUSION_KEYS)
    for steps in range(1, 60):
        assert propagation_keys(steps) == explicit(steps, propagation_keys(steps))


# ---- forecasts -----------------------------------------------------------------------------------


def test_sources_are_latest_first_and_limited_by_history():
    keys = (0, 1, 4, 7)
    assert [sources(keys, step, 2) for step in (1, 2, 4, 5, 9)] == [
        (0,),
        (1, 0),
        (1, 0),
        (4, 1, 0),
        (7, 4, 1),
    ]
    assert sources(keys, 9, 0) == (7,)


def test_one_source_is_reused_as_it_is():
    assert lagrange((9.0, 7.0, 4.0), (1,), 2) == (1.0,)


@given(
    clock=st.lists(st.integers(-50, 50), min_size=5, max_size=9, unique=True),
    count=st.integers(1, 4),
    coefficients=st.lists(st.integers(-3, 3), min_size=4, max_size=4),
)
@few
def test_lagrange_sums_to_one_and_is_exact_on_polynomials(clock, count, coefficients):
    values = np.polyval(coefficients[:count], np.array(clock, dtype=float))
    known = tuple(range(count))[::-1]
    weights = lagrange(clock, known, count)
    scale = max(map(abs, weights)) * (1 + max(map(abs, values)))
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12 * max(map(abs, weights)))
    assert np.dot(weights, values[list(known)]) == pytest.approx(values[count], abs=1e-10 * scale)


# ---- fitted schedules ----------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@given(seed=st.integers(0, 2**32 - 1))
@few
def test_the_error_is_that_of_the_forecast_features(order, seed):
    random, rows = np.random.default_rng(seed), features(seed)
    weights, clock = random.uniform(0, 2, STEPS), random.uniform(0.5, 1, STEPS).cumsum()
    keys = explicit(STEPS, np.flatnonzero(random.random(STEPS) < 0.4))
    got = fitted_error(gram(rows), keys, order, weights, clock)
    assert got == pytest.approx(forecast_error(rows, keys, order, weights, clock), rel=1e-6)


@pytest.mark.parametrize("order", ORDERS)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(3, 6),
    warmup=st.integers(1, 3),
    longest=st.sampled_from([None, 3, 4]),
    plain=st.booleans(),
)
@few
def test_the_search_equals_brute_force(order, seed, count, warmup, longest, plain):
    random, products = np.random.default_rng(seed), gram(features(seed))
    weights = None if plain else random.uniform(0, 2, STEPS)
    clock = None if plain else -random.uniform(0.5, 1, STEPS).cumsum()
    choices = list(schedules(STEPS, count, warmup, longest))
    if not choices:
        with pytest.raises(ConfigError, match=f"count={count}: expected groups of 1 to {longest}"):
            fitted(products, count, order, warmup, weights, longest, clock)
        return
    keys = fitted(products, count, order, warmup, weights, longest, clock)
    least = min(fitted_error(products, each, order, weights, clock) for each in choices)
    assert keys in choices
    assert fitted_error(products, keys, order, weights, clock) == pytest.approx(least, abs=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@given(seed=st.integers(0, 2**32 - 1), error=st.floats(0, 1))
@few
def test_fitted_to_is_the_fewest_that_reach_the_error(order, seed, error):
    products = gram(features(seed))
    keys = fitted_to(products, error, order)
    energy = np.trace(products)
    assert fitted_error(products, keys, order) <= error**2 * energy + 1e-9
    for count in range(1, len(keys)):
        fewer = fitted_error(products, fitted(products, count, order), order)
        assert fewer > error**2 * energy - 1e-9


def test_fitted_to_spans_one_step_to_all():
    products = gram(features(0))
    assert fitted_to(products, 0.0) == tuple(range(STEPS))
    assert fitted_to(np.zeros((STEPS, STEPS)), 0.0) == (0,)
    assert fitted_to(products, 1e6, warmup=2, longest=4) == fitted(products, 3, 0, 2, None, 4)


@pytest.mark.parametrize("order", ORDERS)
def test_all_steps_full_costs_nothing(order):
    products = gram(features(1))
    keys = fitted(products, STEPS, order)
    assert keys == tuple(range(STEPS)) and fitted_error(products, keys, order) == 0
    assert fitted(np.ones((1, 1)), 1, order) == (0,)


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_is_exact_on_features_of_its_degree(order):
    clock = np.array([0, 1, 3, 4, 6, 7, 9, 12.0])
    rows = np.vander(clock, order + 1) @ features(2, order + 1)
    keys = tuple(range(order + 1))
    energy = np.trace(gram(rows))
    found = fitted(gram(rows), 4, order, clock=clock)
    assert fitted_error(gram(rows), keys, order, clock=clock) < 1e-9 * energy
    assert fitted_error(gram(rows), found, order, clock=clock) < 1e-9 * energy
    if order:
        assert fitted_error(gram(rows), keys, order - 1, clock=clock) > 1e-3 * energy


def test_weights_draw_the_refreshes():
    weights = np.zeros(STEPS)
    weights[5] = 1
    assert fitted_error(gram(features(3)), fitted(gram(features(3)), 2, weights=weights)) > 0
    assert fitted(gram(features(3)), 2, weights=weights)[1] == 5


@pytest.mark.parametrize(("steps", "count", "order"), [(50, 17, 2), (120, 24, 1)])
def test_schedules_of_real_length_beat_the_uniform_one(steps, count, order):
    products = gram(features(4, steps, 32))
    keys, even = fitted(products, count, order), uniform(steps, -(-steps // count))
    assert len(keys) == count == len(even)
    assert fitted_error(products, keys, order) < fitted_error(products, even, order)


# ---- CacheQuant's groups -------------------------------------------------------------------------


def test_group_costs_are_sums_of_l1_distances():
    rows = features(5).reshape(STEPS, 5, 1)
    costs = group_costs_l1(rows)
    for first in range(STEPS):
        for end in range(first + 1, STEPS + 1):
            expected = sum(np.abs(rows[i] - rows[first]).sum() for i in range(first, end))
            assert costs[first, end - 1] == pytest.approx(expected)


@pytest.mark.parametrize("bounds", [None, (1, 4), (2, 3), group_bounds(3)])
@given(seed=st.integers(0, 2**32 - 1))
@few
def test_groups_equal_brute_force(bounds, seed):
    costs = group_costs_l1(features(seed))
    low, high = bounds or (1, STEPS)

    def cost(keys):
        ends = (*keys, STEPS)
        return sum(costs[a, b - 1] for a, b in pairwise(ends))

    choices = [
        keys
        for keys in schedules(STEPS, 3)
        if all(low <= length <= high for length in np.diff((*keys, STEPS)))
    ]
    keys = fitted_groups(costs, 3, bounds)
    assert keys in choices and cost(keys) == pytest.approx(min(map(cost, choices)))


def test_every_step_its_own_group_costs_nothing():
    assert fitted_groups(group_costs_l1(features(6)), STEPS) == tuple(range(STEPS))


def test_group_bounds_are_half_to_twice_the_interval():
    assert [group_bounds(interval) for interval in (1, 2, 5)] == [(1, 2), (1, 4), (3, 10)]


# ---- bad input -----------------------------------------------------------------------------------

GRAM = gram(features(7))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: uniform(0, 1), "steps=0"),
        (lambda: uniform(True, 1), "steps=True"),
        (lambda: uniform(5, 0), "interval=0"),
        (lambda: uniform(5, 1.5), r"interval=1\.5"),
        (lambda: uniform(5, 1, 6), "warmup=6: expected a whole number from 1 to 5"),
        (lambda: nonuniform(10, 11), "count=11"),
        (lambda: nonuniform(10, 5), "center=15"),
        (lambda: nonuniform(50, 5, power=1.0), r"power=1\.0"),
        (lambda: nonuniform(50, 5, power=math.nan), "power=nan"),
        (lambda: nonuniform(50, 5, power=11), "power=11: expected a number above 1"),
        (lambda: nonuniform(50, 50), "count=50: no power"),
        (lambda: explicit(5, [5]), "keys=5"),
        (lambda: explicit(5, [-1]), "keys=-1"),
        (lambda: explicit(5, [1.0]), r"keys=1\.0"),
        (lambda: explicit(5, [2, 3, 2]), r"keys=\[2, 3, 2\].*\[2\] repeat"),
        (lambda: propagation_keys(0), "steps=0"),
        (lambda: sources((0, 3), 0, 1), "step=0"),
        (lambda: sources((0, 3), 2, -1), "order=-1"),
        (lambda: lagrange((0, 1, 2), (), 2), r"sources=\(\)"),
        (lambda: lagrange((0, 1, 2), (1, 1), 2), "sources: expected distinct"),
        (lambda: lagrange((0, 1, 2), (-1,), 2), "sources=-1"),
        (lambda: lagrange((0, 1, 2), (1,), 3), "at=3"),
        (lambda: fitted(GRAM, 9), "count=9"),
        (lambda: fitted(GRAM, 2, warmup=3), "count=2: expected a whole number from 3 to 8"),
        (lambda: fitted(GRAM, 3, warmup=0), "warmup=0"),
        (lambda: fitted(GRAM, 3, order=3), "order=3"),
        (lambda: fitted(GRAM, 3, longest=0), "longest=0"),
        (lambda: fitted(GRAM, 3, longest=2), "count=3: expected groups of 1 to 2 steps"),
        (lambda: fitted(GRAM, 3, weights=[1.0]), r"weights of shape \(1,\)"),
        (lambda: fitted(GRAM, 3, weights=-np.ones(STEPS)), "weights: expected 0 or more"),
        (lambda: fitted(GRAM, 3, clock=np.ones(STEPS)), "clock: expected distinct"),
        (lambda: fitted(GRAM, 3, clock=np.full(STEPS, np.inf)), "clock of shape"),
        (lambda: fitted_to(GRAM, -0.1), r"error=-0\.1"),
        (lambda: fitted_to(GRAM, 0.1, order=-1), "order=-1"),
        (lambda: fitted_error(GRAM, (0, 9)), "keys=9"),
        (lambda: fitted_error(GRAM, (0, 3), order=3), "order=3"),
        (lambda: fitted_groups(GRAM, 0), "count=0"),
        (lambda: fitted_groups(GRAM, 3, (0, 3)), "bounds=0"),
        (lambda: fitted_groups(GRAM, 3, (3, 2)), "bounds=2"),
        (lambda: fitted_groups(GRAM, 3, (3, 4)), "count=3: expected groups of 3 to 4 steps"),
        (lambda: group_bounds(0), "interval=0"),
    ],
)
def test_bad_options_name_the_argument(call, named):
    with pytest.raises(ConfigError, match=named):
        call()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: fitted(np.ones((2, 3)), 1), r"gram of shape \(2, 3\)"),
        (lambda: fitted(np.zeros((0, 0)), 1), "gram of shape"),
        (lambda: fitted_to(np.full((2, 2), np.nan), 1), "gram of shape"),
        (lambda: fitted_error(np.array([[1.0, 2.0], [0.0, 1.0]]), (0,)), "gram: .*symmetric"),
        (lambda: fitted_groups(np.ones(4), 1), "costs of shape"),
        (lambda: group_costs_l1(np.ones(4)), r"features of shape \(4,\)"),
        (lambda: group_costs_l1(np.full((4, 2), np.inf)), "features of shape"),
    ],
)
def test_bad_measurements_name_the_argument(call, named):
    with pytest.raises(CalibrationError, match=named):
        call()
