"""Graphs as JSON: the same text and numbers come back, and nothing outside the allow-list does."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from effuse.calibrate import calibrate, step_values
from effuse.capture import capture
from effuse.dump import dump
from effuse.errors import ArtifactError
from effuse.graph import evaluate, set_outputs
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Quantize
from effuse.program import run_program
from effuse.serial import graph_from_json, graph_to_json

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Net(nn.Module):
    """Lists, types, devices, words, infinities, tuples of outputs, open sizes."""

    def __init__(self):
        super().__init__()
        self.inp, self.mid = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(2, 4), nn.Linear(4, 4)
        self.out = nn.Conv2d(4, 2, 1)

    def forward(self, sample, timestep, prompt):
        angles = timestep.double()[:, None] * torch.arange(4, device="cpu") / 3.0
        h = self.inp(sample) + self.time(angles.cos().float())[:, :, None, None]
        h = F.gelu(self.mid(F.silu(self.norm(h))), approximate="tanh")
        one, other = h.chunk(2, dim=1)
        h = torch.cat([other.clamp(max=math.inf), one], dim=1) + prompt[:, :, None, None]
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        tokens = h.flatten(2).masked_fill(~mask[0, 0], -math.inf)
        return self.out(tokens.reshape(h.shape)), tokens.mean()


def program_of(dynamic=None):
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 2, 4, 4), "timestep": torch.tensor([7, 7])}
    values["prompt"] = torch.randn(2, 4)
    times = (9.0, 7.0, 1.0)
    return capture(Net().eval(), values, timesteps=times, dynamic=dynamic)


def there_and_back(graph):
    text = json.dumps(graph_to_json(graph), sort_keys=True)
    back = graph_from_json(json.loads(text))
    back.lint()
    assert json.dumps(graph_to_json(back), sort_keys=True) == text
    return back


def text_of(graph, types):
    """The dump with the types of another graph: JSON keeps no recorded values."""
    for node, other in zip(graph.nodes, types.nodes, strict=True):
        node.meta = dict(other.meta)
    return dump(graph)


PASSES = {
    "captured": (),
    "hoisted": (Canonicalize(), Hoist()),
    "static": (Canonicalize(), Hoist(), Quantize()),
    "dynamic": (Canonicalize(), Hoist(), Quantize(activations="dynamic")),
}


@pytest.mark.parametrize("name", PASSES)
def test_round_trip(name):
    result = run_passes(program_of(), PASSES[name], lambda p: calibrate(p, None, step_values))
    env = dict(result.examples) | {"step_index": torch.tensor([1])}
    for part in result.parts:
        back = there_and_back(part.graph)
        expected = evaluate(part.graph, result.weights, env)
        found = evaluate(back, result.weights, env)
        assert all(map(torch.equal, found, expected))
        env |= dict(zip(part.outputs, expected, strict=True))
        assert text_of(back, part.graph) == dump(part.graph)


def test_round_trip_with_open_sizes():
    program = program_of(dynamic={"batch": (1, 8), "height": (4, 32), "width": (4, 32)})
    (part,) = program.parts
    back = there_and_back(part.graph)
    assert text_of(back, part.graph) == dump(part.graph)
    values = {"sample": torch.randn(3, 2, 6, 8), "timestep": torch.tensor([1, 1, 1])}
    values["prompt"] = torch.randn(3, 4)
    expected = run_program(program, values)
    assert all(map(torch.equal, evaluate(back, program.weights, values), expected))


def one_call(target, args=(), kwargs=None, op="call_function"):
    return [
        {"op": "placeholder", "target": "x", "args": [], "kwargs": {}},
        {"op": op, "target": target, "args": list(args), "kwargs": kwargs or {}},
        {"op": "output", "target": "output", "args": [[{"node": 1}]], "kwargs": {}},
    ]


def test_the_hand_written_form_is_read():
    graph = graph_from_json(one_call("aten.add.Tensor", [{"node": 0}, {"float": "0x1.8p+1"}]))
    (found,) = evaluate(graph, {}, {"x": torch.tensor([1.0])})
    assert found.item() == 4.0
    graph = graph_from_json(one_call("operator.mul", [{"node": 0}, 3]))
    assert evaluate(graph, {}, {"x": 4}) == (12,)


FORBIDDEN = [
    "os.system", "builtins.eval", "operator.attrgetter", "operator.setitem",
    "operator.methodcaller", "torch.load", "aten.add", "aten", "",
    "profiler._record_function_enter_new.default",
    # reachable by name under torch.ops, but no functions of tensors
    "aten.add.overloads", "aten.add.__class__", "aten.add.op", "aten.name.upper",
    "aten.__class__.mro", "aten.__init__.__globals__",
    # ops that do something else than compute
    "aten.save.default", "aten.from_file.default", "aten.warn.default", "aten.manual_seed.default",
    "aten.wait.default", "aten.add_.Tensor", "aten.add.out", "aten.set_.source_Tensor",
]  # fmt: skip


@pytest.mark.parametrize("target", FORBIDDEN)
def test_an_op_outside_the_allow_list_is_refused(target):
    with pytest.raises(ArtifactError, match="is not one that an artifact may call"):
        graph_from_json(one_call(target, [{"node": 0}]))


def test_an_op_that_this_torch_lacks_is_refused():
    for target in ("aten.no_such_op.default", "aten.add.no_such_overload", "effuse.none.default"):
        with pytest.raises(ArtifactError, match="is unknown here; update torch or effuse"):
            graph_from_json(one_call(target))


@pytest.mark.parametrize("op", ["call_module", "call_method", "root", "anything"])
def test_only_calls_of_functions_are_made(op):
    """Whatever a node claims to be, its target goes through the allow-list."""
    with pytest.raises(ArtifactError):
        graph_from_json(one_call("forward", op=op))


def test_types_are_looked_up_and_nothing_else():
    for name in ("save", "load", "ops", "nn", "Tensor", "not a device", "hub.load"):
        with pytest.raises(ArtifactError, match="is no type, layout or device of torch"):
            graph_from_json(one_call("aten.to.dtype", [{"node": 0}, {"torch": name}]))


def test_a_graph_with_a_foreign_call_is_not_written():
    graph = fx.Graph()
    node = graph.placeholder("x")
    set_outputs(graph, [graph.call_function(print, (node,))])
    with pytest.raises(ArtifactError, match="cannot hold a call of <built-in function print>"):
        graph_to_json(graph)


@pytest.mark.parametrize(
    "value",
    [0.1, 1e-300, -0.0, math.inf, -math.inf, 1, True, None, "tanh", [1, [2.5, None]], [],
     torch.float16, torch.bool, torch.device("cpu"), torch.strided, torch.channels_last],
    ids=str,
)  # fmt: skip
def test_arguments_come_back_as_they_are(value):
    graph = fx.Graph()
    node = graph.placeholder("x")
    call = graph.call_function(aten.add.Tensor, (node, value), {"alpha": value})
    set_outputs(graph, [call])
    back = next(each for each in there_and_back(graph).nodes if each.op == "call_function")
    for found in (back.args[1], back.kwargs["alpha"]):
        assert repr(found) == repr(value)
        assert isinstance(found, type(value))


def test_nan_comes_back():
    graph = fx.Graph()
    call = graph.call_function(aten.add.Tensor, (graph.placeholder("x"), math.nan))
    set_outputs(graph, [call])
    (found,) = (each for each in there_and_back(graph).nodes if each.op == "call_function")
    assert math.isnan(found.args[1])
