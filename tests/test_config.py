"""Configurations: four ways to write one, and every mistake told with the nearest name."""

from __future__ import annotations

import dataclasses
import json

import pytest

import effuse
from effuse.config import resolve
from effuse.errors import ConfigError
from effuse.passes import PRESETS, Canonicalize, Hoist, Quantize

TOML = """
backend = "reference"
seed = 7
calibration_steps = "normal"
calibration_calls = 1024
dynamic = {batch = [1, 8]}
roles = {"added.mask" = "static"}

[[passes]]
name = "quantize"
activations = "dynamic"
min_sqnr_db = 12
exclude = ["conv_in*", "conv_out*"]

[[passes]]
name = "hoist"
"""


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "build.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_by_name_as_passes_and_as_a_mapping(name):
    assert resolve(name) == effuse.Config(passes=name) == resolve({"passes": name})
    assert resolve(name).passes == effuse.Config(passes=PRESETS[name]).passes


def test_a_config_is_itself():
    config = effuse.Config(passes=(Hoist(),), seed=3)
    assert resolve(config) is config


def test_a_toml_file(toml):
    expected = effuse.Config(
        passes=(
            Hoist(),
            Quantize(
                "w8a8", activations="dynamic", min_sqnr_db=12.0, exclude=("conv_in*", "conv_out*")
            ),
        ),
        backend="reference",
        seed=7,
        calibration_steps="normal",
        calibration_calls=1024,
        dynamic={"batch": (1, 8)},
        roles={"added.mask": "static"},
    )
    assert resolve(toml) == resolve(str(toml)) == expected


def test_passes_by_name_mapping_and_value():
    one = effuse.Config(passes=["hoist", {"name": "quantize", "edges": True}])
    assert one.passes == (Hoist(), Quantize(edges=True))
    assert effuse.Config(passes=Quantize()).passes == (Quantize(),)
    assert effuse.Config(passes={"name": "hoist"}).passes == (Hoist(),)
    assert effuse.Config(passes=()).passes == ()


def test_passes_in_any_order_come_in_the_legal_one():
    passes = (Quantize(), Hoist(), Canonicalize())
    assert effuse.Config(passes=passes).passes == (Canonicalize(), Hoist(), Quantize())
    assert effuse.Config(passes=["quantize", "hoist"]).passes == (Hoist(), Quantize())


@pytest.mark.parametrize("passes", [(Hoist(), Hoist()), ["hoist", Hoist()],
                                    (Quantize(), Quantize(edges=True))])  # fmt: skip
def test_a_pass_given_twice(passes):
    with pytest.raises(ConfigError, match=r"passes: (hoist|quantize) is given twice"):
        effuse.Config(passes=passes)


MISTAKES = [
    ("w8a8-dynamc", "preset: 'w8a8-dynamc' is unknown; did you mean 'w8a8-dynamic'?"),
    ({"passes": "exakt"}, "preset: 'exakt' is unknown; did you mean 'exact'?"),
    ({"passes": ["hoists"]}, "passes: no pass is called 'hoists'; did you mean 'hoist'?"),
    ({"passes": [{"nam": "hoist"}]}, "passes: no pass is called ''"),
    (
        {"passes": [{"name": "quantize", "activation": "static"}]},
        "passes: quantize has no option 'activation'; did you mean 'activations'?",
    ),
    ({"pases": []}, "config: no option 'pases'; did you mean 'passes'?"),
    ({"backend": "onx"}, "backend: 'onx' is not in this version; did you mean 'onnx'?"),
    ({"backend": "executorch"}, "backend: 'executorch' is not in this version"),
    ({"target": "cpu-avx512vni"}, "target: 'cpu-avx512vni' is not in this version; did you mean"),
    (
        {"calibration_steps": "normale"},
        "calibration_steps: 'normale' is unknown; did you mean 'normal'?",
    ),
    ({"target": "sm_91"}, "target: 'sm_91': not in this version; the nearest is sm_90 (known: "),
]


@pytest.mark.parametrize(("value", "message"), MISTAKES)
def test_mistakes_are_told_with_the_nearest_name(value, message):
    with pytest.raises(ConfigError) as caught:
        resolve(value)
    assert str(caught.value).startswith(message)
    assert "known: " in str(caught.value)


