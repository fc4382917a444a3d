"""What an error at each step costs, on a sampler whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from effuse.calibrate import drive
from effuse.capture import capture
from effuse.log import Log
from effuse.passes import Cache
from effuse.passes.base import Work
from effuse.passes.cut import Target
from effuse.passes.sensitivity import (
    Disturbed,
    measured_steps,
    pictures,
    smoothed,
    step_weights,
)

STEPS = 12
PACE = 0.02 * 0.6 ** np.arange(STEPS)  # what the sampler makes of an output


class Deep(nn.Module):
    """The output is what a branch adds to the latent."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(6, 6)

    def forward(self, sample, timestep):
        return torch.tanh(self.layer(sample)) * (1 + timestep[:, None] / 10) ** 2


@pytest.fixture(scope="module")
def program():
    inputs = {"sample": torch.randn(4, 6), "timestep": torch.full((4,), 3.0)}
    return capture(Deep().eval(), inputs, timesteps=tuple(float(t) for t in reversed(range(STEPS))))


def sample(model, seed=0, pace=PACE):
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    for index in range(STEPS):
        out = model(sample=x, timestep=torch.full((4,), float(STEPS - 1 - index)))
        x = x + float(pace[index]) * out
    return x


def target_of(program):
    node = next(n for n in program.parts[0].graph.nodes if "tanh" in str(n.target))
    return Target("branch", node)


def work(run):
    return Work(log=Log(), drive=lambda program, watch: drive(program, run, watch))


def test_weights_follow_what_the_sampler_makes_of_an_output(program):
    found = step_weights(program, program.parts[0], [target_of(program)], work(sample))
    gain = np.array([(1 + (STEPS - 1 - i) / 10) ** 2 for i in range(STEPS)])
    expected = (PACE * gain) ** 2
    inner = slice(1, STEPS - 1)
    ratio = found[inner] / expected[inner]
    assert found.max() == 1.0
    assert expected[inner].max() / expected[inner].min() > 1e4
    assert ratio.max() / ratio.min() < 3  # four pictures, smoothed, and steps move later ones


def test_noise_that_changes_from_run_to_run_is_said(program):
    seeds = iter(range(100))
    hand = work(lambda model: sample(model, seed=next(seeds)))
    found = step_weights(program, program.parts[0], [target_of(program)], hand)
    assert np.array_equal(found, np.ones(STEPS))
    assert "seed its generator" in hand.log.notes[-1]


def test_a_calibration_that_does_not_sample_is_said(program):
    hand = work(lambda model: sample(model, pace=np.zeros(STEPS)))
    found = step_weights(program, program.parts[0], [target_of(program)], hand)
    assert np.array_equal(found, np.ones(STEPS))
    assert "does not sample" in hand.log.notes[-1]


def test_only_the_chosen_row_is_disturbed_at_its_step(program):
    run = Disturbed(program.parts[0], [target_of(program)], "sample", STEPS, [3, 5, 7, 9])
    drive(program, sample, run)
    assert run.steps == [[3, 5, 7, 9]] and run.pictures == 4
    assert (run.errors[0] > 0).all()
    with torch.no_grad():
        plain = sample(Deep().eval())
    moved = (run.last[0] - plain).abs().sum(1)
    assert (moved > 0).all()


def test_a_picture_that_guidance_calls_twice_is_one():
    x = torch.randn(3, 2, 2)
    assert pictures(torch.cat([x, x])) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize("count", [4, 5, 10, 50, 1000])
def test_measured_steps_are_inside_distinct_and_spread(count):
    found = measured_steps(count)
    assert len(set(found)) == len(found) == min(24, count - 2)
    assert min(found) == 1 and max(found) == count - 2
    assert max(found[:4]) - min(found[:4]) >= (count - 3) // 2 or count < 8


def test_smoothing_keeps_an_exponential_and_needs_no_measurement():
    steps = list(range(1, 30))
    found = smoothed(steps, [10.0 * 0.8**s for s in steps], 31)
    assert np.allclose(found[1:30] / found[1], 0.8 ** np.arange(29))
    assert np.array_equal(smoothed([], [], 5), np.ones(5))
    assert np.array_equal(smoothed([3], [0.1], 5), np.ones(5))


def test_a_fitted_schedule_refreshes_where_errors_cost_most(program):
    options = Cache(schedule="fitted", full_steps=5, warmup=1, order=0)
    features = np.cumsum(np.ones(STEPS))[:, None]
    gram = features @ features.T
    early = options.fit(gram, 0.3 ** np.arange(STEPS))
    late = options.fit(gram, 0.3 ** np.arange(STEPS)[::-1])
    assert len(early) == len(late) == 5
    assert sum(early) < sum(options.fit(gram)) < sum(late)
