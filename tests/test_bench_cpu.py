"""The CPU benchmark: its figures by hand, its arguments, and a whole run on a tiny network."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

OURS = ("effuse w8a8", "effuse w8a8, OpenVINO", "effuse w8a8, OpenVINO bf16")
FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark, which runs as a script among its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def refused(module, capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        module("cpu").main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_figures_by_hand(module):
    show = module("cpu_show")
    base = show.typical([[2.0, 9.0, 2.0], [4.0]])
    assert base == [2.0, 4.0]
    found = show.figures([[1.0, 1.0, 7.0], [1.0, 3.0]], base)
    assert found["ms_rounds"] == [1000.0, 2000.0]
    assert found["ratio_rounds"] == [2.0, 2.0]
    assert (found["ms"], found["ratio"], found["calls"]) == (1500.0, 2.0, [3, 2])
    assert "ratio" not in show.figures([[1.0]], None)


def measured(name, ms, sqnr, size):
    shared = {"on_disk": True, "peak_bytes": 5e7, "build_peak_bytes": 0, "build_s": 1.0}
    return {
        "name": name, "ms_rounds": [ms, 2 * ms], "ms": 1.5 * ms, "sqnr_db": sqnr, "bytes": size,
        "ratio": 8 / ms, "load_s": 0.5, "remark": "", **shared,
    }  # fmt: skip


def test_ours_are_compared_with_the_rivals_that_ran(module):
    show = module("cpu_show")
    rows = [
        measured("ORT quantize_static", 4.0, 20.0, 200),
        {"name": "OpenVINO + NNCF int8", "error": "ImportError: no"},
        measured("effuse w8a8", 2.0, 23.5, 100),
    ]
    text = "effuse w8a8 against ORT quantize_static: 2.00× as fast, +3.5 dB, 0.50× the size"
    assert show.versus(rows) == [text]


def test_cells_say_what_failed_and_what_is_equal(module):
    show = module("cpu_show")
    failed = show.cells({"name": "peer", "error": "OSError: gone"})
    assert failed[0] == "peer" and failed[-1] == "failed: OSError: gone"
    assert len(failed) == len(show.COLUMNS) == len(show.cells(measured("x", 4.0, 200.0, 1e6)))
    figures = show.cells(measured("x", 4.0, 200.0, 1e6))
    assert figures[:5] == ("x", "2.00×", "equal", "6.00", "1.0")
    assert show.decibels(-200.0) == "not finite" and show.decibels(21.26) == "21.3"


def test_inputs_survive_their_file(module, tmp_path):
    job = module("cpu_job")
    inputs = [{"sample": np.full((2, 3), n), "timestep": np.array(n)} for n in range(12)]
    job.write_inputs(tmp_path / "inputs.npz", inputs)
    for given, read in zip(inputs, job.read_inputs(tmp_path / "inputs.npz"), strict=True):
        assert list(given) == list(read)
        assert all(np.array_equal(given[name], read[name]) for name in given)


def test_errors_in_tables_have_no_colours_and_no_folders_of_the_machine(module):
    clean = module("cpu_run").clean
    assert clean("OSError: /home/me/lib/\x1b[96mtorch/x.so\x1b[0m: no") == "OSError: x.so: no"
    assert (
        clean("see https://a.org/b/c/d or and/or/not/x")
        == "see https://a.org/b/c/d or and/or/not/x"
    )
    assert len(clean("x" * 1000)) == 300


@pytest.mark.parametrize("zeros", [False, True])
def test_random_networks_are_seeded_and_have_no_zero_matrices(module, zeros):
    networks = module("cpu_networks")

    def make():
        layer = networks.nn.Linear(2, 2)
        if zeros:
            networks.nn.init.zeros_(layer.weight)
        return layer

    one, other = networks.seeded(make)(), networks.seeded(make)()
    assert (one.weight == other.weight).all() and one.weight.all() and not one.training


def test_calibration_and_judged_inputs_differ(module):
    network = module("cpu_networks").NETWORKS["tiny"]
    data = network.data(network.make())
    times = [int(each["timestep"]) for each in data.calibration]
    assert tuple(times) == data.timesteps and len(data.judged) == 8
    for each in data.judged:
        (twin,) = (c for c in data.calibration if c["timestep"] == each["timestep"])
        assert not np.allclose(twin["sample"], each["sample"])
        assert 0.5 < float(each["sample"].std()) < 1.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "unet-36"], "did you mean 'unet-36m'"),
        (["--config", "w8a7"], "did you mean 'w8a8'"),
        (["--config", "missing.toml"], "no such config file"),
        (["--config", "exact"], "two rows are called 'effuse exact'"),
        (["--only", "nothing"], "no row's name matches 'nothing'"),
        (["--only", "("], "unterminated subpattern"),
        (["--rounds", "0"], "--rounds and --threads take 1 or more"),
    ],
)
def test_arguments_are_refused_with_the_way_out(module, capsys, arguments, message):
    assert message in refused(module, capsys, *arguments)


def test_dry_run_writes_nothing(module, capsys, tmp_path):
    out = tmp_path / "results"
    arguments = ["--network", "dit-s2", "--only", "ORT", "--out", str(out), "--dry-run"]
    assert module("cpu").main(arguments) == 0
    text = capsys.readouterr().out
    assert "ORT fp32: ready" in text and "eager" not in text and "cpu-dit-s2.json" in text
    assert not out.exists()


def test_networks_without_their_weights_say_where_to_get_them(module, capsys, monkeypatch):
    monkeypatch.delenv("EFFUSE_TAEF2", raising=False)
    assert module("cpu").main(["--network", "taef2", "--out", "unused", "--list"]) == 0
    assert "taef2" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="--taef2 FOLDER"):
        module("cpu_networks").taef2_folder()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A whole run: eager, ONNX Runtime, ours, and a peer that dies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        cpu, peers = importlib.import_module("cpu"), importlib.import_module("cpu_peers")
        unknown = peers.Row("no such row", peers.eager)
        patch.setattr(cpu, "all_rows", lambda configs: [*peers.all_rows(configs), unknown])
        out = tmp_path_factory.mktemp("results")
        arguments = ["--network", "tiny", "--only", "eager|w8a8|no such row", "--out", str(out)]
        arguments += ["--rounds", "2", "--seconds", "0.01", "--threads", "1"]
        status = cpu.main(arguments)
    found = json.loads((out / "cpu-tiny.json").read_text(encoding="utf-8"))
    return status, found, (out / "cpu-tiny.md").read_text(encoding="utf-8")


def test_a_run_measures_every_row(report):
    status, found, _ = report
    rows = {row["name"]: row for row in found["rows"]}
    assert status == 0
    assert list(rows) == ["eager fp32", "ORT fp32", *OURS, "no such row"]
    assert rows["eager fp32"]["sqnr_db"] == 200.0  # the child made the same network
    assert rows["ORT fp32"]["sqnr_db"] > 100 and rows["ORT fp32"]["ratio_rounds"] == [1.0, 1.0]
    assert all(20 < rows[name]["sqnr_db"] < 60 for name in OURS)
    for name in ("eager fp32", "ORT fp32", *OURS):
        row = rows[name]
        assert row["ms"] > 0 and row["bytes"] > 4000 and len(row["ratio_rounds"]) == 2
    assert rows["ORT fp32"]["on_disk"] and rows["ORT fp32"]["build_s"] > 0


def test_a_device_row_runs_without_torch(report):
    ours = [row for row in report[1]["rows"] if row["name"] in OURS]
    assert [row["remark"] for row in ours] == [""] * len(OURS)  # it says so if torch was imported


def test_a_peer_that_dies_does_not_stop_the_rest(report):
    _, found, text = report
    assert found["rows"][-1]["error"] == "load: the process ended with status 1"
    assert "| failed: load: the process ended with status 1 |" in text


def test_the_table_has_its_columns_and_no_folder(report):
    _, found, text = report
    header = next(line for line in text.splitlines() if line.startswith("| configuration"))
    assert header.split("|")[2].strip() == "× ORT fp32"
    assert not re.search(r"/(tmp|home|root)/", text + json.dumps(found))
