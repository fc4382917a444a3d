"""The class-conditional transformer: its pipeline, its weights and the script that trained them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from typer.testing import CliRunner

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
WHITE_CORNERS = ["cat face", "blue heart", "monkey face", "pig face", "panda face", "two hearts"]


def example(name):
    sys.path.insert(0, str(EXAMPLES))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(EXAMPLES))


emoji_dit = example("emoji_dit")
train_emoji_dit = example("train_emoji_dit")


@pytest.fixture(scope="module")
def pipeline():
    return emoji_dit.EmojiDitPipeline.open()


@pytest.fixture(scope="module")
def untrained():
    torch.manual_seed(0)
    model = train_emoji_dit.network(170, layers=2).eval()
    folder = emoji_dit.FOLDER / "scheduler"
    return emoji_dit.EmojiDitPipeline(model, DDIMScheduler.from_pretrained(folder))


def corners(pixels):
    """Share of the pixels in the four 2×2 corners that are near white."""
    edge = pixels[:, :, [0, 1, -2, -1]][:, :, :, [0, 1, -2, -1]]
    return float((edge > 0.8).float().mean())


def drawn(pipeline, prompts, steps=10, **options):
    pipeline.scheduler.set_timesteps(steps)
    return pipeline.latents(prompts, **options)


def test_labels_are_null_then_told(pipeline):
    first, last = emoji_dit.names()[0], emoji_dit.names()[-1]
    assert pipeline.labels([first, last, 7]).tolist() == [170, 170, 170, 0, 169, 7]
    with pytest.raises(KeyError, match="unicorn parade"):
        pipeline.labels(["unicorn parade"])


def test_network_is_deep_and_in_single_precision(pipeline):
    network = pipeline.transformer
    assert len(network.transformer_blocks) >= 10
    assert network.dtype == torch.float32 and not network.training
    assert 3e6 < sum(p.numel() for p in network.parameters()) < 4.6e6


def test_example_inputs_run_the_network(pipeline):
    with torch.no_grad():
        (noise,) = pipeline.transformer(**pipeline.example_inputs(2))
    assert noise.shape == (4, 3, 32, 32) and noise.isfinite().all()


def test_call_gives_pictures_and_reports_steps(pipeline):
    seen = []
    pictures = pipeline(["cat face", 3], steps=3).images
    assert [picture.size for picture in pictures] == [(32, 32)] * 2
    pixels = drawn(pipeline, ["cat face", 3], 3, on_step=lambda *step: seen.append(step))
    assert pixels.isfinite().all() and [index for index, *_ in seen] == [0, 1, 2]


def test_trained_network_draws_white_corners(pipeline, untrained):
    assert corners(drawn(pipeline, WHITE_CORNERS)) > 0.8
    assert corners(drawn(untrained, WHITE_CORNERS)) < 0.6


def test_classes_steer_the_picture(pipeline):
    """A blue heart is blue and a green one green, from the same noise."""
    blue, green = drawn(pipeline, ["blue heart", "green heart"])[:, :, 12:20, 12:20].mean((2, 3))
    assert blue[2] > blue[0] and green[1] > green[0]
    assert blue[2] - blue[1] > green[2] - green[1]


def test_denoises_what_it_drew(pipeline, untrained):
    """At mid noise a trained network finds most of the noise in a picture; an untrained none."""
    prompts = emoji_dit.names()[::11]
    clean = drawn(pipeline, prompts)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    time = torch.tensor(500)
    noisy = pipeline.scheduler.add_noise(clean, noise, time)
    labels = pipeline.labels(prompts)[len(prompts) :]
    losses = []
    for network in (pipeline.transformer, untrained.transformer):
        with torch.no_grad():
            found = network(noisy, timestep=time.repeat(len(prompts)), class_labels=labels).sample
        losses.append(float((found - noise).square().mean()))
    trained, random = losses
    assert trained < 0.1 and random > 0.9


@pytest.fixture
def tiny_data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "tiny.npz", images=images, names=np.array(list("abcde")))
    (tmp_path / "names.json").write_text(json.dumps(["d", "b"]))
    return tmp_path


def test_pictures_follow_the_captions(tiny_data):
    found = train_emoji_dit.pictures(tiny_data / "tiny.npz", tiny_data / "names.json")
    images = np.load(tiny_data / "tiny.npz")["images"]
    assert found.shape == (2, 3, 32, 32)
    assert np.array_equal(((found[0] + 1) * 127.5).permute(1, 2, 0).round().byte(), images[3])


def test_rate_warms_up_then_falls_to_zero():
    rates = [train_emoji_dit.rate_at(progress, 0.1) for progress in (0, 0.05, 0.1, 0.55, 1, 1.2)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0, 0])


def test_training_script_writes_a_network_that_loads(tiny_data):
    app = train_emoji_dit.typer.Typer()
    app.command()(train_emoji_dit.main)
    out = tiny_data / "out"
    arguments = [
        "--data",
        tiny_data / "tiny.npz",
        "--names",
        tiny_data / "names.json",
        "--out",
        out,
    ]
    sizes = ["--steps", "2", "--layers", "1", "--batch", "2", "--every", "1"]
    result = CliRunner().invoke(app, [*map(str, arguments), *sizes])
    assert result.exit_code == 0, result.output
    assert "step 2, 100% of the run" in result.output
    model = emoji_dit.EmojiDitPipeline.open(out).transformer
    assert model.config.num_embeds_ada_norm == 2
    assert all(parameter.isfinite().all() for parameter in model.parameters())
