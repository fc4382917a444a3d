"""Random small nets × any sub-list of passes in legal order: they verify, and agree with eager."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effuse.backends.reference import session
from effuse.calibrate import calibrate, step_values
from effuse.capture import capture
from effuse.config import legal_order
from effuse.dump import dump
from effuse.graph import evaluate
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Quantize
from effuse.program import run_program
from effuse.rates import dependences
from effuse.serial import graph_from_json, graph_to_json
from effuse.verify import exact_bound, relative_error, verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (9.0, 7.0, 3.0, 1.0)
BATCH, WIDTH, SIDE = 2, 4, 4
BOUND = exact_bound(torch.float32)

# vectors are (batch, 4), images (batch, 4, 4, 4); `a` and `b` are two values of the kind, `v` a
# vector and `i` an image, `k` a small number, `n` the net with its weights

VECTORS = {
    "linear": lambda n, a, b, k: F.linear(a, n.matrices[k % 2], n.biases[k % 3 % 2]),
    "linear without bias": lambda n, a, b, k: F.linear(a, n.matrices[k % 2]),
    "silu": lambda n, a, b, k: F.silu(a),
    "add": lambda n, a, b, k: a + b,
    "multiply": lambda n, a, b, k: a * b.tanh(),
    "scale": lambda n, a, b, k: a * (1.0, 1, 0.5)[k % 3],
    "cat and chunk": lambda n, a, b, k: torch.cat([a, b], dim=1).chunk(2, dim=1)[k % 2],
    "cat and strided slice": lambda n, a, b, k: torch.cat([a, b], dim=1)[:, k % 2 :: 2],
    "reshape": lambda n, a, b, k: a.reshape(-1, 2, 2).transpose(1, 2).reshape(a.shape),
    "constant": lambda n, a, b, k: a + torch.arange(WIDTH) * 0.25,
    "weights": lambda n, a, b, k: a + n.biases[k % 2].sin() * n.biases[0],
    "mean": lambda n, a, b, k: a.mean(dim=1, keepdim=True).expand(a.shape),
    "rounds": lambda n, a, b, k: a.double().float(),
}

IMAGES = {
    "conv": lambda n, i, j, v, k: F.conv2d(i, n.kernels[k % 2], n.biases[k % 3 % 2], padding=1),
    "grouped conv": lambda n, i, j, v, k: F.conv2d(i, n.kernels[k % 2][:, :2], None, 1, 1, 1, 2),
    "linear": lambda n, i, j, v, k: F.linear(i, n.matrices[k % 2], n.biases[k % 2]),
    "group norm": lambda n, i, j, v, k: F.group_norm(i, 2, n.biases[0], n.biases[1]),
    "silu": lambda n, i, j, v, k: F.silu(i),
    "add": lambda n, i, j, v, k: i + j,
    "multiply": lambda n, i, j, v, k: i * j.tanh(),
    "shift": lambda n, i, j, v, k: i + v[:, :, None, None],
    "modulate": lambda n, i, j, v, k: i * (1 + v.tanh()[:, :, None, None]),
    "enlarge": lambda n, i, j, v, k: i + v[:, :, None, None].expand(-1, -1, SIDE, SIDE),
    "cat and split": lambda n, i, j, v, k: torch.cat([i, j], dim=1).split([2, 4, 2], dim=1)[1],
    "tokens": lambda n, i, j, v, k: i.flatten(2).transpose(1, 2).contiguous().mT.view(i.shape),
    "dropout": lambda n, i, j, v, k: F.dropout(i, 0.3, training=False).clone().contiguous(),
    "attention": lambda n, i, j, v, k: F.scaled_dot_product_attention(i, j, i),
    "whole": lambda n, i, j, v, k: i[:, :, :].to(torch.float32) / 1,
}


@dataclass(frozen=True)
class Step:
    """One op on earlier values, which are picked by numbers modulo how many there are."""

    image: bool
    op: str
    a: int
    b: int
    v: int
    k: int


class Net(nn.Module):
    """The net of a recipe; its last image and the picked values of any rate are returned."""

    def __init__(self, steps, returned):
        super().__init__()
        torch.manual_seed(0)
        self.steps, self.returned = steps, returned
        draw = torch.randn
        self.matrices = nn.ParameterList(draw(WIDTH, WIDTH) / 2 for _ in range(2))
        self.biases = nn.ParameterList(draw(WIDTH) for _ in range(2))
        self.kernels = nn.ParameterList(draw(WIDTH, WIDTH, 3, 3) / 6 for _ in range(2))

    def forward(self, sample, timestep, prompt):
        angles = timestep.float()[:, None] * torch.arange(1, WIDTH + 1) / WIDTH
        vectors, images = [angles.cos(), prompt], [sample]
        for step in self.steps:
            v = vectors[step.v % len(vectors)]
            pool, table = (images, IMAGES) if step.image else (vectors, VECTORS)
            a, b = pool[step.a % len(pool)], pool[step.b % len(pool)]
            given = (a, b, v, step.k) if step.image else (a, b, step.k)
            pool.append(table[step.op](self, *given))
        pool = vectors + images
        return images[-1], *(pool[number % len(pool)] for number in self.returned)


def steps_of(image):
    names = sorted(IMAGES if image else VECTORS)
    number = st.integers(0, 11)
    return st.builds(Step, st.just(image), st.sampled_from(names), *[number] * 4)


nets = st.builds(
    Net,
    st.lists(st.one_of(steps_of(True), steps_of(False)), min_size=1, max_size=9).map(tuple),
    st.lists(st.integers(0, 11), max_size=2).map(tuple),
)

chosen = st.lists(
    st.sampled_from([Canonicalize(), Hoist()]), unique_by=lambda each: each.name
)  # fmt: skip
schedules = st.sampled_from([TIMES, None])


def values(seed, batch=BATCH, time=7):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, WIDTH, SIDE, SIDE, generator=generator),
        "timestep": torch.full((batch,), time),
        "prompt": torch.randn(batch, WIDTH, generator=generator),
    }


def frozen(net):
    """ATen's linear folds sizes in another order for weights that take gradients."""
    return net.eval().requires_grad_(False)


