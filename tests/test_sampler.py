"""Samplers as data: against the schedulers themselves, as JSON, and what they refuse."""

import json
import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effuse.errors import ArtifactError, InputError
from effuse.sampler import Row, Sampler, Term, wide
from effuse.sampler_probe import Noise, probe

STEPS = 12
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy 2 in diffusers
ROUNDING = 1e-5  # relative: float32 roundings over a picture; x0 of early steps is noise / 0.07

REFUSED = {  # of those that diffusers exports, with default configs: why
    "AmusedScheduler": "mask_token_id",
    "BlockRefinementScheduler": "too many values to unpack",
    "CogVideoXDPMScheduler": "its step takes (model_output, old_pred_original_sample, timestep",
    "CosineDPMSolverMultistepScheduler": "torchsde",
    "DDPMWuerstchenScheduler": "its step 0 raised IndexError",
    "DPMSolverSDEScheduler": "torchsde",
    "DiscreteDDIMScheduler": "it draws random numbers that are not normal",
    "EntropyBoundScheduler": "it draws random numbers that are not normal",
    "HeliosDMDScheduler": "set_timesteps raised",
    "HeliosScheduler": "set_timesteps raised",
    "KarrasVeScheduler": "its step takes (model_output, sigma_hat, sigma_prev, …)",
    "PiflowScheduler": "its step 0 raised ValueError",
    "RFD4ProteinaScheduler": "schedule_mode",
    "RePaintScheduler": "its step also needs original_image, mask",
    "SCMScheduler": "its step 2 raised IndexError",  # its last timestep is no step
    "ScoreSdeVeScheduler": "it has no method step",
    "VQDiffusionScheduler": "num_vec_classes",
}
NOISY = {
    "CMStochasticIterativeScheduler", "DDPMParallelScheduler", "DDPMScheduler",
    "EulerAncestralDiscreteScheduler", "FlowMatchLCMScheduler", "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler", "LTXEulerAncestralRFScheduler", "SASolverScheduler", "TCDScheduler",
    "UnCLIPScheduler",
}  # fmt: skip
OTHER_STEPS = {"SCMScheduler": 2}  # it takes no other number


def config(name, **options):
    return pytest.param(name, options, id=f"{name}-{'-'.join(map(str, options.values()))}")


