"""Canonicalize: golden before and after, a reject for each rule, equal numbers, idempotence."""

from __future__ import annotations

import logging
import operator
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.capture import capture
from effuse.dump import dump
from effuse.errors import VerifyError
from effuse.graph import calls, clone, eliminate, emit, outputs, set_outputs
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize
from effuse.passes.base import Work
from effuse.passes.canonicalize import FOLD_LIMIT
from effuse.plan import Depends
from effuse.program import Part, run_program
from effuse.verify import compare, exact_bound, relative_error, verify

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


def captured(function, *shapes, sample=(2, 4), dtype=torch.float32, **options):
    torch.manual_seed(1)
    values = {"sample": torch.randn(sample).to(dtype)}
    return capture(Lambda(function, *shapes).eval(), values, **options)


def canonicalized(function, *shapes, **options):
    """The result, verified, and held to eager's numbers by the manager."""
    program = captured(function, *shapes, **options)
    result = run_passes(program, (Canonicalize(),))
    assert result.records[0].error == 0.0
    return result


def targets(program):
    return [str(node.target).removeprefix("aten.") for node in calls(program.parts[0].graph)]


def edited(program, target, *args):
    """The program with its first output sent through another call; not to be compared to eager."""
    (full,) = program.parts
    graph, _ = clone(full.graph)
    first, *rest = outputs(graph)
    with graph.inserting_before(graph.output_node()):
        set_outputs(graph, [emit(graph, target, first, *args), *rest])
    return replace(program, parts=(replace(full, graph=graph),), expected=None)


def everything(x, w, b):
    x = F.dropout(x, 0.5, training=False).to(torch.float32)
    x = x.view(2, 4).clone() * 1.0
    table = torch.arange(4) * 0.5  # constant
    y = F.linear(x, w, b) + table
    z = F.linear(x, w, b) / 1
    torch._assert(x.shape[0] == 2, "two")
    unread = x.sin()  # noqa: F841
    return (y + z).expand(2, 4).reshape(2, 2, 2)[:, :, :]


BEFORE = """\
%0: float32[2x4] = input sample
%1: float32[4x4] = weight weights.0
%2: float32[4] = weight weights.1
%3: float32[2x4] = aten.dropout.default(%0, 0.5, False)
%4: float32[2x4] = aten.to.dtype(%3, float32)
%5: float32[2x4] = aten.view.default(%4, [2, 4])
%6: float32[2x4] = aten.clone.default(%5)
%7: float32[2x4] = aten.mul.Tensor(%6, 1.0)
%8: int64[4] = aten.arange.default(4, device=cpu, pin_memory=False)
%9: float32[4] = aten.mul.Tensor(%8, 0.5)
%10: float32[2x4] = aten.linear.default(%7, %1, %2)
%11: float32[2x4] = aten.add.Tensor(%10, %9)
%12: float32[2x4] = aten.linear.default(%7, %1, %2)
%13: float32[2x4] = aten.div.Tensor(%12, 1)
%14: float32[2x4] = aten.add.Tensor(%11, %13)
%15: float32[2x4] = aten.expand.default(%14, [2, 4])
%16: float32[2x2x2] = aten.reshape.default(%15, [2, 2, 2])
%17: float32[2x2x2] = aten.alias.default(%16)
return [%17]
"""

AFTER = """\
%0: float32[2x4] = input sample
%1: float32[4x4] = weight weights.0
%2: float32[4] = weight weights.1
%3: float32[4] = weight folded.mul_1
%4: float32[2x4] = aten.linear.default(%0, %1, %2)
%5: float32[2x4] = aten.add.Tensor(%4, %3)
%6: float32[2x4] = aten.add.Tensor(%5, %4)
%7: float32[2x2x2] = aten.reshape.default(%6, [2, 2, 2])
return [%7]
"""


def test_golden():
    program = captured(everything, (4, 4), (4,))
    assert dump(program.parts[0].graph) == BEFORE
    result = run_passes(program, (Canonicalize(),))
    assert dump(result.parts[0].graph) == AFTER
    assert dump(program.parts[0].graph) == BEFORE
    (record,) = result.records
    assert record.error == 0.0
    assert set(result.weights) == {"weights.0", "weights.1", "folded.mul_1"}
    assert torch.equal(result.weights["folded.mul_1"], torch.arange(4) * 0.5)
    rules = {"cast", "constant", "dead", "duplicate", "identity", "reshaped", "unit", "view"}
    assert set(record.rewrites) == rules


