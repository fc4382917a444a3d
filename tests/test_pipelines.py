"""Drop-in: real diffusers pipelines, of tiny random parts, give the same pictures as before."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

import effuse
from effuse.errors import InputError
from effuse.metrics import psnr_db

STEPS = 4
LENGTH, WIDTH = 6, 16  # of a prompt
CLOSE_DB = 50


def ddim():
    return DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False)


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None, norm_num_groups=4, attention_head_dim=2, cross_attention_dim=WIDTH,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
    ).eval()  # fmt: skip
    config = CLIPTextConfig(
        vocab_size=50, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    return {"vae": vae, "text_encoder": CLIPTextModel(config).eval()}


class Tokenizer:
    """Letters to numbers, with the manners of CLIPTokenizer that the pipeline uses."""

    model_max_length = LENGTH
    added_tokens_encoder = ()

    def tokenize(self, text):
        return list(text)

    def __call__(self, text, **options):
        texts = [text] if isinstance(text, str) else text
        rows = [[0, *(3 + ord(c) % 40 for c in each[: LENGTH - 2]), 2] for each in texts]
        ids = torch.tensor([row + [2] * (LENGTH - len(row)) for row in rows])
        return type("Tokens", (), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})()


def pipeline(unet, parts, scheduler=None, kind=StableDiffusionPipeline):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = kind(
            **parts, tokenizer=None, unet=unet, scheduler=scheduler or ddim(), safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.tokenizer = Tokenizer()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe, **options):
    settings = {"prompt": "a cat", "num_inference_steps": STEPS, "guidance_scale": 5.0, **options}
    generator = torch.Generator().manual_seed(3)
    return pipe(**settings, generator=generator, output_type="np").images


def example(batch=2):
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": torch.randn(batch, LENGTH, WIDTH),
    }


def build(unet, scheduler, config="exact", batch=2):
    scheduler.set_timesteps(STEPS)
    return effuse.compile(unet, config, inputs=example(batch), schedule=scheduler, progress=False)


@pytest.fixture(scope="module")
def compiled(unet):
    return build(unet, ddim())


def same(one, other):
    assert one.shape == other.shape
    assert psnr_db(one, other, peak=1.0) >= CLOSE_DB


def test_guidance_as_one_batch(unet, parts, compiled):
    before = picture(pipeline(unet, parts))
    pipe = pipeline(unet, parts)
    pipe.unet = compiled
    assert pipe.unet is compiled
    same(picture(pipe), before)
    assert before.std() > 0.01  # a picture, not one colour


def test_the_pictures_really_come_from_the_compiled_network(unet, parts, compiled):
    pipe = pipeline(unet, parts)
    pipe.unet = compiled
    runs = compiled.session.runs["prompt"]
    picture(pipe, prompt="a dog")
    assert compiled.session.runs["prompt"] == runs + 1
    assert psnr_db(picture(pipe, prompt="a dog"), picture(pipe), peak=1.0) < CLOSE_DB


def test_without_guidance(unet, parts):
    compiled = build(unet, ddim(), {"passes": "exact", "dynamic": {"batch": (1, 4)}})
    before = [picture(pipeline(unet, parts), guidance_scale=scale) for scale in (1.0, 4.0)]
    pipe = pipeline(unet, parts)
    pipe.unet = compiled  # batches of 1 and of 2 through one artifact
    for scale, expected in zip((1.0, 4.0), before, strict=True):
        same(picture(pipe, guidance_scale=scale), expected)
    pair = picture(pipe, prompt=["a cat", "a dog"])
    same(pair, picture(pipeline(unet, parts), prompt=["a cat", "a dog"]))


def test_guidance_as_two_calls(unet):
    compiled = build(unet, ddim(), batch=1)
    prompts = [torch.randn(1, LENGTH, WIDTH) for _ in range(2)]

    def sample(net):
        scheduler = ddim()
        scheduler.set_timesteps(STEPS)
        latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            for time in scheduler.timesteps:
                given, empty = (net(latent, time, encoder_hidden_states=p).sample for p in prompts)
                guided = empty + 3.0 * (given - empty)
                latent = scheduler.step(guided, time, latent).prev_sample
        return latent.numpy()

    expected = sample(unet)
    runs = compiled.session.runs["prompt"]
    found = sample(compiled)
    assert psnr_db(expected, found, peak=float(np.ptp(expected))) >= CLOSE_DB
    assert compiled.session.runs["prompt"] == runs + 2


def test_a_scheduler_of_fractional_timesteps(unet, parts):
    scheduler = EulerDiscreteScheduler(timestep_spacing="linspace")
    before = picture(pipeline(unet, parts, scheduler))
    pipe = pipeline(unet, parts, scheduler)
    pipe.unet = build(unet, EulerDiscreteScheduler(timestep_spacing="linspace"))
    same(picture(pipe), before)


def test_from_the_middle_of_the_schedule(unet, parts, compiled):
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = {"image": image, "strength": 0.5}
    before = picture(pipeline(unet, parts, kind=StableDiffusionImg2ImgPipeline), **settings)
    pipe = pipeline(unet, parts, kind=StableDiffusionImg2ImgPipeline)
    pipe.unet = compiled
    same(picture(pipe, **settings), before)


def test_another_number_of_steps_is_told(unet, parts, compiled):
    pipe = pipeline(unet, parts)
    pipe.unet = compiled
    with pytest.raises(InputError, match=r"not one of the 4 timesteps.*set the scheduler"):
        picture(pipe, num_inference_steps=7)


def test_a_loaded_artifact_in_a_pipeline(unet, parts, compiled, tmp_path):
    before = picture(pipeline(unet, parts))
    pipe = pipeline(unet, parts)
    pipe.unet = effuse.load(compiled.save(tmp_path / "unet.zip"))
    same(picture(pipe), before)


def test_what_pipelines_ask_of_a_network(unet, parts, compiled, tmp_path):
    pipe = pipeline(unet, parts)
    pipe.unet = compiled
    assert pipe.to("cpu") is pipe and pipe.to(torch.float32) is pipe
    assert pipe.components["unet"] is compiled
    assert pipe.device == pipe._execution_device == compiled.device == torch.device("cpu")
    assert pipe.dtype == compiled.dtype == torch.float32
    assert compiled.eval() is compiled and compiled.to("cpu", torch.float32) is compiled
    assert compiled.config.in_channels == unet.config.in_channels == compiled.config["in_channels"]
    assert compiled.config.get("nothing") is None and not hasattr(compiled.config, "nothing")
    assert "Compiled" in repr(pipe)
    pipe.enable_attention_slicing()
    pipe.maybe_free_model_hooks()


def test_a_pipeline_built_around_a_compiled_network(unet, parts, compiled):
    pipe = pipeline(compiled, parts)
    same(picture(pipe), picture(pipeline(unet, parts)))
    again = StableDiffusionPipeline(**{**pipe.components, "tokenizer": None},
                                    requires_safety_checker=False)  # fmt: skip
    assert again.unet is compiled


@pytest.mark.parametrize(("kind", "scheduler"), [(DDPMPipeline, DDPMScheduler),
                                                 (DDIMPipeline, DDIMScheduler)])  # fmt: skip
def test_unconditional_pipelines(kind, scheduler):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8,),
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), mid_block_type=None,
        norm_num_groups=4, add_attention=False,
    ).eval()  # fmt: skip
    pipe = kind(unet, scheduler())
    pipe.set_progress_bar_config(disable=True)

    def run():
        generator = torch.Generator().manual_seed(3)
        return pipe(2, generator=generator, num_inference_steps=STEPS, output_type="np").images

    before = run()
    pipe.scheduler.set_timesteps(STEPS)
    pipe.unet = effuse.compile(unet, "exact", schedule=pipe.scheduler, progress=False)
    same(run(), before)
    assert before.std() > 0.01
