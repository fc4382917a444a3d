"""Learned rounding: of one weight, and of a unit's weights against its outputs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from effuse.errors import CalibrationError, PassError
from effuse.kernels.grids import nearest, parse_grid
from effuse.passes.adaround import Rounding
from effuse.passes.gptq import Hessian, compensated, per_column
from effuse.passes.reconstruct import (
    Recipe,
    hard_weights,
    loss,
    mean_loss,
    mixed,
    reconstruct,
)

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


def linear_unit(scale=1.0):
    """Two linear layers on inputs of few directions; the third argument draws the data."""
    weights = {"up": random(0, 32, 16) / 4, "down": random(1, 16, 32) / 6}
    directions = random(2, 6, 16)

    def unit(example, given):
        inner = functional.silu(functional.linear(example["x"], given["up"]))
        return scale * functional.linear(inner, given["down"])

    def example(seed):
        return {"x": random(seed, 16, 6) @ directions + 0.3 * random(seed + 1000, 16, 16)}

    return unit, weights, example


def conv_unit(scale=1.0):
    """A residual block, two outputs."""
    weights = {"first": random(0, 12, 8, 3, 3) / 8, "second": random(1, 8, 12, 3, 3) / 10}
    directions = random(2, 8, 3)

    def unit(example, given):
        inner = functional.silu(functional.conv2d(example["x"], given["first"], padding=1))
        last = functional.conv2d(inner, given["second"], padding=1)
        return scale * (last + example["x"]), scale * inner

    def example(seed):
        few = torch.einsum("ck,bkhw->bchw", directions, random(seed, 2, 3, 10, 10))
        noisy = few + 0.3 * random(seed + 1000, 2, 8, 10, 10)
        return {"x": functional.avg_pool2d(noisy, 3, 1), "step": torch.tensor([seed])}

    return unit, weights, example


def learn(made, levels=INT4, count=12, recipe=None, **options):
    unit, weights, example = made
    inputs = [example(seed) for seed in range(10, 10 + count)]
    targets = [unit(each, weights) for each in inputs]
    roundings = {
        name: Rounding(each, each.flatten(1).abs().amax(1, keepdim=True) / levels[-1], levels)
        for name, each in weights.items()
    }
    plain = hard_weights(roundings)
    recipe = recipe or Recipe(iterations=400)
    found = reconstruct(unit, inputs, targets, roundings, recipe, **options)
    return found, plain, inputs, targets


@pytest.mark.parametrize("make", [linear_unit, conv_unit])
@pytest.mark.parametrize("levels", [INT4, E2M1])
def test_a_units_error_falls_far_below_that_of_nearest(make, levels):
    unit, weights, example = made = make()
    found, plain, inputs, targets = learn(made, levels)
    assert found.after == found.learned < 0.5 * found.before
    assert mean_loss(unit, inputs, targets, plain) == found.before
    assert mean_loss(unit, inputs, targets, found.weights) == found.after
    fresh = [example(seed) for seed in range(100, 108)]
    wanted = [unit(each, weights) for each in fresh]
    unseen = [mean_loss(unit, fresh, wanted, each) for each in (plain, found.weights)]
    ratios = f"{found.learned / found.before:.3f}, on unseen data {unseen[1] / unseen[0]:.3f}"
    print(f"\n{make.__name__}, {len(levels)} levels: learned / nearest {ratios}")
    assert unseen[1] < 0.6 * unseen[0]


def test_learning_does_not_depend_on_the_units_scale():
    ratios = []
    for scale in (1e-3, 1.0, 1e3):
        found = learn(linear_unit(scale))[0]
        ratios.append(found.learned / found.before)
    assert max(ratios) < 0.4


def test_a_seed_gives_the_same_weights():
    first, again, other = (
        learn(linear_unit(), recipe=Recipe(iterations=40, batch=2, seed=seed))[0]
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert any(not torch.equal(first.weights[name], other.weights[name]) for name in first.weights)


def test_what_training_spoils_is_not_kept():
    wild = Recipe(iterations=2, rate=1e4, pull=0.0)
    found, plain, _, _ = learn(linear_unit(), recipe=wild)
    assert found.learned > found.before == found.after
    assert all(torch.equal(found.weights[name], plain[name]) for name in plain)


def test_a_weight_that_is_on_the_grid_is_left_alone():
    weight = {"w": torch.tensor([[1.0, -7.0], [3.0, 7.0]])}
    rounding = Rounding(weight["w"], torch.ones(2, 1), INT4)
    inputs = [{"x": random(0, 4, 2)}]

    def unit(example, given):
        return example["x"] @ given["w"]

    found = reconstruct(unit, inputs, [unit(inputs[0], weight)], {"w": rounding})
    assert found.before == found.after == 0
    assert torch.equal(found.weights["w"], weight["w"])


def test_the_loss_is_summed_over_dimension_1():
    output, target = random(0, 3, 5, 2, 2), random(1, 3, 5, 2, 2)
    expected = (output - target).square().sum(1).mean()
    assert loss(output, target).item() == pytest.approx(expected.item())
    assert loss((output, output), (target, output)).item() == pytest.approx(expected.item())


def test_the_schedule_of_the_regulariser():
    recipe = Recipe(iterations=100)
    assert [recipe.beta_at(i) for i in (0, 19)] == [None, None]
    assert [recipe.beta_at(i) for i in (20, 60, 100)] == [20, 11, 2]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_inputs_are_mixed_value_by_value(share):
    quantized = {"x": torch.ones(40, 50), "step": torch.tensor([3])}
    exact = {"x": torch.zeros(40, 50), "step": torch.tensor([3])}
    found = mixed(quantized, exact, share, torch.Generator().manual_seed(0))
    assert found["x"].mean().item() == pytest.approx(share, abs=0.05)
    assert found["step"] is quantized["step"]


def test_mixed_inputs_reach_the_unit_and_progress_is_told():
    unit, weights, example = linear_unit()
    exact = [example(seed) for seed in range(4)]
    coarse = [{"x": each["x"].mul(4).round() / 4} for each in exact]
    seen, told = [], []

    def watched(given, chosen):
        seen.append(given["x"])
        return unit(given, chosen)

    reconstruct(
        watched,
        coarse,
        [unit(each, weights) for each in exact],
        {name: Rounding(w, w.abs().amax() / 7, INT4) for name, w in weights.items()},
        Recipe(iterations=3),
        exact,
        lambda what, done, total: told.append((what, done, total)),
    )
    trained = seen[4:-4]  # the first and last four measure
    assert told == [("reconstruct", done, 3) for done in (1, 2, 3)]
    assert len(trained) == 3
    for x in trained:
        assert any(
            torch.equal(torch.where(x == q["x"], q["x"], e["x"]), x)
            and not torch.equal(x, q["x"])
            and not torch.equal(x, e["x"])
            for q, e in zip(coarse, exact, strict=True)
        )


def test_examples_that_do_not_fit_are_refused():
    inputs, targets = [{"x": torch.ones(1)}], [torch.ones(1)]

    def unit(example, given):
        return example["x"] * given["w"]

    roundings = {"w": Rounding(torch.ones(1, 1), torch.ones(1, 1), INT4)}
    with pytest.raises(CalibrationError, match="came none"):
        reconstruct(unit, [], [], roundings)
    with pytest.raises(CalibrationError, match="targets: expected one for each of 1 examples"):
        reconstruct(unit, inputs, targets * 2, roundings)
    with pytest.raises(CalibrationError, match="float_inputs: expected one for each of 1"):
        reconstruct(unit, inputs, targets, roundings, float_inputs=[])
    with pytest.raises(CalibrationError, match="loss of nan"):
        reconstruct(unit, [{"x": torch.full((1,), torch.nan)}], targets, roundings)


def test_learning_goes_on_from_gptq_and_never_loses_by_it():
    unit, weights, example = linear_unit()
    inputs = [example(seed) for seed in range(10, 22)]
    targets = [unit(each, weights) for each in inputs]
    hessian = Hessian(16)
    for each in inputs:
        hessian.add(each["x"])
    grid = partial(nearest, grid=parse_grid("int4"))
    scale = {name: each.abs().amax(1, keepdim=True) / 7 for name, each in weights.items()}
    settled = compensated(weights["up"], hessian, scale["up"], 0, grid)
    starts = {"up": settled, "down": weights["down"]}
    roundings = {name: Rounding(each, scale[name], INT4) for name, each in starts.items()}
    found = reconstruct(unit, inputs, targets, roundings, Recipe(iterations=400))
    rounded = {name: grid(each / scale[name]) * scale[name] for name, each in starts.items()}
    assert found.before == pytest.approx(mean_loss(unit, inputs, targets, rounded))
    assert found.after < 0.7 * found.before
