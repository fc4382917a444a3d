"""Skip: equal to networks written without the block, searches that equal brute force, rejects."""

from __future__ import annotations

import doctest
import functools
import json
import logging
import os
from dataclasses import replace
from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from effuse.backends import onnx
from effuse.calibrate import drive
from effuse.capture import capture
from effuse.config import Config, make_pass
from effuse.dump import dump
from effuse.errors import CalibrationError, ConfigError, PassError
from effuse.graph import evaluate
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, Skip, skip, skip_search
from effuse.passes.base import Work
from effuse.passes.skip import step_range
from effuse.passes.skip_blocks import find_blocks, plan_flops, without
from effuse.passes.skip_search import (
    Recorded,
    Stretches,
    find_tails,
    greedy,
    knapsack,
    measure,
    output_loss,
    quiet,
    single_losses,
)
from effuse.plan import Role
from effuse.program import run_program

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (90.0, 70.0, 50.0, 30.0, 20.0, 10.0)
few = settings(deadline=None, max_examples=60)


class Res(nn.Module):
    """x + two convolutions with a timestep in between; a projection where channels change."""

    def __init__(self, given: int, width: int):
        super().__init__()
        self.first, self.time = nn.Conv2d(given, width, 3, padding=1), nn.Linear(4, width)
        self.last = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(given, width, 1) if given != width else nn.Identity()

    def forward(self, x, t, omitted=False):
        if omitted:
            return self.shortcut(x)
        h = F.silu(self.first(x)) + self.time(t)[:, :, None, None]
        return self.shortcut(x) + self.last(F.silu(h))


class UNet(nn.Module):
    """Two ResBlocks down, one in the middle, a long skip and a projecting ResBlock up.

    `omit` and `deep` are the hand-written forms of what Skip and Cache do.
    """

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.one, self.two, self.middle = Res(8, 8), Res(8, 8), Res(8, 8)
        self.up = Res(16, 8)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.omit, self.deep = (), None

    def forward(self, sample, timestep):
        t = torch.cos(timestep.float()[:, None] / torch.tensor([1.0, 3.0, 9.0, 27.0]))
        x = self.block("two", self.block("one", self.enter(sample), t), t)
        h = F.interpolate(self.block("middle", self.down(x), t), scale_factor=2.0)
        h = h if self.deep is None else self.deep
        return self.leave(self.block("up", torch.cat([h, x], 1), t))

    def block(self, name, x, t):
        return getattr(self, name)(x, t, name in self.omit)


class DiT(nn.Module):
    """Three blocks of two gated residual layers each, gates from the timestep."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.norm, self.gate = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(1, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(8, 24), "out": nn.Linear(8, 8),
                           "ff": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))})
            for _ in range(3)
        )  # fmt: skip
        self.omit = ()

    def forward(self, sample, timestep):
        gate = self.gate(torch.cos(timestep.float())[:, None])[:, None]
        h = self.enter(sample)
        for number, block in enumerate(self.blocks):
            if (number, "attn") not in self.omit:
                q, k, v = block["attn"](self.norm(h)).chunk(3, dim=-1)
                h = h + gate * block["out"](F.scaled_dot_product_attention(q, k, v))
            if (number, "ff") not in self.omit:
                h = h + gate * block["ff"](self.norm(h))
        return self.leave(h)


def prepared(model, values, **options):
    program = capture(model, values, timesteps=TIMES, **options)
    return run_passes(program, (Canonicalize(), Hoist()))


@functools.cache
def unet():
    torch.manual_seed(0)
    model = UNet().eval()
    return model, prepared(model, {"sample": torch.randn(2, 3, 8, 8), "timestep": at(3)})


@functools.cache
def dit():
    torch.manual_seed(0)
    model = DiT().eval()
    return model, prepared(model, {"sample": torch.randn(2, 5, 4), "timestep": at(3)})


def at(step, batch=2):
    return torch.full((batch,), int(TIMES[step]))


def values_at(program, step, **changes):
    """The example inputs, with the timestep of a step."""
    times = {i.name: torch.full_like(program.examples[i.name], TIMES[step])
             for i in program.inputs if i.role is Role.TIMESTEP}  # fmt: skip
    return {**program.examples, **times, **changes}


def ran(program, step, **changes):
    """What the plan's variant gives at a step."""
    variant = program.plan.at(step).variant
    return run_program(program, values_at(program, step, **changes), variant=variant)[0]


