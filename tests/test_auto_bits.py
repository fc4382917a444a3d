"""AutoBits: its noises against Quantize itself, its costs, its budgets, and what it refuses."""

from __future__ import annotations

import functools
import logging
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.calibrate import calibrate, drive, layer_values
from effuse.capture import capture
from effuse.errors import ConfigError, PassError
from effuse.graph import evaluate, module_path
from effuse.log import Log
from effuse.pass_manager import run_passes
from effuse.passes import Hoist, Quantize, layer_cost
from effuse.passes.auto_bits import AutoBits, Job, uniform
from effuse.passes.base import Work
from effuse.passes.bits_solver import Option
from effuse.passes.layer_noise import (
    latent_noise,
    output_noise,
    relative_noise,
    results,
    walk,
)
from effuse.passes.layer_options import Choices, drop_losers, shared_weights, stored, together
from effuse.passes.lone_layer import FLOAT, lone_layer, written
from effuse.passes.quantize_sites import sites
from effuse.passes.sensitivity import Finals

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

FORMATS = ("w8a8", "w4a8")


class Net(nn.Module):
    """Convolutions one behind the other, a linear that runs twice, a layer for the prompt."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 64, 3, padding=1)
        self.dense, self.text = nn.Linear(64, 64), nn.Linear(8, 64)
        self.last = nn.Conv2d(64, 3, 1)

    def forward(self, sample, timestep, prompt):
        h = self.second(self.first(sample)) * timestep.float().cos()[:, None, None, None]
        h = (h + self.text(prompt)[:, :, None, None]).transpose(1, 3)
        h = self.dense(F.silu(self.dense(h)))
        return self.last(h.transpose(1, 3))


@functools.cache
def network():
    """The program, hoisted, and its calibration."""
    torch.manual_seed(0)
    values = {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([5])}
    values["prompt"] = torch.randn(1, 8)
    program = capture(Net().eval(), values, timesteps=(9.0, 5.0, 1.0))
    program = run_passes(program, (Hoist(),))
    return program, calibrate(program, None, layer_values)


def layers():
    """The step's layers by module path; the dense one's first call."""
    program, _ = network()
    found = reversed(sites(program.part("full"), program.weights))
    return {module_path(site): site for site in found}


def lone(path, format):
    program, calibration = network()
    return lone_layer(program, program.part("full"), layers()[path], format, calibration)


def compiled(**options):
    program, calibration = network()
    return run_passes(program, (AutoBits(**options),), lambda _: calibration)


def probe():
    _, calibration = network()
    return calibration.probes["full"][1]


def formats(program):
    return {layer.name: layer.format for layer in program.layers}


def size(program):
    return sum(tensor.nbytes for tensor in program.weights.values())


@pytest.fixture
def modelled(monkeypatch):
    """No ONNX back end: the cost model's times."""
    monkeypatch.setattr(layer_cost, "measurable", lambda: "not here")


# a layer alone, and what it does to the output


def test_a_layer_alone_is_the_layer():
    program, _ = network()
    seen = []

    def visit(site, alive, number):
        assert torch.equal(lone(module_path(site), FLOAT)(alive), alive[site.name])
        seen.append((module_path(site), number))

    found = layers()
    walk(program.part("full").graph, program.weights, probe(), dict.fromkeys(found.values()), visit)
    assert seen == [("first", 0), ("second", 1), ("dense", 2), ("last", 3)]


def test_a_format_that_does_not_fit_a_layer_says_so():
    assert "groups of 48 do not fill rows of 64" in lone("dense", "int4/group48:none")


@pytest.mark.parametrize("path", ["first", "second", "last"])
@pytest.mark.parametrize("format", FORMATS)
def test_the_noise_of_one_layer_is_what_quantize_makes_of_it(path, format):
    program, calibration = network()
    part, site = program.part("full"), layers()[path]
    lones = {site: [lone(path, format)]}
    found = output_noise(program, part, lones, [probe()], Work(calibration=calibration))
    others = {name: FLOAT for name in (*layers(), "text")}
    pass_ = written(format, tuple((others | {path: format}).items()))
    changed = pass_.run(program, Work(calibration=calibration))
    truth, moved = results(program, part, probe()), results(changed, changed.part("full"), probe())
    assert found == {(site, format): pytest.approx(relative_noise(truth, moved), rel=1e-4)}
    assert found[site, format] > 1e-7


