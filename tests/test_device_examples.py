"""The scripts of examples/devices: pictures as diffusers' DDIM makes them, without torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn

import effuse

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "devices"
TARGETS = {"cpu": "cpu", "xnnpack": "xnnpack"}
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["diffusers"] = None  # importing them fails
sys.path.insert(0, sys.argv[1])
script, sys.argv = sys.argv[2], sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


class Net(nn.Module):
    """A denoiser with the emoji network's inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.prompt = nn.Linear(64, 8)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        h = self.first(sample) + torch.sin(timestep * 0.01)
        h = h + 5 * self.prompt(encoder_hidden_states).mean(1)[:, :, None, None]
        y = sample + self.last(torch.tanh(h))
        return {"sample": y} if return_dict else (y,)


@pytest.fixture
def examples(monkeypatch):
    """The module that the scripts share."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import emoji_numpy

    return emoji_numpy


def scheduler(steps=10):
    made = DDIMScheduler.from_pretrained(FOLDER.parent / "models" / "emoji-unet" / "scheduler")
    made.set_timesteps(steps)
    return made


def sampled(examples, prompt):
    """The picture by the network itself and diffusers."""
    net, steps = Net().eval(), scheduler()
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, 32, 32)))
    states = torch.from_numpy(np.stack([examples.embed(""), examples.embed(prompt)]))
    with torch.no_grad():
        for time in steps.timesteps:
            free, told = net(torch.cat([x, x]).float(), time, states)["sample"].chunk(2)
            noise = free + examples.GUIDANCE * (told - free)
            x = steps.step(noise.double(), time, x).prev_sample
    return ((x[0].clamp(-1, 1) + 1) * 127.5).to(torch.uint8).permute(1, 2, 0).numpy()


def built(target, folder):
    given = {"sample": torch.ones(2, 3, 32, 32), "timestep": torch.tensor(500),
             "encoder_hidden_states": torch.ones(2, 8, 64), "return_dict": False}  # fmt: skip
    config = effuse.Config(passes="exact", target=target)
    compiled = effuse.compile(
        Net().eval(), config, inputs=given, schedule=scheduler(), progress=False
    )
    return compiled.save(folder / "emoji.effuse")


@pytest.mark.parametrize("name", TARGETS)
def test_a_script_makes_the_picture_that_diffusers_makes(name, examples, tmp_path):
    path = built(TARGETS[name], tmp_path)
    script = FOLDER / f"emoji_{name}.py"
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, str(FOLDER), str(script), str(path),
         "cat face", "cat.png"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "cat.png")).astype(int)
    expected = sampled(examples, "cat face").astype(int)
    assert expected.std() > 20
    assert np.abs(picture - expected).max() <= 1  # a rounding of 255 levels
    other = sampled(examples, "red heart").astype(int)
    assert np.abs(picture - other).max() > 1  # so the prompt counts


def test_each_is_a_page_at_most_and_names_a_target(examples):
    scripts = sorted(FOLDER.glob("emoji_*.py"))
    assert {each.stem.removeprefix("emoji_") for each in scripts} >= {
        "cpu", "cuda", "qnn", "coreml", "xnnpack",
    }  # fmt: skip
    for path in scripts:
        if path.stem not in ("emoji_numpy", "emoji_build"):
            text = path.read_text(encoding="utf-8")
            assert "torch" not in text and len(text.splitlines()) <= 25
            compile(text, str(path), "exec")
