"""Reuse decided at run time, picture by picture: First-Block Cache and TeaCache."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import effuse
from effuse.arrays import NumpyArrays
from effuse.backends.reference import TorchArrays, session
from effuse.calibrate import drive
from effuse.capture import capture
from effuse.config import Config
from effuse.decision import Memory, changes, decide, totals
from effuse.errors import ConfigError, PassError
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist
from effuse.passes.signals import fitted_polynomial
from effuse.plan import Decision, Plan, PlanStep, Slot, spec_from_json, to_json

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

STEPS, WARMUP = 10, 2
TIMES = tuple(float(time) for time in range(10 * STEPS, 0, -10))
MIDDLE = STEPS - WARMUP - 1  # steps that are decided on
NEVER, ALWAYS = 1e9, 0.0  # thresholds: what is less than this is reused


class Block(nn.Module):
    """Two gated residual branches; a constant one adds the same to every latent."""

    def __init__(self, width, constant):
        super().__init__()
        self.gate, self.one, self.other = (
            draw(width, 2 * width),
            draw(width, width),
            draw(width, width),
        )
        self.constant = constant

    def forward(self, h, c):
        one, other = dense(c[:, None], self.gate).chunk(2, dim=-1)
        scale, shift = (0.0, 0.5) if self.constant else (1.0, 0.0)
        h = h + one * torch.tanh(dense(h, self.one)) * scale + shift
        return h + other * torch.relu(dense(h, self.other)) * scale + shift


class Tiny(nn.Module):
    """A DiT on 2 x 2 patches of an 8 x 8 latent whose rows are computed each for itself."""

    def __init__(self, width=4, blocks=3, folded=False, constant=False):
        super().__init__()
        self.enter, self.leave, self.label = draw(16, width), draw(width, 16), draw(3, width)
        self.blocks = nn.ModuleList(Block(width, constant and not n) for n in range(blocks))
        self.folded = folded

    def forward(self, sample, timestep, prompt):
        batch = sample.shape[0]
        h = sample.reshape(batch, 2, 4, 2, 4).transpose(2, 3).reshape(batch, 4, 16)
        h = dense(h, self.enter)
        phase = timestep.float().reshape(-1, 1) * torch.arange(1, 5) / 100
        c = torch.sin(phase) + dense(prompt[:, None], self.label)[:, 0]
        if self.folded:
            h, c = h.reshape(batch * 2, 2, -1), c.repeat_interleave(2, 0)
        for block in self.blocks:
            h = block(h, c)
        h = dense(h.reshape(batch, 4, -1), self.leave)
        return h.reshape(batch, 2, 2, 4, 4).transpose(2, 3).reshape(sample.shape)


def draw(*shape):
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[0]))


def dense(x, weight):
    """A matrix product for each row, so that a row's bits do not depend on the batch."""
    return torch.bmm(x, weight.expand(x.shape[0], *weight.shape))


def inputs(batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 1, 8, 8, generator=generator),
        "timestep": torch.tensor(TIMES[1]),
        "prompt": torch.randn(batch, 3, generator=generator),
    }


def program(*caches, batch=2, drive=None, **options):
    torch.manual_seed(0)
    net = Tiny(**options).eval().requires_grad_(False)
    captured = capture(net, inputs(batch), timesteps=TIMES, dynamic={"batch": (1, 4)})
    return run_passes(captured, (Canonicalize(), Hoist(), *caches), drive=drive)


def cache(threshold, **options):
    return Cache(mode="residual", threshold=threshold, warmup=WARMUP, **options)


def latents(seed, batch=1, steps=STEPS):
    """A trajectory from noise to a picture: (steps, batch, 1, 8, 8)."""
    generator = torch.Generator().manual_seed(seed)
    noise, picture = (torch.randn(batch, 1, 8, 8, generator=generator) for _ in range(2))
    shares = torch.linspace(1, 0.1, steps)
    return torch.stack([share * noise + (1 - share) * picture for share in shares])


def sample(call, xs, prompt):
    """The network's outputs along a trajectory."""
    found = [
        call(sample=x, timestep=time, prompt=prompt) for x, time in zip(xs, TIMES, strict=True)
    ]
    return torch.stack([torch.as_tensor(each) for each in found])


def pictures(*seeds):
    """Trajectories and prompts of some pictures as one batch."""
    prompts = torch.cat([inputs(1, seed)["prompt"] for seed in seeds])
    return torch.cat([latents(seed) for seed in seeds], dim=1), prompts


