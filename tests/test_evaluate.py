"""Evaluation by hand count: a tiny network against a perturbed copy whose error is known."""

import json
import time
from collections import Counter
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from effuse.errors import InputError
from effuse.evaluate import CPUINFO, evaluate, picture_db, to_pixels
from effuse.metrics import psnr_db, sqnr_db
from effuse.tape import Tape

PROMPTS = ("one", "two")
STEPS = 4


class Net(nn.Module):
    """A convolution, whose output is `gain` times as large."""

    config: ClassVar = {"sample_size": 8}

    def __init__(self, gain=1.0):
        super().__init__()
        self.gain, self.calls = gain, 0
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(self.conv.weight, std=0.2)
            nn.init.zeros_(self.conv.bias)

    def forward(self, sample, timestep, return_dict=False):
        self.calls += 1
        return (self.gain * self.conv(sample) * (1 + timestep / 100),)


class Clock:
    """What a computer with nothing else to do would show."""

    def __init__(self):
        self.now = 0.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


def noise():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def sampler(calls=1, steps=STEPS):
    """Euler steps from the same noise; `calls` of the model a step."""

    def sample(model, on_step):
        assert model.config == Net.config
        x = noise()
        for index in range(steps):
            time = torch.tensor(steps - 1 - index)
            outputs = [model(x, time, return_dict=False)[0] for _ in range(calls)]
            on_step(index, time, outputs[-1])
            x = x - 0.1 * outputs[-1]
        return x

    return sample


def run(models, sample=None, prompts=PROMPTS, **options):
    given = {name: (model, 2.0 + index) for index, (name, model) in enumerate(models.items())}
    return evaluate(given, sample or sampler(), prompts, **options)


def test_step_error_is_that_of_the_output_on_equal_inputs():
    found = run({"original": Net(), "louder": Net(1.01)})
    # the copy is wrong by 1 % of its output at every step, wherever its own pictures have gone
    assert found.runs[0].step_sqnr_db == pytest.approx([40.0] * STEPS, abs=1e-3)
    assert found.timesteps == (3.0, 2.0, 1.0, 0.0)


def test_two_calls_a_step_are_one_step():
    found = run({"original": Net(), "louder": Net(1.1)}, sampler(calls=2))
    assert found.runs[0].step_sqnr_db == pytest.approx([20.0] * STEPS, abs=1e-3)


def test_pictures_come_from_each_models_own_trajectory():
    found = run({"original": Net(), "louder": Net(1.1)})
    sample = sampler()
    with torch.no_grad():
        one, other = (
            sample(net, lambda *_: None).clamp(-1, 1).numpy() for net in (Net(), Net(1.1))
        )
    assert found.runs[0].psnr_db == pytest.approx(psnr_db(one, other))
    each = [psnr_db(a, b) for a, b in zip(one, other, strict=True)]
    assert found.runs[0].psnr_each == pytest.approx(each)
    assert found.reference.pictures.shape == (2, 8, 8, 3)
    assert found.reference.psnr_db == 200


def test_psnr_by_hand():
    a = np.zeros((1, 3, 2, 2), np.float32)
    assert picture_db(a, a + 0.2) == pytest.approx(20.0, abs=1e-4)  # 10·log10(2² / 0.2²)
    assert picture_db(a, a * np.nan) == -200
    assert sqnr_db([3, 4], [3, 4.5]) == pytest.approx(20.0)  # 10·log10(25 / 0.25)


def test_pixels():
    assert to_pixels(np.array([-1, 0, 1, np.nan]).reshape(1, 1, 1, 4)).ravel().tolist() == [
        0, 128, 255, 128,
    ]  # fmt: skip


def test_models_take_turns_call_by_call_after_sampling():
    order = []

    class Named(Net):
        def forward(self, sample, timestep, return_dict=False):
            order.append(self.name)
            return super().forward(sample, timestep, return_dict)

    nets = {name: Named() for name in "abc"}
    for name, net in nets.items():
        net.name = name
    run(nets, rounds=2)
    sampling, turns = "".join(order[: 3 * STEPS]), "".join(order[3 * STEPS :])
    assert sampling == "a" * STEPS + "b" * STEPS + "c" * STEPS
    assert turns == ("abccba" * STEPS)[: 6 * STEPS]


@pytest.mark.usefixtures("clock")
def test_the_median_of_a_model_is_its_own():
    class Slow(Net):
        def forward(self, sample, timestep, return_dict=False):
            time.sleep(0.02)
            return super().forward(sample, timestep, return_dict)

    found = run({"quick": Net(), "slow": Slow()})
    assert found.runs[0].ms_per_step == pytest.approx(20) and found.reference.ms_per_step == 0


