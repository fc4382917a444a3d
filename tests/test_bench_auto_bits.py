"""The benchmark of AutoBits: what it reads in the pass's notes, and the budgets it derives."""

import importlib
from pathlib import Path

import pytest

NOTES = [
    "time of single layers measured in ONNX Runtime; a step in float takes 80.00 ms",
    "predicted, all in float: inf dB, 10.000 MB, 80.00 ms; 30 in float",
    "predicted, least size: 20.0 dB, 2.000 MB, 70.00 ms; 30 in w4a8",
    "predicted, least time: 30.0 dB, 4.000 MB, 40.00 ms; 30 in w8a8",
    "predicted, as chosen: 37.5 dB, 3.980 MB, 60.00 ms; 20 in w8a8, 10 in float",
    "measured, as chosen: 37.2 dB, 3.990 MB, 61.50 ms (float in turns with it: 81.25)",
]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    return importlib.import_module("auto_bits")


def test_a_row_has_what_was_predicted_and_what_came_true(bench):
    assert bench.row(NOTES) == {
        "layers": "20 in w8a8, 10 in float",
        "predicted_db": 37.5, "predicted_mb": 3.98, "predicted_ms": 60.0,
        "measured_db": 37.2, "measured_mb": 3.99, "measured_ms": 61.5, "float_ms": 81.25,
    }  # fmt: skip


def test_the_budgets_lie_within_reach(bench):
    assert bench.chosen(NOTES, 35.0) == [
        {"size_mb": 4.0}, {"milliseconds": 60.0}, {"sqnr_db": 35.0}
    ]  # fmt: skip


def test_a_row_without_times(bench):
    found = bench.row([NOTES[4], "measured, as chosen: 37.2 dB, 3.990 MB"])
    assert found["float_ms"] is None and "measured_ms" not in found


def test_arguments_out_of_range_are_refused(bench, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--steps", "1"])
    assert stop.value.code == 2 and "--steps: at least 2" in capsys.readouterr().err
