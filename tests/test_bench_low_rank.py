"""The benchmark of low-rank branches: its layers, rows, tables and turns, and short runs."""

import importlib
import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark, which runs as a script among its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


# ---- the layers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (80, 80)])
def test_the_spectrum_decays_as_it_says(module, shape):
    layers = module("low_rank_layers")
    matrix = layers.decaying(*shape)
    values = torch.linalg.svdvals(matrix)
    expected = torch.arange(1, min(shape) + 1) ** -layers.DECAY
    assert torch.allclose(values / values[0], expected, rtol=1e-4)
    assert matrix.square().mean().item() == pytest.approx(1 / shape[1], rel=1e-4)


def test_a_percent_of_the_channels_is_loud_in_all_inputs(module):
    layers = module("low_rank_layers")
    layer = layers.Layer(400, 32)
    power = layer.judged.square().mean(0)
    loud = power > 50
    assert loud.sum() == 4 and torch.equal(loud, layers.loudness(400) > 1)
    assert power[loud].min() > 100 / 1.2 and power[loud].max() < 10_000 * 1.2
    assert power[~loud].mean().item() == pytest.approx(1, abs=0.1)
    for each in layer.calibration():
        assert torch.equal(each["x"].square().mean(0) > 50, loud)
        assert not torch.equal(each["x"], layer.judged)


def test_channels_are_correlated(module):
    layers = module("low_rank_layers")
    x = layers.Layer(160, 32).judged / layers.loudness(160)
    off = torch.corrcoef(x.T) - torch.eye(160)
    assert off.abs().mean() > 3 / len(x) ** 0.5  # of independent ones it is 0.8 / √n


def test_images_hold_the_channels_of_the_convolution(module):
    layers = module("low_rank_layers")
    layer = layers.Layer(64, 32, 3)
    assert layer.judged.shape == (2, 64, 32, 32) and layer.truth.shape == (2, 32, 32, 32)
    power = layer.judged.square().mean((0, 2, 3))
    assert torch.equal(power > 50, layers.loudness(64) > 1)
    assert 0.5 < layer.loud_share < 1


# ---- rows and tables -----------------------------------------------------------------------------


def test_names_are_unique_and_passes_fit_their_method(module):
    rows, layers = module("low_rank_rows"), module("low_rank_layers")
    found = rows.rows(layers.WIDE)
    assert len({row.name for row in found}) == len(found)
    for row in found:
        *before, quantize = row.passes
        assert [each.name for each in before] == (
            ["smooth"] * row.method.smooth + ["low_rank"] * row.method.branch
        )
        assert {each.format for each in row.passes} == {row.format}
        assert quantize.edges and (quantize.rounding == "gptq") == row.method.gptq


def test_ranks_are_for_small_weights(module):
    rows, layers = module("low_rank_rows"), module("low_rank_layers")
    for layer in layers.WIDE:
        ranks = {row.rank for row in rows.of_layer(layer)}
        assert ranks == ({rows.RANK} if layer.inner * layer.outer > 2e6 else set(rows.RANKS))


def test_only_takes_the_plain_row_along(module):
    rows, layers = module("low_rank_rows"), module("low_rank_layers")
    names = [row.name for row in rows.rows(layers.SMALL, r"linear.*: w4a4 low-rank, rank 8$")]
    assert names == ["linear 128->128: w4a4 plain", "linear 128->128: w4a4 low-rank, rank 8"]


def result(method, sqnr, rank=32, size=1000):
    return {"layer": "linear", "format": "w4a4", "method": method, "rank": rank,
            "sqnr_db": sqnr, "bytes": size}  # fmt: skip


def test_gains_are_over_the_plain_row(module):
    show = module("low_rank_show")
    failed = {"layer": "linear", "format": "w4a8", "method": "plain", "rank": 32, "error": "x"}
    lines = show.by_method([result("plain", 10.0), result("smooth", 12.25), failed], "linear")
    assert lines == [("plain", "10.0", "failed", "", ""), ("smooth", "12.2 (+2.2)", "", "", "")]


def test_rank_0_is_the_format_alone(module):
    show = module("low_rank_show")
    found = [result("plain", 10.0), result("smooth", 11.0), result("low-rank", 13.0, 8, 2000),
             result("low-rank", 14.0, 32, 3000), result("smooth + low-rank", 20.0)]  # fmt: skip
    assert show.by_rank(found, "linear") == [
        ("w4a4 low-rank", "10.0 dB, 1 kB", "13.0 dB, 2 kB", "", "14.0 dB, 3 kB", "")
    ]