def skipped(program, *before, **options):
    return run_passes(program, (*before, Skip(**options)), drive=sample)


def sample(program, watch):
    """One trajectory, whose steps share their noise."""
    start = torch.randn(
        program.examples["sample"].shape, generator=torch.Generator().manual_seed(1)
    )
    drive(
        program, ({"sample": start / (1 + step), "timestep": at(step)} for step in range(6)), watch
    )


def variants(program):
    return [step.variant for step in program.plan.steps]


def texts(program):
    return {part.name: dump(part.graph) for part in program.parts}


def by_hand(model, step, sample, **changes):
    """The eager network with attributes changed for one call."""
    before = {name: getattr(model, name) for name in changes}
    try:
        for name, value in changes.items():
            setattr(model, name, value)
        with torch.no_grad():
            return model(sample, at(step))
    finally:
        for name, value in before.items():
            setattr(model, name, value)


def test_the_examples_of_the_docstrings_hold():
    for module in (skip, skip_search):
        found = doctest.testmod(module)
        assert found.attempted and not found.failed


# ---- what is left out ----------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [{}, {"0:6": ()}, (), ((), ())])
def test_an_empty_set_is_the_baseline(steps):
    program = unet()[1]
    found = skipped(program, steps=steps)
    assert texts(found) == texts(program) and found.plan == program.plan
    assert "no step leaves a block out" in found.records[-1].notes


def test_steps_without_a_set_run_the_variant_itself():
    program = unet()[1]
    found = skipped(program, steps={2: "middle"})
    assert variants(found) == ["full"] * 2 + ["full_skip1"] + ["full"] * 3
    assert texts(found)["full"] == texts(program)["full"]
    assert torch.equal(ran(found, 0), ran(program, 0))


@pytest.mark.parametrize("omit", [("one",), ("two",), ("middle",), ("up",), ("one", "two"),
                                  ("one", "two", "middle", "up")])  # fmt: skip
def test_equals_the_unet_written_without_the_blocks(omit):
    model, program = unet()
    found = skipped(program, steps={"1:3": omit})
    expected = by_hand(model, 1, program.examples["sample"], omit=omit)
    torch.testing.assert_close(ran(found, 1), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(ran(program, 1), expected, rtol=1e-2, atol=1e-2)


def test_a_projection_stays_on_the_shortcut():
    found = skipped(unet()[1], steps={0: "up"})
    read = {str(node.target) for node in found.part("full_skip1").graph.nodes}
    assert "up.shortcut.weight" in read and "up.first.weight" not in read


@pytest.mark.parametrize(
    ("what", "pattern", "omit"),
    [
        ("unit", "blocks.1.out", [(1, "attn")]),
        ("unit", "blocks.*.ff.2", [(0, "ff"), (1, "ff"), (2, "ff")]),
        ("layer", "blocks.0", [(0, "attn"), (0, "ff")]),
        ("block", "blocks.2", [(2, "attn"), (2, "ff")]),
        ("block", "blocks.[01].*", [(n, each) for n in (0, 1) for each in ("attn", "ff")]),
    ],
)
def test_equals_the_transformer_written_without_the_blocks(what, pattern, omit):
    model, program = dit()
    found = skipped(program, steps={"4:": pattern}, what=what)
    expected = by_hand(model, 5, program.examples["sample"], omit=omit)
    torch.testing.assert_close(ran(found, 5), expected, rtol=1e-5, atol=1e-5)
    assert variants(found) == ["full"] * 4 + ["full_skip1"] * 2


def test_each_distinct_set_makes_one_variant():
    steps = {"0:2": "one", (1, 3): "middle", "2": "one", 5: ("middle", "one")}
    found = skipped(unet()[1], steps=steps)
    assert variants(found) == ["full_skip1", "full_skip2", "full_skip2", "full", "full",
                               "full_skip2"]  # fmt: skip
    again = skipped(unet()[1], steps=[("one",), ("middle", "one"), ("one", "middle"), (), (),
                                      ("one", "middle")])  # fmt: skip
    assert texts(again) == texts(found) and again.plan == found.plan


def test_skipping_twice_changes_nothing_more():
    once = skipped(unet()[1], steps={"0:2": "one"})
    twice = skipped(once, steps={"0:2": "one"})
    assert texts(twice) == texts(once) and twice.plan == once.plan


def test_more_may_be_left_out_later():
    once = skipped(unet()[1], steps={0: "one"})
    twice = skipped(once, steps={"0:2": "two"})
    assert variants(twice) == ["full_skip1_skip2", "full_skip2"] + ["full"] * 4
    both = skipped(unet()[1], steps={0: ("one", "two")})
    assert torch.equal(ran(twice, 0), ran(both, 0))


def test_the_default_variant_stays_when_every_step_skips():
    found = skipped(unet()[1], steps={":": "one"})
    assert {part.name for part in found.variants} == {"full", "full_skip1"}
    assert found.plan.default == "full"


def test_fuel_stops_variants():
    program, steps = unet()[1], {0: "one", 1: "two"}
    found = run_passes(program, (Skip(steps=steps),), fuel=1)
    assert variants(found) == ["full_skip1"] + ["full"] * 5


def test_an_open_batch_stays_open():
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 3, 8, 8), "timestep": at(3)}
    model = UNet().eval()
    found = skipped(prepared(model, values, dynamic={"batch": (1, 4)}), steps={0: ("one", "up")})
    sample = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        model.omit = ("one", "up")
        expected = model(sample, at(0, 3))
    given = {"sample": sample, "timestep": at(0, 3)}
    torch.testing.assert_close(run_program(found, given, variant="full_skip1")[0], expected)