@pytest.fixture(scope="module")
def plain():
    return program()


@pytest.fixture(scope="module")
def decided():
    """Programs by threshold and options: one built, the decision in its plan changed."""
    built = program(cache(0.1))

    def get(threshold, **options):
        decision = replace(built.plan.decision, threshold=threshold, **options)
        return replace(built, plan=replace(built.plan, decision=decision))

    return get


# ---- the pass ------------------------------------------------------------------------------------


def test_the_plan_says_what_is_decided_on(decided):
    plan = decided(0.1).plan
    lines = plan.lines(TIMES)
    (slot,) = plan.slots
    signal = plan.decision.signal
    assert slot.depth == 1 and signal != slot.name
    assert lines[0] == f"step   0 t=100: full  fills {slot.name}"
    assert lines[2] == f"step   2 t=80: reuse  reads {slot.name}, unless {signal} changed by 0.1"
    assert lines[-1] == "step   9 t=10: full"
    for part in decided(0.1).variants:
        assert signal in part.outputs


def test_the_plan_survives_json():
    spec = program(cache(0.25, accumulate=True, polynomial=(2.0, 0.0, 1.0))).spec()
    assert spec.plan.decision.polynomial == (2.0, 0.0, 1.0)
    assert spec_from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_options_come_through_a_config():
    options = {"name": "cache", "mode": "residual", "threshold": 0.1, "accumulate": True}
    (fitted,) = Config(passes=[{**options, "polynomial": "fitted"}]).passes
    (given,) = Config(passes=[{**options, "polynomial": [1, 0.5]}]).passes
    assert fitted.polynomial == "fitted" and given.polynomial == (1.0, 0.5)


@pytest.mark.parametrize(("options", "message"), [
    ({"threshold": -0.1}, "threshold=-0.1: expected a number, at least 0"),
    ({"threshold": math.nan}, "threshold=nan"),
    ({"threshold": math.inf}, "threshold=inf"),
    ({"threshold": 0.1, "mode": "block"}, 'belongs to mode="residual"'),
    ({"threshold": 0.1, "at": ("blocks.0",)}, 'belongs to mode="residual"'),
    ({"accumulate": True}, "belong to a threshold"),
    ({"polynomial": (1.0, 0.0)}, "belong to a threshold"),
    ({"threshold": 0.1, "polynomial": (1.0, 0.0)}, "needs accumulate=True"),
    ({"threshold": 0.1, "accumulate": True, "polynomial": "fited"}, "did you mean 'fitted'"),
])  # fmt: skip
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Cache(**{"mode": "residual", **options})


def test_rows_that_are_no_pictures_are_refused():
    with pytest.raises(PassError, match="one row a picture"):
        program(cache(0.1), folded=True)


def test_too_few_steps_to_decide_on(plain):
    found = program(Cache(mode="residual", threshold=0.1, warmup=STEPS))
    assert not found.plan.slots and found.plan.decision is None
    assert "nothing is reused" in found.records[-1].notes[0]


# ---- when the network runs -----------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [False, True])
def test_threshold_0_is_the_program_without_a_cache(plain, decided, accumulate):
    xs, prompt = pictures(1, 2)
    call = session(decided(ALWAYS, accumulate=accumulate))
    assert torch.equal(sample(call, xs, prompt), sample(session(plain), xs, prompt))
    assert call.steps == {"full": STEPS, "reuse": MIDDLE}


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_huge_threshold_computes_warmup_and_the_last_step(plain, decided, accumulate):
    xs, prompt = pictures(1, 2)
    call = session(decided(NEVER, accumulate=accumulate))
    found, expected = sample(call, xs, prompt), sample(session(plain), xs, prompt)
    assert call.steps == {"full": WARMUP + 1, "reuse": MIDDLE}
    same = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
    assert same == [True] * WARMUP + [False] * MIDDLE + [True]


def test_a_constant_signal_computes_warmup_and_the_last_step():
    call = session(program(cache(1e-6), constant=True))
    sample(call, *pictures(1))
    assert call.steps == {"full": WARMUP + 1, "reuse": MIDDLE}


def test_the_same_input_again_reuses(decided):
    call = session(decided(1e-6))
    xs, prompt = pictures(1)
    for step in (0, 1, 2, 2):
        call(sample=xs[step], timestep=TIMES[step], prompt=prompt)
    assert call.steps == {"full": 3, "reuse": 2}