def test_the_noise_of_the_last_latent_is_that_of_sampling_with_the_layer():
    program, calibration = network()

    def sample(model):
        x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        for step in (9, 5, 1):
            given = {"timestep": torch.tensor([step]), "prompt": torch.ones(1, 8)}
            x = x - 0.1 * model(sample=x, **given)

    def run(current, watch):
        drive(current, sample, watch)

    work = Work(calibration=calibration, drive=run)
    site = layers()["second"]
    lones = {site: [lone("second", "w8a8")]}
    (found,) = latent_noise(program, program.part("full"), lones, work).values()
    only = tuple((name, FLOAT) for name in (*layers(), "text") if name != "second")
    changed = written("w8a8", only).run(program, Work(calibration=calibration))
    finals = [Finals("sample", 3) for _ in range(2)]
    for each, current in zip(finals, (program, changed), strict=True):
        run(current, each)
    assert found == pytest.approx(relative_noise(finals[0].last, finals[1].last), rel=1e-4)
    assert found > 0
    with pytest.raises(PassError, match="samples over a schedule"):
        latent_noise(program, program.part("full"), lones, Work(calibration=calibration))


def test_noise_that_is_not_finite_is_infinite():
    one = [torch.ones(2)]
    assert relative_noise(one, [torch.tensor([1.0, float("nan")])]) == float("inf")
    assert relative_noise([torch.zeros(2)], one) == float("inf")
    assert relative_noise(one, one) == 0.0
    assert relative_noise(one, [torch.tensor([1.0, 2.0])]) == 0.5


# costs


def test_calls_of_one_weight_are_one_group():
    program, _ = network()
    found = together(sites(program.part("full"), program.weights))
    paths = [tuple(module_path(site) for site in group) for group in found]
    assert paths == [("first",), ("second",), ("dense", "dense"), ("last",)]
    shared = shared_weights(program)
    assert {"text.weight", "text.bias"} <= shared
    assert not {f"{path}.{name}" for path in layers() for name in ("weight", "bias")} & shared


def test_bytes_count_a_weight_once_and_what_stays_not_at_all():
    low, real = lone("second", "w8a8"), lone("second", FLOAT)
    assert stored([real, real], set()) == 4 * (64 * 64 * 9 + 64)
    assert stored([real], {"second.bias"}) == 4 * 64 * 64 * 9
    assert 0.2 < stored([low], set()) / stored([real], set()) < 0.3


def test_a_layer_stays_in_float_where_low_bits_win_nothing():
    site = layers()["second"]
    lones = {site: {name: lone("second", name) for name in (FLOAT, *FORMATS)}}
    times = {(site, FLOAT): 1.0, (site, "w8a8"): 0.5, (site, "w4a8"): 1.0}
    for timed, left in ((True, [FLOAT, "w8a8"]), (False, [FLOAT, *FORMATS])):
        choices = Choices([(site,)], {site: dict(lones[site])}, frozenset(), times)
        log = Log()
        drop_losers(choices, timed, log)
        assert choices.formats((site,)) == left
        assert log.reasons == ({"auto_bits: w4a8": {"not faster than float": 1}} if timed else {})
    choices = Choices([(site,)], lones, set(lone("second", "w4a8").weights), times)
    big = {**lones[site], "w8a8": lones[site][FLOAT]}  # as large as float, and faster
    choices.lones[site] = big
    drop_losers(choices, False, Log())
    assert choices.formats((site,)) == [FLOAT, "w8a8", "w4a8"]


def test_layers_are_timed_once_for_each_shape():
    every = [lone(path, name) for path in ("second", "dense") for name in (FLOAT, "w8a8")]
    found = layer_cost.measure([*every, *every], lambda *_: None)
    assert set(found) == {layer_cost.signature(each) for each in every}
    assert len(found) == 4
    assert all(isinstance(each, float) and 0 < each < 1000 for each in found.values())


def test_a_format_without_a_form_in_onnx_says_so():
    (found,) = layer_cost.measure([lone("dense", "nvfp4")], lambda *_: None).values()
    assert isinstance(found, str) and "onnx" in found


def test_runs_in_turns_give_the_median():
    order = []

    def run(name, seconds):
        order.append(name)
        time.sleep(seconds)

    runs = [functools.partial(run, "a", 0.004), functools.partial(run, "b", 0.001)]
    slow, fast = layer_cost.in_turns(runs, 0.0)
    assert order == ["a", "b"] * (layer_cost.WARM_UP + layer_cost.LEAST_RUNS)
    assert slow > fast >= 1.0


def test_the_cost_model_likes_integers_where_there_is_arithmetic():
    found = layers()
    times = {name: layer_cost.predict(found["second"], name, 36864) for name in (FLOAT, "w8a8")}
    assert times["w8a8"] < times[FLOAT]
    assert layer_cost.predict(found["last"], "w8a8", 192) > layer_cost.predict(
        found["last"], FLOAT, 768
    )  # too small to win


# the pass


