"""The README says what the repository does: its example, its commands, its lists."""

import os
import re
import subprocess
import sys
from pathlib import Path

import effuse
from effuse.backends.onnx_integer import NATIVE
from effuse.kernels.formats import FORMATS, describe
from effuse.passes import ORDER, PRESETS

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_is_the_quickstart_file():
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert block == (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")


def test_every_pass_and_preset_is_in_the_tables():
    for each in ORDER:
        assert f"`{each.__name__}" in README
    for name in PRESETS:
        assert f"| `{name}` |" in README


def test_the_table_of_formats_is_what_they_declare():
    for row in map(describe, FORMATS.values()):
        start = f"| `{row['name']}` | {row['weights']}"
        (line,) = [each for each in README.splitlines() if each.startswith(start)]
        for key in ("weights", "activations", "conv_weights", "conv_activations"):
            assert row[key] in line
        assert f" {row['bits_per_weight']:g}" in line
        assert ("native" in line) == (row["name"] in NATIVE)


def test_the_make_targets_that_it_names_exist():
    targets = re.findall(
        r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    for name in re.findall(r"make ([a-z]+)", README):
        assert name in targets


def test_the_example_runs_as_written(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONSAFEPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cat.png").stat().st_size > 1000
    loaded = effuse.load(tmp_path / "unet.effuse")
    assert any(layer["format"] == "w8a8" for layer in loaded.manifest["layers"])
