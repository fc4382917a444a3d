"""The correction of a forecast, per channel and step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from effuse.backends.reference import session
from effuse.calibrate import drive
from effuse.capture import capture
from effuse.errors import ConfigError
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist
from effuse.passes.correction import least_squares
from effuse.passes.features import channel_of
from effuse.verify import relative_error

TIMES = tuple(float(t) for t in reversed(range(8)))


def test_least_squares_leaves_nothing_that_it_could_explain():
    random = np.random.default_rng(0)
    channels = np.repeat(np.arange(5), 200)
    x, y = random.standard_normal((2, 1000))
    y += 0.7 * x + channels
    slope, shift = least_squares(x, y, channels, 6)
    rest = y - slope[channels] * x - shift[channels]
    for channel in range(5):
        mine = channels == channel
        assert abs(rest[mine].mean()) < 1e-12
        assert abs(np.corrcoef(rest[mine], x[mine])[0, 1]) < 1e-12
    assert (slope[5], shift[5]) == (1, 0)  # a channel that was not seen


def test_a_constant_channel_is_only_shifted():
    slope, shift = least_squares(np.full(4, 2.0), np.full(4, 5.0), np.zeros(4, int), 1)
    assert (slope[0], shift[0]) == (1, 3)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5, 3), (4, 3)])
def test_channels_of_elements(shape):
    axis = 1 if len(shape) == 4 else len(shape) - 1
    index = torch.arange(shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    expected = index.expand(shape).flatten()
    assert torch.equal(channel_of(torch.arange(expected.numel()), shape), expected)


class Drifting(nn.Module):
    """A long skip's deep half whose channels drift with the timestep, each in its own way."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.deep = nn.Conv2d(3, 4, 1)
        self.pace = nn.Parameter(torch.rand(1, 4, 1, 1))
        self.last = nn.Conv2d(7, 3, 1)

    def forward(self, sample, timestep):
        skip = sample + 0.25
        deep = self.deep(skip) * (1 + self.pace * timestep) + self.pace * timestep**2
        return self.last(torch.cat([deep, skip], dim=1))


def steps_of(seed):
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return [{"sample": x, "timestep": torch.tensor(time)} for time in TIMES]


@pytest.fixture(scope="module")
def net():
    return Drifting().eval()


def build(net, **options):
    program = capture(net, steps_of(0)[3], timesteps=TIMES)

    def run(current, watch):
        drive(current, steps_of(0), watch)

    chosen = Cache(**{"order": 0, "warmup": 1, "interval": 4} | options)
    return run_passes(program, (Canonicalize(), Hoist(), chosen), drive=run)


def errors(net, program):
    run, found = session(program), []
    for given in steps_of(1):
        with torch.no_grad():
            found.append(relative_error((run(**given),), (net(**given),)))
    return found


def test_drift_that_is_affine_in_each_channel_is_corrected_away(net):
    held, corrected = build(net), build(net, correct=True)
    assert max(errors(net, held)) > 0.05
    assert max(errors(net, corrected)) < 1e-4
    assert set(corrected.weights) - set(held.weights) == {
        f"correction.{corrected.plan.slots[0].name}.{kind}" for kind in ("scale", "shift")
    }
    assert (
        corrected.part("full").graph.python_code("").src
        == held.part("full").graph.python_code("").src
    )


def test_full_steps_are_not_touched(net):
    found = errors(net, build(net, correct=True))
    assert found[0] == found[4] == 0


def test_a_threshold_takes_no_correction():
    with pytest.raises(ConfigError, match="correct belongs to a schedule"):
        Cache(mode="residual", threshold=0.1, correct=True)