def threshold_between(decided, *seeds, **options):
    """A threshold at which these pictures do not all reuse the same steps."""
    for threshold in np.geomspace(1e-3, 1, 30):
        steps = []
        for seed in seeds:
            call = session(decided(float(threshold), **options))
            sample(call, *pictures(seed))
            steps.append(call.steps["full"])
        if len(set(steps)) > 1 and min(steps) > WARMUP + 1 and max(steps) < STEPS:
            return float(threshold), steps
    raise AssertionError("no such threshold")


@pytest.mark.parametrize("accumulate", [False, True])
def test_one_picture_never_affects_another(decided, accumulate):
    threshold, _ = threshold_between(decided, 1, 2, accumulate=accumulate)
    made = decided(threshold, accumulate=accumulate)
    together = sample(session(made), *pictures(1, 2))
    for row, seed in enumerate((1, 2)):
        assert torch.equal(together[:, row : row + 1], sample(session(made), *pictures(seed)))


def test_two_calls_for_guidance_decide_each_for_itself(decided):
    threshold, _ = threshold_between(decided, 1, 2)
    (x, _), prompts = pictures(1), [inputs(1, seed)["prompt"] for seed in (1, 2)]
    call = session(decided(threshold))
    found = [[call(sample=at, timestep=time, prompt=prompt) for prompt in prompts]
             for at, time in zip(x, TIMES, strict=True)]  # fmt: skip
    for place, prompt in enumerate(prompts):
        alone = sample(session(decided(threshold)), x, prompt)
        assert torch.equal(torch.stack([each[place] for each in found]), alone)


def test_a_start_in_the_middle_computes_once_and_then_decides(decided):
    call = session(decided(NEVER))
    xs, prompt = pictures(1)
    for step in range(4, STEPS):
        call(sample=xs[step], timestep=TIMES[step], prompt=prompt)
    assert call.steps == {"full": 2, "reuse": STEPS - 6}


def test_a_picture_that_is_not_a_number_is_computed(decided):
    call = session(decided(NEVER))
    xs, prompt = pictures(1, 2)
    xs[3:, 1] = math.nan
    found = sample(call, xs, prompt)
    alone = sample(session(decided(NEVER)), *pictures(1))
    assert torch.equal(found[:3, :1], alone[:3]) and found[3:, 1].isnan().all()


def test_through_onnx(tmp_path):
    torch.manual_seed(0)
    net = Tiny().eval().requires_grad_(False)
    xs, prompt = pictures(1, 2)
    built, outputs, steps = {}, {}, {}
    for backend in ("onnx", "reference"):
        config = Config(passes=[Hoist(), cache(0.3)], backend=backend)
        built[backend] = effuse.compile(
            net, config, inputs=inputs(), schedule=TIMES, progress=False
        )
        for threshold in (ALWAYS, 0.3, NEVER):
            call = with_threshold(built[backend].session, threshold)
            outputs[backend, threshold] = sample(call, xs, prompt)
            steps[backend, threshold] = call.steps["full"]
    for threshold in (ALWAYS, 0.3, NEVER):
        one, other = (outputs[backend, threshold] for backend in built)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert steps["onnx", threshold] == steps["reference", threshold]
    assert steps["onnx", ALWAYS] == STEPS and steps["onnx", NEVER] == WARMUP + 1
    loaded = effuse.load(built["onnx"].save(tmp_path / "net.effuse"))
    arrays = sample(loaded, xs.numpy(), prompt.numpy())
    torch.testing.assert_close(arrays, outputs["onnx", 0.3], rtol=1e-6, atol=1e-6)
    assert "unless residual" in loaded.plan


def with_threshold(known, threshold):
    decision = replace(known.spec.plan.decision, threshold=threshold)
    spec = replace(known.spec, plan=replace(known.spec.plan, decision=decision))
    return type(known)(spec, known._runs, known.arrays)


# ---- the arithmetic ------------------------------------------------------------------------------


