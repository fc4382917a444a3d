"""Distillation: what is matched, exact schedules and averages, recovery, resuming, divergence."""

from __future__ import annotations

import functools
import json
import logging
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import effuse
from effuse.capture import capture
from effuse.distill_course import Entry, Quality, Trained, course, smoothed
from effuse.distill_data import (
    ENOUGH,
    PROBES,
    Call,
    Listener,
    Pool,
    Trajectories,
    ddim,
    drawn,
    euler,
    sampler,
)
from effuse.distill_loss import feature_loss, match_features, output_loss
from effuse.distill_network import Network, trainable
from effuse.distill_state import Folder, State
from effuse.distill_train import Recipe, train
from effuse.errors import CalibrationError, ConfigError, InputError, PassError
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import Distill, Hoist, Quantize
from effuse.passes.base import Pass
from effuse.passes.skip_blocks import find_blocks, without
from effuse.program import Program, prune_weights, run_program

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
FLOW = [1.0, 0.75, 0.5, 0.25]
few = settings(deadline=None, max_examples=20)


class Block(nn.Module):
    """Self-attention in two heads, cross-attention where asked for, hidden units."""

    def __init__(self, width: int, cross: bool):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.ask, self.told = (nn.Linear(width, width) for _ in range(2)) if cross else (None, None)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x, prompt):
        heads = [
            each(x).unflatten(-1, (2, -1)).transpose(1, 2) for each in (self.q, self.k, self.v)
        ]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2))
        if self.ask is not None:
            told = self.told(prompt)
            x = x + F.scaled_dot_product_attention(self.ask(x), told, told)
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    """Tokens (batch, 6, 4), a timestep, a prompt (batch, 3, 8); predicts noise."""

    def __init__(self, cross=True, blocks=2):
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.leave = nn.Linear(4, 8), nn.Linear(8, 4)
        self.time, self.norm = nn.Linear(2, 8), nn.LayerNorm(8)
        self.blocks = nn.ModuleList(Block(8, cross) for _ in range(blocks))

    def forward(self, sample, timestep, prompt):
        at = timestep.float()[:, None] / torch.tensor([1000.0, 100.0])
        x = self.enter(sample) + self.time(at.cos())[:, None]
        for block in self.blocks:
            x = block(x, prompt)
        return self.leave(self.norm(x))


def inputs(seed=0, batch=2, time=500.0):
    random = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 6, 4, generator=random),
        "timestep": torch.full((batch,), time),
        "prompt": torch.randn(batch, 3, 8, generator=random),
    }


@functools.cache
def teacher():
    return capture(Net().eval(), inputs(), timesteps=TIMES)


@functools.cache
def pruned():
    """The teacher without the first block's feed-forward branch."""
    return remove(teacher(), "blocks.0.down")


def remove(program, *names):
    blocks = [each for each in find_blocks(program, "unit") if each.name in names]
    assert len(blocks) == len(names), [each.name for each in find_blocks(program, "unit")]
    part = without(program.part("full"), "full", blocks)
    return prune_weights(program.with_parts(replace(part, exact=True)))


def data(count=8):
    return [inputs(seed, time=TIMES[seed % len(TIMES)]) for seed in range(count)]


def pool(count=8, seed=0):
    return Pool([Call(each) for each in data(count)], seed)


def recovered(**options):
    """Train the pruned network on a pool, by `train` itself."""
    where = {name: options.pop(name) for name in ("resume", "progress") if name in options}
    recipe = Recipe(**{"steps": 24, "rate": 3e-3, "every": 6, **options})
    return train(Network(pruned()), Network(teacher()), pool(), recipe, **where)


def ratio_db(program, seeds=range(50, 54)):
    """SQNR against the teacher on calls that no training has seen."""
    found = [torch.cat([run_program(each, inputs(s, time=TIMES[s % 5]))[0] for s in seeds])
             for each in (teacher(), program)]  # fmt: skip
    return sqnr_db(*(each.detach().numpy() for each in found))


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---- features ------------------------------------------------------------------------------------