def test_without_a_budget_it_is_faster_and_as_faithful(modelled):
    result = compiled()
    record = result.records[-1]
    assert formats(result)["second"] in FORMATS and formats(result)["last"] == FLOAT
    first, chosen = (next(note for note in record.notes if words in note)
                     for words in ("w8a8 where it wins", "predicted, as chosen"))  # fmt: skip
    assert decibels_in(chosen) >= decibels_in(first) - 0.1
    assert any("cost model" in note for note in record.notes)


def decibels_in(note):
    return float(note.split(": ")[1].split(" dB")[0])


def test_predicted_and_measured_error_agree(modelled):
    notes = compiled(size_mb=0.07).records[-1].notes
    predicted, measured = (
        decibels_in(next(note for note in notes if note.startswith(f"{kind}, as chosen")))
        for kind in ("predicted", "measured")
    )
    assert predicted == pytest.approx(measured, abs=2.0)


@pytest.mark.parametrize("megabytes", [0.12, 0.06, 0.04])
def test_a_size_is_kept(modelled, megabytes):
    result = compiled(size_mb=megabytes)
    assert size(result) <= megabytes * 1e6
    assert result.layers and size(network()[0]) > 0.17e6


def test_a_size_that_cannot_be_had_says_the_best(modelled):
    with pytest.raises(
        PassError, match=r"auto_bits: size_mb=0.01: a budget of 0.010 MB cannot be "
    ):
        compiled(size_mb=0.01)


def test_the_error_falls_with_the_size(modelled):
    notes = [compiled(size_mb=each).records[-1].notes for each in (0.04, 0.08, 0.2)]
    found = [
        decibels_in(next(note for note in each if note.startswith("measured"))) for each in notes
    ]
    assert found == sorted(found) and found[0] < found[-1] - 3


def test_an_error_that_is_too_small_leaves_all_in_float(modelled):
    result = compiled(sqnr_db=190.0)
    assert {formats(result)[path] for path in layers()} == {FLOAT}


def test_a_step_in_onnx_runtime_is_measured_and_never_slower():
    notes = compiled(formats=("w8a8",)).records[-1].notes
    assert any(
        note.startswith("time of single layers measured in ONNX Runtime; a step") for note in notes
    )
    (measured,) = (note for note in notes if note.startswith("measured, as chosen"))
    low, real = (
        float(part.split()[-1])
        for part in measured.removesuffix(")").split(" ms (float in turns with it: ")
    )
    slower = any("all layers stay float" in note for note in notes)
    assert slower == (low > real)


def test_a_result_that_is_slower_as_a_whole_is_given_up():
    program, calibration = network()
    work = Work(calibration=calibration)
    job = Job(AutoBits(), program, program.part("full"), probe(), work)
    low = job.write({})
    assert FLOAT not in formats(low).values()
    assert formats(job.settle(low, (2.0, 1.0))) == formats(low)
    assert set(formats(job.settle(low, (1.0, 2.0))).values()) == {FLOAT}
    small = Job(AutoBits(size_mb=1.0), program, program.part("full"), probe(), work)
    assert formats(small.settle(low, (1.0, 2.0))) == formats(low)  # the size was asked for


def test_include_and_exclude(modelled):
    result = compiled(size_mb=0.12, exclude=("dense",))
    assert formats(result)["dense"] == FLOAT and formats(result)["second"] != FLOAT


def test_the_first_option_stands_in_where_a_format_is_missing():
    row = [Option(FLOAT, 0.0, 4, 1.0), Option("w8a8", 0.1, 1, 0.5)]
    assert uniform([row, row[:1]], "w8a8") == [1, 0]


BAD = {
    "two budgets": (dict(size_mb=1.0, sqnr_db=30.0), "one budget at most, not size_mb and sqnr_db"),
    "no size": (dict(size_mb=0.0), "size_mb=0.0: expected more than 0"),
    "no format": (dict(formats=()), "name at least one"),
    "unknown": (dict(formats=("w7a8",)), "w7a8"),
    "string": (dict(formats="w8a8"), "expected a sequence"),
    "sensitivity": (dict(sensitivity="outputs"), "did you mean 'output'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    options, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        AutoBits(**options)


def test_quantize_and_auto_bits_exclude_each_other():
    program, calibration = network()
    with pytest.raises(PassError, match="give AutoBits in Quantize's place"):
        run_passes(program, (Quantize(), AutoBits()), lambda _: calibration)
    with pytest.raises(PassError, match="auto_bits needs calibration"):
        run_passes(program, (AutoBits(),))


def test_the_program_is_left_alone(modelled):
    program, _ = network()
    before = evaluate(program.part("full").graph, program.weights, probe())
    compiled(size_mb=0.06)
    after = evaluate(program.part("full").graph, program.weights, probe())
    assert all(map(torch.equal, before, after))
