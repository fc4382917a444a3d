"""The choice of formats: against brute force, at the border of a budget, and what cannot be met."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effuse.errors import PassError
from effuse.passes.bits_solver import (
    MEASURES,
    Budget,
    Option,
    choose,
    decibels,
    efficient,
    noise,
    total,
)

NUMBER = st.integers(0, 60)
OPTION = st.builds(Option, st.just("any"), NUMBER, NUMBER, NUMBER)
LAYERS = st.lists(st.lists(OPTION, min_size=1, max_size=3), min_size=1, max_size=6)
MEASURE = st.sampled_from(MEASURES)


def brute_force(options, budget):
    """The least value of what is minimised, by trying every choice; None if none is allowed."""
    found = []
    for choice in itertools.product(*(range(len(row)) for row in options)):
        whole = total(options, choice)
        if all(getattr(whole, name) <= limit for name, limit in budget.limits.items()):
            found.append(getattr(whole, budget.minimise))
    return min(found, default=None)


@settings(deadline=None, max_examples=80)
@given(LAYERS, MEASURE, st.dictionaries(MEASURE, st.integers(0, 250), max_size=2))
def test_as_brute_force(options, minimise, limits):
    budget = Budget(minimise, limits)
    expected = brute_force(options, budget)
    if expected is None:
        with pytest.raises(PassError, match="cannot be met: the best is"):
            choose(options, budget)
    else:
        whole = total(options, choose(options, budget))
        assert getattr(whole, minimise) == expected
        assert all(getattr(whole, name) <= limit for name, limit in limits.items())


@settings(deadline=None, max_examples=40)
@given(LAYERS, MEASURE, MEASURE, st.data(), st.sampled_from([1e-7, 0.1, 3e6]))
def test_a_budget_that_a_choice_meets_exactly_is_met(options, minimise, limited, data, unit):
    scaled = [[Option("any", o.error * unit, o.bytes, o.milliseconds * unit) for o in row]
              for row in options]  # fmt: skip
    choice = [data.draw(st.integers(0, len(row) - 1)) for row in scaled]
    border = total(scaled, choice)
    found = total(scaled, choose(scaled, Budget(minimise, {limited: getattr(border, limited)})))
    assert getattr(found, limited) <= getattr(border, limited) * (1 + 1e-6)
    assert getattr(found, minimise) <= getattr(border, minimise) * (1 + 1e-6)


def test_what_cannot_be_met_says_the_best_and_its_cost():
    layers = [[Option("float", 0.0, 4_000_000, 10.0), Option("w8a8", 1e-3, 1_000_000, 4.0)]] * 2
    with pytest.raises(PassError) as caught:
        choose(layers, Budget("error", {"bytes": 1_500_000}))
    assert str(caught.value) == (
        "a budget of 1.500 MB cannot be met: the best is 2.000 MB "
        "(altogether 27.0 dB, 2.000 MB, 8.00 ms)"
    )
    with pytest.raises(PassError, match=r"of 201.00 dB|of 200.00 dB"):
        choose([[Option("w8a8", 1e-3, 1, 1.0)]], Budget("milliseconds", {"error": noise(201)}))


def test_the_asked_limit_is_reported_under_the_others():
    """Small is slow here: the least size within the time is not the least of all."""
    layers = [[Option("float", 0.0, 40, 1.0), Option("w4", 0.1, 5, 3.0)]] * 2
    assert choose(layers, Budget("error", {"bytes": 45, "milliseconds": 4.0})) in ((0, 1), (1, 0))
    with pytest.raises(PassError, match=r"the best is 0.000 MB \(altogether 10.0 dB, 0.000 MB, 4."):
        choose(layers, Budget("error", {"bytes": 10, "milliseconds": 4.0}))


def test_ties_are_settled_the_same_way_each_time():
    same = Option("a", 1.0, 2, 3.0)
    assert choose([[same, same, same]] * 4, Budget("error", {})) == (0, 0, 0, 0)
    layers = [[Option("float", 0.0, 4, 1.0), Option("low", 1.0, 1, 1.0)]] * 6
    budget = Budget("error", {"bytes": 15})
    first = choose(layers, budget)
    assert sum(first) == 3
    assert all(choose(layers, budget) == first for _ in range(5))


def test_a_layer_prefers_what_costs_less_in_the_other_measures():
    layers = [[Option("slow", 1.0, 5, 9.0), Option("fast", 1.0, 5, 2.0)]]
    assert choose(layers, Budget("error", {})) == (1,)
    assert [place for place, _ in efficient(layers[0])] == [1]


def test_small_errors_beside_a_hopeless_option():
    """Noise powers span many orders of magnitude; the solver's tolerances do not swallow them."""
    layers = [[Option("a", 2e-7, 1, 0.0), Option("b", 1e-7, 2, 0.0), Option("c", 50.0, 0, 0.0)]] * 3
    chosen = choose(layers, Budget("error", {"bytes": 5}))
    assert sorted(chosen) == [0, 1, 1]
    chosen = choose(layers, Budget("bytes", {"error": 4e-7}))
    assert sorted(chosen) == [0, 1, 1]


def test_decibels_and_noise_are_inverse():
    assert [decibels(noise(ratio)) for ratio in (-30.0, 0.0, 47.5)] == pytest.approx(
        [-30.0, 0.0, 47.5]
    )
    assert decibels(0.0) == 200.0 and decibels(float("inf")) == -200.0


def test_no_options_is_an_error():
    with pytest.raises(PassError, match="without any option"):
        choose([[]], Budget("error", {}))
