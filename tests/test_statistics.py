"""Statistics merge as one pass would see it; calibration says what is wrong; probes are spread."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effuse.calibrate import PROBES, calibrate, nested, step_values, trajectory
from effuse.capture import capture
from effuse.errors import CalibrationError
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist
from effuse.statistics import Probes, Ranges, Statistics

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

GROUPS = 3
few = settings(deadline=None, max_examples=60)

values = st.floats(-1e6, 1e6, width=32)
records = st.lists(
    st.tuples(
        st.sampled_from([("full", "a"), ("full", "b"), ("prompt", "a")]),
        st.integers(0, GROUPS - 1),
        st.lists(values, max_size=4),
    ),
    max_size=8,
)


def seen(*runs):
    statistics = Statistics(GROUPS)
    for run in runs:
        for key, group, numbers in run:
            statistics.add(key, group, torch.tensor(numbers, dtype=torch.float32))
    return statistics


def data(statistics):
    return {
        key: (ranges.low.tolist(), ranges.high.tolist())
        for key, ranges in statistics.ranges.items()
    }


@few
@given(records, records, records)
def test_merge_is_associative_commutative_and_one_pass(one, two, three):
    a, b, c = seen(one), seen(two), seen(three)
    assert data(a.merge(b).merge(c)) == data(a.merge(b.merge(c))) == data(seen(one, two, three))
    assert data(a.merge(b)) == data(b.merge(a))
    assert data(a.merge(a)) == data(a) == data(a.merge(Statistics(GROUPS)))


@few
@given(records, records)
def test_merge_leaves_its_operands_alone_also_later(one, two):
    a, b = seen(one), seen(two)
    before = data(a), data(b)
    merged = a.merge(b)
    for key in merged.ranges:
        merged.add(key, 0, torch.tensor([-1e9, 1e9]))
    assert (data(a), data(b)) == before


@few
@given(records)
def test_ranges_are_the_least_and_greatest_of_each_group(run):
    found = data(seen(run))
    for key in {key for key, _, _ in run}:
        for group in range(GROUPS):
            numbers = [x for k, g, xs in run for x in xs if (k, g) == (key, group)]
            low, high = (each[group] for each in found[key])
            assert low == min(numbers, default=math.inf)
            assert high == max(numbers, default=-math.inf)


def test_overall_and_half_precision():
    ranges = Ranges.empty(2)
    ranges.add(0, torch.tensor([1.0, -3.0], dtype=torch.bfloat16))
    ranges.add(1, torch.tensor([[5.0]]))
    assert ranges.overall == (-3.0, 5.0)
    assert ranges.low.dtype == torch.float64


def test_different_groups_do_not_merge():
    for other in (1, 4):
        with pytest.raises(ValueError, match=f"statistics of 3 and of {other} groups"):
            Statistics(3).merge(Statistics(other))


# calibration


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.time, self.text, self.inner = nn.Linear(1, 4), nn.Linear(3, 4), nn.Linear(4, 4)

    def forward(self, sample, timestep, prompt):
        h = self.inner(sample) * self.time(timestep.float()[:, None])
        return h + self.text(prompt)


TIMES = tuple(float(t) for t in range(20, 0, -1))


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    return capture(Net().eval(), example(), timesteps=TIMES)


def example(time=7):
    generator = torch.Generator().manual_seed(time)
    return {
        "sample": torch.randn(1, 4, generator=generator),
        "timestep": torch.tensor([time]),
        "prompt": torch.ones(1, 3),
    }


def run_over(times):
    def run(model):
        for time in times:
            model(**example(time))

    return run


def test_nothing_yielded_is_a_clear_error(program):
    for feed in (lambda model: None, [], iter(())):
        with pytest.raises(CalibrationError, match="calibration yielded nothing") as caught:
            calibrate(program, feed, step_values)
        assert "hand a run(model) that samples with the model it is given" in str(caught.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_its_call(program, bad):
    broken = example(5)
    broken["sample"][0, 1] = bad
    with pytest.raises(CalibrationError) as caught:
        calibrate(program, [example(7), example(6), broken, example(4)], step_values)
    assert str(caught.value).startswith(
        "calibration: sample became NaN or infinite at call 3; check the weights"
    )


def test_what_nobody_wants_may_be_infinite(program):
    broken = example(5)
    broken["sample"][0, 1] = math.inf
    found = calibrate(program, [broken], lambda part, node: node.name == "linear_1")
    assert {name for _, name in found.statistics.ranges} == {"linear_1"}


def test_a_function_and_an_iterable_give_the_same(program):
    times = [20, 10, 1]
    one = calibrate(program, run_over(times), step_values)
    other = calibrate(program, (example(time) for time in times), step_values)
    assert data(one.statistics) == data(other.statistics)
    assert one.calls == other.calls == 3


def test_ranges_are_kept_by_group_of_the_schedule(program):
    found = calibrate(program, run_over([20, 19, 11, 1]), step_values, groups=4)
    low = found.statistics.ranges["full", "sample"].low
    rows = {time: example(time)["sample"].min().item() for time in (20, 19, 11, 1)}
    assert low.tolist() == [min(rows[20], rows[19]), rows[11], math.inf, rows[1]]


def test_without_a_schedule_the_groups_take_turns():
    torch.manual_seed(0)
    program = capture(Net().eval(), example())
    found = calibrate(program, run_over([20, 19, 11]), step_values, groups=2)
    low = found.statistics.ranges["full", "sample"].low
    rows = {time: example(time)["sample"].min().item() for time in (20, 19, 11)}
    assert low.tolist() == [min(rows[20], rows[11]), rows[19]]


def test_two_runs_merge_to_one(program):
    first = calibrate(program, run_over([20, 15]), step_values).statistics
    second = calibrate(program, run_over([10, 5]), step_values).statistics
    both = calibrate(program, run_over([20, 15, 10, 5]), step_values).statistics
    assert data(first.merge(second)) == data(both)


def test_only_floating_values_of_the_step_program_are_watched(program):
    result = run_passes(program, (Canonicalize(), Hoist()))
    found = calibrate(result, None, step_values)
    assert {part for part, _ in found.statistics.ranges} == {"full"}
    names = {node.name for node in result.part("full").graph.nodes if node.op != "get_attr"}
    assert {name for _, name in found.statistics.ranges} <= names
    assert ("full", "step_index") not in found.statistics.ranges


@pytest.mark.parametrize("runs", [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 100, 1000])
def test_probes_are_bounded_and_spread(runs):
    probes = Probes(4)
    most = 0
    for run in range(runs):
        probes.add({"number": torch.tensor(run)})
        most = max(most, len(probes.kept))
    assert most <= 8
    numbers = [int(probe["number"]) for probe in probes.chosen()]
    assert len(numbers) == min(runs, 4)
    assert numbers == sorted(set(numbers))
    assert numbers[0] == 0
    if runs >= 4:
        gaps = [b - a for a, b in zip(numbers, [*numbers[1:], runs], strict=True)]
        assert max(gaps) <= runs / 2
        assert numbers[-1] >= runs / 2


def test_every_part_has_probes_of_its_own_inputs(program):
    result = run_passes(program, (Canonicalize(), Hoist()))
    found = calibrate(result, None, step_values)
    assert set(found.probes) == {part.name for part in result.parts}
    for part in result.parts:
        assert all(tuple(probe) == part.inputs for probe in found.probes[part.name])
    assert len(found.probes["full"]) == PROBES and found.calls == len(TIMES)


def test_probes_are_copies(program):
    sample = torch.zeros(1, 4)

    def run(model):
        for time in (7, 6):
            model(sample=sample, timestep=torch.tensor([time]), prompt=torch.ones(1, 3))
            sample.add_(1)

    first, second = calibrate(program, run, step_values).probes["full"]
    assert first["sample"].eq(0).all()
    assert second["sample"].eq(1).all()


def test_the_default_trajectory_runs_the_schedule_from_noise_to_the_example(program):
    steps = list(trajectory(program, seed=3))
    assert [int(step["timestep"]) for step in steps] == [int(time) for time in TIMES]
    assert all(torch.equal(step["prompt"], program.examples["prompt"]) for step in steps)
    again = list(trajectory(program, seed=3))
    assert all(torch.equal(a["sample"], b["sample"]) for a, b in zip(steps, again, strict=True))
    assert not torch.equal(steps[0]["sample"], next(iter(trajectory(program, seed=4)))["sample"])
    noise = torch.randn(1, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(steps[0]["sample"], noise)
    near = (steps[-1]["sample"] - program.examples["sample"]).abs().max()
    assert near < (noise - program.examples["sample"]).abs().max()
    assert calibrate(program, None, step_values).calls == len(TIMES)


def test_nested_arguments():
    flat = {("sample",): 1, ("added", "text"): 2, ("added", "time"): 3}
    assert nested(flat) == {"sample": 1, "added": {"text": 2, "time": 3}}


def test_progress_counts_calls(program):
    said = []
    calibrate(program, None, step_values, progress=lambda *what: said.append(what))
    assert said == [("calibrate", number, 20) for number in range(1, 21)]