def test_one_table_of_the_networks(module, tmp_path, capsys):
    networks = module("low_rank_networks")
    assert networks.main(["--out", str(tmp_path)]) == 1
    row = {"format": "w4a4", "sqnr_db": 10.0, "psnr_db": 20.0, "megabytes": 3.0}
    rows = [{**row, "method": "plain"}, {**row, "method": "LowRank()", "psnr_db": 24.04},
            {"format": "w4a8", "method": "LowRank()", "error": "x"}]  # fmt: skip
    report = {"rows": rows, "remarks": ["so many steps"]}
    (tmp_path / "quantize-dit.json").write_text(json.dumps(report))
    assert networks.main(["--out", str(tmp_path)]) == 0
    text = (tmp_path / "low-rank-networks.md").read_text()
    assert "| low-rank | 24.04 (+4.0) |  |  |  |" in text and "| low-rank | 3.00 |  |" in text
    assert "- so many steps" in text


# ---- time ----------------------------------------------------------------------------------------


def test_turns_alternate_and_do_not_count_their_first_call(module):
    seen = []
    calls = {name: lambda name=name: seen.append(name) for name in "ab"}
    found = module("low_rank_time").in_turns(calls, 2, 0.0)
    assert seen == ["a"] * 4 + ["b"] * 8 + ["a"] * 4
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}


def test_ratios_are_medians_of_the_rounds_own(module):
    found = {"fp32": [4.0, 8.0, 4.0], "w4a16": [2.0, 4.0, 4.0], "w4a16 + rank 32": [3.0, 5.0, 4.0],
             "w4a8": [1.0, 1.0, 1.0], "w4a8 + rank 32": [1.0, 2.0, 2.0]}  # fmt: skip
    ratios = module("low_rank_time").ratios(found)
    assert ratios["w4a16, × fp32"] == 2 and ratios["w4a8 + rank 32, × fp32"] == 4
    assert ratios["w4a16: branch, %"] == pytest.approx(25) and ratios["w4a8: branch, %"] == 100


# ---- runs ----------------------------------------------------------------------------------------


def run(module, out, *arguments):
    assert module("low_rank").main(["--smoke", "--out", str(out), *arguments]) == 0
    name = "time" if "--time" in arguments else "layers"
    return json.loads((out / f"low-rank-{name}.json").read_text())


def test_a_short_run_and_what_it_keeps(module, tmp_path):
    only = ["--only", "linear.*w4a8 (plain|low-rank)$"]
    report = run(module, tmp_path, *only)
    plain, branch = report["rows"]
    assert branch["sqnr_db"] > plain["sqnr_db"] + 3 and branch["bytes"] > plain["bytes"]
    assert "| low-rank |" in (tmp_path / "low-rank-layers.md").read_text()
    plain["sqnr_db"] = 1.25
    (tmp_path / "low-rank-layers.json").write_text(json.dumps({**report, "rows": [plain]}))
    again = run(module, tmp_path, *only, "--add")["rows"]
    assert again[0]["sqnr_db"] == 1.25 and again[1]["sqnr_db"] == branch["sqnr_db"]


def test_a_short_run_of_times(module, tmp_path, monkeypatch):
    monkeypatch.setattr(module("low_rank_time"), "FORMATS", ("w4a16",))
    report = run(module, tmp_path, "--time", "--only", "128, 1 rows")
    (row,) = report["rows"]
    assert set(row["ms"]) == set(module("low_rank_time").models()) and min(row["ms"].values()) > 0
    assert "w4a16: branch, %" in row["ratios"]


def test_a_row_that_fails_is_named_and_the_others_go_on(module, tmp_path, monkeypatch, capsys):
    low_rank = module("low_rank")
    monkeypatch.setattr(low_rank, "measured", lambda row: 1 / 0)
    only = ["--only", "linear.*w4a8 plain"]
    assert low_rank.main(["--smoke", "--out", str(tmp_path), *only]) == 1
    (row,) = json.loads((tmp_path / "low-rank-layers.json").read_text())["rows"]
    assert row["error"].startswith("ZeroDivisionError") and "failed" in capsys.readouterr().out


def test_arguments(module, capsys):
    for given, said in ((["--rounds", "0"], "--rounds: at least 1"), (["--only", "("], "--only")):
        with pytest.raises(SystemExit) as stop:
            module("low_rank").main(given)
        assert stop.value.code == 2 and said in capsys.readouterr().err


def test_list_and_dry_run(module, capsys):
    assert module("low_rank").main(["--list", "--only", "conv.*nvfp4a4 GPTQ"]) == 0
    assert "conv 320x320x3x3: nvfp4a4 GPTQ" in capsys.readouterr().out
    assert module("low_rank").main(["--dry-run", "--only", "1152->4608: w4a4 GPTQ"]) == 0
    assert "'rounding': 'gptq'" in capsys.readouterr().out
    assert module("low_rank").main(["--dry-run", "--time", "--only", "3072, 64"]) == 0
    assert "3072->3072, 64 rows" in capsys.readouterr().out
