"""The verb lint and its library: what it prints, on whose files, and how it fails."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
import torch.nn.functional as F
from onnx import parser
from torch import nn
from typer.testing import CliRunner

import effuse
from effuse.cli_app import app
from effuse.errors import ArtifactError, ConfigError
from effuse.lint import TARGETS, lint, rules_of

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
SOUND = f"{HEAD} g (float[2,4] x) => (float[2,4] y) {{ y = Relu(x) }}"
PAIR = f"""{HEAD} g (float[2,4] x) => (float[2,4] y) <float s = {{0.5}}, int8 z = {{1}}>
{{ [first] q = QuantizeLinear(x, s, z)
   [second] y = DequantizeLinear(q, s, z) }}"""

CUT = parser.parse_model(PAIR).SerializeToString()[:90]


def call(*words, code=0):
    result = CliRunner().invoke(app, ["lint", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def fails(*words):
    """The message of a call that cannot lint."""
    message = " ".join(call(*words, code=2).stderr.split())
    assert "Traceback" not in message
    return message


def save(path, text):
    onnx.save(parser.parse_model(text), path)
    return path


@pytest.fixture
def faulty(tmp_path):
    return save(tmp_path / "faulty.onnx", PAIR)


def test_a_clean_file(tmp_path):
    path = save(tmp_path / "sound.onnx", SOUND)
    for target in TARGETS:
        assert f"{path} for {target}: clean" in call("--target", target, path).stdout


def test_the_table_names_rule_node_place_fault_remedy_and_source(faulty):
    text = call("--target", "tensorrt-10", faulty, code=1).stdout
    row = next(line for line in text.splitlines() if "first" in line)
    for word in ("symmetric", "error", "QuantizeLinear 'first' (node 0)", "its zero point is 1"):
        assert word in row
    flat = " ".join(text.split())
    assert "2 error" in flat and "Quantize symmetrically" in flat and "docs.nvidia.com" in flat


def test_json_has_the_same(faulty):
    found = json.loads(call("--target", "tensorrt-11", "--json", faulty, code=1).stdout)
    assert list(found) == [str(faulty)]
    assert [(each["rule"], each["node"]) for each in found[str(faulty)]] == [
        ("symmetric", "first"), ("symmetric", "second"),
    ]  # fmt: skip
    assert found[str(faulty)][0] == lint(faulty, "tensorrt-11")[0].to_json()


def test_warnings_do_not_fail(tmp_path):
    path = save(tmp_path / "m.onnx", SOUND.replace("y = Relu(x)", "y = Relu(x)\n z = NonZero(x)"))
    assert "data-dependent" in call("--target", "tensorrt-11", path).stdout


def test_a_table_of_many_places_says_how_many_more(tmp_path):
    body = "\n".join(f"y{n} = Det(x)" for n in range(20)) + "\n y = Relu(x)"
    path = save(tmp_path / "m.onnx", SOUND.replace("y = Relu(x)", body))
    assert "operator: 12 more" in call("--target", "tensorrt-11", path, code=1).stdout


def test_rules_by_target_and_version():
    older = ("--target", "tensorrt-10", "--version", "10.9")
    asked = (("--target", "tensorrt-11"), older)
    new, old = (json.loads(call("--rules", "--json", *words).stdout) for words in asked)
    only = {each["id"] for each in old} - {each["id"] for each in new}
    assert {"operator-attention", "mxfp8-version", "opset-22"} <= only
    assert "e2m1-version" not in only
    assert "until 10.14" in call("--rules", *older).stdout


def test_attention_by_version(tmp_path):
    text = (
        SOUND.replace("21", "23")
        .replace("[2,4]", "[1,2,4,8]")
        .replace("ir_version: 10", "ir_version: 11")
    )
    path = save(tmp_path / "m.onnx", text.replace("Relu(x)", "Attention(x, x, x)"))
    found = {version: [each.rule for each in lint(path, "tensorrt-10", version)]
             for version in ("10.13", "10.14")}  # fmt: skip
    assert found == {"10.13": ["operator-attention"], "10.14": []}


def test_subgraphs_and_functions_are_linted(tmp_path):
    text = """<ir_version: 10, opset_import: ["" : 21, "here" : 1]>
    g (float[2,4] x, bool c) => (float[2,4] y)
    { a = here.twice(x)
       y = If (c) <then_branch = yes () => (float t) { t = Det(a) },
                   else_branch = no () => (float e) { e = Det(x) }> }
    <domain: "here", opset_import: ["" : 21]> twice (v) => (w) { w = Unique(v) }"""
    found = lint(save(tmp_path / "m.onnx", text), "tensorrt-11")
    assert [(each.op, each.place) for each in found if each.rule == "operator"] == [
        ("Det", "node 0 in yes"), ("Det", "node 0 in no"), ("Unique", "node 0 in twice"),
    ]  # fmt: skip


def test_models_in_memory_stay_as_they_are():
    proto = parser.parse_model(PAIR)
    model, before = ir.from_proto(proto), proto.SerializeToString()
    kept = ir.to_proto(model).SerializeToString()
    for each in (proto, model):
        assert {found.rule for found in lint(each, "tensorrt-10")} == {"symmetric"}
    assert proto.SerializeToString() == before
    assert ir.to_proto(model).SerializeToString() == kept


def external(folder, length=4 << 20):
    """A file of 4 MiB of weights beside it, of which scales are the last four bytes."""
    model = parser.parse_model(PAIR.replace("{1}", "{0}"))
    data = np.zeros(length, np.uint8)
    data[-4:] = np.frombuffer(np.float32(-1).tobytes(), np.uint8)
    (folder / "w.bin").write_bytes(data.tobytes())
    scale = model.graph.initializer[0]
    del scale.float_data[:]
    scale.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", length - 4), ("length", 4)):
        scale.external_data.add(key=key, value=str(value))
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return folder / "m.onnx"


def test_scales_in_external_data_are_read(tmp_path):
    found = lint(external(tmp_path), "tensorrt-10")
    assert [each.rule for each in found] == ["scale-positive"] * 2


def test_external_data_that_are_missing(tmp_path):
    path = external(tmp_path)
    (tmp_path / "w.bin").unlink()
    assert "'w.bin' are missing" in fails(path)


@pytest.mark.parametrize("data", [b"", b"hello there", CUT])
def test_files_that_hold_no_model(data, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    assert str(path) in fails(path)
    path.unlink()
    assert "cannot be read" in fails(path)


def test_a_file_over_the_limit_is_not_read(tmp_path):
    with (tmp_path / "m.onnx").open("wb") as file:
        file.truncate(1 << 31)  # sparse
    assert "2 GiB" in fails(tmp_path / "m.onnx")


def test_bad_models(tmp_path):
    def says(text, change=lambda model: None):
        model = parser.parse_model(text)
        change(model)
        (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
        return fails(tmp_path / "m.onnx")

    assert "opset 99 is unknown" in says(SOUND.replace("21", "99"))
    assert "names no opset" in says(SOUND, lambda model: model.ClearField("opset_import"))
    assert "'com.microsoft'" in says(SOUND.replace("Relu", "com.microsoft.Gelu"))

    def twice(model):
        model.graph.node.append(model.graph.node[0])

    assert "malformed" in says(SOUND, twice)


def test_folders(tmp_path):
    (tmp_path / "inside").mkdir()
    assert "no ONNX file in it" in fails(tmp_path / "inside")
    save(tmp_path / "inside" / "a.onnx", SOUND)
    assert "a.onnx for onnxruntime: clean" in call(tmp_path / "inside").stdout


def test_wrong_usage():
    for words in ((), ("--rules", "m.onnx")):
        assert CliRunner().invoke(app, ["lint", *words]).exit_code == 2
    assert "tensorrt-10" in fails("--target", "tensorrt-9", "m.onnx")
    assert "10.something" in fails("--target", "tensorrt-10", "--version", "11.0", "m.onnx")
    assert "numbers and dots" in fails("--version", "new", "m.onnx")
    with pytest.raises(ConfigError):
        rules_of("tensorrt")
    with pytest.raises(ArtifactError, match="got int"):
        lint(3, "openvino")


class Denoiser(nn.Module):
    """Convolutions, a norm and a linear layer on the timestep."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Conv2d(4, 64, 3, padding=1), nn.Conv2d(64, 4, 3, padding=1)
        self.norm, self.time = nn.GroupNorm(4, 64), nn.Linear(64, 64)
        self.mix = nn.Linear(64, 64)

    def forward(self, sample, timestep):
        time = self.time(torch.cos(timestep.float() * torch.arange(64.0)))
        hidden = F.silu(self.norm(self.into(sample))) + time[None, :, None, None]
        mixed = self.mix(hidden.flatten(2).transpose(1, 2)).transpose(1, 2)
        return self.out(hidden + mixed.unflatten(2, hidden.shape[2:]))


@pytest.mark.parametrize("preset,rules", [
    ("exact", set()), ("w8a8", {"symmetric", "quantized-type"}),
])  # fmt: skip
def test_what_is_compiled_is_clean_for_onnxruntime(preset, rules, tmp_path):
    torch.manual_seed(0)
    given = {"sample": torch.randn(1, 4, 4, 4), "timestep": torch.tensor(500)}
    made = effuse.compile(
        Denoiser().eval(), preset, inputs=given, schedule=[900, 500], progress=False
    )
    made.save(tmp_path / "made.zip")
    assert "clean" in call("--target", "onnxruntime", tmp_path / "made.zip").stdout
    told = call("--target", "tensorrt-11", "--json", tmp_path / "made.zip", code=int(bool(rules)))
    found = {each["rule"] for part in json.loads(told.stdout).values() for each in part}
    assert rules <= found if rules else not found