def test_speedup_and_json_without_pixels():
    found = run({"original": Net(), "copy": Net()})
    data = json.loads(json.dumps(found.to_json()))
    ratio = found.reference.ms_per_run / found.runs[0].ms_per_run
    assert data["runs"][0]["speedup"] == found.speedup(found.runs[0]) == ratio
    assert "pictures" not in data["runs"][0]
    assert (data["reference"]["megabytes"], data["runs"][0]["megabytes"]) == (2.0, 3.0)
    assert data["runs"][0]["psnr_db"] == 200 and data["prompts"] == list(PROMPTS)
    assert data["machine"]["cores"] >= 1 and data["machine"]["processor"]


def test_machine_without_cpuinfo(monkeypatch, tmp_path):
    monkeypatch.setattr("effuse.evaluate.CPUINFO", tmp_path / CPUINFO.name)
    assert run({"only": Net()}).machine["processor"]


def test_the_tape_is_bounded_and_even():
    tape = Tape(4)
    for step in range(11):
        tape.record(step, (), {}, np.zeros(1))
    assert list(tape.steps) == [0, 4, 8]
    found = run({"a": Net(), "b": Net(1.01)}, sampler(steps=7), keep=2)
    kept = [value is not None for value in found.runs[0].step_sqnr_db]
    assert kept == [True, False, False, False, True, False, False]


def test_the_tape_is_bounded_in_bytes_and_keeps_a_prompt_once():
    prompt = torch.zeros(1000)
    tape = Tape(100, memory=4 * (1000 + 2 * 8 * 10))
    for step in range(40):
        latent = torch.full((8,), float(step))
        tape.record(step, (latent,), {"prompt": prompt.clone()}, latent)
    assert list(tape.steps) == list(range(0, 40, 4))
    kept = [call.arguments for calls in tape.steps.values() for call in calls]
    assert len({id(kwargs["prompt"]) for _, kwargs in kept}) == 1
    assert [args[0].value[0].item() for args, _ in kept] == list(tape.steps)


def test_one_step_stays_however_large_it_is():
    found = run({"a": Net(), "b": Net(1.01)}, memory=1)
    assert [value is not None for value in found.runs[0].step_sqnr_db] == [True] + [False] * 3


class Cached(Net):
    """Slow and right at even steps, quick and 10 % wrong at odd ones, if it met the step before."""

    def __init__(self):
        super().__init__()
        self.steps, self.last = Counter(), None

    def forward(self, sample, timestep, return_dict=False):
        index = STEPS - 1 - int(timestep)
        reuses = index % 2 == 1 and self.last == index - 1
        self.last = index
        self.steps["reuse" if reuses else "full"] += 1
        self.gain = 1.1 if reuses else 1.0
        if not reuses:
            time.sleep(0.05)
        return super().forward(sample, timestep, return_dict)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("keep", [STEPS, 2])
def test_a_network_that_reuses_steps_is_timed_by_whole_runs(keep):
    found = run({"original": Net(), "cached": Cached()}, keep=keep)
    assert found.runs[0].variants == {"full": 2, "reuse": 2}
    assert found.reference.variants == {}
    assert found.runs[0].ms_per_run == pytest.approx(100)  # two slow steps of four
    errors = found.runs[0].step_sqnr_db
    if keep == STEPS:
        assert errors == pytest.approx([200, 20, 200, 20], abs=1e-3)
    else:  # it was not shown the steps in between: what it gave is not what it gives in a run
        assert errors == (None,) * STEPS


def test_inputs_are_kept_from_samplers_that_write_in_place():
    def sample(model, on_step):
        x = noise()
        for index in range(STEPS):
            on_step(index, index, output := model(x, torch.tensor(index))[0])
            x -= output.mul_(0.1)
        return x

    found = run({"original": Net(), "louder": Net(1.01)}, sample)
    assert found.runs[0].step_sqnr_db == pytest.approx([40.0] * STEPS, abs=1e-3)


def test_infinite_outputs_are_no_good_pictures():
    found = run({"original": Net(), "broken": Net(float("inf"))})
    assert found.runs[0].psnr_db == -200 and found.runs[0].step_sqnr_db[0] == -200


def test_progress_ends_where_it_said():
    seen = []
    run({"a": Net(), "b": Net()}, progress=lambda *now: seen.append(now))
    assert seen[0] == ("sample", 0, 2) and ("sample", 2, 2) in seen
    assert seen[-1] == ("time and compare", 2 * STEPS, 2 * STEPS)


@pytest.mark.parametrize(
    ("sample", "prompts", "words"),
    [
        (lambda model, on_step: torch.zeros(2, 3, 8, 8), PROMPTS, "did not call the model"),
        (sampler(), ("one",), r"shape \(2, 3, 8, 8\); expected \(1, 3"),
    ],
)
def test_samplers_that_break_their_promise_are_named(sample, prompts, words):
    with pytest.raises(InputError, match=words):
        run({"original": Net()}, sample, prompts)


def test_nothing_to_compare():
    with pytest.raises(InputError, match="at least one model"):
        run({})
