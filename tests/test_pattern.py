"""The pattern core: rules rewrite, every non-match says why, reasons are counted, fuel stops."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.capture import capture
from effuse.dump import dump
from effuse.graph import calls, clone, evaluate, outputs
from effuse.log import Log
from effuse.pattern import Ops, Rule, match, rewrite, root

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Lambda(nn.Module):
    def __init__(self, function, *shapes):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) for shape in shapes)

    def forward(self, sample):
        return self.function(sample, *self.weights)


def graph_of(function, *shapes, sample=(2, 4)):
    torch.manual_seed(1)
    program = capture(Lambda(function, *shapes).eval(), {"sample": torch.randn(sample)})
    return clone(program.parts[0].graph)[0], program


def numbers(graph, program):
    return evaluate(graph, program.weights, program.examples)


# relu(x w' + b) -> clamp(addmm(b, x, w'), 0): the same numbers by other ops
LINEAR_RELU = Rule(
    name="linear-relu",
    doc="relu(x·wᵀ + b) = max(addmm(b, x, wᵀ), 0)",
    pattern=lambda op, x, w, b: op.relu(op.linear(x, w, b)),
    rewrite=lambda emit, x, w, b: emit(
        aten.clamp.default, emit(aten.addmm.default, b, x, emit(aten.t.default, w)), 0
    ),
    where=lambda x, w, b: None if b is not None else "the linear has no bias",
)

NORM_SILU = Rule(
    name="group-norm-silu",
    doc="silu(n) = n·sigmoid(n)",
    pattern=lambda op, x, groups, w, b, eps: op.silu(op.group_norm(x, groups, w, b, eps)),
    rewrite=lambda emit, x, groups, w, b, eps: _norm_silu(emit, x, groups, w, b, eps),
)


def _norm_silu(emit, x, groups, w, b, eps):
    norm = emit(aten.group_norm.default, x, groups, w, b, eps)
    return emit(aten.mul.Tensor, norm, emit(aten.sigmoid.default, norm))


def test_a_rule_rewrites_every_place_and_keeps_the_numbers():
    def net(x, w, b, v):
        return F.relu(F.linear(F.relu(F.linear(x, w, b)), v, b))

    graph, program = graph_of(net, (4, 4), (4,), (4, 4))
    log = Log()
    assert rewrite(graph, (LINEAR_RELU,), log) == 2
    graph.lint()
    assert calls(graph, aten.linear.default, aten.relu.default) == []
    assert len(calls(graph, aten.addmm.default, aten.clamp.default)) == 4
    assert torch.allclose(numbers(graph, program)[0], program.expected[0], rtol=1e-6, atol=1e-6)
    assert log.rewrites == {"linear-relu": 2}
    assert not log.reasons


def test_golden():
    def net(x, w, b):
        return F.silu(F.group_norm(x, 2, w, b))

    graph, program = graph_of(net, (4,), (4,), sample=(1, 4, 3))
    assert rewrite(graph, (NORM_SILU,), Log()) == 1
    assert dump(graph) == (
        "%0: float32[1x4x3] = input sample\n"
        "%1: float32[4] = weight weights.0\n"
        "%2: float32[4] = weight weights.1\n"
        "%3: float32[1x4x3] = aten.group_norm.default(%0, 2, %1, %2, 1e-05)\n"
        "%4: float32[1x4x3] = aten.sigmoid.default(%3)\n"
        "%5: float32[1x4x3] = aten.mul.Tensor(%3, %4)\n"
        "return [%5]\n"
    )
    assert torch.allclose(numbers(graph, program)[0], program.expected[0], rtol=1e-6, atol=1e-6)


def test_the_new_nodes_name_the_place_of_the_old():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act = nn.GroupNorm(2, 4), nn.SiLU()

        def forward(self, sample):
            return self.act(self.norm(sample))

    program = capture(Net().eval(), {"sample": torch.randn(1, 4, 3)})
    graph, _ = clone(program.parts[0].graph)
    rewrite(graph, (NORM_SILU,), Log())
    assert dump(graph).count("# act\n") == 3


REJECTS = {
    "other users": (
        lambda x, w, b: F.relu(y := F.linear(x, w, b)) + y, "the linear has other users",
    ),
    "also returned": (
        lambda x, w, b: (F.relu(y := F.linear(x, w, b)), y), "the linear has other users",
    ),
    "another op": (lambda x, w, b: F.relu(x.sin()), "aten.sin.default is not linear"),
    "no call": (lambda x, w, b: F.relu(x), "an operand is not a call of linear"),
    "where": (lambda x, w, b: F.relu(F.linear(x, w)), "the linear has no bias"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTS)
def test_a_reject_says_why_and_changes_nothing(name):
    net, reason = REJECTS[name]
    graph, _ = graph_of(net, (4, 4), (4,))
    before, log = dump(graph), Log()
    assert rewrite(graph, (LINEAR_RELU,), log) == 0
    assert dump(graph) == before
    assert dict(log.reasons) == {"linear-relu": {reason: 1}}
    assert not log.rewrites


def test_reasons_are_counted_by_rule():
    def net(x, w, b):
        y = F.linear(x, w, b)
        return F.relu(x.sin()) + F.relu(x.cos().sin()) + F.relu(y) + y

    log = Log()
    graph, _ = graph_of(net, (4, 4), (4,))
    never = Rule("never", "", lambda op, x: op.relu(x), None, where=lambda x: "not today")
    rewrite(graph, (LINEAR_RELU, never), log)
    assert log.reasons == {
        "linear-relu": {"aten.sin.default is not linear": 2, "the linear has other users": 1},
        "never": {"not today": 3},
    }


def test_reasons_hold_no_names_of_nodes():
    def net(x):
        return F.hardtanh(x.sin(), -1.0, 2.0) + x.add(x.cos())

    graph, _ = graph_of(net)
    hard = match(Ops().hardtanh(Ops().sin(root_name("x")), -1.0, 1.0), calls(graph)[1])
    assert not hard
    assert hard.reason == "2.0 is not 1.0"
    inner = calls(graph, aten.add.Tensor)[0]
    assert match(Ops().add(root_name("x"), 3), inner).reason == "a computed value is not 3"


def root_name(name):
    return root(Rule(name, "", lambda op, x: x, None))


SAME = Rule("double", "x + x = 2·x", lambda op, x: op.add(x, x), lambda emit, x: _double(emit, x))


def _double(emit, x):
    return emit(aten.mul.Tensor, x, 2.0)


def test_one_name_stands_for_one_value():
    graph, program = graph_of(lambda x: (x + x) + x.sin())
    log = Log()
    assert rewrite(graph, (SAME,), log) == 1
    assert log.reasons == {"double": {"x stands for two different values": 1}}
    assert torch.equal(numbers(graph, program)[0], program.expected[0])


TWO_CONVS = Rule(
    "convs",
    "two convolutions of one padding",
    lambda op, x, w, v, stride, pad: op.conv2d(
        op.conv2d(x, w, None, stride, pad), v, None, stride, pad
    ),
    lambda emit, x, **_: x,
)


def test_one_name_stands_for_equal_numbers():
    def net(x, w, v, same):
        x = F.conv2d(x, w, padding=1)
        return F.conv2d(x, v, padding=1 if same else 2)

    for same in (True, False):
        graph, _ = graph_of(
            lambda x, w, v, same=same: net(x, w, v, same), (2, 2, 3, 3), (2, 2, 3, 3),
            sample=(1, 2, 4, 4),
        )  # fmt: skip
        log = Log()
        assert rewrite(graph, (TWO_CONVS,), log) == int(same)
        assert same or log.reasons["convs"] == {
            "pad stands for two different values": 1,
            "an operand is not a call of conv2d": 1,  # the first one's own
        }


def test_missing_arguments_bind_none_and_a_match_says_what_it_covers():
    graph, _ = graph_of(lambda x, w: F.relu(F.linear(x, w)), (4, 4))
    linear, relu = calls(graph)
    found = match(root(LINEAR_RELU), relu)
    assert found
    assert found.bound["b"] is None
    assert found.nodes == (relu, linear)


def test_fuel_stops():
    def net(x, w, b):
        for _ in range(4):
            x = F.relu(F.linear(x, w, b))
        return x

    for fuel in range(6):
        graph, program = graph_of(net, (4, 4), (4,))
        log = Log(fuel)
        done = min(fuel, 4)
        assert rewrite(graph, (LINEAR_RELU,), log) == done
        assert len(calls(graph, aten.clamp.default)) == done
        assert log.fuel == fuel - done
        assert log.rewrites["linear-relu"] == done
        assert torch.allclose(numbers(graph, program)[0], program.expected[0], rtol=1e-5)


def test_what_a_rewrite_left_behind_counts_as_no_user():
    # sin(x)·2 → cos(x)·2, from left to right: the dead product must not keep the next from matching
    double = Rule(
        "sin-to-cos",
        "",
        lambda op, x: op.neg(op.neg(op.sin(x))),
        lambda emit, x: emit(aten.neg.default, emit(aten.sin.default, x)),
    )
    graph, _ = graph_of(lambda x: x.sin().neg().neg().neg().neg())
    assert rewrite(graph, (double,), Log()) == 3
    assert [str(node.target) for node in calls(graph)] == ["aten.sin.default", "aten.neg.default"]
    assert rewrite(graph, (double,), Log()) == 0


def test_a_dead_operand_keeps_no_later_place_from_matching():
    drop = Rule("drop", "", lambda op, a, b: op.add(op.sin(a), b), lambda emit, a, b: b)

    def net(x):
        y = x.sin()
        return y.sin() + x, y + x  # once the first sum is gone, y is read by the second alone

    graph, _ = graph_of(net)
    assert rewrite(graph, (drop,), Log()) == 2
    assert calls(graph) == []


@pytest.mark.filterwarnings("error")
def test_a_shared_operand_is_removed_once():
    square = Rule("square", "", lambda op, x: op.mul(op.sin(x), op.sin(x)), lambda emit, x: x)
    graph, _ = graph_of(lambda x: (y := x.sin()) * y)
    assert rewrite(graph, (square,), Log()) == 1
    assert calls(graph) == []
    assert outputs(graph)[0].op == "placeholder"


def test_an_unknown_op_in_a_pattern_is_named():
    with pytest.raises(AttributeError, match="neither aten nor effuse has an op 'linaer'"):
        getattr(Ops(), "linaer")  # noqa: B009