def test_self_attention_is_told_from_cross_attention_by_what_is_read():
    found = match_features(Network(pruned()), Network(teacher()))
    assert found.kind == "self-attention"
    assert found.names == ("blocks.0.out", "blocks.1.out")


def test_features_of_a_removed_span_are_not_matched():
    found = match_features(Network(remove(teacher(), "blocks.1.out")), Network(teacher()))
    assert found.names == ("blocks.0.out",)


def test_fused_projections_are_one_value_too():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

        def forward(self, sample):
            attended = F.scaled_dot_product_attention(*self.qkv(sample).chunk(3, dim=-1))
            return sample + self.out(attended)

    network = Network(capture(Fused().eval(), {"sample": torch.randn(1, 5, 4)}))
    assert match_features(network, network).names == ("out",)


def test_heads_that_are_gone_change_no_feature():
    """The layer behind attention keeps its shape; only what it reads gets narrower."""
    narrow = Net()
    for block in narrow.blocks:
        block.q, block.k, block.v = (nn.Linear(8, 4) for _ in range(3))
        block.out = nn.Linear(4, 8)
    found = match_features(Network(capture(narrow.eval(), inputs())), Network(teacher()))
    assert found.names == ("blocks.0.out", "blocks.1.out")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, sample):
        for layer in self.layers:
            sample = sample + torch.tanh(layer(sample))
        return sample


def test_without_attention_the_sums_of_spans_stand_in():
    whole = capture(Plain().eval(), {"sample": torch.randn(3, 4)})
    network = Network(whole)
    blocks = find_blocks(whole, "unit")
    part = without(whole.part("full"), "full", blocks[1:2])
    found = match_features(Network(whole.with_parts(part)), network)
    assert found.kind == "residual span" and found.names == ("layers.0", "layers.2")
    nodes = {node.name: node for node in whole.part("full").graph.nodes}
    assert all(nodes[name].target is torch.ops.aten.add.Tensor for name in found.teacher)


def test_unlike_networks_share_no_features():
    wide = nn.Sequential(nn.Linear(4, 4)).eval()
    network = Network(capture(wide, {"input": torch.randn(3, 4)}))
    assert match_features(network, network).names == ()


def test_a_network_computes_on_its_device_alone():
    """Shapes only, on the meta device, where a tensor left on the CPU would not do."""
    whole = capture(Net().eval(), inputs(), timesteps=TIMES)
    outputs, features = Network(whole, torch.device("meta"))(
        inputs(), taps=match_features(Network(whole), Network(whole)).student
    )
    assert [each.device.type for each in (*outputs, *features.values())] == ["meta"] * 3


# ---- the loss, the schedule, the average ---------------------------------------------------------


@few
@given(st.floats(0.1, 10), st.integers(0, 99))
def test_features_count_by_their_own_size(scale, seed):
    one, other = torch.randn(2, 7, generator=torch.Generator().manual_seed(seed))
    plain = float(feature_loss({"f": one}, {"f": other}))
    scaled = float(feature_loss({"f": scale * one}, {"f": scale * other}))
    assert scaled == pytest.approx(plain, rel=1e-4)
    assert feature_loss({"f": one}, {"f": one}) == 0
    assert float(feature_loss({"f": torch.zeros(7)}, {"f": one})) == pytest.approx(1)


def test_output_loss_is_the_mean_square_summed_over_outputs():
    mine, theirs = [torch.zeros(4), torch.ones(2)], [torch.full((4,), 2.0), torch.zeros(2)]
    assert output_loss(mine, theirs) == 5


