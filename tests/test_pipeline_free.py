"""Pipelines without torch: several denoisers in turns, schedulers that add noise in their steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hand_made import built
from torch import nn

import effuse
from effuse.metrics import psnr_db
from effuse.noise import draws

pytest.importorskip("transformers")
from diffusers import DDIMScheduler, DiffusionPipeline, EulerAncestralDiscreteScheduler

STEPS, CLOSE_DB = 4, 50
SQUARE = {"height": 32, "width": 32}


def picture(pipe, call, seeds=(3,), prompt="a cat", **options):
    """The pipeline's own; one seed, or a generator for each picture."""
    made = [torch.Generator().manual_seed(seed) for seed in seeds]
    found = pipe(prompt, num_inference_steps=STEPS, generator=made if len(made) > 1 else made[0],
                 output_type="np", **call, **options)  # fmt: skip
    return found[0]


def same(found, expected):
    assert found.shape == expected.shape
    assert psnr_db(expected, found, peak=1.0) >= CLOSE_DB


# ---- noise in every step -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy(tiny):
    pipe = tiny.latent_consistency()
    return pipe, built(pipe, SQUARE)


def test_a_scheduler_that_adds_noise(noisy):
    pipe, compiled = noisy
    assert compiled.report[0] == "torch-free: yes"
    same(compiled.run("a cat", seed=3), picture(pipe, SQUARE))
    assert psnr_db(compiled.run("a cat", seed=4), picture(pipe, SQUARE), peak=1.0) < CLOSE_DB


def test_another_such_scheduler(tiny):
    pipe = tiny.stable_diffusion()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    same(built(pipe, SQUARE).run("a cat", seed=3), picture(pipe, SQUARE))


def test_noise_of_several_pictures(noisy):
    pipe, compiled = noisy
    two = picture(pipe, SQUARE, num_images_per_prompt=2)
    same(compiled.run("a cat", images=2, seed=3), two)
    each = picture(pipe, SQUARE, (5, 6), prompt=["a cat", "a dog"])
    same(compiled.run(["a cat", "a dog"], seed=[5, 6]), each)


def test_latents_of_one_s_own(noisy):
    pipe, compiled = noisy
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    expected = picture(pipe, SQUARE, latents=latents)
    same(compiled.run("a cat", noise=latents.numpy(), seed=3), expected)


@pytest.mark.parametrize("shapes", [((16,), (16,)), ((17,), (40,), (16,)), ((2, 3, 5), (100,))])
def test_draws_one_after_another_are_torch_s(shapes):
    generator, draw = torch.Generator().manual_seed(7), draws(7)
    for shape in shapes:
        expected = torch.randn(shape, generator=generator).numpy()
        np.testing.assert_allclose(draw(shape), expected, rtol=1e-5, atol=2e-6)


# ---- several denoisers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def in_turns(tiny):
    pipe = tiny.wan_in_turns()
    return pipe, built(pipe, tiny.FRAMES)


def test_denoisers_in_turns(tiny, in_turns):
    pipe, compiled = in_turns
    assert {"transformer", "transformer_2"} <= set(compiled.components)
    assert compiled.recipe["turns"] == [0, 0, 1, 1]
    assert [each["guidance"]["told"] for each in compiled.recipe["networks"]] == [0, 0]
    same(compiled.run("a cat", seed=np.int64(3)), picture(pipe, tiny.FRAMES))


def test_each_has_its_own_steps(tiny, in_turns, monkeypatch):
    _, compiled = in_turns
    monkeypatch.setitem(compiled.manifest["torch_free"], "turns", [0, 1, 1, 1])
    with pytest.raises(effuse.errors.InputError, match=r"timestep: .* is not one of the"):
        compiled.run("a cat", seed=3)


def test_both_of_them_compute_while_they_are_watched(in_turns):
    """Two calls of one step that shared a result would leave open which one is guided away from."""
    from effuse.pipeline_watch import watch

    pipe, _ = in_turns
    given = {"height": 16, "width": 16, "num_frames": 5, "max_sequence_length": 16}
    log = watch(pipe, {"prompt": "a dog", "num_inference_steps": 6, **given})
    for name in ("transformer", "transformer_2"):
        calls = log.of((name, ""))
        steps = sorted({call.step for call in calls})
        assert len(steps) >= 2 and len(calls) == 2 * len(steps)
        real = {call.step for call in calls if call.seconds}
        assert real == set(steps[:2])


def test_another_guidance_is_refused_before_anything_runs(in_turns, monkeypatch):
    _, compiled = in_turns
    told = compiled.recipe["networks"]
    monkeypatch.setitem(told[1], "guidance", {"weights": [5.0, -4.0]})
    steps = []
    with pytest.raises(effuse.errors.InputError, match="without guidance in this form"):
        compiled.run("a cat", guidance=3.0, on_step=lambda *done: steps.append(done))
    assert not steps


class Pair(DiffusionPipeline):
    """Two networks in every step."""

    def __init__(self, one, other, scheduler):
        super().__init__()
        self.register_modules(one=one, other=other, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=3, generator=None):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.randn(1, 16, generator=generator)
        for when in self.scheduler.timesteps:
            out = self.one(x, when.float()) + self.other(x, when.float())
            x = self.scheduler.step(out, when, x).prev_sample
        return (x,)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(16, 16)

    def forward(self, noisy, moment):
        return self.mix(noisy) * (1 + moment / 1000)


def test_two_in_one_step_are_told():
    torch.manual_seed(0)
    pipe = Pair(Layer().eval(), Layer().eval(), DDIMScheduler(clip_sample=False))
    compiled = effuse.compile_pipeline(pipe, "exact", steps=3, progress=False)
    assert set(compiled.components) == {"one", "other"}
    assert compiled.report[0].startswith("torch-free: no, because it calls 2 denoisers in one step")
