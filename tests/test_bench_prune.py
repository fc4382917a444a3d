"""The pruning benchmark's rows, table and plot, from results made up here."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from effuse.passes import Distill, Hoist, Prune

pytest.importorskip("diffusers")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def prune(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune")


@pytest.fixture
def show(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("prune_show")


def result(by, share, steps, **changed):
    return {
        "name": f"{by}, {share}, {steps}", "by": by, "share": share, "steps": steps,
        "psnr_db": 20.0 + steps / 100, "speedup": 1.25, "megabytes": 12.0,
        "removed": {"parameters": share, "flops": share / 2}, "remark": "", **changed,
    }  # fmt: skip


def document(*rows):
    return {"steps": 20, "prompts": 8, "megabytes": 15.9, "samples": None, "rows": list(rows)}


def test_every_criterion_is_run_at_every_budget_with_and_without_recovery(prune):
    names = [row.name for row in prune.rows(200)]
    assert len(set(names)) == len(names) == 2 * len(prune.SHARES) * (len(prune.BY) + 1)
    assert "loss, 20 %, 200 updates" in names and "hand-picked, 50 %" in names


def test_a_row_is_its_passes(prune, tmp_path):
    row = prune.Row("loss", 0.2, 200)
    first, second, third = prune.passes(row, "dit", tmp_path)
    assert (first.by, first.parameters, first.include) == ("loss", 0.2, ())
    assert isinstance(second, Distill) and second.steps == 200
    assert isinstance(third, Hoist)
    assert len(prune.passes(prune.Row("random", 0.1, 0), "unet", tmp_path)) == 2


@pytest.mark.parametrize("network", ["unet", "dit"])
def test_a_larger_budget_picks_more_by_hand(prune, network, tmp_path):
    picked = [prune.prune(prune.Row(prune.HAND, share, 0), network, tmp_path).include
              for share in prune.SHARES]  # fmt: skip
    assert [len(each) for each in picked] == sorted(len(each) for each in picked)
    assert len(picked[0]) < len(picked[-1]) == len(prune.PICKED[network])
    assert all(isinstance(Prune(parameters=0.1, include=each), Prune) for each in picked)


def test_what_the_pass_tells_is_read(prune):
    notes = ["5 of 24 candidates went: 20.9% of the parameters and 33.4% of the flops", "scores …"]
    assert prune.removed(notes) == pytest.approx({"parameters": 0.209, "flops": 0.334})


def test_the_table_has_a_line_for_each_pair_and_says_why_one_is_missing(show, tmp_path):
    missing = result("hand-picked", 0.5, 0, remark="too little")
    rows = [result("loss", 0.2, 0), result("loss", 0.2, 200), missing]
    text = show.markdown("dit", document(*rows))
    assert "| loss | 20 % | 20.0 % | 10.0 % | 20.0 | 22.0 | 1.25× | 12.00 |  |" in text
    assert "| hand-picked | 50 % | | | | | | | too little |" in text
    show.plot(tmp_path / "plot.png", "dit", document(*rows))
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_a_row_takes_the_place_of_an_older_one_of_its_name(prune):
    first, second = result("loss", 0.2, 0), result("random", 0.2, 0)
    found = prune.merged([first, second], {**first, "psnr_db": 1.0})
    assert [row["psnr_db"] for row in found] == [1.0, 20.0]
    assert prune.merged(found, result("loss", 0.5, 0))[2]["share"] == 0.5


def test_the_rows_of_an_earlier_run_stay_if_it_sampled_alike(prune, tmp_path):
    options = SimpleNamespace(out=tmp_path, steps=20, prompts=8, threads=0)
    before = {**prune.opened("dit", options, 1.0), "rows": [result("loss", 0.2, 0)]}
    prune.write("dit", tmp_path, before)
    assert prune.opened("dit", options, 1.0)["rows"] == before["rows"]
    options.steps = 10
    assert prune.opened("dit", options, 1.0)["rows"] == []


def test_a_long_recovery_is_a_table_of_its_own(show):
    long = result("loss", 0.2, 2000, kid=3.0, feature_distance=0.125, build_s=600.0)
    told = {**document(result("loss", 0.2, 0), result("loss", 0.2, 200), long),
            "samples": {"count": 512, "kid": 0.5, "feature_distance": 0.0}}  # fmt: skip
    text = show.markdown("dit", told)
    assert "recovered: 200 updates" in text and "are at 0 and 0.5" in text
    assert "| loss | 20 % | 2000 | 10.0 | 40.0 | 0.125 | 3.0 |" in text
    assert text.count("| loss | 20 % |") == 2
