"""The coverage benchmark: inputs that a row tells where effuse derives none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks are not in the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

from coverage_config import networks  # noqa: E402
from coverage_given import inputs_of  # noqa: E402
from coverage_show import counts, markdown  # noqa: E402
from coverage_stages import GIVEN, Subject, run_stages  # noqa: E402

ROWS = json.loads((BENCHMARKS / "coverage_inputs.json").read_text(encoding="utf-8"))


class Paired(nn.Module):
    """Takes a pair that must agree with a list of sizes: nothing that a name tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(
        self, h: torch.Tensor, timestep: torch.Tensor, pairs: list[tuple[torch.Tensor, ...]],
        sizes: list[int],
    ) -> torch.Tensor:  # fmt: skip
        if [len(each) for each, _ in pairs] != sizes:
            raise ValueError("other sizes are told")
        mixed = sum((each * kept[:, None]).sum(dim=0) for each, kept in pairs)
        return self.layer(h + mixed) * timestep[:, None, None]


TOLD = {"h": [2, 3, 4], "timestep": {"time": [2]},
        "pairs": {"list": [{"tuple": [[5, 4], {"ones": [5]}]}, {"tuple": [[1, 4], {"ones": [1]}]}]},
        "sizes": {"value": [5, 1]}}  # fmt: skip


def test_a_row_tells_inputs():
    more = {"ids": {"index": [2, 3]}, "kinds": {"table": [0, 2]}, "seen": {"units": [1, 2]}}
    found = inputs_of({**TOLD, **more}, 7.0)
    assert found["timestep"].tolist() == [7, 7]
    assert found["ids"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["kinds"].dtype is torch.int64 and found["sizes"] == [5, 1]
    assert found["seen"].tolist() == [[1, 1]] and found["seen"].dtype is torch.int64
    assert type(found["pairs"][0]) is tuple and found["pairs"][1][1].tolist() == [True]
    assert found["h"].shape == (2, 3, 4) and found["h"].unique().numel() == 24
    assert torch.equal(found["h"], inputs_of(TOLD, 1.0)["h"])


def test_a_row_tells_dicts_objects_and_turns():
    cell = {"object": {"class": "types.SimpleNamespace", "key": [2, 4], "size": {"value": 2}}}
    found = inputs_of({"cache": {"dict": {"first": cell}}, "freqs": {"turns": [2, 3]}}, 1.0)
    first = found["cache"]["first"]
    assert type(first).__name__ == "SimpleNamespace"
    assert first.key.shape == (2, 4) and first.size == 2
    assert found["freqs"].shape == (2, 3) and found["freqs"].is_complex()
    assert torch.allclose(found["freqs"].abs(), torch.ones(2, 3))
    assert len(set(found["freqs"].flatten().tolist())) == 6


def test_told_inputs_are_a_miss_of_their_stage_and_of_no_other():
    stages = ("built", "inputs", "captured", "exact")
    told = run_stages(Subject(Paired, {}, None, "", TOLD), lambda row: None, stages)
    assert told == {"built": True, "inputs": GIVEN, "captured": True, "exact": True}
    alone = run_stages(Subject(Paired, {}, None), lambda row: None, stages)
    assert alone["inputs"] != GIVEN and "captured" not in alone


def test_told_inputs_are_counted_as_not_derived():
    row = {"stages": {"built": True, "inputs": GIVEN, "captured": True}, "parameters": 20}
    page = {"rows": {"Paired": row}, "classes": {"Paired": "transformer"}, "date": "",
            "versions": {}, "machine": {"processor": ""}}  # fmt: skip
    assert f"- Paired, inputs: {GIVEN}" in markdown(page)
    assert counts(page)[2].startswith("| denoisers | 1 | 1 | 1 | 0 | 1 |")


def test_rows_name_classes_that_exist():
    assert set(ROWS) <= set(networks())
    for row in ROWS.values():
        inputs_of(row, 1.0)
