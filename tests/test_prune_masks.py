"""Prune by masks: what a picture does not need gets the lowest score, and goes."""

from __future__ import annotations

import functools
import logging

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.calibrate import drive
from effuse.capture import capture
from effuse.errors import PassError
from effuse.graph import evaluate
from effuse.log import Log
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Prune, prune_masks
from effuse.passes.base import Purpose
from effuse.passes.prune_candidates import find_candidates, find_sites, group_of, grouped
from effuse.passes.prune_masks import gates_of
from effuse.verify import exact_bound, relative_error

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (900.0, 500.0, 100.0)


class Net(nn.Module):
    """Attention in two heads and four hidden units; the second head and the last units are idle."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 3)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 4), nn.Linear(4, 8)
        with torch.no_grad():
            self.out.weight.mul_(2)
            self.out.weight[:, 4:] = 0
            self.down.weight.mul_(2)
            self.down.weight[:, [0, 2]] = 0

    def forward(self, sample, timestep):
        x = self.enter(sample) + torch.cos(timestep.float())[:, None, None]
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return self.leave(x + self.down(F.gelu(self.up(x))))


def captured(model, times=TIMES):
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 5, 3), "timestep": torch.full((2,), 500.0)}
    return run_passes(capture(model.eval(), values, timesteps=times), (Canonicalize(),))


@functools.cache
def network():
    torch.manual_seed(1)
    return captured(Net())


def sample(program, watch):
    drive(program, None, watch)


def run(program=None, **options):
    options = {"by": "masks", "calls": 2, "updates": 60, "what": ("head", "unit"), **options}
    return run_passes(program or network(), (Prune(**options),), drive=sample)


def outputs(program):
    graph = program.part("full").graph
    return evaluate(graph, program.weights, program.examples)


def test_what_does_nothing_gets_the_lowest_score_and_goes():
    done = run(parameters=0.38, groups=2)
    heads, units = (
        [each for each in done.records[-1].data["candidates"] if each["kind"] == kind]
        for kind in ("head", "unit")
    )
    assert [each["gone"] for each in heads] == [False, True]
    assert heads[1]["score"] < heads[0]["score"] - 0.05
    assert [each["gone"] for each in units] == [True, False]  # the lowest masks come first
    assert units[0]["score"] < units[1]["score"] - 0.05
    assert relative_error(outputs(done), outputs(network())) <= exact_bound(torch.float32)
    assert done.weights["down.weight"].shape == (8, 2)


def test_masks_are_kept(tmp_path, monkeypatch):
    first = run(parameters=0.1, resume=str(tmp_path), updates=5)
    monkeypatch.setattr(prune_masks, "learn_masks", None)
    assert run(parameters=0.1, resume=str(tmp_path), updates=5).records == first.records
    with pytest.raises(TypeError):
        run(parameters=0.1, resume=str(tmp_path), updates=6)


def test_the_schedule_decides_the_sampler(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    for schedule in (None, scheduler):
        run_passes(
            network(),
            (Prune(parameters=0.1, by="masks", what="unit", updates=1, resume=str(tmp_path)),),
            drive=sample, purpose=Purpose(schedule=schedule),
        )  # fmt: skip
    assert len(list(tmp_path.iterdir())) == 2


def test_what_it_takes_is_told_before():
    told = []
    run_passes(
        network(), (Prune(parameters=0.1, by="masks", what="head", updates=2, calls=1),),
        drive=sample, progress=lambda what, done, total: told.append(what),
    )  # fmt: skip
    (about,) = [what for what in told if "forwards" in what]
    assert about.startswith("prune: 2 updates of 1 masks over 3 steps: about 27 forwards of ")
    assert told.index(about) < told.index("prune: masks")


class Split(nn.Module):
    """Two layers read the units, one of them among other values."""

    def __init__(self):
        super().__init__()
        self.up, self.beside = nn.Linear(3, 4), nn.Linear(3, 2)
        self.one, self.other = nn.Linear(4, 3), nn.Linear(6, 3)

    def forward(self, sample, timestep):
        x = sample * torch.cos(timestep.float())[:, None, None]
        h = F.gelu(self.up(x))
        return x + self.one(h) + self.other(torch.cat([self.beside(x), -h], -1))


def test_gates_are_where_layers_read():
    program = captured(Split())
    sites = {site.count: site for site in find_sites(program, ("unit",), Log())}
    gates = gates_of(program.part("full"), sites[4])
    assert {gate.atoms for gate in gates} == {(0, 1, 2, 3), (-1, -1, 0, 1, 2, 3)}
    (beside,) = gates_of(program.part("full"), sites[2])
    assert beside.atoms == (0, 1, -1, -1, -1, -1)


def test_groups_hold_what_ranks_alike():
    site = find_sites(network(), ("unit",), Log())[0]
    numbers = group_of(np.array([0.3, 0.1, 0.9, 0.2]), 2)
    assert numbers.tolist() == [1, 0, 1, 0]
    labels = set(grouped(site, numbers).labels.values())
    assert labels == {(1, 0, 1, 0)}
    assert len(find_candidates(network(), ("unit",), Log(), 2)) == 2


def test_masks_need_a_schedule_and_its_first_step():
    with pytest.raises(PassError, match="which needs the timesteps"):
        run(captured(Net(), None), parameters=0.1)

    def late(program, watch):
        values = dict(program.examples)
        watch.begin({**values, "timestep": torch.full((2,), 100.0)}, 2)

    with pytest.raises(PassError, match="none of its calls was at the schedule's first step"):
        run_passes(network(), (Prune(parameters=0.1, by="masks", what="head"),), drive=late)