def test_changes_are_relative_to_the_signal_before():
    now = np.array([[2.0, 4.0], [0.0, 0.0], [1.0, -1.0], [math.nan, 0.0]])
    before = np.array([[1.0, 3.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    found = changes(now, before)
    assert found[:3].tolist() == [0.5, 0.0, math.inf] and math.isnan(found[3])


def test_a_polynomial_has_its_highest_power_first_and_is_clamped():
    decision = Decision("s", 1.0, accumulate=True, polynomial=(3.0, -2.0, 0.25))
    before = Memory(np.ones((3, 2)), np.array([0.0, 10.0, 1.0]))
    now = np.full((3, 2), 1.0) + np.array([[0.5], [1.0], [0.25]])
    expected = np.poly1d([3.0, -2.0, 0.25])([0.5, 1.0, 0.25])
    assert expected[2] < 0
    assert totals(decision, before, now).tolist() == [expected[0], 10 + expected[1], 1.0]


def run_decisions(decision, signals):
    """Which steps refresh, a row at a time, of a program whose output is its signal."""
    plan = Plan(slots=(Slot("slot", (1, 1), "float32"),), decision=decision)
    entry, memory, found = PlanStep("reuse", reads=("slot",)), None, []
    for signal in signals:
        given = {"s": np.array(signal, dtype=np.float32).reshape(-1, 1)}
        fresh = {**given, "slot": np.ones_like(given["s"])}
        old = {"slot_0": np.zeros_like(given["s"])}
        out, _, memory = decide(
            plan, entry, memory, old, dict(given), lambda fresh=fresh: fresh, NumpyArrays()
        )
        found.append(out["slot"].ravel().tolist() if "slot" in out else None)
    return found, memory


def test_first_block_compares_with_the_last_refresh():
    found, memory = run_decisions(Decision("s", 0.35), [[10, 10], [12, 15], [14, 16], [15, 20]])
    assert found == [None, [0, 1], [1, 0], None]
    assert memory.signal.ravel().tolist() == [14, 15]


def test_accumulate_adds_up_what_changes_from_step_to_step():
    decision = Decision("s", 0.25, accumulate=True)
    found, memory = run_decisions(decision, [[10], [11], [12.1], [13.31], [14.641]])
    assert found == [None, None, None, [1], None]  # 0.1, 0.2, 0.3, then 0.1 again
    assert memory.signal.item() == np.float32(14.641) and memory.total[0] == pytest.approx(0.1)


@pytest.mark.parametrize("arrays", [NumpyArrays(), TorchArrays()])
def test_where_picks_rows(arrays):
    one, other = (arrays.array(np.full((2, 3, 2), value, np.float32)) for value in (1, 2))
    found = np.asarray(arrays.where(np.array([True, False]), one, other))
    assert found[0].tolist() == [[1, 1]] * 3 and found[1].tolist() == [[2, 2]] * 3


# ---- fitting -------------------------------------------------------------------------------------


def test_a_fit_finds_the_polynomial_and_says_how_much_it_explains():
    x = np.linspace(0, 1, 50)
    found, explained = fitted_polynomial((x, 2 * x**4 - x + 0.5))
    assert found == pytest.approx((2, 0, 0, -1, 0.5), abs=1e-9) and explained == pytest.approx(1)
    noise = np.random.default_rng(0).normal(size=50)
    assert fitted_polynomial((x, noise))[1] < 0.5
    for pairs in ((x[:9], x[:9]), (x, np.ones(50)), (np.ones(50), x), (x[:0], x[:0])):
        assert fitted_polynomial(pairs) == ((), 0.0)


def driven(runs):
    def feed(program, watch):
        drive(program, lambda model: [sample(model, *pictures(seed)) for seed in runs], watch)

    return feed


def test_a_fitted_polynomial(decided):
    found = program(cache(0.1, accumulate=True, polynomial="fitted"), drive=driven(range(8)))
    polynomial, notes = found.plan.decision.polynomial, " ".join(found.records[-1].notes)
    assert f"{8 * (STEPS - WARMUP)} changes, R²" in notes
    assert len(polynomial) == (5 if "fitted to" in notes else 0)


def test_a_fit_that_explains_too_little_is_not_taken():
    def noise(program, watch):
        def feed(model):
            for seed in range(8):
                xs = torch.randn(STEPS, 1, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
                sample(model, xs, torch.zeros(1, 3))

        drive(program, feed, watch)

    found = program(cache(0.1, accumulate=True, polynomial="fitted"), drive=noise)
    assert found.plan.decision.polynomial == ()
    assert "too little is explained" in found.records[-1].notes[0]


def test_a_fit_needs_calibration():
    with pytest.raises(PassError, match="needs calibration"):
        program(cache(0.1, accumulate=True, polynomial="fitted"))