WRONG = [
    ({"seed": "much"}, "config: seed: .*integer.*'much'"),
    ({"seed": 1.5}, "config: seed: .*1.5"),
    ({"backend": 3}, "config: backend: .*string.*3"),
    ({"roles": ["sample"]}, "config: roles: "),
    ({"step_groups": 0}, "step_groups: at least 1, got 0"),
    ({"calibration_steps": 4}, "config: calibration_steps: .*string.*4"),
    ({"calibration_calls": 0}, "calibration_calls: at least 1, or None, got 0"),
    ({"calibration_calls": "many"}, "config: calibration_calls: .*integer.*'many'"),
    ({"calibration_calls": 64}, "calibration_calls: 64 calls are drawn by .*'all' records every"),
    (
        {"calibration_calls": 0, "calibration_steps": "normal"},
        "calibration_calls: at least 1, or None, got 0",
    ),
    ({"dynamic": {"batch": 4}}, r"config: dynamic\.batch: "),
    ({"dynamic": {"batch": (8, 1)}}, r"dynamic: 'batch' needs bounds 1 <= low <= high, got \(8, 1"),
    ({"dynamic": {"batch": (0, 4)}}, r"dynamic: 'batch' needs bounds"),
    ({"passes": 5}, "passes: expected a sequence of passes, got 5"),
    ({"passes": [5]}, "passes: expected a pass, its name or a mapping, got 5"),
    ({"passes": [Hoist]}, "passes: expected a pass, its name or a mapping, got <class"),
    ({"passes": [{"name": "quantize", "format": "w1a1"}]}, "passes: quantize: .*'w1a1'"),
    ({"passes": [{"name": "quantize", "edges": "maybe"}]}, "passes: quantize: edges: .*'maybe'"),
    ({"passes": [{"name": "hoist", "include": "conv*"}]}, "passes: hoist: include: .*'conv"),
    ({"passes": [Quantize(min_sqnr_db="loud")]}, "passes: quantize: min_sqnr_db: .*'loud'"),
    ({"passes": [Hoist(exclude="conv*")]}, "passes: hoist: exclude: "),
]


@pytest.mark.parametrize(("value", "message"), WRONG)
def test_values_of_the_wrong_type(value, message):
    with pytest.raises(ConfigError, match=message):
        resolve(value)


def test_config_files_that_are_missing_or_no_toml(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.toml: no such config file"):
        resolve(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("backend = nothing")
    with pytest.raises(ConfigError, match=r"bad\.toml: not valid TOML: .*line 1"):
        resolve(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"binary\.toml: not valid TOML"):
        resolve(tmp_path / "binary.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.toml: Is a directory"):
        resolve(tmp_path / "folder.toml")


def test_mistakes_in_a_file_are_told_alike(tmp_path):
    (tmp_path / "a.toml").write_text('backend = "onnnx"')
    with pytest.raises(ConfigError, match="did you mean 'onnx'"):
        resolve(tmp_path / "a.toml")


def test_data_is_json_and_makes_the_same_config_again(toml):
    for config in (resolve(toml), resolve("w8a8"), effuse.Config(target="cpu", passes="none")):
        data = json.loads(json.dumps(config.data()))
        assert effuse.Config(**data) == config
        assert effuse.Config(**data).data() == config.data()


def test_data_holds_every_option_of_every_pass():
    data = effuse.Config(passes=(Quantize(), Hoist())).data()
    assert [each["name"] for each in data["passes"]] == ["hoist", "quantize"]
    for each, kind in zip(data["passes"], (Hoist, Quantize), strict=True):
        names = {field.name for field in dataclasses.fields(kind)}
        assert set(each) == {"name", *names} - {"resume"}  # a folder of the build machine


def test_a_config_cannot_be_changed():
    config = effuse.Config()
    with pytest.raises(Exception, match="frozen"):
        config.seed = 2
    assert effuse.Config().passes == () and effuse.Config().backend == "onnx"


def test_errors_are_effuse_errors_and_value_errors():
    with pytest.raises(effuse.EffuseError, match="seed"):
        resolve({"seed": None})
    with pytest.raises(ValueError, match="seed"):
        resolve({"seed": None})
