"""The benchmark of a sweep on a tiny network: predicted, stopped, gone on with, written."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_sweep")


@pytest.fixture
def start(bench, monkeypatch, tmp_path):
    def call(*words):
        base = ["prune_sweep", "--smoke", "--size", "8", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [*base, "--kept", str(tmp_path / "kept"), *words])
        return bench.main()

    return call


def test_a_sweep_that_is_stopped_goes_on(bench, start, monkeypatch, tmp_path, capsys):
    whole, count = bench.Timed.write, 0

    def write(self, key, tensors):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        whole(self, key, tensors)

    monkeypatch.setattr(bench.Timed, "write", write)
    assert start() == 130
    first = json.loads((tmp_path / "out/prune-sweep.json").read_text())
    assert len(first["rows"]) == 3 and "--add goes on" in capsys.readouterr().out
    assert start("--add") == 0
    second = json.loads((tmp_path / "out/prune-sweep.json").read_text())
    assert second["rows"][:3] == first["rows"] and len(second["rows"]) > 6
    assert second["forwards"] > 3 and second["peak_bytes"] > 1e8
    (about,) = second["predicted"]
    assert about.startswith(f"prune: losses of {len(second['rows'])} spans on 1 input: about")
    names = [row["name"] for row in second["rows"]]
    assert "down_blocks.0" in names[0] and "up_blocks" in names[-1]
    text = (tmp_path / "out/prune-sweep.md").read_text()
    assert all(f"| {name} |" in text for name in names)


def test_the_list_needs_no_weights(start, capsys):
    assert start("--list") == 0
    said = capsys.readouterr().out
    assert "down_blocks.0.resnets.0.conv2" in said and "forwards" in said


def test_more_than_the_memory_allowed_is_said(bench):
    document = {"rows": [1, 2], "seconds": 3.0, "peak_bytes": 9 * 2**30}
    assert bench.summary(document, 4) == ("2 of 4 losses in 3 s, at most 9.00 GiB, more than 8 GiB")