class Widening(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return sample + self.layer(sample.float()) * timestep.float()[:, None]


def test_a_shortcut_takes_the_dtype_of_its_sum():
    values = {"sample": torch.randn(2, 4).half(), "timestep": at(0)}
    found = skipped(prepared(Widening().eval(), values), steps={0: "*"})
    assert torch.equal(ran(found, 0), values["sample"].float())


# ---- diffusers -----------------------------------------------------------------------------------


def test_a_diffusers_unet_without_a_resnet_and_a_transformer():
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        attention_head_dim=2, cross_attention_dim=12,
    ).eval()  # fmt: skip
    values = {"sample": torch.randn(2, 4, 8, 8), "timestep": at(1)}
    program = prepared(model, {**values, "encoder_hidden_states": torch.randn(2, 3, 12)})
    blocks = ("up_blocks.0.resnets.0", "mid_block.attentions.*", "down_blocks.0.resnets.0")
    found = skipped(program, steps={1: blocks})
    projecting = model.up_blocks[0].resnets[0]
    projecting.forward = lambda x, temb: projecting.conv_shortcut(x)
    model.down_blocks[0].resnets[0].forward = lambda x, temb: x
    model.mid_block.attentions[0].forward = lambda x, **_: (x,)
    with torch.no_grad():
        expected = model(**values, encoder_hidden_states=program.examples["encoder_hidden_states"])
    torch.testing.assert_close(ran(found, 1), expected[0], rtol=1e-4, atol=1e-5)


def test_a_diffusers_transformer_without_a_block():
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        num_layers=3, sample_size=8, num_embeds_ada_norm=10,
    ).eval()  # fmt: skip
    nn.init.normal_(model.transformer_blocks[0].norm1.linear.weight, std=0.5)
    values = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": at(1),
              "class_labels": torch.tensor([1, 2])}  # fmt: skip
    found = skipped(prepared(model, values), steps={1: "transformer_blocks.1"}, what="block")
    model.transformer_blocks[1].forward = lambda hidden, **_: hidden
    with torch.no_grad():
        expected = model(**values)[0]
    torch.testing.assert_close(ran(found, 1), expected, rtol=1e-4, atol=1e-5)


# ---- with a cache --------------------------------------------------------------------------------


@functools.cache
def cached():
    return run_passes(unet()[1], (Cache(interval=2, order=0, warmup=1, mode="deep"),))


def composed(program, **options):
    """Skip behind a cache, and what it noted."""
    found = skipped(program, **options)
    return found, found.records[-1]


def test_only_what_a_cached_step_still_runs_is_left_out():
    found, _ = composed(cached(), steps={"0:2": ("one", "middle"), "4:": "middle"})
    assert variants(found) == ["full_skip1", "reuse_skip1", "full", "reuse", "full_skip2", "reuse"]
    for old, new in zip(cached().plan.steps, found.plan.steps, strict=True):
        assert replace(new, variant=old.variant) == old
    assert found.plan.slots == cached().plan.slots


def test_a_cached_step_equals_the_network_with_the_value_given():
    model, _ = unet()
    found, _ = composed(cached(), steps={"0:2": ("one", "middle")})
    (slot,) = found.plan.slots
    deep = torch.randn([int(size) for size in slot.shape])
    expected = by_hand(model, 1, found.examples["sample"], omit=("one",), deep=deep)
    torch.testing.assert_close(ran(found, 1, **{slot.past[0]: deep}), expected)