CASES = (
    *(config("DDIMScheduler", prediction_type=kind, clip_sample=clip, timestep_spacing=spacing)
      for kind in ("epsilon", "v_prediction", "sample")
      for clip in (True, False) for spacing in ("leading", "trailing")),
    config("DDIMScheduler", clip_sample_range=2.5, beta_schedule="squaredcos_cap_v2"),
    config("DDIMScheduler", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    config("DDIMInverseScheduler"),
    config("EulerDiscreteScheduler"),
    config("EulerDiscreteScheduler", prediction_type="v_prediction", use_karras_sigmas=True),
    *(config("DPMSolverMultistepScheduler", solver_order=order, use_karras_sigmas=karras)
      for order in (1, 2, 3) for karras in (False, True)),
    config("DPMSolverMultistepScheduler", solver_type="heun"),
    config("DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    *(config("DPMSolverSinglestepScheduler", solver_order=order) for order in (2, 3)),
    config("FlowMatchEulerDiscreteScheduler", shift=3.0),
    config("FlowMatchHeunDiscreteScheduler"),
    config("PNDMScheduler"),
    config("PNDMScheduler", skip_prk_steps=True),
    *(config("UniPCMultistepScheduler", solver_order=order) for order in (1, 2, 3)),
    config("UniPCMultistepScheduler", prediction_type="flow_prediction", use_flow_sigmas=True),
    config("HeunDiscreteScheduler"),
    config("HeunDiscreteScheduler", clip_sample=True),
    config("LMSDiscreteScheduler"),
    *(config("DEISMultistepScheduler", solver_order=order) for order in (1, 2, 3)),
    config("EDMEulerScheduler"),
    config("DDPMScheduler"),
    config("LCMScheduler", clip_sample=True),
    config("SASolverScheduler"),
)  # fmt: skip


def made(name, options=None, steps=STEPS, **timing):
    scheduler = getattr(diffusers, name)(**options or {})
    scheduler.set_timesteps(steps, **timing)
    return scheduler


def predict(x, time):
    """Some network: it mixes channels and bends."""
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(5)) * 0.5
    return torch.tanh(torch.einsum("ij,bjhw->bihw", weight, x) + float(time) / 1000)


def by_scheduler(scheduler, noises):
    """Every sample of a picture, as a pipeline runs the scheduler, in float32."""
    x, drawn = noises[0] * getattr(scheduler, "init_noise_sigma", 1.0), Noise()
    found = []
    for time, noise in zip(scheduler.timesteps, noises[1:], strict=True):
        drawn.next(noise)
        shown = scheduler.scale_model_input(x, time) if hasattr(
            scheduler, "scale_model_input") else x  # fmt: skip
        output = predict(shown, time)
        with drawn:
            x = scheduler.step(output, time, x, return_dict=False)[0]
        found.append(x.numpy())
    return found


def by_sampler(sampler, noises):
    x = noises[0].numpy() * np.float32(sampler.initial_scale)
    found = []
    for index, time in enumerate(sampler.timesteps):
        output = predict(torch.from_numpy(sampler.scale(index, x)), time).numpy()
        noise = noises[1 + index].numpy() if sampler.noisy(index) else None
        x = sampler.step(index, x, output, noise)
        assert x.dtype == np.float32
        found.append(x)
    return found


def agree(scheduler, sampler):
    generator = torch.Generator().manual_seed(0)
    count = 1 + len(scheduler.timesteps)
    noises = [torch.randn(2, 4, 6, 6, generator=generator) for _ in range(count)]
    pairs = zip(by_sampler(sampler, noises), by_scheduler(scheduler, noises), strict=True)
    for found, expected in pairs:
        assert np.abs(found - expected).max() <= ROUNDING * np.abs(expected).max()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_sampler_samples_what_its_scheduler_samples(name, options):
    scheduler = made(name, options)
    sampler = probe(getattr(diffusers, name)(**options), STEPS)
    assert np.array_equal(sampler.timesteps, scheduler.timesteps.numpy())
    assert sampler.timesteps.dtype == scheduler.timesteps.numpy().dtype
    agree(scheduler, Sampler.from_json(json.loads(json.dumps(sampler.to_json()))))


def test_dynamic_shifting_takes_mu():
    options = {"use_dynamic_shifting": True}
    sampler = probe(diffusers.FlowMatchEulerDiscreteScheduler(**options), STEPS, mu=1.15)
    agree(made("FlowMatchEulerDiscreteScheduler", options, mu=1.15), sampler)
    other = probe(diffusers.FlowMatchEulerDiscreteScheduler(**options), STEPS, mu=0.5)
    assert not np.allclose(other.timesteps, sampler.timesteps)
    with pytest.raises(InputError, match="set_timesteps raised ValueError"):
        probe(diffusers.FlowMatchEulerDiscreteScheduler(**options), STEPS)


def test_all_that_diffusers_exports():
    """32 of 49 with default configs; every other with its reason."""
    names = {name for name in dir(diffusers) if name.endswith("Scheduler")}
    refused, noisy = {}, set()
    for name in sorted(names):
        try:
            sampler = probe(getattr(diffusers, name)(), OTHER_STEPS.get(name, STEPS))
        except (InputError, ImportError, TypeError) as error:
            refused[name] = str(error)
            continue
        noisy |= {name} if any(row.noisy for row in sampler.rows) else set()
    assert refused.keys() == REFUSED.keys()
    assert {name for name in refused if REFUSED[name] not in refused[name]} == set()
    assert noisy == NOISY
    assert (len(names), len(refused)) == (49, 17)


@pytest.mark.parametrize(("name", "options", "said"), [
    ("DDIMScheduler", {"thresholding": True, "sample_max_value": 5.0},
     "looks at more than a pixel: .* with thresholding=False it may work"),
    ("DDPMScheduler", {"variance_type": "learned_range"}, "with variance_type='fixed_small'"),
    ("UniPCMultistepScheduler", {"predict_x0": False}, "step 11 gives numbers that are not finite"),
])  # fmt: skip
def test_refuses_with_the_reason_and_what_works(name, options, said):
    with pytest.raises(InputError, match=said):
        probe(getattr(diffusers, name)(**options), STEPS)


def test_what_is_refused_as_not_finite_is_not_finite_in_diffusers():
    scheduler = made("UniPCMultistepScheduler", {"predict_x0": False})
    noises = list(torch.randn(1 + STEPS, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)))
    assert not np.isfinite(by_scheduler(scheduler, noises)[-1]).all()


def test_deep_correctors_look_back_no_further_than_their_order():
    for order in (1, 2, 3):
        sampler = probe(diffusers.UniPCMultistepScheduler(solver_order=order), 30)
        assert sampler.depth == max(2, order)
    assert probe(diffusers.LMSDiscreteScheduler(), 30).depth == 3
    assert probe(diffusers.DPMSolverMultistepScheduler(), 30).depth == 1
    assert probe(diffusers.DDIMScheduler(), 30).depth == 0


