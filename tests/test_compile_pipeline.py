"""Whole pipelines: watched, compiled part by part, saved and loaded as one artifact."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hand_made import hand_made
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import effuse
from effuse.cli_app import app
from effuse.errors import ArtifactError, CaptureError, ConfigError, InputError
from effuse.metrics import psnr_db
from effuse.noise import normal
from effuse.pipeline_calls import labelled, outline, rebuild
from effuse.pipeline_free import torch_free
from effuse.pipeline_recipe import find
from effuse.pipeline_sources import Pair
from effuse.pipeline_tokens import tokens_of
from effuse.pipeline_watch import watch

pytest.importorskip("transformers")

STEPS, CLOSE_DB = 4, 50
CALL = {"height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipe(tiny):
    made = tiny.stable_diffusion()
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def compiled(pipe):
    return effuse.compile_pipeline(
        pipe, "exact", steps=STEPS, prompts=("a dog",), call=CALL, progress=False
    )


def picture(pipe, prompt="a cat", **options):
    generator = torch.Generator().manual_seed(3)
    found = pipe(prompt, num_inference_steps=STEPS, generator=generator, output_type="np",
                 **{**CALL, **options})  # fmt: skip
    return found.images


def same(one, other):
    assert one.shape == other.shape
    assert psnr_db(one, other, peak=1.0) >= CLOSE_DB


def test_the_same_picture_from_all_three(pipe, compiled):
    before = picture(pipe)
    assert set(compiled.components) == {"unet", "vae", "text_encoder"}
    parts = compiled.components.values()
    ran = [sum(part.compiled.session.steps.values()) for part in parts]
    same(picture(compiled), before)
    more = [sum(part.compiled.session.steps.values()) for part in parts]
    assert all(one < other for one, other in zip(ran, more, strict=True))
    assert before.std() > 0.01  # a picture, not one colour
    assert psnr_db(before, picture(compiled, "a dog"), peak=1.0) < CLOSE_DB


def test_the_pipeline_handed_in_stays_as_it_is(pipe, compiled):
    assert isinstance(pipe.unet, nn.Module) and pipe.vae is not compiled.pipeline().vae
    assert not any("forward" in vars(each) for each in (pipe.unet, pipe.vae, pipe.text_encoder))
    assert "step" not in vars(pipe.scheduler)


def test_saved_and_loaded(pipe, compiled, tmp_path):
    before = picture(pipe)
    for path in (tmp_path / "a.zip", tmp_path / "a.effuse"):
        compiled.save(path)
        loaded = effuse.load(path)
        loaded.pipeline().set_progress_bar_config(disable=True)
        same(picture(loaded), before)
        assert type(loaded.pipeline()) is type(pipe)
        assert loaded.report == compiled.report and loaded.size == compiled.size
    assert compiled.save(tmp_path / "a.effuse").is_dir()  # in the old one's place


def test_back_into_a_pipeline(tiny, pipe, compiled):
    other = tiny.stable_diffusion()
    other.set_progress_bar_config(disable=True)
    assert compiled.into(other) is other and other.unet is compiled.components["unet"]
    same(picture(other), picture(pipe))


def test_what_pipelines_ask_of_a_component(pipe, compiled):
    vae = compiled.components["vae"]
    assert vae.config.scaling_factor == pipe.vae.config.scaling_factor
    assert vae.dtype == torch.float32 and vae.device == torch.device("cpu")
    assert next(vae.parameters()).dtype == torch.float32 and not list(vae.modules())
    assert vae.to("cpu") is vae and vae.eval() is vae
    assert "vae" in repr(vae) and "StableDiffusionPipeline" in repr(compiled)
    with pytest.raises(AttributeError, match=r"vae has no 'quantize'.*when it was watched"):
        _ = vae.quantize


def test_results_are_of_the_component_s_own_class(pipe, compiled):
    ids = pipe.tokenizer("a dog", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipe.text_encoder(ids)
    found = compiled.components["text_encoder"](ids)
    assert type(found) is type(expected)
    torch.testing.assert_close(found.pooler_output, expected.pooler_output, rtol=1e-4, atol=1e-5)


def test_a_call_that_was_not_compiled_is_told(compiled):
    vae = compiled.components["vae"]
    with pytest.raises(InputError, match=r"vae.decode: z: compiled for shape .*got \(1, 4, 8, 8\)"):
        vae.decode(torch.zeros(1, 4, 8, 8), return_dict=False)
    with pytest.raises(InputError, match="return_dict: compiled with False, got True"):
        vae.decode(torch.zeros(1, 4, 16, 16))
    with pytest.raises(InputError, match=r"timestep: .* is not one of the 4 timesteps"):
        compiled("a cat", num_inference_steps=7, **CALL)


@pytest.mark.parametrize("change", ["truncate", "remove", "newer"])
def test_a_damaged_artifact(compiled, tmp_path, change):
    folder = compiled.save(tmp_path / "a.effuse")
    inner = folder / "unet" / "weights.safetensors"
    if change == "truncate":
        inner.write_bytes(inner.read_bytes()[:-1])
    elif change == "remove":
        inner.unlink()
    else:
        data = json.loads((folder / "pipeline.json").read_text())
        (folder / "pipeline.json").write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(ArtifactError, match=r"unet/weights\.safetensors is|format 99"):
        effuse.load(folder)


@pytest.mark.parametrize("name", ["unet/../../evil", "../evil", "a/b/c", "/tmp/evil", "unet/.x"])
def test_a_zip_that_leaves_its_folder(compiled, tmp_path, name):
    path = compiled.save(tmp_path / "a.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ArtifactError, match="a path that leaves the artifact"):
        effuse.load(path)


# ---- without torch -------------------------------------------------------------------------------


def test_the_same_picture_without_torch(pipe, compiled, tmp_path):
    before = picture(pipe, negative_prompt="no dog")
    path = compiled.save(tmp_path / "a.zip")
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'scipy'): sys.modules[name] = None\n"
        "import effuse, numpy\n"
        f"found = effuse.load({str(path)!r}).run('a cat', 'no dog', seed=3)\n"
        f"numpy.save({str(tmp_path / 'found.npy')!r}, found)\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code], check=True, timeout=120)
    same(np.load(tmp_path / "found.npy"), before)
    assert psnr_db(before, picture(pipe), peak=1.0) < CLOSE_DB  # the negative prompt counts


def test_the_run_s_arguments(pipe, compiled):
    same(compiled.run("a cat", guidance=3.0, seed=3), picture(pipe, guidance_scale=3.0))
    ids = pipe.tokenizer("a cat").input_ids
    assert np.array_equal(compiled.run(ids, seed=3), compiled.run("a cat", seed=3))
    long = "a cat on a mat beside a dog"  # cut to sixteen tokens
    same(compiled.run(long, seed=3), picture(pipe, long))
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(9))
    several = ["a cat", "a dog"]
    same(
        compiled.run(several, "no", images=2, seed=3),
        picture(pipe, several, negative_prompt=["no"] * 2, num_images_per_prompt=2),
    )
    generators = [torch.Generator().manual_seed(n) for n in (5, 6)]
    given = {"num_inference_steps": STEPS, "output_type": "np", **CALL}
    same(compiled.run(several, seed=[5, 6]), pipe(several, generator=generators, **given).images)
    steps = []
    found = compiled.run("a cat", noise=latents.numpy(), on_step=lambda *done: steps.append(done))
    same(found, picture(pipe, latents=latents))
    assert steps == [(n + 1, STEPS) for n in range(STEPS)]
    with pytest.raises(InputError, match="17 token ids, and the pipeline takes 16"):
        compiled.run([0] * 17)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"negative": ["a", "b", "c"]}, "negative: 3 texts for 2 prompts"),
        ({"seed": [1]}, "seed: 1 seeds for 2 pictures"),
        ({"noise": np.zeros((1, 4, 16, 16))}, r"noise: expected the shape \(2, 4, 16, 16\)"),
        ({"images": 0}, "images: .* making 1 of a prompt.*came 0"),
    ],
)
def test_numbers_that_do_not_fit(compiled, given, reason):
    with pytest.raises(InputError, match=reason):
        compiled.run(["a cat", "a dog"], **given)


def test_several_prompts_at_once_in_torch(by_hand, compiled):
    told = r"text_encoder: .*compiled for shape \(1, 16\), got \(2, 16\).*prompts=\(\[…, …\],\)"
    with pytest.raises(InputError, match=told):
        compiled(["a cat", "a dog"], num_inference_steps=STEPS, **CALL)
    pipe, _ = by_hand
    calls = [{"prompt": ["a", "b"]}]
    assert "watched with 2 prompts at once" in torch_free(pipe, *calls, None, {}, None)["refused"]


def test_on_the_command_line(pipe, compiled, tmp_path):
    path, target = compiled.save(tmp_path / "a.effuse"), tmp_path / "a.png"
    run = CliRunner()
    options = ["run", str(path), "-o", str(target), "--prompt", "a cat", "--seed", "3"]
    result = run.invoke(app, [*options, "--prompt", "a dog", "--images", "1"])
    assert result.exit_code == 0 and "2 pictures" in result.output, result.output
    result = run.invoke(app, options)
    assert result.exit_code == 0, result.output
    found = np.asarray(Image.open(target))[::8, ::8] / 255  # small pictures are enlarged
    assert np.abs(found - picture(pipe)[0]).max() < 1 / 255
    inner = ["run", str(path / "unet"), "-o", str(target), "--prompt", "a cat"]
    result = run.invoke(app, inner)
    assert result.exit_code == 1 and "is no pipeline's artifact" in " ".join(result.output.split())


def test_what_lies_between_the_components_is_data(compiled):
    recipe = compiled.recipe
    assert recipe["networks"][0]["guidance"] == {"free": 0, "told": 1, "scale": 7.5}
    assert [call["copies"] for call in recipe["networks"][0]["calls"]] == [2]
    assert {each["text"] for each in recipe["readings"]} == {"prompt", "negative"}
    assert recipe["decoder"]["scale"] == pytest.approx([1 / 0.18215] * 4, rel=1e-4)
    assert recipe["picture"] == pytest.approx({"scale": 0.5, "shift": 0.5}, abs=1e-4)
    assert recipe["agreement_db"] > 60 and compiled.report[0] == "torch-free: yes"


def test_a_missing_tokenizer_is_told(compiled, tmp_path):
    told = {**compiled.recipe["readings"][0], "tokenizer": "gone"}
    with pytest.raises(InputError, match=r"no gone/tokenizer\.json.*give token ids"):
        tokens_of(compiled.folder, told, "a cat")


@pytest.mark.parametrize("count", [16, 17, 100, 768])
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 1])
def test_noise_is_torch_s(seed, count):
    expected = torch.randn(count, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_allclose(normal(seed, (count,)), expected, rtol=1e-5, atol=2e-6)


def test_too_little_noise():
    with pytest.raises(InputError, match="at least 16"):
        normal(0, (15,))


# ---- a pipeline of hand-written parts ------------------------------------------------------------


@pytest.fixture(scope="module")
def by_hand():
    pipe = hand_made()
    return pipe, effuse.compile_pipeline(pipe, "exact", steps=3, progress=False)


def test_any_networks_by_how_they_are_called(by_hand):
    pipe, compiled = by_hand
    told = compiled.manifest["components"]
    assert {name: each["role"] for name, each in told.items()} == {
        "encoder": "encoder", "network": "denoiser", "decoder": "decoder", "judge": "decoder",
        "spare": None,
    }  # fmt: skip
    torch.testing.assert_close(compiled("abc"), pipe("abc"), rtol=1e-4, atol=1e-5)


def test_what_stays_as_it_is_has_a_reason(by_hand):
    _, compiled = by_hand
    told = compiled.manifest["components"]
    assert told["spare"]["reason"] == "not called in the watched run"
    assert told["judge"]["reason"].startswith("CaptureError: ")
    assert set(compiled.components) == {"encoder", "network", "decoder"}
    assert any(line.startswith("judge: left as it is: CaptureError") for line in compiled.report)


def test_why_there_is_no_run_without_torch(by_hand):
    _, compiled = by_hand
    assert compiled.report[0] == "torch-free: no, because judge is not compiled"
    with pytest.raises(InputError, match="torch-free: no, because judge is not compiled"):
        compiled.run("abc")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "encoder: ids depends on the prompt in a way that is not known"),
        ({"power": 2}, "no weighted sum"),
        ({"order": 1}, "called in another order"),
    ],
)
def test_what_is_not_of_that_kind_is_told(change, reason):
    pipe = hand_made()
    calls = [{"prompt": text, "steps": 3, "seed": 0} for text in ("abc", "abcd")]
    logs = [watch(pipe, call) for call in calls]
    for log in logs:
        log.calls = [call for call in log.calls if call.component != "judge"]
    if "power" in change:
        logs[1] = logs[0]
        steps = [replace(step, output=step.output**2) for step in logs[0].steps]
        logs[0].steps = steps
    if "order" in change:
        logs[1].calls = logs[1].calls[::-1]
    folders = {call.key: call.component for call in logs[0].calls}
    with pytest.raises(InputError, match=reason):
        find(Pair(*logs, folders, {}, None, 0))


def test_a_class_that_is_not_diffusers_own(by_hand, tmp_path):
    pipe, compiled = by_hand
    loaded = effuse.load(compiled.save(tmp_path / "a.zip"))
    with pytest.raises(ArtifactError, match=r"no class of diffusers.*\.into\(\)"):
        loaded("abc")
    other = loaded.into(hand_made())
    torch.testing.assert_close(other("abc"), pipe("abc"), rtol=1e-4, atol=1e-5)


def test_named_components():
    some = effuse.compile_pipeline(hand_made(), steps=3, components=["network"], progress=False)
    assert set(some.components) == {"network"}
    assert some.manifest["components"]["encoder"]["reason"] == "not among components="
    with pytest.raises(CaptureError):
        effuse.compile_pipeline(hand_made(), steps=3, components=["judge"], progress=False)
    told = r"no network is called 'netwrk'.*did you mean 'network'"
    with pytest.raises(ConfigError, match=told):
        effuse.compile_pipeline(hand_made(), components=["netwrk"], progress=False)
    with pytest.raises(ConfigError, match="no network is called 'scheduler'"):
        effuse.compile_pipeline(hand_made(), components=["scheduler"], progress=False)


def test_calibration_samples_every_prompt(monkeypatch):
    module = importlib.import_module("effuse.pipeline")
    seen = []
    whole = module.sample
    monkeypatch.setattr(
        module, "sample", lambda request, *rest: (seen.extend(request.calls), whole(request, *rest))
    )
    compiled = effuse.compile_pipeline(
        hand_made(), {"passes": "w8a8"}, steps=3, prompts=("a", "bcd"), components=["network"],
        progress=False,
    )  # fmt: skip
    assert [call["prompt"] for call in seen] == ["a", "bcd"]
    assert compiled.components["network"].compiled.manifest["passes"]


def test_a_watched_run_is_short():
    log = watch(hand_made(), {"prompt": "abc", "steps": 20})
    calls = log.of(("network", ""))
    assert len(calls) == len(log.steps) == 20
    assert sum(call.seconds > 0 for call in calls) == 2  # the rest is not computed
    times = [float(call.arguments["moment"]) for call in calls]
    assert len(set(times)) == 20 and times == sorted(times, reverse=True)


def test_a_value_and_its_outline():
    tensors = [torch.zeros(1), torch.ones(2)]
    value = {"a": tensors[0], "b": (tensors[1], None, [3, "x"])}
    shape, found = outline(value)
    assert json.loads(json.dumps(shape)) == shape
    assert all(one is other for one, other in zip(found, tensors, strict=True))
    assert rebuild(shape, tensors) == {"a": tensors[0], "b": (tensors[1], None, (3, "x"))}
    with pytest.raises(InputError, match="a object is neither"):
        outline({"a": object()})


def test_a_class_of_another_library_is_not_imported():
    shape = {"dict": {"a": 0}, "class": "subprocess.Popen"}
    found = rebuild(shape, [np.zeros(1)])
    assert type(found).__name__ == "Output" and found.a.shape == (1,)


def test_arguments_by_label():
    tensors, plain = labelled({"x": np.zeros(1), "more": {"y": np.ones(2), "z": 3}, "no": None})
    assert list(tensors) == ["x", "more.y"] and plain == {"more.z": 3}
