"""Variants that calibration never ran are quantized by ranges of the default variant's layers."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.calibrate import calibrate, step_values
from effuse.capture import capture
from effuse.graph import calls
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, Quantize
from effuse.passes.lent_ranges import lend_ranges, pairs
from effuse.passes.quantize import unseen_run

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = tuple(float(time) for time in range(90, -1, -10))


class Net(nn.Module):
    """A long skip around two convolutions; two more after it."""

    def __init__(self):
        super().__init__()
        names = ("enter", "down", "up", "join", "leave")
        for name, (inside, outside) in zip(
            names, [(3, 8), (8, 8), (8, 8), (16, 8), (8, 3)], strict=True
        ):
            setattr(self, name, nn.Conv2d(inside, outside, 3, padding=1))

    def forward(self, sample, timestep):
        h = F.silu(self.enter(sample)) * timestep.float().cos()[:, None, None, None]
        deep = F.silu(self.up(F.silu(self.down(h))))
        return self.leave(F.silu(self.join(torch.cat([deep, h], 1))))


def call(index, seed):
    generator = torch.Generator().manual_seed(seed)
    times = torch.full((2,), int(TIMES[index]))
    return {"sample": torch.randn(2, 3, 8, 8, generator=generator), "timestep": times}


@pytest.fixture(scope="module")
def cached():
    torch.manual_seed(0)
    program = capture(Net().eval(), call(4, 0), timesteps=TIMES)
    passes = (Canonicalize(), Hoist(), Cache(interval=3, mode="deep", warmup=2))
    return run_passes(program, passes)


def single_calls(program):
    """One call from each of many pictures: no plan gets anywhere."""
    feed = [call(index, seed=index) for index in range(len(TIMES))]
    return calibrate(program, feed, step_values)


def in_eight_bits(program, name):
    target = torch.ops.effuse.quantize.default
    return len(calls(program.part(name).graph, target))


def other(program):
    (name,) = {part.name for part in program.variants} - {program.plan.default}
    return program.part(name)


def test_layers_of_a_variant_that_never_ran_are_in_eight_bits(cached):
    name = other(cached).name
    result = run_passes(cached, (Quantize("w8a8", min_sqnr_db=-100.0),), single_calls)
    assert in_eight_bits(result, name) > 0
    notes = result.records[-1].notes
    assert f"{name}: never run in calibration; ranges are the default variant's" in notes
    assert any(note.startswith(f"{name}: 1 of ") for note in notes)  # its edges stay in float


def test_the_same_layer_has_the_same_ranges(cached):
    calibration = single_calls(cached)
    wider, names = lend_ranges(cached, calibration)
    part, default = other(cached), cached.part(cached.plan.default)
    assert names == [part.name]
    found = pairs(part, default, cached.weights)
    assert found
    for own, known in found.items():
        assert own[0] == part.name and known[0] == default.name
        assert wider.statistics.range_of(own) == calibration.statistics.range_of(known)
    assert not any(key[0] == part.name for key in calibration.statistics.ranges)  # left alone


def test_a_variant_that_ran_keeps_its_own(cached):
    calibration = calibrate(cached, None, step_values)  # along a trajectory
    wider, names = lend_ranges(cached, calibration)
    assert wider is calibration and names == []


def test_without_calibration_nothing_is_lent(cached):
    assert lend_ranges(cached, unseen_run(cached))[1] == []


def test_a_weight_that_layers_share_lends_nothing():
    class Twice(Net):
        def forward(self, sample, timestep):
            h = self.enter(sample) * timestep.float().cos()[:, None, None, None]
            return self.leave(self.down(self.down(h)))

    torch.manual_seed(0)
    program = capture(Twice().eval(), call(4, 0), timesteps=TIMES)
    program = run_passes(program, (Canonicalize(),))
    part = program.part(program.plan.default)
    found = pairs(part, part, program.weights)
    assert len(found) == 4  # what enter and leave read and give
