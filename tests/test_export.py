"""ORT format: the same numbers, the operators for small builds, sizes and their budget."""

import os
import subprocess
import sys
import tempfile
from functools import cache

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import effuse
from effuse import cli_export, export_ort
from effuse.cli_app import app
from effuse.errors import ArtifactError, ConfigError
from effuse.passes import Cache, Hoist, Lora, Quantize

TIMES = [800, 600, 400, 200]
SAMPLE = """
import sys
import numpy as np
sys.modules["torch"] = None  # importing it fails
sys.modules["onnx"] = None
import effuse
net = effuse.load(sys.argv[1], threads=1)
x = np.load(sys.argv[2])
for time in (800, 600, 400, 200):
    x = x - 0.1 * net(x, time, encoder_hidden_states=np.ones((1, 2, 8), np.float32))["sample"]
np.save(sys.argv[3], x)
print(dict(net.session.steps))
"""


class Net(nn.Module):
    """A denoiser with a long skip, which a cache finds, and a prompt."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.down = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 3, 2, 1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.prompt = nn.Linear(8, width)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.linear = nn.Linear(width, width)
        self.last = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states, return_dict=True):
        skip = torch.relu(self.first(sample) + torch.sin(timestep * 0.01))
        h = (
            torch.relu(self.down(skip))
            + self.prompt(encoder_hidden_states).mean(1)[..., None, None]
        )
        h = nn.functional.interpolate(torch.relu(self.middle(h)), scale_factor=2.0)
        h = torch.relu(self.up(torch.cat([h, skip], 1)))
        h = h + self.linear(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {"sample": self.last(h)} if return_dict else (self.last(h),)


@cache  # none of the tests changes what it gets
def built(*passes, target=None):
    given = {
        "sample": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "timestep": torch.tensor(600),
        "encoder_hidden_states": torch.ones(1, 2, 8),
        "return_dict": False,
    }
    config = effuse.Config(passes=passes or (Hoist(),), target=target)
    return effuse.compile(Net().eval(), config, inputs=given, schedule=TIMES, progress=False)


def start():
    return np.random.default_rng(3).standard_normal((1, 3, 16, 16)).astype(np.float32)


def sampled(net):
    x, prompt = start(), np.ones((1, 2, 8), np.float32)
    for time in TIMES:
        x = x - 0.1 * net(x, time, encoder_hidden_states=prompt)["sample"]
    return x


def exported(compiled, folder, budget=None):
    source = compiled.save(folder / "net.effuse")
    return source, export_ort.export(source, folder / "small.effuse", budget)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_plan_runs_on_ort_files_with_numpy_and_onnxruntime_alone(tmp_path):
    compiled = built(Hoist(), Cache(interval=2, warmup=1))
    _, written = exported(compiled, tmp_path)
    assert {name for name in written.files if name.endswith(".ort")} == {
        "full.ort", "reuse.ort", "prompt.ort",
    }  # fmt: skip
    assert not any(name.endswith((".onnx", ".safetensors")) for name in written.files)
    np.save(tmp_path / "start.npy", start())
    found = subprocess.run(
        [sys.executable, "-c", SAMPLE, str(written.path), "start.npy", "out.npy"], cwd=tmp_path,
        capture_output=True, text=True, env={**os.environ, "PYTHONSAFEPATH": "1"}, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "{'full': 2, 'reuse': 2}" in found.stdout
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), sampled(compiled), atol=2e-6)


def test_quantized_layers_stay_integer(tmp_path):
    compiled = built(Hoist(), Quantize("w8a8"))
    _, written = exported(compiled, tmp_path)
    operators = (written.path / export_ort.OPERATORS).read_text()
    assert "QLinearConv" in operators and "QGemm" in operators
    np.testing.assert_allclose(
        sampled(effuse.load(written.path)), sampled(compiled), rtol=1e-4, atol=1e-5
    )


def test_four_bits_keep_float_arithmetic(tmp_path):
    compiled = built(Hoist(), Quantize("w4a16", min_sqnr_db=0))
    _, written = exported(compiled, tmp_path)
    np.testing.assert_allclose(sampled(effuse.load(written.path)), sampled(compiled), atol=2e-6)


def test_the_operators_are_those_of_the_models_with_their_types(tmp_path):
    _, written = exported(built(), tmp_path)
    text = (written.path / export_ort.OPERATORS).read_text()
    assert text.startswith("ai.onnx;") and '"float"' in text
    assert "QLinearConv" not in text


def test_layouts_of_this_machine_do_not_get_into_the_file(tmp_path):
    _, written = exported(built(), tmp_path)
    text = (written.path / export_ort.OPERATORS).read_text()
    assert "nchwc" not in text and tempfile.gettempdir() not in text


def test_operators_of_other_providers_are_not_fused_away(tmp_path):
    _, written = exported(built(target="coreml"), tmp_path)
    assert "com.microsoft" not in (written.path / export_ort.OPERATORS).read_text()


def test_loras_load_on_ort_files(tmp_path):
    compiled = built(Hoist(), Lora())
    factors = {
        "linear.lora_A.weight": torch.randn(2, 32, generator=torch.Generator().manual_seed(1)),
        "linear.lora_B.weight": torch.randn(32, 2, generator=torch.Generator().manual_seed(2)),
    }
    save_file(factors, tmp_path / "style.safetensors")
    _, written = exported(compiled, tmp_path)
    loaded = effuse.load(written.path)
    before = sampled(loaded)
    np.testing.assert_allclose(before, sampled(compiled), atol=2e-6)
    compiled.load_lora(tmp_path / "style.safetensors")
    loaded.load_lora(tmp_path / "style.safetensors")
    changed = sampled(loaded)
    np.testing.assert_allclose(changed, sampled(compiled), atol=2e-6)
    compiled.unload_lora()
    assert np.abs(changed - before).max() > 1e-3


def test_the_manifest_counts_what_the_format_duplicates(tmp_path):
    source, written = exported(built(Hoist(), Cache(interval=2, warmup=1)), tmp_path)
    shared = sum(path.stat().st_size for path in source.iterdir()
                 if path.suffix in (".onnx", ".safetensors"))  # fmt: skip
    parts = sum(size for name, size in written.files.items() if name.endswith(".ort"))
    described = effuse.load(written.path).manifest["export"]
    assert described == {"format": "ort", "shared": shared, "duplicated": parts - shared}
    assert written.total == sum(
        path.stat().st_size for path in written.path.iterdir() if path.name != export_ort.OPERATORS
    )


def test_a_budget_that_is_exceeded_names_what_is_large_and_what_would_fit(tmp_path):
    compiled = built()
    source, written = exported(compiled, tmp_path, budget=10**6)
    goal = tmp_path / "smaller.effuse"
    with pytest.raises(ConfigError) as caught:
        export_ort.export(source, goal, written.total - 1)
    message = str(caught.value)
    assert not goal.exists()
    size = written.files["full.ort"]
    assert f"full.ort {size / 1e6:.2f} MB" in message
    assert "up.weight 0.07 MB" in message.replace("up__weight", "up.weight")
    assert "by estimate w8a8" in message and "w4a16" in message
    with pytest.raises(ConfigError, match="no preset would fit"):
        export_ort.export(source, goal, 1000)
    export_ort.export(source, goal, written.total)


def test_the_estimate_of_a_preset_is_near_what_it_takes(tmp_path):
    source, written = exported(built(), tmp_path)
    guess = export_ort.estimates(effuse.load(source).manifest, written)["w8a8"]
    (tmp_path / "w8a8").mkdir()
    _, real = exported(built(Hoist(), Quantize("w8a8")), tmp_path / "w8a8")
    assert 0.6 < guess / real.total < 1.6


def test_only_artifacts_of_the_onnx_back_end_and_only_once(tmp_path):
    given = {"sample": torch.ones(1, 3, 16, 16), "timestep": torch.tensor(600),
             "encoder_hidden_states": torch.ones(1, 2, 8)}  # fmt: skip
    config = effuse.Config(backend="reference")
    other = effuse.compile(Net().eval(), config, inputs=given, progress=False)
    with pytest.raises(ConfigError, match="backend 'reference'; ORT format is made from"):
        export_ort.export(other.save(tmp_path / "other.effuse"), tmp_path / "out.effuse")
    _, written = exported(built(), tmp_path)
    with pytest.raises(ConfigError, match="ORT format already"):
        export_ort.export(written.path, tmp_path / "again.effuse")


def test_a_damaged_ort_file_is_refused(tmp_path):
    _, written = exported(built(), tmp_path)
    data = bytearray((written.path / "full.ort").read_bytes())
    data[len(data) // 2] ^= 1
    (written.path / "full.ort").write_bytes(data)
    with pytest.raises(ArtifactError, match=r"full\.ort is not as it was written"):
        effuse.load(written.path)


def test_the_verb(tmp_path):
    source = built().save(tmp_path / "net.effuse")
    said = call("export", source, tmp_path / "small.zip", "--size-budget", "1MB")
    assert said.exit_code == 0, said.output
    assert "full.ort" in said.stdout and "for the device" in said.stdout
    assert onnxruntime.__version__ and effuse.load(tmp_path / "small.zip").manifest["export"]
    over = call("export", source, tmp_path / "none.zip", "--size-budget", "1 kB")
    assert over.exit_code == 1 and not (tmp_path / "none.zip").exists()
    for words, part in (
        (("--format", "exe"), "expected ort"),
        (("--size-budget", "a lot"), "20MB"),
    ):
        wrong = call("export", source, tmp_path / "none.zip", *words)
        assert wrong.exit_code == 2 and part in wrong.output


@pytest.mark.parametrize(("text", "size"), [("20MB", 20_000_000), ("1.5 kB", 1500), ("7", 7)])
def test_sizes(text, size):
    assert cli_export.read_size(text) == size