def test_a_budget_counts_what_a_cached_plan_runs():
    before = plan_flops(cached(), 6)
    found, log = composed(cached(), budget=0.25, max_variants=2)
    assert plan_flops(found, 6) <= 0.75 * before
    assert len({name for name in variants(found) if "_skip" in name}) <= 2 * 2
    assert any("measured without all of them" in note for note in log.notes)


def program_inputs(program):
    """What the default variant reads at the first step of a trajectory."""
    watch = Recorded(Stretches(program, 6))
    sample(program, watch)
    return watch.values[0]


# ---- by sensitivity ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "most", "search"),
    [(0.1, 4, "greedy"), (0.3, 2, "knapsack"), (0.5, 1, "greedy"), (0.2, 20, "knapsack")],
)
def test_the_budget_is_saved_with_few_variants(budget, most, search):
    for program, what in ((unet()[1], "layer"), (dit()[1], "unit")):
        found = skipped(program, budget=budget, search=search, max_variants=most, what=what)
        assert plan_flops(found, 6) <= (1 - budget) * plan_flops(program, 6)
        assert 1 <= len(found.variants) - 1 <= most
        assert all(0 <= len(step.fills) == len(step.reads) == 0 for step in found.plan.steps)


def test_losses_are_those_of_each_block_alone():
    for (_, program), what in ((unet(), "layer"), (dit(), "block"), (dit(), "unit")):
        blocks, part = find_blocks(program, what), program.part("full")
        with torch.no_grad():
            values = program_inputs(program)
            exact = evaluate(part.graph, program.weights, values)
            losses = single_losses(part, find_tails(part, blocks), program, values)
            for number, block in enumerate(blocks):
                less = without(part, "less", [block])
                expected = output_loss(evaluate(less.graph, program.weights, values), exact)
                assert losses[number] == pytest.approx(expected, rel=1e-6) and expected > 0


def test_a_block_that_does_nothing_goes_first():
    torch.manual_seed(0)
    model = UNet().eval()
    nn.init.zeros_(model.two.last.weight)
    nn.init.zeros_(model.two.last.bias)
    program = prepared(model, {"sample": torch.randn(2, 3, 8, 8), "timestep": at(3)})
    found = skipped(program, budget=0.1, max_variants=1)
    assert any(
        note.endswith("left out most often: two.last (6)") for note in found.records[-1].notes
    )
    assert torch.equal(ran(found, 0), ran(program, 0))
    other = skipped(program, budget=0.1, exclude=("two.*",))
    assert not any("two.last" in note for note in other.records[-1].notes)


def test_losses_and_savings_are_told_by_stretch():
    program = dit()[1]
    blocks, stretches = find_blocks(program, "block"), Stretches(program, 4)
    assert [stretches.of(step) for step in range(6)] == [0, 0, 1, 2, 2, 3]
    with torch.no_grad():
        found = measure(program, blocks, stretches, Work(drive=sample))
    assert found.losses.shape == found.saved.shape == (4, 3)
    assert (found.saved[0] == 2 * found.saved[1]).all() and (found.losses > 0).all()
    assert sum(probe.weight for probe in found.probes) == pytest.approx(1)


items = st.lists(st.tuples(st.floats(0, 1, width=16), st.integers(0, 9)), min_size=1, max_size=9)


@few
@given(items, st.floats(0, 1))
def test_the_knapsack_equals_brute_force_and_beats_greedy(items, share):
    losses, saved = [loss for loss, _ in items], [flops for _, flops in items]
    need = round(share * sum(saved))

    def cost(chosen):
        return sum(losses[item] for item in chosen)

    found, quick = knapsack(losses, saved, need), greedy(losses, saved, need)
    every = (
        each for count in range(len(items) + 1) for each in combinations(range(len(items)), count)
    )
    best = min(cost(each) for each in every if sum(saved[item] for item in each) >= need)
    assert cost(found) == pytest.approx(best, abs=1e-6)
    assert cost(found) <= cost(quick)
    for chosen in (found, quick):
        assert sum(saved[item] for item in chosen) >= need
        assert all(saved[item] for item in chosen) and list(chosen) == sorted(set(chosen))


