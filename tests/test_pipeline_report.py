"""What the command line says of a pipeline's artifact, and the example that makes one."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from hand_made import hand_made
from typer.testing import CliRunner

import effuse
from effuse.cli_app import app
from effuse.errors import InputError, MissingExtra
from effuse.pipeline_tokens import tokens_of

pytest.importorskip("transformers", reason="pipelines need transformers, which is not installed")
from diffusers import DDIMScheduler, UNet2DConditionModel

ROOT = Path(__file__).resolve().parent.parent
PARTS = {"encoder": 1, "network": 3, "decoder.decode": 1}  # how often a picture calls them


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    compiled = effuse.compile_pipeline(hand_made(), "exact", steps=3, progress=False)
    folder = tmp_path_factory.mktemp("pipeline")
    compiled.save(folder / "a.zip")
    return compiled.save(folder / "a.effuse")


def said(*words, code=0):
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("suffix", [".effuse", ".zip"])
def test_inspect(saved, suffix):
    path = saved.with_suffix(suffix)
    text = said("inspect", path)
    assert "HandMade: 3 steps of DDIMScheduler" in text
    assert "runs without torch: no, because judge is not compiled" in text
    assert "as it is: CaptureError" in text and "every call" in text and "per schedule" in text
    data = json.loads(said("inspect", path, "--json"))
    parts = {name: part for each in data["components"].values()
             for name, part in each["parts"].items()}  # fmt: skip
    assert {name: part["calls"] for name, part in parts.items()} == PARTS
    assert parts["network"]["rates"]["schedule"]["parameters"] == 8
    assert parts["network"]["leaves_step_program"] == pytest.approx(8 / 28)
    assert sum(part["bytes"] for part in parts.values()) < data["bytes"]
    assert data["components"]["judge"]["reason"].startswith("CaptureError")
    assert not data["others"]["judge"]["saved"] and data["others"]["scheduler"]["saved"]


def test_report(saved, tmp_path):
    page = tmp_path / "page.html"
    text = said("report", saved, "-o", page)
    assert "agrees with reference" in text and f"wrote {page.name}"[:5] in text
    html = page.read_text(encoding="utf-8")
    for number, name in enumerate(PARTS, 1):
        assert f'href="#network-{number}">What was built: {name}<' in html
        assert f'id="network-{number}">What was built: {name}<' in html
    assert (
        "<h1>HandMade</h1>" in html and "judge is not compiled" in html and "Entrance" not in html
    )
    data = json.loads(said("report", saved, "--json"))
    assert set(data["parts"]) == set(PARTS) and data["pipeline"]["steps"] == 3
    same = effuse.load(saved).to_html(tmp_path / "other.html")
    assert same.read_text(encoding="utf-8") == html


def test_bench(saved):
    data = json.loads(said("bench", saved, saved, "--repeat", 1, "--warmup", 0, "--json"))
    assert len(data["artifacts"]) == 2
    for each in data["artifacts"]:
        assert {part["part"]: part["calls"] for part in each["parts"]} == PARTS
        whole = sum(part["calls"] * part["median_ms"] for part in each["parts"])
        assert each["picture_ms"] == pytest.approx(whole)
    text = said("bench", saved, "--repeat", 1, "--warmup", 0)
    assert "a picture in the parts of" in text and "decoder.decode" in text
    mixed = said("bench", saved, saved / "network", code=1)
    assert "no pipeline, and another artifact is one" in mixed


@pytest.mark.parametrize("words", [("dump", "A"), ("export", "A", "{}/x"), ("diff", "A", "A")])
def test_what_takes_a_network_names_the_parts(saved, tmp_path, words):
    given = [str(saved) if word == "A" else word.format(tmp_path) for word in words]
    text = said(*given, code=1)
    assert "a pipeline's artifact, and this takes a network's" in text
    assert f"{saved.name}/decoder.decode" in text.replace(" ", "")


def test_other_verbs(saved):
    assert "compiled already; --prune is for networks" in said("inspect", saved, "--prune", code=1)
    assert "decoder.decode/full.onnx for onnxruntime: clean" in said("lint", saved)


def test_a_text_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    told = {"tokenizer": "gone", "length": 4, "cleaned": "", "pad": 0}
    with pytest.raises(MissingExtra, match=r"effuse\[text\]'; or give token ids"):
        tokens_of(tmp_path, told, "a cat")
    assert tokens_of(tmp_path, told, [5])["input_ids"].tolist() == [[5, 0, 0, 0]]


def test_the_example(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    example = importlib.import_module("pipeline")
    small = UNet2DConditionModel(
        sample_size=32, in_channels=3, out_channels=3, layers_per_block=1, cross_attention_dim=64,
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        norm_num_groups=4, attention_head_dim=4,
    ).eval()  # fmt: skip
    kind = example.EmojiPipeline
    monkeypatch.setattr(kind, "open", lambda: kind(small, DDIMScheduler()))
    assert example.main("cat face", steps=3) > 60
    assert (tmp_path / "out" / "pipeline" / "picture.png").stat().st_size > 1000
    assert "torch-free: yes" in capsys.readouterr().out
    loaded = effuse.load(tmp_path / "out" / "pipeline" / "emoji.effuse")
    with pytest.raises(InputError, match="9 token ids, and the pipeline takes 8"):
        loaded.run([1] * 9)
