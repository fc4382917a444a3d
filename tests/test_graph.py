"""Editing graphs: emit, substitute, eliminate, clone, evaluate; and DESIGN 2's cached UNet."""

from __future__ import annotations

import gc
import json
import logging
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.capture import capture
from effuse.dump import dump
from effuse.errors import VerifyError
from effuse.graph import (
    calls,
    clone,
    drop_unused_inputs,
    eliminate,
    emit,
    emit_input,
    emit_weight,
    evaluate,
    fake_mode,
    inputs,
    module_path,
    outputs,
    set_outputs,
    source_line,
    substitute,
    unused_name,
    value_of,
)
from effuse.plan import Depends, Plan, PlanStep, Slot, spec_from_json, to_json
from effuse.program import Part, run_program
from effuse.verify import check_variants, verify

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.SiLU())

    def forward(self, sample):
        return self.inner(sample), sample * 2.0


class UNet(nn.Module):
    """Two levels down and up; each level up concatenates what came down."""

    def __init__(self):
        super().__init__()
        self.first, self.time = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(1, 4)
        self.down = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.deep = nn.Sequential(
            *(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 4, 3, padding=1))
              for _ in range(6))
        )  # fmt: skip
        self.up = nn.Conv2d(8, 4, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 3, padding=1)

    def forward(self, sample, timestep):
        shift = self.time(timestep.float()[:, None])[:, :, None, None]
        top = self.first(sample) + shift
        below = F.silu(self.down(top))
        h = self.up(torch.cat([self.deep(below), below], dim=1))
        h = F.interpolate(h, scale_factor=2.0)
        return self.last(torch.cat([h, top], dim=1))


@pytest.fixture(scope="module")
def tiny():
    torch.manual_seed(0)
    model = Tiny().eval()
    sample = torch.randn(2, 3)
    return model, capture(model, {"sample": sample}), sample


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(1, 2, 8, 8), "timestep": torch.tensor([7])}
    return capture(UNet().eval(), inputs, timesteps=(9.0, 7.0, 3.0, 1.0))


def editable(program):
    return clone(program.parts[0].graph)[0], dict(program.weights)


def test_emit_types_the_node_it_makes(tiny):
    graph, _ = editable(tiny[1])
    (linear,) = calls(graph, aten.linear.default)
    with graph.inserting_after(linear):
        new = emit(graph, aten.sum.dim_IntList, linear, [1], dtype=torch.float64, like=linear)
    value = value_of(new)
    assert (tuple(value.shape), value.dtype) == ((2,), torch.float64)
    assert value.fake_mode is fake_mode(graph)
    assert module_path(new) == module_path(linear) == "inner.0"
    assert source_line(new) == source_line(linear)
    assert "linear.py" in source_line(linear)


def test_emit_refuses_what_the_op_does_not_accept(tiny):
    graph, _ = editable(tiny[1])
    (linear,) = calls(graph, aten.linear.default)
    before = dump(graph)
    with graph.inserting_after(linear), pytest.raises(RuntimeError, match="reduction dim"):
        emit(graph, aten.mm.default, linear, linear)
    assert dump(graph) == before


def test_emitted_inputs_stand_behind_the_inputs_and_weights_are_stored(tiny):
    graph, weights = editable(tiny[1])
    (linear,) = calls(graph, aten.linear.default)
    place = emit_input(graph, "extra", value_of(linear))
    assert [node.target for node in inputs(graph)] == ["sample", "extra"]
    assert list(graph.nodes)[:2] == inputs(graph)
    with graph.inserting_before(linear):
        node = emit_weight(graph, weights, "half", torch.tensor([0.5], dtype=torch.float16))
    assert value_of(node).dtype == torch.float16
    assert weights["half"].item() == 0.5
    graph.erase_node(place)
    graph.erase_node(node)


def test_unused_name():
    taken = {"a": torch.zeros(1), "a.1": torch.zeros(1)}
    assert unused_name(taken, "b") == "b"
    assert unused_name(taken, "a") == "a.2"
    assert unused_name({}, "a") == "a"


def test_substitute_reaches_users_and_outputs(tiny):
    graph, weights = editable(tiny[1])
    (linear,), (silu,) = calls(graph, aten.linear.default), calls(graph, aten.silu.default)
    with graph.inserting_after(silu):
        relu = emit(graph, aten.relu.default, silu, like=silu)
    substitute(silu, relu)  # relu itself goes on reading silu
    assert outputs(graph)[0] is relu
    assert relu.args == (silu,)
    substitute(linear, inputs(graph)[0])
    found = evaluate(graph, weights, {"sample": tiny[2]})
    assert torch.equal(found[0], F.relu(F.silu(tiny[2])))
    assert eliminate(graph) == 3  # the linear and its two weights
    graph.lint()