def test_the_solver_prints_nothing(capfd):
    """An instance at which HiGHS 1.12 (scipy 1.17) prints from C++, whatever its options say."""
    random = np.random.default_rng(5)
    saved = random.integers(1, 10**9, 200)
    losses = random.random(200) * saved
    knapsack(losses.tolist(), saved.tolist(), int(saved.sum()) * 2 // 5)
    assert capfd.readouterr() == ("", "")


def test_only_what_is_printed_inside_is_dropped(capfd):
    with pytest.raises(ZeroDivisionError), quiet():
        os.write(1, b"inside\n")
        _ = 1 / 0
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "after\n"


# ---- lowering, and what people write -------------------------------------------------------------


def test_the_variants_run_in_onnx(tmp_path):
    found = skipped(unet()[1], steps={"2:4": ("one", "up")})
    onnx.build(found, tmp_path)
    session = onnx.load_session(found.spec(), tmp_path)
    for step in (0, 2):
        given = {name: value.numpy() for name, value in values_at(found, step).items()}
        (name,) = found.outputs
        torch.testing.assert_close(torch.from_numpy(session.step(given)[name]), ran(found, step),
                                   rtol=1e-4, atol=1e-5)  # fmt: skip
    assert session.steps == {"full": 1, "full_skip1": 1}


def test_options_come_from_toml_and_go_to_json():
    data = {"name": "skip", "steps": {"0:2": ["mid*"], "4": "up"}, "what": "unit"}
    found = make_pass(data)
    assert found == Skip(steps={(0, 2): ("mid*",), 4: "up"}, what="unit")
    assert make_pass(found) == found
    options = json.loads(json.dumps(Config(passes=(found,)).data()))["passes"][0]
    assert options["steps"] == {"0:2": ["mid*"], "4": ["up"]} and make_pass(options) == found
    assert make_pass({"name": "skip", "steps": [["a"], [], "b"]}).steps == {
        "0": ("a",), "1": (), "2": ("b",)}  # fmt: skip


def test_ranges_of_steps():
    assert step_range("3", 6) == range(3, 4)
    assert step_range(":", 6) == range(6)
    assert step_range(":2", 6) == range(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either steps"),
        ({"steps": {0: "a"}, "budget": 0.1}, "either steps"),
        ({"budget": 0.0}, "a share between 0 and 1"),
        ({"budget": 1.0}, "a share between 0 and 1"),
        ({"budget": 0.1, "max_variants": 0}, "at least 1"),
        ({"budget": 0.1, "what": "layers"}, "did you mean 'layer'"),
        ({"budget": 0.1, "search": "genetic"}, "greedy, knapsack"),
        ({"steps": {"a:b": "x"}}, 'a range as "10:20"'),
        ({"steps": "middle"}, "at which steps"),
        ({"steps": {-1: "x"}}, 'a range as "10:20"'),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Skip(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": {0: "midle.last"}}, "'midle.last' names no block; did you mean 'middle.last'"),
        ({"steps": {6: "one"}}, "the schedule has the steps 0 to 5"),
        ({"steps": {"4:7": "one"}}, "the schedule has the steps 0 to 5"),
        ({"steps": {"3:3": "one"}}, "the schedule has the steps 0 to 5"),
        ({"steps": [["one"], ["two"], ["up"]], "max_variants": 2}, "3 distinct .* max_variants=3"),
        ({"steps": {0: "one"}, "exclude": ("*",)}, "leave none of one.last, two.last"),
        ({"budget": 0.99}, "without all 4 blocks .* is saved"),
    ],
)
def test_networks_and_schedules_that_do_not_fit(options, message):
    with pytest.raises(PassError, match=message):
        skipped(unet()[1], **options)


def test_no_schedule_no_calibration_no_block():
    model, program = unet()
    with pytest.raises(PassError, match="schedule=scheduler"):
        run_passes(capture(model, dict(program.examples)), (Skip(steps={0: "one"}),))
    with pytest.raises(PassError, match="needs calibration"):
        run_passes(program, (Skip(budget=0.1),))
    with pytest.raises(CalibrationError, match="never ran full at any of the steps 2 to 2"):
        some = [{"sample": program.examples["sample"], "timestep": at(0)}]
        run_passes(program, (Skip(budget=0.1),), drive=lambda p, watch: drive(p, some, watch))
    plain = prepared(nn.Conv2d(3, 3, 1).eval(), {"input": torch.randn(1, 3, 4, 4)})
    with pytest.raises(PassError, match="no residual layer"):
        run_passes(plain, (Skip(steps={0: "*"}),))
