"""Draws of timesteps have the papers' shares; the bottleneck is found by structure."""

from __future__ import annotations

import logging

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effuse.calibrate import calibrate, draw_calls, step_values
from effuse.capture import capture
from effuse.draw import (
    DRAWS,
    Bottleneck,
    density,
    density_counts,
    find_bottleneck,
    normal_counts,
    uniform_counts,
    variety,
)
from effuse.errors import CalibrationError
from effuse.graph import module_path, value_of
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist
from effuse.step_groups import group_of, planned_groups

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

few = settings(deadline=None, max_examples=60)
steps_and_calls = st.integers(1, 60), st.integers(1, 300)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# counts


@few
@given(*steps_and_calls)
def test_uniform_is_even_and_sums_up(steps, calls):
    counts = uniform_counts(steps, calls)
    assert len(counts) == steps and sum(counts) == calls
    assert max(counts) - min(counts) <= 1
    if steps % calls == 0:
        chosen = [step for step, count in enumerate(counts) if count]
        assert chosen == list(range(0, steps, steps // calls))


@few
@given(*steps_and_calls, st.integers(0, 9))
def test_normal_sums_up_and_is_seeded(steps, calls, seed):
    counts = normal_counts(steps, calls, seed)
    assert len(counts) == steps and sum(counts) == calls and min(counts) >= 0
    assert counts == normal_counts(steps, calls, seed)


def test_normal_has_the_mean_of_a_clamped_normal_and_leans_to_the_clean_end():
    steps, calls = 250, 100_000
    counts = torch.tensor(normal_counts(steps, calls), dtype=torch.float64)
    times = torch.arange(steps - 1, -1, -1)  # of the steps in running order
    mean = (counts * times).sum() / calls
    assert mean / steps == pytest.approx(0.4216, abs=0.01)  # E[clamp(N(.4, .4), 0, 1)]
    inner = counts.flip(0)[1:-1].view(62, 4).sum(1)
    assert int(inner.argmax()) * 4 / steps == pytest.approx(0.4, abs=0.12)
    assert counts[-1] / calls == pytest.approx(0.16, abs=0.01)  # P(t < 0), clamped
    assert normal_counts(steps, calls, 1) != normal_counts(steps, calls, 0)


features = st.tuples(st.integers(1, 12), st.integers(0, 99)).map(
    lambda drawn: noise(drawn[0], 5, seed=drawn[1])
)


@few
@given(features, st.integers(1, 300), st.sampled_from([None, 0.0, 0.3, 3.0]),
       st.sampled_from([0.0, 1.2, 100.0]))  # fmt: skip
def test_density_counts_sum_up(found, calls, radius, weight):
    counts = density_counts(found, calls, radius, weight)
    assert len(counts) == len(found) and sum(counts) == calls and min(counts) >= 0


@few
@given(st.integers(1, 20), st.integers(1, 100))
def test_equal_features_are_drawn_uniformly(steps, calls):
    same = noise(5).expand(steps, 5) * 1.1
    assert density_counts(same, calls) == uniform_counts(steps, calls)


@few
@given(features, st.integers(0, 11), st.floats(0, 4))
def test_a_step_twice_raises_its_density_by_one(found, index, radius):
    index %= len(found)
    twice = torch.cat([found, found[index : index + 1]])
    before, after = density(found, radius), density(twice, radius)
    assert after[index] == before[index] + 1 == after[-1]
    assert ((after[:-1] - before) <= 1).all() and (after[:-1] >= before).all()


def test_variety_and_density_by_hand():
    found = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert torch.allclose(variety(found), torch.tensor([1.0, 1.0, 2.0]).double())
    assert density(found, 0.5).tolist() == [1, 1, 0]  # mean of squares: 0.5, 1, 2.5
    assert density(found, 1.0).tolist() == [2, 1, 1]
    assert density_counts(found, 30, radius=0.5, weight=1.0) == (10, 10, 10)
    assert density_counts(found, 30, radius=0.5, weight=0.0) == (15, 15, 0)
    assert density_counts(found, 31, radius=0.5, weight=0.0) == (16, 15, 0)  # of 15.5, 15.5
    assert density_counts(found, 4, radius=0.5, weight=1.0) == (2, 1, 1)  # the lacking one


# the bottleneck


class Flat(nn.Module):
    """Convolutions of one size, with squeeze and excitation beside."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(5))
        self.squeeze = nn.Conv2d(3, 3, 1)

    def forward(self, sample, timestep):
        for index, each in enumerate(self.layers):
            sample = each(sample) * torch.cos(timestep * 0.01)
            if index == 2:
                sample = sample * self.squeeze(sample.mean((2, 3), keepdim=True)).sigmoid()
        return sample


def unet():
    return UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16, 16), down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3, attention_head_dim=8,
    )  # fmt: skip


def dit():
    return DiTTransformer2DModel(
        sample_size=8, in_channels=3, num_layers=4, num_attention_heads=2, attention_head_dim=8,
        patch_size=2, num_embeds_ada_norm=4, norm_num_groups=1,
    )  # fmt: skip


TIMES = (900.0, 700.0, 500.0, 300.0, 100.0, 50.0)


def captured(network, shape, **more):
    torch.manual_seed(0)
    given = {"sample": noise(*shape), "timestep": torch.tensor([500]), **more}
    return capture(network.eval(), given, timesteps=TIMES)


@pytest.fixture(scope="module")
def flat():
    return captured(Flat(), (2, 3, 8, 8))


@pytest.fixture(scope="module")
def small_unet():
    return captured(unet(), (1, 3, 16, 16))


def test_bottleneck_of_a_unet_is_its_smallest_image(small_unet):
    part = small_unet.part("full")
    node = find_bottleneck(part, small_unet)
    assert value_of(node).shape == (1, 16, 4, 4)
    assert any(module_path(user).startswith("mid_block") for user in node.users)


def test_bottleneck_of_one_size_is_in_the_middle(flat):
    part = flat.part("full")
    node = find_bottleneck(part, flat)
    assert value_of(node).shape == (2, 3, 8, 8)
    assert {module_path(user) for user in node.users} & {"layers.2", "layers.3"}


def test_bottleneck_of_tokens_is_in_the_middle():
    given = {"hidden_states": noise(1, 3, 8, 8), "timestep": torch.tensor([500]),
             "class_labels": torch.tensor([1])}  # fmt: skip
    torch.manual_seed(0)
    program = capture(dit().eval(), given, timesteps=TIMES)
    node = find_bottleneck(program.part("full"), program)
    assert value_of(node).shape == (1, 16, 16)
    blocks = {module_path(user).split(".")[1] for user in node.users if module_path(user)}
    assert blocks & {"1", "2"}


class Bare(nn.Module):
    def forward(self, sample, timestep):
        return sample * torch.cos(timestep * 0.01)


def test_no_layer_is_a_clear_error():
    program = captured(Bare(), (1, 3, 4, 4))
    with pytest.raises(CalibrationError, match="no linear or convolution layer reads"):
        find_bottleneck(program.part("full"), program)


# drawing and recording


def call(time, seed=0):
    return {"sample": noise(2, 3, 8, 8, seed=seed), "timestep": torch.tensor([time])}


def over(times, runs=1):
    def run(model):
        for number in range(runs):
            for time in times:
                model(**call(int(time), number))

    return run


def test_no_draw_takes_all(flat):
    assert draw_calls(flat, None, "all") is None
    assert calibrate(flat, over(TIMES, 2), step_values).statistics.calls == 12


@pytest.mark.parametrize("draw", [each for each in DRAWS if each != "all"])
@pytest.mark.parametrize("calls", [None, 1, 4, 40])
def test_draws_have_as_many_calls_as_asked(flat, draw, calls):
    counts = draw_calls(flat, over(TIMES), draw, calls)
    assert len(counts) == len(TIMES) and sum(counts) == (calls or len(TIMES))


@pytest.mark.parametrize("draw", [each for each in DRAWS if each != "all"])
def test_a_draw_needs_a_schedule(draw):
    program = capture(Flat().eval(), call(500))
    with pytest.raises(CalibrationError, match=f"'{draw}' draws steps of the schedule, and none"):
        draw_calls(program, None, draw)


def test_calls_outside_the_draw_are_run_but_not_recorded(flat):
    counts = (0, 2, 0, 1, 0, 0)
    ran = []

    def run(model):
        for number in range(3):
            for time in TIMES:
                ran.append(model(**call(int(time), number), return_dict=False))

    found = calibrate(flat, run, step_values, groups=6, counts=counts)
    assert len(ran) == found.calls == 18 and found.statistics.calls == 3
    ranges = found.statistics.ranges["full", "sample"]
    assert ranges.unseen == (0, 2, 4, 5)
    lowest = [call(1, number)["sample"].min().item() for number in range(3)]
    assert ranges.low[1].item() == min(lowest[:2]) and ranges.low[3].item() == lowest[0]
    assert len(found.probes["full"]) == 3


def test_taking_every_step_is_taking_all(flat):
    every = calibrate(flat, over(TIMES), step_values).statistics
    drawn = calibrate(flat, over(TIMES), step_values, counts=(1,) * 6).statistics
    assert {k: (r.low.tolist(), r.high.tolist()) for k, r in every.ranges.items()} == {
        k: (r.low.tolist(), r.high.tolist()) for k, r in drawn.ranges.items()
    }


def test_a_draw_that_takes_nothing_is_a_clear_error(flat):
    with pytest.raises(CalibrationError, match="recorded nothing: none of its 2 calls"):
        calibrate(flat, over(TIMES[:2]), step_values, counts=(0, 0, 1, 1, 1, 1))


def test_what_runs_once_a_picture_is_taken_whatever_the_draw():
    class Prompted(Flat):
        def forward(self, sample, timestep, prompt):
            return super().forward(sample, timestep) + self.squeeze(prompt)

    program = captured(Prompted(), (2, 3, 8, 8), prompt=noise(2, 3, 8, 8))
    program = run_passes(program, (Canonicalize(), Hoist()))

    def run(model):
        for time in TIMES:
            model(**call(int(time)), prompt=noise(2, 3, 8, 8))

    found = calibrate(program, run, step_values, counts=(0, 0, 0, 0, 0, 1))
    assert len(found.probes["prompt"]) == 1 and len(found.probes["full"]) == 1


def test_density_watches_the_steps_that_are_run(flat):
    counts = draw_calls(flat, over(TIMES[2:5], 2), "density", 30)
    assert [count > 0 for count in counts[:2]] == [False, False] and counts[5] == 0
    with pytest.raises(CalibrationError, match="saw no step of the schedule"):
        Bottleneck(flat.part("full"), flat).counts(6, 3)


def test_density_runs_the_calibration_again(flat):
    inputs = [call(int(time)) for time in TIMES]
    assert sum(draw_calls(flat, inputs, "density", 12)) == 12
    with pytest.raises(CalibrationError, match=r"'density' samples twice, and .* runs once"):
        draw_calls(flat, iter(inputs), "density", 12)


def test_density_sees_the_bottleneck_of_every_step(flat):
    watch = Bottleneck(flat.part("full"), flat)
    features = [noise(2, 3, 8, 8, seed=index) for index in range(6)]
    for index, feature in enumerate(features):
        watch.begin({}, index)
        watch.observe(flat.part("full"), watch.node, feature)
    expected = density_counts(torch.stack([each.mean(0).flatten() for each in features]), 50)
    assert watch.counts(6, 50) == expected


def test_density_of_a_cached_plan_samples_every_step_in_full(small_unet):
    program = run_passes(small_unet, (Canonicalize(), Cache(interval=3, warmup=1)))
    assert {step.variant for step in program.plan.steps} > {"full"}
    counts = draw_calls(program, None, "density", 600)
    assert counts == draw_calls(small_unet, None, "density", 600)


def test_groups_in_which_a_variant_is_planned(small_unet):
    program = run_passes(small_unet, (Canonicalize(), Cache(interval=3, warmup=1)))
    for part in program.variants:
        at = [i for i in range(6) if program.plan.at(i).variant == part.name]
        assert planned_groups(program, part.name, 6) == set(at)
        assert planned_groups(program, part.name, 60) == {group_of(i, 6, 60) for i in at}
    assert planned_groups(program, "full", 1) == {0}