def run(examples):
    return settings(
        deadline=None,
        max_examples=examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def eager(net, given):
    with torch.no_grad():
        return net(**given)


@run(60)
@given(nets, chosen, schedules)
def test_exact_passes_verify_and_agree_with_eager(net, passes, schedule):
    program = capture(frozen(net), values(0), timesteps=schedule)
    note(dump(program.parts[0].graph))
    result = run_passes(program, legal_order(passes))  # verified and measured after each
    for part in result.parts:
        note(f"# {part.name}\n{dump(part.graph)}")
    assert all(record.error <= BOUND for record in result.records)
    call = session(result)
    for seed, time in ((1, 9), (2, 1), (1, 3), (2, 9)):
        given = values(seed, time=time)
        assert relative_error(call(**given), eager(net, given)) <= BOUND
    if Hoist() in passes:
        assert Hoist().ensures(result) is None


@run(25)
@given(nets, schedules)
def test_canonicalize_is_idempotent_and_never_grows(net, schedule):
    program = capture(frozen(net), values(0), timesteps=schedule)
    once = run_passes(program, (Canonicalize(),))
    twice = run_passes(once, (Canonicalize(),))
    note(dump(once.parts[0].graph))
    assert dump(twice.parts[0].graph) == dump(once.parts[0].graph)
    assert twice.weights.keys() == once.weights.keys()
    assert len(once.parts[0].graph.nodes) <= len(program.parts[0].graph.nodes)
    split = run_passes(once, (Hoist(),))
    again = run_passes(split, (Canonicalize(),))
    assert again.records[-1].error <= BOUND


@run(25)
@given(nets, st.integers(0, 12))
def test_any_amount_of_fuel_leaves_a_right_program(net, fuel):
    program = capture(frozen(net), values(0), timesteps=TIMES)
    result = run_passes(program, (Canonicalize(), Hoist()), fuel=fuel)
    assert all(record.error <= BOUND for record in result.records)
    spent = sum(
        count
        for record in result.records
        for rule, count in record.rewrites.items()
        if rule != "dead"
    )
    assert spent <= fuel


@run(15)
@given(nets, st.sampled_from(["static", "dynamic"]), st.booleans(), chosen)
def test_quantize_verifies_on_any_net(net, activations, edges, passes):
    program = capture(frozen(net), values(0), timesteps=TIMES)
    exact = legal_order(passes)
    quantize = Quantize(activations=activations, edges=edges)
    result = run_passes(program, (*exact, quantize), lambda p: calibrate(p, None, step_values))
    verify(result)
    (*_, record) = result.records
    lossy = [layer for layer in result.layers if layer.format != "float"]
    assert record.rewrites.get("quantize", 0) == len(lossy)
    assert all(layer.sqnr_db >= quantize.min_sqnr_db for layer in lossy)
    assert all(layer.reason for layer in result.layers if layer.format == "float")
    if not lossy:
        assert record.error <= BOUND
    assert all(value.isfinite().all() for value in run_program(result, result.examples))


@run(25)
@given(nets, chosen)
def test_graphs_survive_json(net, passes):
    program = capture(frozen(net), values(0), timesteps=TIMES)
    result = run_passes(program, legal_order(passes))
    env = dict(result.examples) | {"step_index": torch.tensor([1])}
    for part in result.parts:
        back = graph_from_json(json.loads(json.dumps(graph_to_json(part.graph))))
        expected = evaluate(part.graph, result.weights, env)
        assert all(map(torch.equal, evaluate(back, result.weights, env), expected))
        env |= dict(zip(part.outputs, expected, strict=True))


@run(20)
@given(nets)
def test_a_value_changes_only_with_what_its_rate_says(net):
    """The binding-time analysis, against what really changes."""
    program = capture(frozen(net), values(0))
    (part,) = program.parts
    depends = dependences(part.graph, program.sources)

    def all_values(given):
        found = {}
        run_program(program, given, lambda _, node, value: found.update({node: value}))
        return {node: v for node, v in found.items() if isinstance(v, torch.Tensor)}

    base = all_values(values(0))
    for name, role in (("sample", "LATENT"), ("timestep", "TIMESTEP"), ("prompt", "PROMPT")):
        other = all_values(values(0) | {name: values(1, time=3)[name]})
        for node, value in base.items():
            if role not in str(depends[node].name):
                assert torch.equal(value, other[node])


@pytest.mark.parametrize("batch", [1, 3])
@run(12)
@given(nets)
def test_open_batches(batch, net):
    program = capture(frozen(net), values(0), dynamic={"batch": (1, 8)})
    result = run_passes(program, (Canonicalize(),))
    given = values(5, batch=batch)
    assert relative_error(run_program(result, given), eager(net, given)) <= BOUND