def test_the_scheduler_stays_as_it_is_and_one_that_has_stepped_is_set_anew():
    scheduler = made("DPMSolverMultistepScheduler")
    before = probe(scheduler).to_json()
    assert scheduler.step_index is None
    noises = list(torch.randn(1 + STEPS, 1, 4, 2, 2))
    by_scheduler(scheduler, noises)
    assert probe(scheduler).to_json() == before  # what it had stepped counts for nothing
    custom = diffusers.FlowMatchEulerDiscreteScheduler()
    custom.set_timesteps(sigmas=[1.0, 0.7, 0.2])
    assert probe(custom).timesteps.tolist() == custom.timesteps.tolist()
    by_scheduler(custom, noises[:4])
    with pytest.raises(InputError, match="has stepped already; call set_timesteps anew"):
        probe(custom)


def test_noise_is_asked_for_and_history_has_to_be_there():
    noisy = probe(diffusers.DDPMScheduler(), STEPS)
    x = np.ones((1, 4, 2, 2), np.float32)
    with pytest.raises(InputError, match="step 0 adds noise"):
        noisy.step(0, x, x)
    assert not noisy.noisy(STEPS - 1)
    multistep = probe(diffusers.DPMSolverMultistepScheduler(), STEPS)
    with pytest.raises(InputError, match="of step 0, which did not run; begin with step 0"):
        multistep.step(1, x, x)
    multistep.step(0, x, x)
    first = multistep.step(1, x, x)
    multistep.step(0, 5 * x, x)  # another picture
    assert not np.array_equal(multistep.step(1, x, x), first)
    multistep.reset()
    with pytest.raises(InputError, match="did not run"):
        multistep.step(1, x, x)


def test_what_is_kept_is_a_copy_and_no_more_than_is_read():
    sampler = probe(diffusers.DPMSolverMultistepScheduler(), STEPS)
    x, output = np.ones((1, 1, 2, 2), np.float32), np.ones((1, 1, 2, 2), np.float32)
    sampler.step(0, x, output)
    expected = sampler.step(1, x, output)
    sampler.reset()
    again = x.copy()
    sampler.step(0, again, output)
    again[:] = 7
    assert np.array_equal(sampler.step(1, x, output), expected)
    assert {step for _, step in sampler._past} == {1}


row_numbers = st.floats(-4, 4, allow_nan=False)


@given(st.lists(st.tuples(row_numbers, row_numbers, row_numbers), min_size=1, max_size=5),
       st.floats(0.5, 2), st.booleans())  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_step_is_the_sum_that_its_row_says(numbers, scale, clipped):
    rows = [
        Row(scale, (Term("sample", 0, a), Term("output", min(index, 1), b),
                    *([Term("clipped", 0, c)] if clipped else [])), (0.5, -b) if clipped else None)
        for index, (a, b, c) in enumerate(numbers)
    ]  # fmt: skip
    sampler = Sampler(np.arange(len(rows)), rows, scale)
    same = Sampler.from_json(json.loads(json.dumps(sampler.to_json())))
    assert same.rows == sampler.rows and same.initial_scale == scale
    x, generator, before = np.linspace(-1, 1, 6), np.random.default_rng(0), None
    for index, (a, b, c) in enumerate(numbers):
        output = generator.standard_normal(6)
        expected = a * x + b * (output if before is None else before)
        if clipped:
            expected = expected + c * np.clip(0.5 * x - b * output, -1, 1)
        x, before = same.step(index, x, output), output
        assert np.allclose(x, expected, atol=1e-9)


def test_half_precision_is_computed_in_float32():
    assert wide(np.ones(2, np.float16)).dtype == np.float32
    sampler = probe(diffusers.EulerDiscreteScheduler(), STEPS)
    x = np.ones((1, 1, 2, 2), np.float16)
    assert sampler.scale(0, x).dtype == sampler.step(0, x, x).dtype == np.float32
    assert sampler.step(0, x.astype(np.float64), x).dtype == np.float64


@pytest.mark.parametrize("data", [{"rows": 3}, {"name": "", "timesteps": [1], "dtype": "x"}, [1]])
def test_damaged_data_are_refused(data):
    with pytest.raises(ArtifactError, match="the sampler is damaged"):
        Sampler.from_json(data)


@pytest.mark.parametrize(("data", "why"), [
    (None, "compiled without a scheduler"), ({"refused": "DDIM: because"}, "DDIM: because"),
])  # fmt: skip
def test_an_artifact_without_a_sampler_says_why(data, why):
    with pytest.raises(InputError, match=f"has no sampler: .*{why}"):
        Sampler.from_json(data)


def test_the_module_needs_numpy_only():
    code = ("import sys\nfor name in ('torch', 'diffusers', 'onnxruntime', 'onnx'):\n"
            "    sys.modules[name] = None\nimport effuse.sampler")  # fmt: skip
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=60)
