"""Masks learned over a trajectory: gradients step by step, what is needed, what is not."""

from __future__ import annotations

import functools
import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effuse.capture import capture
from effuse.distill_data import ddim, sampler
from effuse.distill_masks import (
    Gate,
    MaskRecipe,
    Trajectory,
    hard_concrete,
    learn_masks,
    settled,
    spread,
)
from effuse.distill_network import Network
from effuse.errors import CalibrationError, ConfigError
from effuse.graph import calls

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten
TIMES = (3.0, 2.0, 1.0)
STEP = ddim([0.3, 0.6, 0.9])
few = settings(deadline=None, max_examples=30)


class Net(nn.Module):
    """Attention in two heads and four hidden units; the second head and the last units are idle."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(3, 8), nn.Linear(8, 3)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down = nn.Linear(8, 4), nn.Linear(4, 8)
        self.time = nn.Linear(1, 8)
        with torch.no_grad():
            self.out.weight.mul_(2)
            self.out.weight[:, 4:] = 0
            self.down.weight[:, 2:] = 0

    def forward(self, sample, timestep):
        x = self.enter(sample) + self.time(timestep[:, None].float())[:, None]
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return self.leave(x + self.down(F.gelu(self.up(x))))


def values(seed=0):
    random = torch.Generator().manual_seed(seed)
    return {"sample": torch.randn(2, 5, 3, generator=random), "timestep": torch.full((2,), 3.0)}


@functools.cache
def network():
    return Network(capture(Net().eval(), values(), timesteps=TIMES))


def gates():
    graph = network().full.graph
    heads = calls(graph, aten.scaled_dot_product_attention.default)[0]
    units = calls(graph, aten.gelu.default)[0]
    return Gate(heads.name, 1, 2), Gate(units.name, -1, 4)


def run():
    return Trajectory(network(), gates(), TIMES, STEP)


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_gradients_step_by_step_are_those_of_the_whole_graph(seed):
    random = torch.Generator().manual_seed(seed)
    scales = [torch.rand(gate.groups, generator=random) for gate in gates()]
    target = torch.randn(2, 5, 3, generator=random)
    loss, found = run().gradients(values(seed), scales, target)

    leaves = [each.clone().requires_grad_() for each in scales]
    latent, trajectory = values(seed)["sample"], run()
    for index in range(len(TIMES)):
        latent = trajectory.move(values(seed), latent, leaves, index)
    whole = (latent - target).square().mean()
    expected = torch.autograd.grad(whole, leaves)
    assert loss == pytest.approx(whole.item())
    assert all(each.abs().max() > 0 for each in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


class Kept:
    """A tensor that autograd keeps for backward; counts how many there are at most."""

    live = most = 0

    def __init__(self, value):
        self.value = value
        Kept.live += 1
        Kept.most = max(Kept.most, Kept.live)

    def __del__(self):
        Kept.live -= 1


def most_kept(count, compute):
    """The most tensors kept at a time, over `count` steps of a trajectory."""
    steps = [3.0 - index / 10 for index in range(count)]
    trajectory = Trajectory(network(), gates(), steps, sampler(None, steps))
    leaves = [torch.ones(gate.groups, requires_grad=True) for gate in gates()]
    Kept.live = Kept.most = 0
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
        compute(trajectory, leaves)
    return Kept.most


def stepwise(trajectory, leaves):
    trajectory.gradients(values(), leaves, torch.zeros(2, 5, 3))


def whole(trajectory, leaves):
    latent = values()["sample"]
    for index in range(len(trajectory.times)):
        latent = trajectory.move(values(), latent, leaves, index)
    torch.autograd.grad(latent.square().mean(), leaves)


def test_memory_is_that_of_one_step():
    assert most_kept(12, stepwise) == most_kept(2, stepwise) > 0
    assert most_kept(12, whole) > 5 * most_kept(2, stepwise)


def test_a_gate_by_positions_is_that_of_the_runs():
    units = gates()[1]
    scales = torch.tensor([0.5, 0.0])
    one, other = (
        Trajectory(network(), (gate,), TIMES, STEP).latents(values(), [scales])[-1]
        for gate in (Gate(units.node, -1, 2), Gate(units.node, -1, 2, (0, 0, 1, 1)))
    )
    assert torch.equal(one, other)
    spared = Gate(units.node, -1, 2, (1, -1, 0, 0))
    value = torch.ones(2, 5, 4)
    assert spread(scales, value, spared).flatten().tolist() == [0, 1, 0.5, 0.5]


def test_open_gates_change_nothing_and_closed_ones_remove():
    open_gates = run().latents(values(), [torch.ones(2), torch.ones(4)])
    assert all(map(torch.equal, open_gates, run().latents(values())))
    eager = Net().eval()
    with torch.no_grad():
        eager.out.weight[:, :4] = 0
        eager.down.weight[:, 1] = 0
    pruned = Network(capture(eager, values(), timesteps=TIMES))
    expected = Trajectory(pruned, (), TIMES, STEP).latents(values())
    closed = [torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0, 1.0, 1.0])]
    for one, other in zip(run().latents(values(), closed), expected, strict=True):
        torch.testing.assert_close(one, other)


# ---- masks ---------------------------------------------------------------------------------------


@few
@given(st.floats(-6, 6), st.floats(0, 1))
def test_hard_concrete_is_the_papers(logit, u):
    noise = math.log(u + 0.5) - math.log(1 - u + 0.5)
    soft = 1 / (1 + math.exp(-(noise + logit) / 0.83)) * 1.2 - 0.1
    found = float(hard_concrete(torch.tensor(logit), torch.tensor(u)))
    assert found == pytest.approx(min(1, max(0, soft)), abs=1e-5)


def test_gates_start_open_and_close():
    assert settled(torch.tensor([3.0, -3.0])).tolist() == [1, 0]


def test_what_the_picture_does_not_need_closes_first():
    seen = []
    recipe = MaskRecipe(steps=60, batch=2, beta=0.02)
    samples = [values(seed) for seed in range(4)]
    heads, units = learn_masks(
        network(), gates(), samples, TIMES, STEP, recipe, lambda *told: seen.append(told)
    ).values()
    assert heads[0] > heads[1] + 0.5
    assert units[:2].min() > units[2:].max()
    assert [told[0] for told in seen] == list(range(1, 61)) and seen[-1][2] < seen[0][2]


def test_masks_follow_from_the_seed():
    once, again, other = (
        learn_masks(network(), gates(), [values()], TIMES, STEP, MaskRecipe(steps=25, seed=seed))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(once[gate], again[gate]) for gate in gates())
    assert not torch.equal(once[gates()[0]], other[gates()[0]])


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (Gate("nowhere", 0, 1), "no node 'nowhere'"),
        (Gate("gelu", 7, 1), "no axis 7"),
        (Gate("gelu", -1, 3), "3 groups do not divide axis -1 of size 4"),
        (Gate("gelu", -1, 0), "0 groups do not divide"),
        (Gate("gelu", -1, 2, (0, 1)), "for each of 4 positions; came 2"),
        (Gate("gelu", -1, 2, (0, 1, 2, 0)), "from 0 to 2"),
    ],
)
def test_gates_that_do_not_fit(gate, words):
    with pytest.raises(ConfigError, match=words):
        learn_masks(network(), [gate], [values()], TIMES, STEP)


def test_nothing_to_learn_from():
    with pytest.raises(CalibrationError, match="at least one of each"):
        learn_masks(network(), gates(), [], TIMES, STEP)
    bad = {**values(), "sample": torch.full((2, 5, 3), math.inf)}
    with pytest.raises(CalibrationError, match="expected a finite last latent"):
        learn_masks(network(), gates(), [bad], TIMES, STEP)
