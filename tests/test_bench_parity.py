"""The parity benchmark: its cells, its tables, the README's table, and one short run."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from effuse.errors import BackendError
from effuse.passes import PRESETS

pytest.importorskip("diffusers")
ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark, which runs as a script among its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def result(network="tiny-dit", preset="w8a8", backend="onnx", **changed):
    return {
        "network": network, "preset": preset, "backend": backend, "reference_db": 47.25,
        "original_db": 31.04, "speedup": 1.934, "megabytes": 2.345,
        "native": {"quantize": "native"}, "layers": {"all": 12, "in float": 2}, **changed,
    }  # fmt: skip


def document(*cells):
    return {"setting": {"steps": 20, "rounds": 5, "threads": 0, "smoke": False},
            "cells": list(cells)}  # fmt: skip


def test_every_network_has_every_preset_on_every_back_end(module):
    rows = module("parity_rows")
    every = rows.cells()
    assert len(set(every)) == len(every) == len(rows.NETWORKS) * 7 * 4
    assert set(rows.PRESETS) <= set(PRESETS)
    assert {each.network for each in rows.cells(smoke=True)} == set(rows.SMOKE)


def test_what_a_cell_is_compared_with_is_measured_too(module):
    rows = module("parity_rows")
    names = [each.name for each in rows.cells("tiny-flux w4a8 openvino")]
    assert names == [
        "tiny-flux exact reference", "tiny-flux exact onnx", "tiny-flux w4a8 reference",
        "tiny-flux w4a8 openvino",
    ]  # fmt: skip


@pytest.mark.parametrize("given", [["--steps", "1"], ["--rounds", "0"], ["--only", "("]])
def test_bad_arguments_are_refused(module, given, capsys):
    with pytest.raises(SystemExit) as stop:
        module("parity").main(given)
    assert stop.value.code == 2 and "error:" in capsys.readouterr().err


def test_the_list_runs_nothing_and_says_what_is_not_run(module, tmp_path, capsys):
    assert (
        module("parity").main(["--list", "--only", "tiny-sd3 exact", "--out", str(tmp_path)]) == 0
    )
    told = capsys.readouterr().out
    assert "tiny-sd3 exact tensorrt\n" in told and "triton: not run, its kernels" in told
    assert not list(tmp_path.iterdir())


def test_a_line_has_the_figures_or_the_reason(module):
    show = module("parity_show")
    assert show.line(result()) == (
        "| w8a8 | onnx | 47.2 | 31.0 | 1.93× | 2.35 | 10 of 12 | native |  |"
    )
    simulated = result(backend="reference", reference_db=None, native={"unpack": "simulated"})
    assert "| reference |  | 31.0 | 1.93× | 2.35 | 10 of 12 | simulated: unpack |" in show.line(
        simulated
    )
    missing = {"network": "tiny-dit", "preset": "w4a8", "backend": "tensorrt", "reason": "no a|b"}
    assert show.line(missing).endswith("| | | | | | | no a\\|b |")
    text = show.markdown(document(result(), missing))
    assert "## tiny-dit" in text and "Not run: triton" in text


def test_the_short_table_has_a_line_a_network_and_a_column_a_back_end(module):
    show = module("parity_show")
    cells = [result(preset="exact", reference_db=200.0, speedup=1.0), result(),
             result(backend="tensorrt", speedup=None)]  # fmt: skip
    *_, line = show.short(cells).splitlines()
    assert line == "| tiny-dit | equal, 1.00× | 47 dB, 1.93× | – | – | – | 47 dB |"


def test_the_readme_is_refreshed_between_its_markers_only(module, tmp_path):
    show, path = module("parity_show"), tmp_path / "README.md"
    path.write_text(f"before\n{show.START}\nold\n{show.END}\nafter\n", encoding="utf-8")
    assert show.refresh(path, "| new |\n") and show.refresh(path, "| new |\n")
    expected = f"before\n{show.START}\n| new |\n{show.END}\nafter\n"
    assert path.read_text(encoding="utf-8") == expected
    for text in ("no markers", f"{show.START} alone", f"{show.END} alone"):
        path.write_text(text, encoding="utf-8")
        assert not show.refresh(path, "| new |\n")
        assert path.read_text(encoding="utf-8") == text


def test_the_readmes_table_is_what_the_results_give(module):
    show, results = module("parity_show"), FOLDER / "results" / "parity.json"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = show.short(json.loads(results.read_text(encoding="utf-8"))["cells"])
    assert show.refreshed(readme, table) == readme


def test_cells_stay_in_order_and_take_the_place_of_older_ones(module):
    parity = module("parity")
    first, second = result("tiny-sd"), result("tiny-dit")
    found = parity.merged(parity.merged([second], first), {**second, "megabytes": 1.0})
    assert [each["network"] for each in found] == ["tiny-sd", "tiny-dit"]
    assert found[1]["megabytes"] == 1.0


class Net(nn.Module):
    """A few layers and a timestep, called as a network of diffusers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))

    def forward(self, sample, timestep, return_dict=True):
        return (self.layers(sample) * (1 + timestep.float() / 10),)


@pytest.fixture
def tiny(module, monkeypatch):
    """A run of the benchmark over one small network in place of tiny-dit."""
    networks = module("parity_networks")

    def data(steps):
        torch.manual_seed(0)
        times = tuple(range(steps, 0, -1))
        taped = [[{"sample": torch.randn(4, 32), "timestep": torch.tensor(time)} for time in times]
                 for _ in range(2)]  # fmt: skip
        return networks.Data(Net().eval(), *taped, times)

    monkeypatch.setitem(networks.NETWORKS, "tiny-dit", data)
    parity = module("parity")
    return lambda out, *more: parity.main(
        ["--steps", "3", "--rounds", "1", "--threads", "1", "--out", str(out), *more]
    )


def test_a_short_run_and_going_on_with_it(tiny, module, tmp_path, monkeypatch):
    only = ("--only", "tiny-dit exact (onnx|tensorrt)")
    assert tiny(tmp_path, *only) == 0
    document = json.loads((tmp_path / "parity.json").read_text(encoding="utf-8"))
    reference, onnx, tensorrt = document["cells"]
    assert reference["reference_db"] is None and reference["original_db"] > 110
    assert onnx["reference_db"] > 110 and onnx["speedup"] > 0 and onnx["ms_per_step"] > 0
    assert tensorrt["reference_db"] > 110 and tensorrt["speedup"] is None
    assert "## tiny-dit" in (tmp_path / "parity.md").read_text(encoding="utf-8")

    def broken(*_):
        raise BackendError("onnx: that is a defect of the lowering")

    monkeypatch.setattr(module("parity_measure").Study, "_compiled", broken)
    assert tiny(tmp_path, *only, "--add") == 0  # nothing is left to measure
    assert tiny(tmp_path, *only) == 1


def test_a_refusal_is_a_reason_and_what_is_no_refusal_an_error(module, tmp_path, monkeypatch):
    measure, rows = module("parity_measure"), module("parity_rows")
    study, cell = (
        measure.Study("tiny-dit", 3, 1, 1, tmp_path),
        rows.Cell("tiny-dit", "w8a8", "onnx"),
    )
    for error, failed in ((BackendError("no such kernel"), False), (TypeError("no"), True)):

        def raised(*_, error=error):
            raise error

        monkeypatch.setattr(measure.Study, "_compiled", raised)
        found = study.measure(cell)
        assert ("error" in found) == failed and str(error) in found["reason"]
