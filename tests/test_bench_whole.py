"""Whole runs of the CPU benchmark: DDIM by hand, and the table of a run on a tiny network."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of the benchmark, which runs as a script among its neighbours."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


def test_the_run_is_that_of_diffusers(module):
    import torch
    from diffusers import DDIMScheduler

    rng = np.random.default_rng(0)
    start = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
    times = [901, 701, 501, 301, 101]

    def run(given):
        seen.append(int(given["timestep"]))
        return np.tanh(given["sample"] * 0.7) + np.float32(given["timestep"] / 2000)

    seen: list[int] = []
    inputs = {"sample": start, "timestep": np.array(5)}
    _, seconds = module("cpu_trajectory").sample(run, inputs, times)
    assert seen == times and seconds > 0 and int(inputs["timestep"]) == 5
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                              set_alpha_to_one=True, steps_offset=1, clip_sample=False,
                              prediction_type="v_prediction")  # fmt: skip
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == [801, 601, 401, 201, 1]
    seen.clear()
    x = torch.from_numpy(start)
    for time in scheduler.timesteps:
        v = run({"sample": x.numpy(), "timestep": np.array(int(time))})
        x = scheduler.step(torch.from_numpy(v), time, x).prev_sample
    other, _ = module("cpu_trajectory").sample(run, inputs, seen[:])
    np.testing.assert_allclose(other, x.clamp(-1, 1).numpy(), atol=1e-4)


def test_rows_are_sampled_and_compared(module, monkeypatch, tmp_path):
    whole = module("cpu_whole")
    monkeypatch.setattr(whole, "ROWS", ("ORT fp32", "effuse w8a8, OpenVINO", "eager fp32"))
    monkeypatch.setattr(whole, "PEER", "ORT fp32")
    arguments = ["--network", "tiny", "--rounds", "2", "--threads", "1", "--out", str(tmp_path)]
    assert whole.main(arguments) == 0
    report = json.loads((tmp_path / "whole-tiny.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["eager fp32", "ORT fp32", "effuse w8a8, OpenVINO"]
    assert rows["eager fp32"]["psnr_db"] > 150 > rows["effuse w8a8, OpenVINO"]["psnr_db"] > 15
    assert all(len(row["s_rounds"]) == 2 and row["s"] > 0 for row in rows.values())
    text = (tmp_path / "whole-tiny.md").read_text(encoding="utf-8")
    assert "| ORT fp32 | " in text and "| 1.00× |" in text
