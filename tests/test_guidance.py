"""Guided calls on fewer rows: the picture is the plan's, and no row depends on its neighbours."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effuse
from effuse.errors import CalibrationError, ConfigError, EffuseError, PassError
from effuse.guidance import cosines
from effuse.passes import Cache, Guidance, Hoist, Quantize
from effuse.passes.guidance import Seen, estimated_errors, fit_affine, fit_step
from effuse.plan import Guide, Plan, spec_from_json, to_json

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
STEPS = len(TIMES)


class Net(nn.Module):
    """The prompt's share of the noise shrinks with the timestep, so each picture crosses once."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.leave = nn.Conv2d(4, 3, 3, padding=1)

    def parts(self, sample, timestep, prompt):
        entered = self.enter(sample)
        return entered, self.body(F.silu(entered)), timestep.float() / 1000 * prompt.mean(1)

    def finish(self, entered, body, told):
        return self.leave(entered + body) + told[:, :, None, None]

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        return (self.finish(*self.parts(sample, timestep, encoder_hidden_states)),)


class Scaled(nn.Module):
    """ε_∅ is ε_c divided by what the prompt says: an affine estimate can be exact."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        scale = 1 + encoder_hidden_states.mean((1, 2))[:, None, None, None]
        return (torch.tanh(self.body(sample)) * scale * (1 + timestep.float() / 1000),)


class Mixing(Net):
    """Rows of a batch depend on each other."""

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        (noise,) = super().forward(sample, timestep, encoder_hidden_states)
        return (noise - noise.mean(0, keepdim=True),)


class Blocks(Net):
    """A stream of equal blocks, the first of which tells what a Cache with a threshold may do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
                                    for _ in range(3))  # fmt: skip

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        entered, _, told = self.parts(sample, timestep, encoder_hidden_states)
        tokens = entered.flatten(2).transpose(1, 2)
        for one, other in self.blocks:
            tokens = tokens + torch.tanh(one(tokens))
            tokens = tokens + F.relu(other(tokens))
        body = tokens.transpose(1, 2).unflatten(2, (8, 8))
        return (self.leave(body) + told[:, :, None, None],)


class Folded(Net):
    """A block works on another axis 0 than the batch."""

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        entered, _, told = self.parts(sample, timestep, encoder_hidden_states)
        folded = torch.cat([entered, entered], 2).reshape(-1, 4, 8, 8)
        body = self.body(folded).unflatten(0, (-1, 2))
        return (self.finish(entered, body.mean(1), told),)


class Promptless(nn.Module):
    def forward(self, sample, timestep, return_dict=True):
        return (sample * timestep.float(),)


def prompts(*strengths, seed=1):
    """(pictures, 2, 3): the stronger, the later γ reaches a threshold."""
    directions = torch.randn(len(strengths), 2, 3, generator=torch.Generator().manual_seed(seed))
    return F.normalize(directions, dim=2) * torch.tensor(strengths)[:, None, None]


