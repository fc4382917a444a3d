"""Prune by measured time: what is slow goes, equal structures are timed once, times are kept."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.capture import capture
from effuse.errors import PassError
from effuse.log import Log
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Prune, prune_budget, prune_time
from effuse.passes.base import Purpose, Work
from effuse.passes.prune_budget import Budget, met
from effuse.passes.prune_candidates import find_candidates
from effuse.passes.prune_time import measure, removal, structures
from effuse.passes.resume import Store

pytest.importorskip("onnxscript")
logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it


class Slow(nn.Module):
    """Few weights, much arithmetic."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x):
        h = x
        for _ in range(8):
            h = F.gelu(self.layer(h))
        return self.layer(h)


class Large(nn.Module):
    """Many weights, little arithmetic."""

    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(32, 32), nn.Parameter(torch.randn(512, 32))

    def forward(self, x):
        return self.layer(x) * self.table


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.slow, self.large, self.alike = Slow(), Large(), Large()

    def forward(self, sample, timestep):
        x = sample * torch.cos(timestep.float())[:, None, None]
        for each in (self.slow, self.large, self.alike):
            x = x + each(x)
        return x


@functools.cache
def network():
    torch.manual_seed(0)
    values = {"sample": torch.randn(1, 512, 32), "timestep": torch.full((1,), 3.0)}
    return run_passes(capture(Net().eval(), values), (Canonicalize(),))


@functools.cache
def spans():
    return tuple(find_candidates(network(), ("span",), Log()))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(prune_time, "SECONDS", 0.1)


REFERENCE = Purpose("reference")  # builds at once


def gone(purpose=REFERENCE, **options):
    passes = (Prune(by="magnitude", **options),)
    record = run_passes(network(), passes, purpose=purpose).records[-1]
    return [each["name"] for each in record.data["candidates"] if each["gone"]], record


def test_a_budget_of_time_takes_what_is_slow_and_one_of_weights_what_is_large():
    names, record = gone(Purpose("onnx"), milliseconds=0.4)
    assert "slow.layer" in names
    times = record.data["milliseconds"]
    assert times["measured"] > 0.4 and times["predicted"] > 0.4
    assert times["candidates"][0] > 2 * times["candidates"][1] == 2 * times["candidates"][2]
    assert record.data["measure"] == "milliseconds" and "as measured" in record.notes[0]
    names, _ = gone(parameters=0.4)
    assert names == ["large.layer"] or names == ["alike.layer"]


def test_what_is_built_alike_is_timed_once(monkeypatch):
    built, run = [], prune_time.step_run
    monkeypatch.setattr(prune_time, "step_run", lambda *args: built.append(1) or run(*args))
    kinds = structures(network().part("full"), spans())
    assert kinds[1] == kinds[2] != kinds[0]
    measure(network(), spans(), Work(purpose=REFERENCE))
    assert len(built) == 3  # the whole, and without each of two structures


def test_times_are_kept_and_told_before(tmp_path, monkeypatch):
    told = []
    work = Work(progress=lambda what, done, total: told.append(what), purpose=REFERENCE)
    first = measure(network(), spans(), work, Store(tmp_path))
    assert any(what.startswith("prune: times of 2 structures: about") for what in told)
    monkeypatch.setattr(prune_time, "step_run", None)
    assert measure(network(), spans(), Work(purpose=REFERENCE), Store(tmp_path)) == first
    elsewhere = Work(purpose=Purpose("onnx"))
    with pytest.raises(TypeError):
        measure(network(), spans(), elsewhere, Store(tmp_path))


def test_the_back_end_of_the_build_is_timed(monkeypatch):
    asked, run = [], prune_time.step_run
    monkeypatch.setattr(prune_time, "step_run", lambda *args: asked.append(args[4:]) or run(*args))
    passes = (Prune(milliseconds=0.3, by="magnitude"),)
    done = run_passes(network(), passes, purpose=REFERENCE)
    assert set(asked) == {("reference", None)}
    assert "slow.layer.weight" not in done.weights


class Wide(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, sample, timestep):
        x = sample * torch.cos(timestep.float())[:, None, None]
        return x + self.down(F.gelu(self.up(x)))


def test_of_atoms_all_but_one_go_to_be_timed():
    values = {"sample": torch.randn(1, 4, 8), "timestep": torch.full((1,), 3.0)}
    program = run_passes(capture(Wide().eval(), values), (Canonicalize(),))
    every = find_candidates(program, ("unit",), Log(), 4)
    kinds = structures(program.part("full"), every)
    assert len(set(kinds)) == 1 and len(removal(every, kinds, kinds[0])) == 3
    found = measure(program, every, Work(purpose=REFERENCE))
    assert len(set(found.each)) == 1 and found.step > 0


def test_more_goes_where_less_is_saved_than_predicted():
    sizes = (10, 10, 10, 70)
    budget = Budget(100, 20, sizes, lambda numbers: sum(sizes[n] for n in numbers),
                    lambda numbers: 0.007 * sum(sizes[n] for n in numbers))  # fmt: skip
    picked, share = met(budget, np.array([1.0, 2.0, 3.0, 9.0]), range(4))
    assert picked == [0, 1, 2] and share == pytest.approx(0.21)
    assert prune_budget.ROUNDS == 2


@pytest.mark.parametrize(
    ("purpose", "words"),
    [
        (Purpose("onnx", "cpu-arm64"), "target='cpu-arm64', and this is"),
        (Purpose("onnx", "cuda"), "build on that machine, or give a budget by flops"),
    ],
)
def test_a_target_elsewhere_is_refused(purpose, words, monkeypatch):
    monkeypatch.setattr(prune_time.platform, "machine", lambda: "x86_64")
    with pytest.raises(PassError, match=words):
        run_passes(network(), (Prune(milliseconds=0.2, by="magnitude"),), purpose=purpose)


def test_more_time_than_all_take_is_refused():
    with pytest.raises(PassError, match=r"milliseconds=0.999: without all 3 candidates"):
        gone(milliseconds=0.999)