def test_rate_rises_then_falls_as_a_cosine():
    recipe = Recipe(steps=104, rate=2.0, warmup=4 / 104)
    assert [recipe.rate_at(step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]
    for step in range(4, 104):
        assert recipe.rate_at(step) == pytest.approx(1 + math.cos(math.pi * (step - 4) / 100))


def test_average_is_the_weights_moving_mean():
    """Against the same loop with torch's own AdamW on an eager module."""
    torch.manual_seed(0)
    eager, wanted = nn.Linear(3, 2), nn.Linear(3, 2)
    values = [{"input": torch.randn(5, 3)} for _ in range(6)]
    mine, theirs = (Network(capture(each.eval(), values[0])) for each in (eager, wanted))
    recipe = Recipe(steps=30, rate=0.05, batch=2, ema=0.8, clip=0.3, weights={"output": 1})
    source = Pool([Call(each) for each in values])
    found = train(mine, theirs, source, recipe)

    adam = torch.optim.AdamW(eager.parameters(), recipe.rate)
    average = {name: each.detach().clone() for name, each in eager.named_parameters()}
    for step in range(30):
        adam.zero_grad()
        for number in (2 * step, 2 * step + 1):
            x = source.at(number).values["input"]
            ((eager(x) - wanted(x).detach()).square().mean() / 2).backward()
        nn.utils.clip_grad_norm_(eager.parameters(), 0.3)
        adam.param_groups[0]["lr"] = recipe.rate_at(step)
        adam.step()
        decay = min(0.8, (1 + step) / (10 + step))
        for name, each in eager.named_parameters():
            average[name] = decay * average[name] + (1 - decay) * each.detach()
    for name, each in average.items():
        torch.testing.assert_close(found.weights[name], each)
    assert found.after.loss < found.before.loss


@few
@given(st.integers(1, 20), st.integers(0, 5))
def test_a_pool_gives_every_call_once_a_turn(count, seed):
    source = Pool([Call({"x": torch.tensor(n)}) for n in range(count)], seed)
    probes = [int(each.values["x"]) for each in source.probes()]
    assert len(set(probes)) == min(count, PROBES)
    taken = set(range(count)) - set(probes if count >= ENOUGH else ())
    turns = [[int(source.at(turn * len(taken) + n).values["x"]) for n in range(len(taken))]
             for turn in (0, 1, 2, 1)]  # fmt: skip
    assert all(len(turn) == len(taken) and set(turn) == taken for turn in turns)
    assert turns[1] == turns[3]


# ---- recovery ------------------------------------------------------------------------------------


def test_what_is_kept_aside_is_of_several_steps():
    """Eight trajectories of twenty steps: evenly spaced calls would be of one step."""
    for seed in range(20):
        found = drawn(160, PROBES, seed)
        assert [each * PROBES // 160 for each in sorted(found)] == list(range(PROBES))
        assert len({each % 20 for each in found}) > PROBES // 2


def test_a_pruned_network_recovers_and_its_loss_falls():
    found = effuse.distill(
        pruned(), teacher(), data(16), steps=120, rate=5e-3, ema=0.95, progress=False
    )
    assert isinstance(found.student, Program) and not found.warning
    assert len(found.history) == 120 and found.features == ("blocks.0.out", "blocks.1.out")
    start, end = (sum(e.loss for e in part) for part in (found.history[:16], found.history[-16:]))
    assert end < start / 3
    assert found.after.sqnr_db > found.before.sqnr_db + 3
    assert ratio_db(found.student) > ratio_db(pruned()) + 3
    record = found.student.records[-1]
    assert record.name == "distill" and "2 self-attention features" in record.notes[0]


def test_only_weights_of_layers_change_and_the_student_given_stays():
    kept = {name: each.clone() for name, each in pruned().weights.items()}
    found = effuse.distill(pruned(), teacher(), data(), steps=3, rate=1e-3, progress=False)
    assert equal(dict(pruned().weights), kept)
    changed = {n for n in kept if not torch.equal(kept[n], found.student.weights[n])}
    layers = set(trainable(Network(pruned())))
    assert changed <= layers and len(changed) > len(layers) / 2
    assert set(kept) - layers  # the table that timesteps are divided by


def test_the_teacher_may_be_a_module():
    for feed in (data(4), None):
        module, program = (
            effuse.distill(pruned(), each, feed, steps=3, rate=1e-3, progress=False)
            for each in (Net().eval(), teacher())
        )
        assert module.history == program.history
        assert equal(dict(module.student.weights), dict(program.student.weights))


def test_sizes_left_open_are_trained_at_those_of_the_data():
    values = [{"sample": torch.randn(count, 4)} for count in (3, 1, 2)]
    whole = capture(Plain().eval(), values[0], dynamic={"batch": (1, 8)})
    student = remove(whole, "add_1")  # tanh is no layer, so the sum names the span
    for wanted, feed in ((whole, values), (Plain().eval(), values[:1])):
        found = effuse.distill(student, wanted, feed, steps=9, rate=1e-2, progress=False)
        assert found.after.loss < found.before.loss


def test_what_equals_its_teacher_stays_to_the_bit():
    found = effuse.distill(teacher(), teacher(), data(), progress=False)
    assert equal(dict(found.student.weights), dict(teacher().weights))
    assert found.warning.startswith("nothing to recover") and not found.history


def test_targets_make_the_loss_of_a_task():
    batch = [(each, torch.ones(2, 6, 4)) for each in data()]
    shares = {"output": 0, "features": 0}
    found = effuse.distill(
        pruned(), teacher(), batch, steps=80, rate=1e-2, weights=shares, progress=False
    )
    first, last = found.history[0], found.history[-1]
    assert last.task < first.task / 4 and last.loss == pytest.approx(100 * last.task)
    assert (run_program(found.student, inputs())[0] - 1).square().mean() < 0.3


def test_run_is_handed_the_teacher_and_its_calls_are_trained_on():
    seen = []

    def run(model):
        for each in data(3):
            seen.append(model(**each))

    found = effuse.distill(pruned(), teacher(), run, steps=4, rate=1e-3, progress=False)
    given = effuse.distill(pruned(), teacher(), data(3), steps=4, rate=1e-3, progress=False)
    assert torch.equal(seen[0], run_program(teacher(), data(1)[0])[0])
    assert equal(dict(found.student.weights), dict(given.student.weights))


def test_without_data_the_teacher_samples():
    found = effuse.distill(
        pruned(), teacher(), steps=60, rate=5e-3, ema=0.95, batch=2, schedule=FLOW, progress=False
    )
    assert found.after.sqnr_db > found.before.sqnr_db + 3


def test_hoisted_programs_are_trained_part_by_part():
    hoisted = [run_passes(replace(each, expected=None), (Hoist(),))
               for each in (pruned(), teacher())]  # fmt: skip
    assert len(Network(hoisted[0]).parts) > 1
    found = effuse.distill(*hoisted, data(16), steps=60, rate=5e-3, ema=0.9, progress=False)
    assert found.after.sqnr_db > found.before.sqnr_db + 3
    with pytest.raises(InputError, match="not one of the schedule"):
        effuse.distill(*hoisted, [inputs(time=123.0)], steps=1, progress=False)


# ---- compiled networks ---------------------------------------------------------------------------


@functools.cache
def compiled():
    config = effuse.Config(passes=(), backend="reference")
    return effuse.compile(Net().eval(), config, inputs=inputs(), schedule=TIMES, progress=False)


def test_a_compiled_student_comes_back_compiled(tmp_path):
    wanted = Net().eval()
    with torch.no_grad():
        for parameter in wanted.parameters():
            parameter.mul_(0.8)
    found = effuse.distill(
        compiled(), wanted, data(16), steps=60, rate=5e-3, ema=0.9, progress=False
    )
    assert isinstance(found.student, effuse.Compiled)
    assert found.features == ("blocks.0.out", "blocks.1.out")
    assert found.after.sqnr_db > found.before.sqnr_db + 3
    loaded = effuse.load(found.student.save(tmp_path / "student.effuse"))
    assert torch.equal(loaded(**inputs()), found.student(**inputs()))
    assert not torch.equal(loaded(**inputs()), compiled()(**inputs()))
    assert loaded.manifest["passes"][-1]["name"] == "distill"
    assert len(loaded.manifest["distilled"]["history"]) == 60


def test_a_teacher_is_captured_as_large_as_a_compiled_student_is():
    samples = 0

    def run(model):
        nonlocal samples
        samples += 1
        for call in data(3):
            model(**call)

    found = effuse.distill(compiled(), Net().eval(), run, steps=2, progress=False)
    assert samples == 1 and found.warning.startswith("nothing to recover")  # they are equal


def test_an_artifact_has_no_examples_to_sample_with():
    with pytest.raises(InputError, match=r"data: trajectories are sampled with .* example inputs"):
        effuse.distill(compiled(), compiled(), progress=False)


# ---- resuming ------------------------------------------------------------------------------------


class Killed(Exception):
    """In the place of a signal."""


def killed_at(step):
    def progress(done, total, loss):
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("step", [7, 12, 23])
def test_a_training_that_was_killed_goes_on_to_the_bit(step, tmp_path):
    whole = recovered(batch=2)
    with pytest.raises(Killed):
        recovered(batch=2, resume=str(tmp_path), progress=killed_at(step))
    done = []
    found = recovered(
        batch=2, resume=str(tmp_path), progress=lambda now, total, loss: done.append(now)
    )
    assert done == list(range(step // 6 * 6 + 1, 25))
    assert equal(found.weights, whole.weights) and found.history == whole.history
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]


def test_a_finished_training_is_read_back(tmp_path):
    first = recovered(resume=str(tmp_path))
    again = recovered(resume=str(tmp_path), progress=killed_at(1))
    assert equal(first.weights, again.weights) and first.history == again.history


def test_trajectories_go_on_in_the_middle():
    fresh, other = (Trajectories(Network(teacher()), TIMES, sampler(None, TIMES)) for _ in "12")
    walked = [fresh.at(number) for number in range(12)]
    for number in (11, 3):
        assert equal(dict(other.at(number).values), dict(walked[number].values))
    assert len({float(each.values["timestep"][0]) for each in walked[5:10]}) == 5


def test_another_training_in_the_folder_is_refused(tmp_path):
    recovered(resume=str(tmp_path), steps=10)
    with pytest.raises(ConfigError, match=r"another training \(seed 0, not 1"):
        recovered(resume=str(tmp_path), steps=10, seed=1)


@pytest.mark.parametrize("name", ["state.json", "*.safetensors"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_state_is_refused(name, how, tmp_path):
    recovered(resume=str(tmp_path), steps=10)
    path = next(tmp_path.glob(name))
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:20])
    if (name, how) == ("state.json", "gone"):  # nothing was ever written
        assert len(recovered(resume=str(tmp_path), steps=10).history) == 10
    else:
        with pytest.raises(ConfigError, match=r"is damaged .* delete the folder"):
            recovered(resume=str(tmp_path), steps=10)


def test_a_state_is_the_one_before_until_the_next_is_whole(tmp_path, monkeypatch):
    folder = Folder.of(str(tmp_path), {})
    folder.write(State({"x": torch.ones(2)}, {"at": 1}))
    place = Folder._place

    def stopped(self, name, write):
        if name == "state.json":
            raise Killed
        place(self, name, write)

    monkeypatch.setattr(Folder, "_place", stopped)
    with pytest.raises(Killed):
        folder.write(State({"x": torch.zeros(2)}, {"at": 2}))
    found = folder.read()
    assert found.data == {"at": 1} and torch.equal(found.tensors["x"], torch.ones(2))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="resume: expected a folder that can be written"):
        recovered(resume=str(tmp_path / "file"))


# ---- divergence ----------------------------------------------------------------------------------


def test_a_loss_that_explodes_leaves_the_last_good_average(caplog):
    good = recovered(steps=10)
    found = recovered(steps=400, rate=50.0, warmup=0.99)
    assert "diverged at step" in found.warning and "lower rate than 50" in found.warning
    assert found.warning in caplog.text
    assert (
        len(found.history) < 400 and smoothed(found.history, found.before.loss) > found.before.loss
    )
    assert found.after.loss <= found.before.loss and good.after.loss < good.before.loss
    assert all(each.isfinite().all() for each in found.weights.values())


def test_nan_in_the_middle_leaves_the_last_good_average():
    """A call that is NaN and comes late: what was learned before it is kept."""
    source = pool(40)
    order = [source.at(number) for number in range(36)]
    late = 27
    bad = {**order[late].values, "sample": torch.full((2, 6, 4), math.nan)}
    source.calls = tuple(Call(bad) if each is order[late] else each for each in source.calls)
    recipe = Recipe(steps=40, rate=3e-3)
    found = train(Network(pruned()), Network(teacher()), source, recipe)
    assert len(found.history) == late and "NaN or infinity" in found.warning
    assert found.after.loss < found.before.loss
    assert all(each.isfinite().all() for each in found.weights.values())


def test_nan_at_the_start_is_an_error():
    bad = [{**inputs(), "sample": torch.full((2, 6, 4), math.nan)}]
    with pytest.raises(CalibrationError, match="expected a finite loss at the start, came nan"):
        effuse.distill(pruned(), teacher(), bad, progress=False)


def test_what_made_nothing_better_is_not_taken():
    """Trained on a task, judged by it: targets that only noise could meet at this rate."""
    found = recovered(steps=2, rate=30.0, warmup=0)
    assert "nothing better" in found.warning or "diverged" in found.warning
    assert equal(found.weights, {n: pruned().weights[n] for n in found.weights})


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps=0: at least 1"),
        ({"batch": 0}, "batch=0: at least 1"),
        ({"rate": -1.0}, "rate=-1.0: a number above 0"),
        ({"rate": math.nan}, "rate=nan: a number above 0"),
        ({"ema": 1.0}, "ema=1.0: from 0 to below 1"),
        ({"weights": {"feature": 1}}, "'feature' in the loss; did you mean 'features'"),
        ({"weights": {"task": -1}}, "task=-1: 0 or more"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(ConfigError, match=words):
        effuse.distill(pruned(), teacher(), data(), progress=False, **options)


class Wide(Net):
    def forward(self, sample, timestep, prompt):
        return super().forward(sample, timestep, prompt).repeat(1, 1, 2)


def test_a_teacher_of_other_shapes_names_both():
    with pytest.raises(InputError, match=r"shapes \[\(2, 6, 8\)\], the student of \[\(2, 6, 4\)\]"):
        effuse.distill(pruned(), Wide(blocks=1).eval(), data(2), progress=False)
    other = capture(Plain().eval(), {"sample": torch.ones(1, 6, 4)})
    with pytest.raises(InputError, match=r"float32\[1, 6, 4\], the student .*float32\[2, 6, 4\]"):
        effuse.distill(pruned(), other, data(), progress=False)


@pytest.mark.parametrize("nothing", [[], lambda model: None], ids=["list", "run"])
def test_no_data(nothing):
    with pytest.raises(CalibrationError, match="yielded nothing"):
        effuse.distill(pruned(), teacher(), nothing, progress=False)


def test_data_that_do_not_fit():
    with pytest.raises(InputError, match="data: expected input mappings"):
        effuse.distill(pruned(), teacher(), [torch.ones(2)], progress=False)
    with pytest.raises(InputError, match="prompt: missing"):
        given = {n: v for n, v in inputs().items() if n != "prompt"}
        effuse.distill(pruned(), teacher(), [given], progress=False)


def test_students_that_cannot_be_trained():
    with pytest.raises(ConfigError, match=r"student: expected a Program.*came Net"):
        effuse.distill(Net().eval(), teacher(), data(), progress=False)
    values = {"sample": torch.ones(2, 4, dtype=torch.bfloat16)}
    short = capture(Plain().eval().bfloat16(), values)
    quantized = run_passes(capture(Plain().eval(), {"sample": torch.ones(2, 4)}),
                           (Quantize("w8a8", activations="dynamic", edges=True),))  # fmt: skip
    with pytest.raises(ConfigError, match="distill first, and quantize what it gives"):
        effuse.distill(quantized, quantized, [{"sample": torch.ones(2, 4)}], progress=False)
    with pytest.raises(ConfigError, match=r"device: expected 'cpu' or .*, came 'xpu:99'"):
        effuse.distill(pruned(), teacher(), data(), device="xpu:99", progress=False)
    with pytest.raises(ConfigError, match="float32, came bfloat16"):
        effuse.distill(short, short, [values], progress=False)
    made = compiled()
    onnx = effuse.Compiled(made.session, {**made.manifest, "backend": "onnx"}, made.folder)
    with pytest.raises(ConfigError, match="compiled for 'reference', came one for 'onnx'"):
        effuse.distill(onnx, teacher(), data(), progress=False)


# ---- samplers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_ddim_is_diffusers(kind, clip):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type=kind, clip_sample=clip)
    scheduler.set_timesteps(5)
    step = sampler(scheduler, scheduler.timesteps.tolist())
    latent, prediction = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for index, time in enumerate(scheduler.timesteps):
        expected = scheduler.step(prediction, time, latent).prev_sample
        torch.testing.assert_close(step(latent, prediction, index), expected)
        latent = expected


def test_euler_is_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    step = sampler(scheduler, scheduler.timesteps.tolist())
    latent, prediction = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    for index, time in enumerate(scheduler.timesteps):
        expected = scheduler.step(prediction, time, latent).prev_sample
        torch.testing.assert_close(step(latent, prediction, index), expected)
        latent = expected


def test_samplers_without_a_scheduler():
    latent, noise = torch.tensor([0.5]), torch.tensor([1.0])
    assert torch.equal(
        sampler(None, [1.0, 0.5])(latent, noise, 1), euler([1, 0.5, 0])(latent, noise, 1)
    )
    assert sampler(None, [999.0, 0.0])(latent, noise, 1).isfinite()
    with pytest.raises(ConfigError, match="prediction_type 'flow'"):
        ddim([0.5], "flow")


@few
@given(st.lists(st.floats(0.01, 0.99), min_size=1, max_size=6), st.integers(0, 99))
def test_ddim_with_the_true_noise_ends_at_the_picture(alphas, seed):
    clean, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed)).double()
    step = ddim(alphas)
    latent = alphas[0] ** 0.5 * clean + (1 - alphas[0]) ** 0.5 * noise
    for index in range(len(alphas)):
        latent = step(latent, noise, index)
    torch.testing.assert_close(latent, clean)


# ---- the pass ------------------------------------------------------------------------------------


class Removal(Pass):
    """Stands where Prune does: leaves one branch out."""

    name = "removal"
    exact = False

    def run(self, program, work):
        work.log.spend("remove")
        return remove(program, "blocks.0.down")


def rewritten(*passes, **options):
    from effuse.calibrate import calibrate, drive, layer_values

    def sample(program, watch):
        drive(program, data(16), watch)

    def measure(program):
        return calibrate(program, data(4), layer_values)

    return run_passes(teacher(), passes, measure, drive=sample, **options)


def test_the_pass_recovers_what_the_one_before_has_cost():
    made = rewritten(Removal(), Distill(steps=80, rate=5e-3, ema=0.95), Hoist())
    removal, distill, hoist = made.records
    assert distill.sqnr_db > removal.sqnr_db + 3
    assert hoist.sqnr_db == pytest.approx(distill.sqnr_db, abs=0.5)
    assert distill.rewrites == {"train": 1} and "80 updates" in distill.notes[0]
    assert distill.options["steps"] == 80 and "resume" not in distill.options


def test_the_record_holds_the_course_of_the_training():
    made = rewritten(Removal(), Distill(steps=80, rate=5e-3, ema=0.95))
    data = made.records[-1].to_json()["data"]
    assert data["updates"] == list(range(81)) and data["updates_total"] == 80
    assert data["loss"][-1] < data["loss"][0] / 2
    assert data["after"] < data["before"] < 1
    assert json.loads(json.dumps(data)) == data


def trained(losses, *ratios):
    history = tuple(Entry(n, 1e-3, loss, 0.0, loss, 0.0) for n, loss in enumerate(losses))
    before, after = (Quality(losses[0] if losses else 1.0, ratio) for ratio in ratios)
    return Trained(
        {}, history, before, after, match_features(Network(teacher()), Network(teacher()))
    )


@pytest.mark.parametrize(("count", "points"), [(0, 1), (7, 8), (199, 200), (5000, 200)])
def test_the_course_has_at_most_200_points_from_the_first_to_the_last(count, points):
    found = trained([2.0] * count, 20.0, 40.0)
    data = course(found)
    assert (data["updates"][0], data["updates"][-1], data["updates_total"]) == (0, count, count)
    assert len(data["updates"]) == len(data["loss"]) == points
    assert (data["before"], data["after"]) == (0.1, 0.01)
    assert data["loss"][-1] == pytest.approx(smoothed(found.history, found.before.loss))


def test_the_course_of_a_training_that_broke_is_json():
    data = course(trained([1.0, math.nan], -200.0, 200.0))
    assert data["loss"] == [1.0, 1.0, None] and data["before"] is None and data["after"] == 1e-10


def test_the_pass_stands_before_quantization():
    made = rewritten(Removal(), Distill(steps=20, rate=5e-3, ema=0.9), Hoist(), Quantize("w8a8"))
    assert made.records[-1].sqnr_db > made.records[0].sqnr_db
    config = effuse.Config(passes=(Quantize(), Hoist(), Distill(steps=3)))
    assert [each.name for each in config.passes] == ["distill", "hoist", "quantize"]


def test_the_pass_alone_is_refused():
    with pytest.raises(PassError, match=r"nothing to recover: .* put Prune before it"):
        rewritten(Distill())
    with pytest.raises(PassError, match="has neither here"):
        run_passes(teacher(), (Removal(), Distill()))
    with pytest.raises(ConfigError, match="steps=0: at least 1"):
        Distill(steps=0)


def test_the_pass_changes_layers_that_are_wanted():
    made = rewritten(
        Removal(), Distill(steps=3, rate=1e-3, include=("blocks.*",), exclude=("*.q",))
    )
    changed = {n for n, each in pruned().weights.items() if not torch.equal(each, made.weights[n])}
    assert "blocks.0.k.weight" in changed and "blocks.0.q.weight" not in changed
    assert all(name.startswith("blocks.") for name in changed)
    with pytest.raises(ConfigError, match="let include and exclude leave some"):
        rewritten(Removal(), Distill(include=("nowhere",)))


def test_without_fuel_the_pass_leaves_the_weights():
    made = rewritten(Removal(), Distill(steps=3), fuel=1)
    assert equal(dict(made.weights), dict(pruned().weights))


def test_calls_that_repeat_are_kept_once():
    listener = Listener()
    for each in (inputs(0), inputs(0, time=100.0)):
        listener.begin(each, None)
    first, second = (call.values for call in listener.calls)
    assert first["prompt"] is second["prompt"] and first["timestep"] is not second["timestep"]
