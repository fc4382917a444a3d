"""What pipelines ask of their components beside calls: class, attributes, objects they return."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
import torch
from hand_made import built

import effuse
from effuse.errors import CaptureError, InputError
from effuse.metrics import psnr_db
from effuse.pipeline_calls import class_of, outline, rebuild, restored, stored
from effuse.pipeline_watch import Log, Watched
from effuse.runtime import Output, first_of

pytest.importorskip("transformers")
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionPAGPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

STEPS, CLOSE_DB = 4, 50
SQUARE = {"height": 32, "width": 32}


def picture(pipe, call):
    given = {"num_inference_steps": STEPS, "output_type": "np", **call}
    return pipe("a cat", generator=torch.Generator().manual_seed(3), **given)[0]


def same_when_loaded(pipe, call, folder):
    compiled = built(pipe, call)
    loaded = effuse.load(compiled.save(folder / "a.effuse"))
    loaded.pipeline().set_progress_bar_config(disable=True)
    assert psnr_db(picture(pipe, call), picture(loaded, call), peak=1.0) >= CLOSE_DB
    return loaded


def test_a_component_that_is_asked_for_its_class(tiny, tmp_path):
    call = {**SQUARE, "image": tiny.PICTURE}
    pipe = tiny.controlled()
    loaded = same_when_loaded(pipe, call, tmp_path)
    assert {"controlnet", "unet", "vae"} <= set(loaded.components)
    assert isinstance(loaded.components["controlnet"], ControlNetModel)
    plain = picture(pipe, {**call, "controlnet_conditioning_scale": 0.0})
    assert psnr_db(plain, picture(pipe, call), peak=1.0) < CLOSE_DB  # the ControlNet counts
    assert type(pipe.controlnet) is ControlNetModel


def test_an_encoder_that_returns_a_distribution(tiny, tmp_path):
    call = {"image": tiny.PICTURE, "strength": 0.8}
    loaded = same_when_loaded(tiny.from_a_picture(), call, tmp_path)
    assert {"vae.encode", "vae.decode"} <= {
        entry.described["folder"] for entry in loaded.components["vae"].entries
    }


def test_numbers_that_are_read_of_a_component(tiny, tmp_path):
    call = {**SQUARE, "num_frames": 9, "max_sequence_length": 16}
    pipe = tiny.ltx()
    loaded = same_when_loaded(pipe, call, tmp_path)
    vae = loaded.components["vae"]
    assert torch.equal(vae.latents_std, pipe.vae.latents_std)
    assert vae.spatial_compression_ratio == pipe.vae.spatial_compression_ratio
    found = loaded.run("a cat", seed=3)
    assert psnr_db(picture(pipe, call), found, peak=1.0) >= CLOSE_DB


def test_what_changes_a_component_while_it_runs_leaves_it_as_it_is(tiny, tmp_path):
    parts = tiny.stable_diffusion().components
    pipe = StableDiffusionPAGPipeline(
        **parts, requires_safety_checker=False, pag_applied_layers=["mid"]
    )
    loaded = same_when_loaded(pipe, SQUARE, tmp_path)
    assert set(loaded.components) == {"vae", "text_encoder"}
    told = loaded.manifest["components"]["unet"]["reason"]
    assert told.startswith("CaptureError: the pipeline uses unet.attn_processors")
    with pytest.raises(CaptureError, match=r"uses unet\.attn_processors"):
        effuse.compile_pipeline(pipe, steps=STEPS, call=SQUARE, components=["unet"], progress=False)


def test_an_object_of_a_known_library_and_its_outline():
    moments = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    one = DiagonalGaussianDistribution(moments)
    shape, tensors = outline({"latent_dist": one})
    other = rebuild(shape, tensors)["latent_dist"]
    assert type(other) is DiagonalGaussianDistribution
    draws = [each.sample(torch.Generator().manual_seed(1)) for each in (one, other)]
    assert torch.equal(*draws) and torch.equal(one.mode(), other.mode())
    gone = {"object": {"mean": 0}, "class": "diffusers.models.gone.Distribution"}
    assert rebuild(gone, [np.zeros(1)]).mean.shape == (1,)


def test_classes_that_known_libraries_define_only():
    home = DDIMScheduler.__module__
    assert class_of(f"{home}.DDIMScheduler", Output) is DDIMScheduler
    passed_on = ("diffusers.utils.hub_utils.Path", f"{home}.np", "diffusers.DDIMScheduler")
    for name in (*passed_on, "subprocess.Popen", "diffusers.gone.It", "diffusers.__version__"):
        assert class_of(name, Output) is Output


@pytest.mark.parametrize(
    "kind", ["transformers.integrations.integration_utils.NeptuneCallback", "diffusers.models.It"]
)
def test_an_artifact_makes_no_object_that_does_something_when_it_goes(tmp_path, kind, monkeypatch):
    class It:
        def __del__(self):
            (tmp_path / "gone").touch()

    It.__module__ = "diffusers.models"
    monkeypatch.setattr("diffusers.models.It", It, raising=False)
    (tmp_path / "kept").touch()
    fields = {"_volatile_checkpoints_dir": {"value": str(tmp_path)}, "_run": {"value": None}}
    found = rebuild({"object": fields, "class": kind}, [])
    assert type(found) is Output
    del found
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_what_copies_and_saves_components(tiny, tmp_path):
    compiled = built(tiny.stable_diffusion(), SQUARE)
    pipe = compiled.pipeline()
    pipe.disable_xformers_memory_efficient_attention()  # goes through all modules
    with pytest.raises(InputError, match=r"unet is compiled.*\.save\(path\)"):
        compiled.components["unet"].save_pretrained(tmp_path)
    other = tiny.stable_diffusion()
    other.vae = None
    assert compiled.into(other).vae.decode is not None
    assert not isinstance(other.vae, type(None))


def test_a_watched_network_can_be_copied():
    watched = Watched(torch.nn.Linear(2, 2), "one", Log())
    assert copy.copy(watched)(torch.zeros(1, 2)).shape == (1, 2)


def test_the_first_tensor_of_what_a_network_returns():
    one, other = np.zeros(1), np.ones(2)
    for found in (one, (one, other), ([one], other), Output({"a": (one,), "b": other}), {"a": one}):
        assert first_of(found) is one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_numbers_as_json(dtype):
    value = (torch.randn(3, 2, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    found = restored(stored(value))
    assert found.dtype == dtype and torch.equal(found, value)
    assert restored(stored(1.5)) == 1.5 and restored(stored(None)) is None