def test_eliminate_keeps_inputs_and_what_reaches_an_output(tiny):
    graph, weights = editable(tiny[1])
    before = len(graph.nodes)
    assert eliminate(graph) == 0
    set_outputs(graph, [outputs(graph)[1]])
    assert eliminate(graph) == 4
    assert len(graph.nodes) == before - 4
    assert [node.target for node in calls(graph)] == [aten.mul.Tensor]
    assert torch.equal(evaluate(graph, weights, {"sample": tiny[2]})[0], tiny[2] * 2)
    set_outputs(graph, [])
    eliminate(graph)
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]
    drop_unused_inputs(graph)
    assert [node.op for node in graph.nodes] == ["output"]


def test_clone_keeps_names_meta_and_text_and_shares_no_node(tiny):
    graph = tiny[1].parts[0].graph
    copy, mapping = clone(graph)
    assert [node.name for node in copy.nodes] == [node.name for node in graph.nodes]
    assert dump(copy) == dump(graph)
    for old, new in mapping.items():
        assert old is not new
        assert old.meta.get("val") is new.meta.get("val")
    text = dump(graph)
    next(iter(calls(copy))).meta["val"] = None
    set_outputs(copy, [])
    eliminate(copy)
    assert dump(graph) == text
    graph.lint()


def test_clone_of_a_graph_with_gaps_in_its_names_keeps_them(unet):
    graph, _ = clone(unet.parts[0].graph)
    first, *_, last = calls(graph, aten.cat.default)
    substitute(first, first.args[0][1])
    eliminate(graph)
    assert last.name.endswith("_1")
    assert [node.name for node in clone(graph)[0].nodes] == [node.name for node in graph.nodes]


def test_evaluate_equals_eager_to_the_bit(tiny, unet):
    model, program, sample = tiny
    found = evaluate(program.parts[0].graph, program.weights, {"sample": sample})
    with torch.no_grad():
        assert all(map(torch.equal, found, model(sample)))
    assert all(map(torch.equal, run_program(unet, unet.examples), unet.expected))


def test_evaluate_drops_each_value_after_its_last_use():
    def forward(x):
        for _ in range(5):
            x = x + 1.0
        return x

    module = nn.Module()
    module.forward = forward
    program = capture(module.eval(), {"x": torch.zeros(3)})
    graph, weights = editable(program)
    with graph.inserting_before(graph.output_node()):
        emit(graph, aten.neg.default, calls(graph)[0])  # read by nothing
    alive, most = [], []

    def observe(node, value):
        gc.collect()
        alive.append(weakref.ref(value))
        most.append(sum(ref() is not None for ref in alive))

    (found,) = evaluate(graph, weights, {"x": torch.zeros(3)}, observe)
    assert torch.equal(found, torch.full((3,), 5.0))
    assert len(most) == 7
    # x (held by this test's caller), the first sum (kept for the last node), a value and its source
    assert max(most[1:]) <= 4
    graph.erase_node(calls(graph, aten.neg.default)[0])
    alive.clear(), most.clear()
    evaluate(graph, weights, {"x": torch.zeros(3)}, observe)
    assert max(most) <= 3


def test_an_unread_value_is_dropped_at_once():
    module = nn.Module()
    module.forward = lambda x: x + 1.0
    program = capture(module.eval(), {"x": torch.zeros(3)})
    graph, weights = editable(program)
    (add,) = calls(graph)
    with graph.inserting_before(add):
        emit(graph, aten.neg.default, inputs(graph)[0])
    seen = []

    def observe(node, value):
        if node is add:
            gc.collect()
            assert seen[1]() is None
        seen.append(weakref.ref(value))

    evaluate(graph, weights, {"x": torch.zeros(3)}, observe)
    assert len(seen) == 3


def test_the_observer_sees_inputs_and_calls_and_may_replace_them(tiny):
    _, program, sample = tiny
    graph = program.parts[0].graph
    seen = []

    def observe(node, value):
        seen.append(node)
        return value + 1 if node.target is aten.linear.default else None

    found = evaluate(graph, program.weights, {"sample": sample}, observe)
    assert seen == [node for node in graph.nodes if node.op in ("placeholder", "call_function")]
    with torch.no_grad():
        assert torch.equal(found[0], F.silu(tiny[0].inner[0](sample) + 1))
    assert torch.equal(found[1], sample * 2)


# DESIGN 2: a cached variant is substitute + eliminate


def shallow_of(program, name="cache_deep"):
    """The shallow variant, and the full one that also gives what the slot keeps."""
    full = program.parts[0]
    graph, mapping = clone(full.graph)
    deepest, *_ = calls(full.graph, aten.cat.default)
    deep = deepest.args[0][0]
    slot = emit_input(graph, f"{name}_0", value_of(deep))
    substitute(mapping[deep], slot)
    eliminate(graph)
    filling, mapping = clone(full.graph)
    set_outputs(filling, (*outputs(filling), mapping[deep]))
    return (
        replace(full, name="shallow", graph=graph),
        replace(full, graph=filling, outputs=(*full.outputs, name)),
        Slot(name, tuple(value_of(deep).shape), "float32"),
    )