def test_idempotent():
    once = run_passes(captured(everything, (4, 4), (4,)), (Canonicalize(),))
    twice = run_passes(once, (Canonicalize(),))
    assert dump(twice.parts[0].graph) == AFTER
    assert twice.records[1].rewrites == {}
    assert twice.weights.keys() == once.weights.keys()


@pytest.mark.parametrize("join", [torch.concat, torch.concatenate])
def test_concatenations_have_one_name(join):
    program = canonicalized(lambda x: join([x, x.sin()], 1))
    assert targets(program).count("cat.default") == 1


KEPT = {
    "a cast to another type": (lambda x: x.to(torch.float64).to(torch.float32), 2, "to.dtype"),
    "a reshape to another shape": (lambda x: x.view(4, 2), 1, "reshape.default"),
    "a slice of a part": (lambda x: x[1:], 1, "slice.Tensor"),
    "an expand that enlarges": (lambda x: x.expand(3, 2, 4), 1, "expand.default"),
    "a factor that is not one": (lambda x: x * 1.5, 1, "mul.Tensor"),
    "a divided integer": (lambda x: x.to(torch.int64) / 1, 1, "div.Tensor"),
    "a factor that is a tensor": (lambda x: x * x.sum(), 1, "mul.Tensor"),
    "calls on other arguments": (lambda x: x.sin() + x.cos().sin(), 2, "sin.default"),
    "calls with other numbers": (
        lambda x: x.abs().pow(2) + x.abs().pow(2.5),
        2,
        "pow.Tensor_Scalar",
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_says_something_stays(name):
    net, count, target = KEPT[name]
    assert targets(canonicalized(net)).count(target) == count


DROPPED = {
    "dropout of channels": lambda x: F.dropout2d(x[None, :, :, None], training=False)[0, ..., 0],
    "alpha dropout": lambda x: F.alpha_dropout(x, training=False),
    "detach": lambda x: x.detach(),
    "a no-op cast": lambda x: x.float(),
    "type_as": lambda x: x.type_as(x),
    "a clone in another layout": lambda x: x.t().clone(memory_format=torch.contiguous_format).t(),
}


@pytest.mark.parametrize("name", DROPPED)
def test_what_says_nothing_goes(name):
    left = targets(canonicalized(lambda x: DROPPED[name](x.sin()).cos()))
    kept = ("sin", "cos", "t.", "slice", "unsqueeze", "select", "squeeze")
    assert [each for each in left if not each.startswith(kept)] == []


def test_a_dropout_that_drops_is_refused():
    program = edited(captured(lambda x: x.sin()), aten.dropout.default, 0.5, True)
    with pytest.raises(VerifyError, match="dropout_default is still there"):
        run_passes(program, (Canonicalize(),))


def test_random_calls_are_neither_merged_nor_folded():
    program = captured(lambda x: x.sin())
    for _ in range(2):
        program = edited(program, aten.rand_like.default)
    (full,) = program.parts
    graph, _ = clone(full.graph)
    with graph.inserting_before(graph.output_node()):
        drawn = [emit(graph, aten.randn.default, [3]) for _ in range(2)]
        ones = emit(graph, aten.ones.default, [3])
    set_outputs(graph, (*outputs(graph), *drawn, ones))
    full = replace(full, graph=graph, outputs=("output_0", "one", "other", "ones"))
    result = run_passes(replace(program, parts=(full,)), (Canonicalize(),))
    assert targets(result).count("randn.default") == 2
    assert targets(result).count("rand_like.default") == 2
    assert targets(result).count("ones.default") == 0


def test_strides_are_kept_where_an_op_reads_them():
    def rotary(x):
        pairs = x.reshape(2, 2, 2).transpose(1, 2).contiguous()
        return torch.view_as_real(torch.view_as_complex(pairs)).clone()

    assert "contiguous.default" in targets(canonicalized(rotary))


@pytest.mark.parametrize(
    ("moved", "then", "kept"),
    [
        (lambda x: x.movedim(-1, 1), F.conv3d, True),  # norms and convolutions go by strides
        (lambda x: x.movedim(-1, 1), lambda x, w: x.view(2, -1) + w.sum(), False),
        (lambda x: x[:, :, 1:], F.conv3d, False),  # the channels are first
    ],
)
def test_a_video_is_laid_out_anew_where_its_channels_were_last(moved, then, kept):
    def function(sample, weight):
        return then(moved(sample).contiguous(), weight)

    program = canonicalized(function, (7, 6, 1, 1, 1), sample=(2, 6, 4, 5, 6))
    assert ("contiguous.default" in targets(program)) is kept
    assert targets(run_passes(program, (Canonicalize(),))) == targets(program)


def attended(x, laid_out, last):
    """Attention over a picture's pixels, whose channels were one behind the other."""
    rows = laid_out(x.flatten(2).transpose(1, 2))
    q, k, v = (each.unsqueeze(1) for each in rows.chunk(3, dim=-1))
    return aten.scaled_dot_product_attention(last(q), last(k), last(v))


@pytest.mark.parametrize(
    ("laid_out", "last", "kept"),
    [
        (lambda x: x.contiguous(), lambda x: x, 1),
        (lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x * 2.0, 0),
        (lambda x: (x * 2.0).transpose(1, 2).clone().transpose(1, 2), lambda x: x, 0),
        (lambda x: x.contiguous().contiguous(), lambda x: x.transpose(0, 1).transpose(0, 1), 1),
    ],
)
def test_rows_that_attention_reads_stay_rows(laid_out, last, kept):
    torch.manual_seed(0)
    program = captured(lambda x: attended(x, laid_out, last), sample=(2, 48, 8, 8))
    result = run_passes(program, (Canonicalize(),))
    found = [each for each in targets(result) if each in ("clone.default", "contiguous.default")]
    assert len(found) == kept
    if kept:
        assert compare(result)[0] == 0.0
    assert run_passes(result, (Canonicalize(),)).records[-1].rewrites == {}


def test_constants_fold_in_chains_and_only_while_they_are_small():
    result = canonicalized(lambda x, w: F.linear(x, (w.t() * 2.0).sin().t()), (4, 4))
    assert targets(result) == ["linear.default"]
    assert len(result.weights) == 1

    side = int(FOLD_LIMIT**0.5)
    small = canonicalized(lambda x: x + torch.ones(side, side).sum())
    assert targets(small) == ["add.Tensor"]
    large = canonicalized(lambda x: x + torch.ones(side, side + 1).sum())
    assert targets(large) == ["ones.default", "sum.default", "add.Tensor"]


def test_a_large_weight_folds_into_one_as_large():
    result = canonicalized(
        lambda x, w: F.linear(x, w.sin()), (300, 300), sample=(1, 300)
    )  # fmt: skip
    assert targets(result) == ["linear.default"]
    assert [tensor.numel() for tensor in result.weights.values()] == [90000]


def test_pieces_of_a_constant_are_constants():
    def rotated(x, table):
        first, second = torch.polar(table, table).split([1, 3], 1)
        turn = torch.cat([second, first], 1)[:, :2]
        return torch.view_as_real(torch.view_as_complex(x.reshape(2, 2, 2)) * turn[:2])

    result = canonicalized(rotated, (2, 4))
    assert targets(result) == ["reshape.default", "view_as_complex.default", "mul.Tensor",
                               "view_as_real.default"]  # fmt: skip
    (folded,) = result.weights.values()
    assert folded.shape == (2, 2)


def test_pieces_of_what_changes_or_is_drawn_are_not_constants():
    split = canonicalized(lambda x: x.split([1, 3], 1)[1])
    assert "split_with_sizes.default" in targets(split)
    drawn = captured(lambda x, w: x + w.sum(), (2, 4))
    graph, _ = clone(drawn.parts[0].graph)
    weight = next(node for node in graph.nodes if node.op == "get_attr")
    with graph.inserting_before(graph.output_node()):
        both = emit(graph, aten.native_dropout.default, weight, 0.5, True)
        set_outputs(graph, [emit(graph, operator.getitem, both, 0)])
    parts = (replace(drawn.parts[0], graph=graph),)
    result = Canonicalize().run(replace(drawn, parts=parts), Work())
    assert "native_dropout.default" in targets(result)


def test_folded_constants_of_two_parts_do_not_meet():
    """Two parts whose nodes have the same names fold to different tensors."""
    one = captured(lambda x, w: x + w.sin(), (4,))
    other = captured(lambda x, w: x + w.cos().sin(), (4,))
    (full,) = one.parts
    graph, _ = clone(other.parts[0].graph)
    (first, second) = calls(graph, aten.cos.default, aten.sin.default)
    first.name, second.name = "other", calls(full.graph, aten.sin.default)[0].name
    second_full = Part("variant", full.depends, graph, full.outputs)
    program = one.with_parts(full, second_full)
    assert torch.equal(one.weights["weights.0"], other.weights["weights.0"])
    result = run_passes(program, (Canonicalize(),))
    folded = [tensor for name, tensor in result.weights.items() if name.startswith("folded")]
    assert len(folded) == 2
    weight = one.weights["weights.0"]
    expected = {"full": weight.sin(), "variant": weight.cos().sin()}
    for part in result.parts:
        (add,) = calls(part.graph, aten.add.Tensor)
        assert torch.equal(result.weights[add.args[1].target], expected[part.name])


def test_a_later_run_does_not_overwrite_what_an_earlier_one_folded():
    once = canonicalized(lambda x, w: x + w.sin(), (4,))
    (full,) = once.parts
    graph, _ = clone(full.graph)
    (folded,) = (node for node in graph.nodes if node.op == "get_attr")
    (add,) = calls(graph)
    with graph.inserting_before(add):
        new = emit(graph, aten.cos.default, folded)
        new.name = "sin"
        both = emit(graph, aten.add.Tensor, add.args[0], folded)
        again = emit(graph, aten.add.Tensor, both, new)
    set_outputs(graph, [again])
    eliminate(graph)
    program = replace(once, parts=(replace(full, graph=graph),), expected=None)
    expected = run_program(program, program.examples)
    result = run_passes(program, (Canonicalize(),))
    assert torch.equal(run_program(result, program.examples)[0], expected[0])
    assert sorted(result.weights) == ["folded.sin", "folded.sin.1"]


def test_duplicates_merge_across_what_they_read():
    def net(x, w, b):
        return F.silu(F.linear(x, w, b)) + F.silu(F.linear(x, w, b)).sin()

    assert targets(canonicalized(net, (4, 4), (4,))) == [
        "linear.default", "silu.default", "sin.default", "add.Tensor",
    ]  # fmt: skip


def test_outputs_that_become_one_value_or_an_input_stay_outputs():
    result = canonicalized(lambda x: (x.clone(), x.sin(), x.sin()))
    first, second, third = outputs(result.parts[0].graph)
    assert first.op == "placeholder"
    assert second is third


def test_open_sizes_are_read_from_the_inputs():
    def net(x):
        h = x.sin()
        return h.reshape(h.shape[0], -1) + h.cos().reshape(h.cos().shape[0], -1)

    program = captured(net, sample=(2, 4, 3), dynamic={"batch": (1, 8)})
    result = run_passes(program, (Canonicalize(),))
    sizes = calls(result.parts[0].graph, aten.sym_size.int)
    assert all(node.args[0].op == "placeholder" for node in sizes)
    assert len(sizes) <= 1
    values = {"sample": torch.randn(5, 4, 3)}
    found = run_program(result, values)
    assert torch.equal(found[0], run_program(program, values)[0])
    assert run_passes(result, (Canonicalize(),)).records[1].rewrites == {}


def test_fuel_stops_after_every_rewrite():
    program = captured(everything, (4, 4), (4,))
    whole = run_passes(program, (Canonicalize(),))
    total = sum(count for rule, count in whole.records[0].rewrites.items() if rule != "dead")
    sizes = []
    for fuel in range(total + 1):
        result = run_passes(program, (Canonicalize(),), fuel=fuel)
        assert result.records[0].error == 0.0
        spent = sum(n for rule, n in result.records[0].rewrites.items() if rule != "dead")
        assert spent == fuel
        sizes.append(len(result.parts[0].graph.nodes))
    assert sizes == sorted(sizes, reverse=True)
    assert dump(result.parts[0].graph) == AFTER


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types(dtype):
    program = captured(lambda x: (x.to(dtype) * 1.0 / 1 + 0.5).sin(), dtype=dtype)
    result = run_passes(program, (Canonicalize(),))
    assert targets(result) == ["add.Tensor", "sin.default"]
    assert relative_error(run_program(result, program.examples), program.expected) <= exact_bound(
        dtype
    )


def test_every_part_is_canonical():
    program = captured(everything, (4, 4), (4,))
    (full,) = program.parts
    prompt = captured(lambda x: x.view(2, 4).sin()).parts[0]
    (place,) = (node for node in prompt.graph.nodes if node.op == "placeholder")
    place.target = "sample"
    # the copy is declared at the full rate: what counts here is that it is visited
    other = Part("other", full.depends | Depends.LATENT, prompt.graph, ("output_0",))
    result = Canonicalize().run(program.with_parts(full, other), Work())
    verify(result)
    assert targets(replace(result, parts=(result.part("other"),))) == ["sin.default"]