def noise(pictures, seed=0):
    return torch.randn(pictures, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def steps_of(told, x, first=0, first_half="free"):
    """A pipeline with guidance: yields what to call the network with, is sent its output."""
    order = slice(None) if first_half == "free" else slice(None, None, -1)
    states = torch.cat([torch.zeros_like(told), told][order])
    for time in TIMES[first:]:
        found = yield {
            "sample": torch.cat([x, x]),
            "timestep": torch.tensor(time),
            "encoder_hidden_states": states,
        }
        free, cond = found.chunk(2)[order]
        x = x - 0.05 * (free + 3 * (cond - free))
    yield x


def sampled(model, told, x=None, first=0, first_half="free"):
    """The picture that the pipeline makes with the model."""
    run = steps_of(told, noise(len(told)) if x is None else x, first, first_half)
    call = next(run)
    while isinstance(call, dict):
        call = run.send(model(**call, return_dict=False)[0])
    return call


def build(net, *passes, backend="reference", dynamic=None, batch=4, **options):
    inputs = {
        "sample": noise(batch, seed=3),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": prompts(*[1.0] * batch),
        "return_dict": False,
    }
    if isinstance(net, Promptless):
        del inputs["encoder_hidden_states"]
    options = {"schedule": TIMES, **options}
    open_batch = {"batch": (1, 8)} if dynamic is None else dynamic
    config = effuse.Config(passes=passes, backend=backend, dynamic=open_batch)
    return effuse.compile(net, config, inputs=inputs, progress=False, **options)


def fresh(compiled, guide=...):
    """A Session on the same graphs that has seen nothing, with another guide in its plan."""
    spec = compiled.session.spec
    if guide is not ...:
        spec = replace(spec, plan=replace(spec.plan, guidance=guide))
    return type(compiled.session)(spec, compiled.session._runs, compiled.session.arrays)


def saved_rows(session, pictures):
    """Rows left out, of those of `pictures` that went through the schedule."""
    assert session.rows["requested"] == 2 * pictures * STEPS
    return session.rows["requested"] - session.rows["evaluated"]


def close(found, expected):
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def scaled():
    torch.manual_seed(0)
    return Scaled().eval()


@pytest.fixture(scope="module")
def adaptive(net):
    return build(net, Hoist(), Guidance(threshold=0.95))


@pytest.fixture(scope="module")
def cached(net):
    cache = Cache(at=("body",), interval=3, order=1, warmup=2)
    return build(net, Hoist(), cache, Guidance(threshold=0.95))


@pytest.fixture(scope="module")
def affine(scaled):
    def calibration(model):
        for seed in (5, 6):
            sampled(model, torch.full((2, 2, 3), 0.5), noise(2, seed))

    return build(scaled, Hoist(), Guidance(mode="affine"), calibration=calibration)


TOLD = prompts(0.5, 2.0, 8.0)


def crossing_steps(net, told, threshold, x=None):
    """The definition: each picture by itself, both rows until γ, then the conditional one."""
    x = noise(len(told)) if x is None else x
    crossed, results = [], []
    for prompt, latent in zip(told, x, strict=True):
        when = STEPS
        run = steps_of(prompt[None], latent[None])
        call = next(run)
        for index in range(STEPS):
            with torch.no_grad():
                (found,) = net(**call)
            free, cond = found.double().flatten(1)
            if index > when:
                found = torch.cat([found[1:], found[1:]])
            elif float(free @ cond / (free.norm() * cond.norm())) >= threshold:
                when = index
            call = run.send(found)
        crossed.append(when)
        results.append(call)
    return crossed, torch.cat(results)


# ---- adaptive ------------------------------------------------------------------------------------


def test_a_threshold_above_one_is_plain_guidance_to_the_bit(adaptive):
    plain, never = fresh(adaptive, None), fresh(adaptive, Guide("batch", threshold=1.01))
    assert torch.equal(sampled(plain, TOLD), sampled(never, TOLD))
    assert saved_rows(never, 3) == 0


def test_equal_halves_are_cut_after_the_first_step_and_change_nothing(adaptive):
    told = prompts(0.0, 0.0)
    session = fresh(adaptive)
    close(sampled(session, told), sampled(fresh(adaptive, None), told))
    assert saved_rows(session, 2) == 2 * (STEPS - 1)


def test_pictures_cross_at_different_steps_as_the_definition_says(net, adaptive):
    crossed, expected = crossing_steps(net, TOLD, 0.95)
    assert len(set(crossed)) == 3 and min(crossed) < STEPS - 1
    session = fresh(adaptive)
    close(sampled(session, TOLD), expected)
    assert saved_rows(session, 3) == sum(max(0, STEPS - 1 - when) for when in crossed)


def test_a_picture_is_the_same_alone(adaptive):
    together = sampled(fresh(adaptive), TOLD)
    for row in range(3):
        session = fresh(adaptive)
        alone = sampled(session, TOLD[row : row + 1], noise(3)[row : row + 1])
        close(together[row : row + 1], alone)


def test_until_the_first_crossing_nothing_changes_to_the_bit(net, adaptive):
    crossed, _ = crossing_steps(net, TOLD, 0.95)
    runs = [steps_of(TOLD, noise(3)) for _ in range(2)]
    sessions = [fresh(adaptive), fresh(adaptive, None)]
    calls = [next(run) for run in runs]
    for index in range(STEPS):
        found = [s(**call)[0] for s, call in zip(sessions, calls, strict=True)]
        assert torch.equal(*found) == (index <= min(crossed))
        calls = [run.send(each) for run, each in zip(runs, found, strict=True)]


def test_the_conditional_half_may_come_first(net):
    compiled = build(net, Guidance(threshold=0.95, order="cond-first"))
    session = fresh(compiled)
    crossed, expected = crossing_steps(net, TOLD, 0.95)
    close(sampled(session, TOLD, first_half="told"), expected)
    assert saved_rows(session, 3) == sum(max(0, STEPS - 1 - when) for when in crossed)


def test_from_the_middle_both_halves_run_first(net, adaptive):
    session, weak = fresh(adaptive), prompts(0.1)
    sampled(session, weak, first=5)
    assert session.rows == {"requested": 10, "evaluated": 2 + 4}
    restart = fresh(adaptive)
    close(sampled(restart, weak), once := sampled(restart, weak))
    assert restart.rows["evaluated"] == 2 * (2 + (STEPS - 1))
    close(once, crossing_steps(net, weak, 0.95)[1])


def test_gamma_counts_from_the_step_before_start(adaptive):
    told = prompts(0.0, 0.0)
    session = fresh(adaptive, Guide("batch", threshold=0.95, start=4))
    sampled(session, told)
    assert saved_rows(session, 2) == 2 * (STEPS - 4)
    late = fresh(adaptive, Guide("batch", threshold=0.95, start=STEPS - 1))
    sampled(late, told)
    assert saved_rows(late, 2) == 2


def test_interleaved_pictures_keep_their_own_state(adaptive):
    pictures = [(prompts(0.5), noise(1, seed=7)), (prompts(6.0, seed=2), noise(1, seed=8))]
    alone = [sampled(fresh(adaptive), *each) for each in pictures]
    runs, session = [steps_of(*each) for each in pictures], fresh(adaptive)
    calls = [next(run) for run in runs]
    for _ in range(STEPS):
        calls = [run.send(session(**call)[0]) for run, call in zip(runs, calls, strict=True)]
    for found, expected in zip(calls, alone, strict=True):
        close(found, expected)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_a_batch_without_two_equal_halves_runs_as_it_is(net, adaptive, rows):
    session, x, told = fresh(adaptive), noise(rows, seed=2), prompts(*[0.0] * rows)
    for time in TIMES:
        call = {"sample": x, "timestep": torch.tensor(time), "encoder_hidden_states": told}
        with torch.no_grad():
            close(session(**call)[0], net(**call)[0])
    assert saved_rows(session, rows / 2) == 0


def test_numpy_calls_keep_their_shape_and_kind(adaptive):
    session, run = fresh(adaptive), steps_of(prompts(0.1, 0.1), noise(2))
    call = next(run)
    for _ in range(3):
        found = session(**{name: value.numpy() for name, value in call.items()})[0]
        assert type(found) is np.ndarray and found.shape == (4, 3, 8, 8)
        call = run.send(torch.from_numpy(found))
    assert session.rows["evaluated"] == 4 + 2 + 2


def test_a_caller_that_writes_into_the_output_changes_no_state(affine):
    told, expected = torch.full((1, 2, 3), 0.5), []
    for spoil in (False, True):
        session, run = fresh(affine), steps_of(told, noise(1))
        call = next(run)
        for _ in range(STEPS):
            found = session(**call)[0]
            call = run.send(found.clone())
            found.mul_(0 if spoil else 1)
        expected.append(call)
    assert torch.equal(*expected)


# ---- with Cache ----------------------------------------------------------------------------------


def cached_definition(net, plan, told, threshold):
    """The plan, row by row: what each row's body gave at the sources, combined by the weights."""
    x, crossed = noise(len(told)), [STEPS] * len(told)
    states = torch.cat([torch.zeros_like(told), told])
    bodies = {}
    for index, time in enumerate(TIMES):
        step = plan.at(index)
        entered, body, add = net.parts(torch.cat([x, x]), torch.tensor(time), states)
        if step.sources:
            weights = step.weights[: len(step.sources)] or (1.0,)
            body = sum(w * bodies[s] for w, s in zip(weights, step.sources, strict=True))
        bodies[index] = body
        free, cond = net.finish(entered, body, add).chunk(2)
        gone = torch.tensor([when < index for when in crossed])[:, None, None, None]
        free = torch.where(gone, cond, free)
        for row, cosine in enumerate(F.cosine_similarity(free.flatten(1), cond.flatten(1))):
            crossed[row] = min(crossed[row], index if cosine >= threshold else STEPS)
        x = x - 0.05 * (free + 3 * (cond - free))
    return crossed, x


def test_slots_are_reduced_with_the_rows(net, cached):
    plan = cached.session.spec.plan
    assert {len(step.sources) for step in plan.steps} == {0, 2}
    with torch.no_grad():
        crossed, expected = cached_definition(net, plan, TOLD, 0.95)
    assert len(set(crossed)) == 3
    session = fresh(cached)
    close(sampled(session, TOLD), expected)
    assert saved_rows(session, 3) == sum(max(0, STEPS - 1 - when) for when in crossed)
    assert session.steps["reuse"] == sum(bool(step.sources) for step in plan.steps)


def test_quantized_rows_stay_apart(net):
    quantize = Quantize("w8a8", activations="dynamic", min_sqnr_db=0, edges=True)
    compiled = build(net, Hoist(), quantize, Guidance(threshold=0.95))
    assert compiled.manifest["layers"]
    together, rest = sampled(session := fresh(compiled), TOLD), noise(3)
    assert saved_rows(session, 3) > 0
    for row in range(3):
        alone = sampled(fresh(compiled), TOLD[row : row + 1], rest[row : row + 1])
        assert F.mse_loss(alone, together[row : row + 1]) < 1e-4


def test_a_cache_that_decides_at_run_time_decides_for_the_rows_that_are_left():
    torch.manual_seed(0)
    cache = Cache(mode="residual", threshold=0.3, warmup=1)
    compiled = build(Blocks().eval(), Hoist(), cache, Guidance(threshold=0.95))
    together, x = sampled(session := fresh(compiled), TOLD), noise(3)
    assert saved_rows(session, 3) > 0
    assert 0 < session.steps["full"] < STEPS
    for row in range(3):
        close(sampled(fresh(compiled), TOLD[row : row + 1], x[row : row + 1]), together[row, None])


def test_slots_with_another_axis_0_than_the_batch_are_refused():
    with pytest.raises(PassError, match="Guidance with Cache needs slots with the batch on axis 0"):
        build(Folded().eval(), Cache(at=("body",), order=0), Guidance())


# ---- affine --------------------------------------------------------------------------------------


def linear_trajectory(coefficients, length=200, seed=0):
    """Seen steps whose ε_∅ follows the affine rule from step 1 on."""
    random = np.random.default_rng(seed)
    last = Seen(0, None, random.normal(size=(2, length)), random.normal(size=(2, length)))
    seen = [last]
    for index, (a, b, c, d) in enumerate(coefficients, start=1):
        told = random.normal(size=(2, length))
        free = a * told + b * last.told + c * last.free + d
        last = Seen(index, None, told, free, last)
        seen.append(last)
    return seen


def test_least_squares_recover_the_coefficients_of_a_linear_trajectory():
    truth = [(0.9, 0.2, -0.1, 0.05), (1.2, -0.5, 0.3, 0.0), (0.5, 0.0, 0.5, -1.0)]
    seen = linear_trajectory(truth) + linear_trajectory(truth, seed=1)
    fits = [fit_step(seen, index) for index in (1, 2, 3)]
    for fit, expected in zip(fits, truth, strict=True):
        assert fit.coefficients == pytest.approx(expected, abs=1e-9)
        assert fit.r2 == pytest.approx(1.0)
    guide = Guide("batch", start=1, affine=tuple(fit.coefficients for fit in fits))
    assert max(estimated_errors(seen, guide).values()) < 1e-9


def test_what_cannot_be_told_lowers_r2():
    random = np.random.default_rng(0)
    told, before, free, rest = random.normal(size=(4, 20000))
    fit = fit_affine(told, before, free, told + rest)
    assert fit.r2 == pytest.approx(0.5, abs=0.02)
    assert fit_affine(told, before, free, np.zeros(20000)).r2 == 1.0


def test_an_estimate_that_can_be_exact_changes_no_picture(affine):
    told = torch.full((3, 2, 3), 0.5)
    session = fresh(affine)
    close(sampled(session, told), sampled(fresh(affine, None), told))
    assert saved_rows(session, 3) == 3 * (STEPS - STEPS // 2)
    guide = affine.session.spec.plan.guidance
    assert guide.start == 5 and len(guide.affine) == 5
    notes = affine.manifest["passes"][-1]["notes"]
    assert len(notes) == 5 and notes[0].startswith("step 5: R² 1.000000; the estimate is off by 0.")


def test_the_estimate_is_the_affine_rule(affine):
    made_up = (0.5, 0.25, -0.125, 0.0625)
    session = fresh(affine, Guide("batch", start=2, affine=(made_up,)))
    run = steps_of(torch.full((1, 2, 3), 2.0), noise(1))
    call, found = next(run), []
    for _ in range(4):
        found.append(session(**call)[0])
        call = run.send(found[-1])
    (_, (free, before), (estimate, told), last) = found
    expected = 0.5 * told + 0.25 * before - 0.125 * free + 0.0625
    close(estimate, expected)
    assert session.rows == {"requested": 8, "evaluated": 7}  # step 3 has no coefficients
    assert not torch.equal(*last)


def test_an_estimate_needs_the_step_before(affine):
    told, x = torch.full((1, 2, 3), 0.5), noise(1)
    session = fresh(affine)
    close(sampled(session, told, x, first=7), sampled(fresh(affine, None), told, x, first=7))
    assert session.rows == {"requested": 6, "evaluated": 4}
    session.reset()
    call = next(steps_of(told, x, first=8))
    assert torch.equal(session(**call)[0], fresh(affine, None)(**call)[0])


def test_a_second_evaluation_of_a_step_runs_both_halves(affine):
    told, session = torch.full((1, 2, 3), 0.5), fresh(affine)
    run = steps_of(told, noise(1))
    call = next(run)
    for _ in range(6):
        found = session(**call)[0]
        again = {**call, "sample": call["sample"] + 0.001}
        call = run.send(found)
    assert session.rows == {"requested": 12, "evaluated": 11}
    close(session(**again)[0], fresh(affine, None)(**again)[0])
    assert session.rows == {"requested": 14, "evaluated": 13}


def test_affine_needs_a_calibration_with_guidance(scaled):
    with pytest.raises(CalibrationError, match=r"never ran step 5 after step 4 on two halves"):
        build(scaled, Guidance(mode="affine"))


# ---- the plan, and what is refused ---------------------------------------------------------------


def test_the_plan_says_it_in_its_first_line(adaptive, affine):
    assert adaptive.plan.splitlines() == [
        "guidance: conditional rows only, once cos(ε_c, ε_∅) reached 0.95",
        "every step: full",
    ]
    first = "guidance: conditional rows only, from step 5 on; the others estimated"
    assert affine.plan.splitlines()[0] == first
    assert Plan().lines() == ["every step: full"]


def test_the_guide_survives_json(adaptive, affine, cached):
    for compiled in (adaptive, affine, cached):
        spec = compiled.session.spec
        assert spec.plan.guidance is not None
        assert spec_from_json(json.loads(json.dumps(to_json(spec)))) == spec


def test_onnx_saved_and_loaded(net, tmp_path):
    compiled = build(net, Hoist(), Guidance(threshold=0.95), backend="onnx")
    crossed, expected = crossing_steps(net, TOLD, 0.95)
    loaded = effuse.load(compiled.save(tmp_path / "net.effuse"))
    close(sampled(loaded, TOLD), expected)
    left_out = sum(max(0, STEPS - 1 - when) for when in crossed)
    assert saved_rows(loaded.session, 3) == left_out > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "adaptiv"}, "mode='adaptiv' is unknown; did you mean 'adaptive'"),
        ({"order": "uncond"}, "order='uncond' is unknown; did you mean 'uncond-first'"),
        ({"threshold": 0}, "threshold=0: expected a cosine above 0"),
        ({"threshold": float("nan")}, "threshold=nan: expected"),
        ({"threshold": float("inf")}, "threshold=inf: expected"),
        ({"threshold": "0.9"}, "threshold='0.9': expected"),
        ({"start": 0}, "start=0: expected a step from 1 on"),
        ({"start": 2.5}, "start=2.5: expected a step"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Guidance(**options)


@pytest.mark.parametrize(
    ("kind", "build_options", "message"),
    [
        (Net, {"dynamic": {}}, r'batch is open: compile with Config\(dynamic={"batch": \(1, 4\)}'),
        (Net, {"dynamic": {"batch": (3, 8)}}, r"half of 4 rows has 2, and the batch is 3 to 8"),
        (Net, {"schedule": None}, "the steps have to be known"),
        (Promptless, {}, "takes no prompt, so there is no guidance to save"),
        (Mixing, {}, "rows of a batch depend on each other"),
    ],
)
def test_programs_without_guidance_to_save_are_refused(kind, build_options, message):
    with pytest.raises(PassError, match=message):
        build(kind().eval(), Guidance(), **build_options)


def test_rows_that_depend_on_each_other_are_found_behind_lossy_passes():
    with pytest.raises(PassError, match="rows of a batch depend on each other"):
        build(Mixing().eval(), Cache(at=("body",), order=0), Guidance())


def test_a_start_behind_the_schedule_is_refused(scaled):
    with pytest.raises(EffuseError, match="start=10: the schedule has the steps 0 to 9"):
        build(scaled, Guidance(mode="affine", start=10))


def test_the_cosine_is_at_most_one_and_of_zeros_none():
    rows = np.random.default_rng(0).normal(size=(50, 3, 8, 8)).astype(np.float32)
    assert cosines(rows, rows).max() <= 1.0 and cosines(rows, rows).min() > 1 - 1e-12
    assert cosines(rows, -rows).max() < -1 + 1e-12
    assert cosines(0 * rows, rows).tolist() == [0.0] * 50