def planned(program):
    shallow, full, slot = shallow_of(program)
    fill = PlanStep("full", fills=(slot.name,))
    reads = (PlanStep("shallow", reads=(slot.name,), sources=(step,)) for step in (0, 2))
    plan = Plan("full", (fill, next(reads), fill, next(reads)), (slot,))
    return program.with_parts(full, shallow, plan=plan)


def test_the_shallow_variant_with_the_same_steps_cache_is_the_full_one_to_the_bit(unet):
    shallow, full, slot = shallow_of(unet)
    values = {"sample": torch.randn(1, 2, 8, 8), "timestep": torch.tensor([3])}
    expected, cache = evaluate(full.graph, unet.weights, values)
    (found,) = evaluate(shallow.graph, unet.weights, values | {"cache_deep_0": cache})
    assert torch.equal(found, expected)
    assert torch.equal(expected, evaluate(unet.parts[0].graph, unet.weights, values)[0])
    other = {"cache_deep_0": torch.zeros(slot.shape)}
    (stale,) = evaluate(shallow.graph, unet.weights, values | other)
    assert not torch.equal(stale, expected)
    count = {part.name: len(calls(part.graph)) for part in (shallow, full)}
    assert count["shallow"] == count["full"] - 6 * 3
    assert len(shallow.graph.nodes) < len(full.graph.nodes) / 2
    assert shallow.inputs == ("sample", "timestep", "cache_deep_0")


def test_a_program_with_slots_verifies(unet):
    program = planned(unet)
    verify(program)
    assert [part.name for part in program.variants] == ["full", "shallow"]
    assert all(map(torch.equal, run_program(program, unet.examples), unet.expected))
    assert program.plan.lines(program.timesteps) == [
        "step   0 t=9: full  fills cache_deep",
        "step   1 t=7: shallow  reads cache_deep of step 0",
        "step   2 t=3: full  fills cache_deep",
        "step   3 t=1: shallow  reads cache_deep of step 2",
    ]
    assert Plan().lines() == ["every step: full"]
    assert program.plan.at(1).variant == "shallow"
    assert program.plan.at(None) == program.plan.at(99) == PlanStep("full")


def test_the_spec_survives_json(unet):
    spec = planned(unet).spec()
    text = json.dumps(to_json(spec), sort_keys=True)
    assert spec_from_json(json.loads(text)) == spec
    assert json.dumps(to_json(spec_from_json(json.loads(text))), sort_keys=True) == text
    bare = replace(spec, timesteps=None, plan=Plan(), bounds={"batch": (1, 8)})
    assert spec_from_json(json.loads(json.dumps(to_json(bare)))) == bare
    assert to_json(Depends.TIMESTEP | Depends.LATENT) == ["timestep", "latent"]
    with pytest.raises(KeyError):
        spec_from_json({"inputs": []})


FULL, SHALLOW = PlanStep("full"), PlanStep("shallow", reads=("cache_deep",))
FILL = PlanStep("full", fills=("cache_deep",))


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ((PlanStep("shallower"),), "no variant is called 'shallower'"),
        ((FULL, SHALLOW), "step 1 reads cache_deep of an earlier step, but the last .* are \\(\\)"),
        ((FILL, PlanStep("shallow")), "shallow reads cache_deep, which the plan does not say"),
        ((FILL, PlanStep("shallow", ("cache_deep",), ("cache_deep",))), "shallow does not fill"),
        ((PlanStep("full", ("other",)),), "full does not fill other"),
        ((FILL, FILL, replace(SHALLOW, sources=(0,))), "of \\(0,\\), but the last .* are \\(1,\\)"),
        ((FILL, FILL, replace(SHALLOW, sources=(1, 0))), "reads more of cache_deep than the 1"),
        ((FILL, replace(SHALLOW, sources=(0,), weights=(1.0, 0.0))), "reads more of cache_deep"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(unet, steps, problem):
    program = planned(unet)
    with pytest.raises(VerifyError, match=problem):
        verify(replace(program, plan=replace(program.plan, steps=steps)))


def test_the_same_steps_slots_are_checked(unet):
    assert check_variants(planned(unet)) is None
    program = planned(unet)
    shallow = program.part("shallow")
    graph, _ = clone(shallow.graph)
    (last,) = outputs(graph)
    with graph.inserting_after(last):
        wrong = emit(graph, aten.mul.Tensor, last, 1.01)
    substitute(last, wrong)
    broken = replace(shallow, graph=graph)
    wanting = check_variants(program.with_parts(program.parts[0], broken))
    assert wanting is not None and wanting.startswith("shallow, fed with the same step's slots")


def test_a_default_variant_that_needs_a_cache_is_refused(unet):
    program = planned(unet)
    with pytest.raises(VerifyError, match="the plan does not say"):
        verify(replace(program, plan=replace(program.plan, default="shallow")))


def test_parts_are_ordered_by_rate(unet):
    (full,) = unet.parts
    slow = Part("slow", Depends.PROMPT, full.graph, full.outputs)
    constant = Part("constant", Depends.NOTHING, full.graph, full.outputs)
    names = [part.name for part in unet.with_parts(full, slow, constant).parts]
    assert names == ["constant", "slow", "full"]
