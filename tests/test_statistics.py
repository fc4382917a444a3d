"""Statistics merge as one pass would see it; calibration says what is wrong; probes are spread."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effuse.build import rewrite
from effuse.calibrate import (
    PROBES,
    calibrate,
    channel_axis,
    needs_of,
    nested,
    step_values,
    trajectory,
)
from effuse.capture import capture
from effuse.config import Config
from effuse.errors import CalibrationError
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Pass, Quantize
from effuse.plan import STEP_INPUT
from effuse.progress import Phases
from effuse.ranges import SETTERS, Histogram, Uniform
from effuse.statistics import (
    RANGES_ONLY,
    Channels,
    Needs,
    Probes,
    Ranges,
    Statistics,
    check_groups,
    step_ranges,
)

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


# what a pass may ask for beside ranges

ALL = Needs(histograms=True, channels=True)
KEY = ("full", "a")

whole = st.integers(-1000, 1000).map(float)  # their sums are exact
tables = st.lists(
    st.tuples(st.integers(0, GROUPS - 1), st.lists(st.lists(whole, min_size=4, max_size=4),
                                                   min_size=1, max_size=3)),
    max_size=6,
)  # fmt: skip


def seen_all(*runs):
    statistics = Statistics(GROUPS, needs=ALL)
    for group, rows in (each for run in runs for each in run):
        statistics.add(KEY, group, torch.tensor(rows))
    return statistics


def all_data(statistics):
    histograms = {
        (key, group): (each.low, each.high, each.counts.tolist())
        for key, found in statistics.histograms.items()
        for group, each in found.items()
    }
    channels = {
        key: [each.axis, *(part.tolist() for part in (each.low, each.high, each.total, each.count))]
        for key, each in statistics.channels.items()
    }
    return data(statistics), histograms, channels


@few
@given(tables, tables, tables)
def test_histograms_and_channels_merge_as_one_pass(one, two, three):
    a, b, c = seen_all(one), seen_all(two), seen_all(three)
    expected = all_data(seen_all(one, two, three))
    assert all_data(a.merge(b).merge(c)) == all_data(a.merge(b.merge(c))) == expected
    assert all_data(b.merge(a).merge(c)) == expected
    before = all_data(a)
    merged = a.merge(Statistics(GROUPS, needs=ALL))
    assert all_data(merged) == before
    merged.add(KEY, 0, torch.full((1, 4), 1e6))
    assert all_data(a) == before


@few
@given(tables)
def test_channels_are_of_the_last_axis_or_of_the_third_last(run):
    found = seen_all(run)
    if not run:
        assert not found.channels
        return
    rows = torch.cat([torch.tensor(rows) for _, rows in run])
    channels = found.channels[KEY]
    assert torch.equal(channels.absmax, rows.abs().amax(0))
    assert torch.allclose(channels.mean, rows.double().mean(0))
    images = Statistics(GROUPS, needs=ALL)
    for group, each in run:
        images.add(KEY, group, torch.tensor(each).T[None, :, None], axis=-3)
    assert torch.equal(images.channels[KEY].absmax, channels.absmax)
    assert torch.allclose(images.channels[KEY].mean, channels.mean)


def test_statistics_that_keep_different_things_do_not_merge():
    with pytest.raises(ValueError, match=r"histograms=True.* and with .*histograms=False"):
        Statistics(needs=ALL).merge(Statistics())


def test_needs_add_up_over_passes():
    @dataclass(frozen=True)
    class Asks(Pass):
        name: ClassVar[str] = "asks"
        needs: ClassVar[Needs] = Needs(channels=True)

    assert Needs(histograms=True) | Needs(channels=True) == ALL
    assert needs_of((Hoist(), Canonicalize())) == needs_of(()) == RANGES_ONLY
    assert needs_of((Hoist(), Asks())) == Needs(channels=True)


def test_ranges_by_setter_over_all_groups_or_of_one():
    statistics = Statistics(2, needs=Needs(histograms=True))
    tail = torch.distributions.StudentT(3.0).sample((5000,))
    statistics.add(KEY, 0, tail)
    statistics.add(KEY, 1, 3 * tail)
    rounding = Uniform(4)
    whole = Histogram.of(torch.cat([tail, 3 * tail]))
    for name, setter in SETTERS.items():
        assert statistics.range_of(KEY, name, rounding) == setter(whole, rounding)
        one = statistics.range_of(KEY, name, rounding, group=1)
        assert one == setter(Histogram.of(3 * tail), rounding)
    low, high = step_ranges(statistics, *KEY, "mse", rounding)
    assert high[1] == pytest.approx(3 * high[0].item(), rel=0.05) and (low < 0).all()


@few
@given(records, st.sampled_from(sorted(SETTERS)))
def test_one_group_is_the_static_range(run, name):
    statistics = Statistics(1, needs=Needs(histograms=True))
    for key, _, numbers in run:
        if numbers:
            statistics.add(key, 0, torch.tensor(numbers))
    for key in statistics.ranges:
        low, high = step_ranges(statistics, *key, name, Uniform(8))
        assert (low.item(), high.item()) == statistics.range_of(key, name, Uniform(8))


def test_groups_that_saw_nothing_are_named():
    statistics = Statistics(4, calls=7)
    statistics.add(KEY, 1, torch.tensor([2.0, -1.0]))
    with pytest.raises(CalibrationError) as caught:
        check_groups(statistics, *KEY)
    message = str(caught.value)
    assert "a of full was not recorded in groups 0, 2, 3 of 4" in message
    assert "7 calls were recorded" in message and "use fewer step_groups" in message
    with pytest.raises(CalibrationError, match="not recorded in group 3 of 4"):
        check_groups(statistics, *KEY, needed=[1, 3])
    with pytest.raises(CalibrationError, match="b of full was not recorded in groups 0, 1, 2, 3"):
        step_ranges(statistics, "full", "b")
    check_groups(statistics, *KEY, needed=[1])
    low, high = step_ranges(statistics, *KEY, needed=[1])
    assert low.tolist() == [-1.0] * 4 and high.tolist() == [2.0] * 4


def test_a_setter_without_its_histogram_says_who_has_to_ask():
    statistics = Statistics(2)
    statistics.add(KEY, 0, torch.ones(3))
    with pytest.raises(CalibrationError, match=r"kept no histogram of a; .*Needs\(histograms=True"):
        statistics.range_of(KEY, "mse", Uniform(8))
    for name in SETTERS:
        with pytest.raises(CalibrationError, match="no value was counted"):
            statistics.range_of(("full", "unseen"), name, Uniform(8))


@pytest.mark.parametrize("value", [0.0, -2.5, 7.0])
def test_a_constant_activation_has_its_value_as_range(value):
    statistics = Statistics(1, needs=ALL)
    for _ in range(3):
        statistics.add(KEY, 0, torch.full((2, 4), value))
    for name in SETTERS:
        assert statistics.range_of(KEY, name, Uniform(8)) == (value, value)
    channels = statistics.channels[KEY]
    assert channels.absmax.tolist() == [abs(value)] * 4 and channels.mean.tolist() == [value] * 4


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_in_nothing(bad):
    statistics = seen_all([(0, [[1.0, 2.0, 3.0, 4.0]])])
    before = all_data(statistics)
    with pytest.raises(ValueError, match="NaN or infinite"):
        statistics.add(KEY, 0, torch.tensor([[1e3, bad, 3.0, 4.0]]))
    assert all_data(statistics) == before


def test_channels_of_nothing():
    empty = Channels.empty(2, 3, -1)
    empty.add(0, torch.empty(0, 3))
    assert empty.count.tolist() == [0, 0] and empty.mean.tolist() == [0, 0, 0]


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
        assert all(set(probe) == {*part.inputs, STEP_INPUT} for probe in found.probes[part.name])
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


def test_calibration_keeps_what_is_asked_for(program):
    times = [20, 10, 1]
    plain = calibrate(program, run_over(times), step_values).statistics
    assert not plain.histograms and not plain.channels and plain.calls == 3
    found = calibrate(program, run_over(times), step_values, needs=ALL).statistics
    assert data(found) == data(plain)
    assert set(found.histograms) == set(found.channels) == set(plain.ranges)
    samples = torch.cat([example(time)["sample"] for time in times])
    channels = found.channels["full", "sample"]
    assert torch.equal(channels.absmax, samples.abs().amax(0))
    assert torch.allclose(channels.mean, samples.double().mean(0))
    assert found.histogram(("full", "sample")).total == samples.numel()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_value_that_is_not_finite_is_named_also_with_histograms(program, bad):
    broken = example(5)
    broken["sample"][0, 1] = bad
    with pytest.raises(CalibrationError, match="sample became NaN or infinite at call 2"):
        calibrate(program, [example(7), broken], step_values, needs=ALL)


def test_the_channels_axis_is_the_layers():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)

        def forward(self, sample, timestep):
            return self.linear(self.conv(sample * timestep).permute(0, 2, 3, 1))

    given = {"sample": torch.ones(1, 3, 6, 6), "timestep": torch.tensor([1.0])}
    part = capture(Mixed().eval(), given).part("full")
    axes = {node.name: channel_axis(node) for node in part.graph.nodes}
    assert (axes["mul"], axes["conv2d"], axes["permute"], axes["linear"]) == (-3, -3, -1, -1)


@dataclass(frozen=True)
class Looks(Pass):
    """Hands out the calibration that it was given."""

    name: ClassVar[str] = "looks"
    calibrates: ClassVar[bool] = True
    needs: ClassVar[Needs] = Needs(histograms=True)
    seen: ClassVar[list] = []

    def run(self, program, work):
        self.seen.append(work.calibration)
        return program


def test_a_build_records_what_its_passes_need_at_the_steps_that_are_drawn(program):
    config = Config(calibration_steps="uniform", calibration_calls=5, step_groups=4)
    config = config.model_copy(update={"passes": (Looks(),)})
    rewrite(program, config, run_over(range(20, 0, -1)), Phases())
    calibration = Looks.seen.pop()
    assert (calibration.calls, calibration.statistics.calls) == (20, 5)
    total = calibration.statistics.histogram(("full", "sample")).total
    assert total == 5 * 4 and not calibration.statistics.channels


def test_a_build_of_passes_that_ask_for_nothing_keeps_ranges_only():
    assert needs_of(Config(passes=(Hoist(), Quantize())).passes) == RANGES_ONLY
