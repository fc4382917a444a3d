"""The wheel on a device: numpy and onnxruntime beside it, an artifact loaded, a picture made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import effuse
from effuse.metrics import psnr_db

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "compiler", "passes", "backends", "kernels")
TIMES = [800, 600, 400, 200]
CLOSE_DB = 60

SAMPLE = """
import importlib.util, json, sys
import numpy as np
import effuse

def missing(call):
    try:
        call()
    except effuse.EffuseError as error:
        return [type(error).__name__, isinstance(error, ImportError), str(error)]

net = effuse.load(sys.argv[1], threads=1)
kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
x = np.load(sys.argv[2]).astype(np.float32)
prompt = np.linspace(-1, 1, 8, dtype=np.float32).reshape(1, 2, 4)
times = [800, 600, 400, 200]
for time, after in zip(times, [*times[1:], None]):
    noise = net(x, time, encoder_hidden_states=prompt, return_dict=False)[0]
    now, then = kept[time], 1.0 if after is None else kept[after]
    clean = (x - np.sqrt(1 - now) * noise) / np.sqrt(now)
    x = (np.sqrt(then) * clean + np.sqrt(1 - then) * noise).astype(np.float32)
np.save(sys.argv[3], x)
print(json.dumps({
    "home": effuse.__file__,
    "absent": [m for m in ("torch", "pydantic", "safetensors") if not importlib.util.find_spec(m)],
    "prompt runs": net.session.runs["prompt"],
    "compile": missing(lambda: effuse.compile(None)),
    "config": missing(lambda: effuse.Config()),
}))
"""


class Net(nn.Module):
    """A denoiser with a prompt."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 8), (8, 8), (8, 3))
        )
        self.prompt = nn.Linear(4, 8)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        h = self.layers[0](sample) + torch.sin(timestep * 0.01)
        h = h + self.prompt(encoder_hidden_states).mean(1)[:, :, None, None]
        y = self.layers[2](torch.relu(self.layers[1](torch.relu(h))))
        return {"sample": y} if return_dict else (y,)


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, **options)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy: a build in the checkout would leave its traces there."""
    copy = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    target = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet",
        "--wheel-dir", str(target), str(copy), cwd=target)  # fmt: skip
    (found,) = target.glob("effuse-*.whl")
    return found


@pytest.fixture(scope="module")
def device(wheel, tmp_path_factory):
    """The folder of the programs of a fresh environment with the wheel and what it depends on."""
    home = tmp_path_factory.mktemp("device")
    venv.create(home, with_pip=False, symlinks=True)
    programs = home / "bin"
    run(sys.executable, "-m", "pip", "--python", str(programs / "python"), "install", "--quiet",
        "--no-compile", str(wheel))  # fmt: skip
    return programs


@pytest.fixture(scope="module")
def compiled():
    given = {
        "sample": torch.randn(1, 3, 8, 8),
        "timestep": torch.tensor(600),
        "encoder_hidden_states": torch.ones(1, 2, 4),
        "return_dict": False,
    }
    return effuse.compile(Net().eval(), "exact", inputs=given, schedule=TIMES, progress=False)


def bare_environment():
    """The environment without what would lend the device the build machine's packages."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


def sampled_by_eager(start):
    """The picture that the original network makes by the same DDIM steps, in double precision."""
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    x, prompt, net = start.double(), torch.linspace(-1, 1, 8).reshape(1, 2, 4), Net().eval()
    with torch.no_grad():
        for time, after in zip(TIMES, [*TIMES[1:], None], strict=True):
            noise = net(x.float(), torch.tensor(time), prompt)["sample"].double()
            now, then = kept[time], 1.0 if after is None else kept[after]
            clean = (x - (1 - now) ** 0.5 * noise) / now**0.5
            x = then**0.5 * clean + (1 - then) ** 0.5 * noise
    return x.numpy()


def test_the_wheel_holds_every_module_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"effuse/{'' if folder == 'compiler' else folder + '/'}{path.name}"
        for folder in ("compiler", "passes", "backends", "kernels")
        for path in (ROOT / folder).iterdir()
        if path.suffix in (".py", ".j2") or path.name == "py.typed"
    }
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("LICENSE") for name in names)


def test_a_picture_on_the_device(device, compiled, tmp_path):
    artifact = compiled.save(tmp_path / "net.zip")
    start = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    np.save(tmp_path / "start.npy", start.numpy())
    (tmp_path / "sample.py").write_text(SAMPLE)
    printed = run(
        str(device / "python"), "sample.py", str(artifact), "start.npy", "picture.npy",
        cwd=tmp_path, env=bare_environment(),
    )  # fmt: skip
    told = json.loads(printed.splitlines()[-1])
    assert "site-packages" in told["home"] and not told["home"].startswith(str(ROOT))
    assert told["absent"] == ["torch", "pydantic", "safetensors"]
    assert told["prompt runs"] == 1
    for use in ("compile", "config"):
        kind, is_import_error, message = told[use]
        assert (kind, is_import_error) == ("MissingExtra", True)
        assert message.endswith("which is not installed; run: pip install 'effuse[compiler]'")
    picture = np.load(tmp_path / "picture.npy")
    assert picture.std() > 0.01
    assert psnr_db(sampled_by_eager(start), picture) > CLOSE_DB


def test_the_console_script_says_what_is_missing(device):
    result = subprocess.run(
        [str(device / "effuse"), "--help"], capture_output=True, text=True, env=bare_environment()
    )
    assert result.returncode == 1
    assert "pip install 'effuse[compiler]'" in result.stderr
    assert "Traceback" not in result.stderr
