"""The coverage benchmark: the search for small configurations, the stages, and what is told."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
if not BENCHMARKS.exists():
    pytest.skip("benchmarks are not in the wheel", allow_module_level=True)
sys.path.insert(0, str(BENCHMARKS))

import coverage_config  # noqa: E402
from coverage_config import Search, classes, construct, floored, halved, networks  # noqa: E402
from coverage_show import counts, markdown  # noqa: E402
from coverage_stages import Subject, run_stages  # noqa: E402

# pytest's log capture makes torch.export write its trace of every symbol, at ten times the time.
logging.getLogger("torch.__trace").disabled = True


class Wide(nn.Module):
    """Heads that have to divide the width, which has to be told twice."""

    def __init__(
        self, num_layers: int = 12, heads: int = 16, width: int = 1024, told: int = 1024,
        names: tuple[str, ...] = ("a", "b"), bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        if width != told or width % (heads * 16):
            raise ValueError("these do not fit")
        self.first = nn.Conv2d(4, width, 1)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=bias) for _ in range(num_layers))
        self.last = nn.Linear(width, 4)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        h = self.first(sample).movedim(1, -1) + timestep / 1000
        for layer in self.layers:
            h = h + layer(h).tanh()
        return self.last(h).movedim(-1, 1)


class Broken(Wide):
    """Is built, but takes nothing."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")


class Pair(nn.Module):
    """Two methods; the latent's channels are not the picture's."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 4, stride=4), nn.Conv2d(width, 3, 3, padding=1)

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
        return self.first(x)

    def decode(self, z: torch.Tensor, return_dict: bool = True) -> torch.Tensor:
        return self.last(z).tanh()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage_config, "ENOUGH", 20_000)


def test_halves():
    assert halved(64) == 32
    assert halved((320, 640)) == (160, 320)
    assert halved([4, 1]) == [2, 1]
    assert [halved(each) for each in (7, 6, 1, True, "a", None, (), (3, 4), 2.0)] == [None] * 9


def test_few_layers():
    assert floored(12) == 2
    assert floored((1, 2, 10)) == (1, 2, 2)
    assert [floored(each) for each in (2, 1, True, ("a",), (1, 2), None)] == [None] * 6


def test_settings_that_depend_on_each_other_are_halved_together(small: None):
    search = Search(Wide, {})
    found = search.find()
    assert search.failed == {}
    assert search.side == 16
    assert found["num_layers"] == 2
    assert found["width"] == found["told"] <= 128
    assert found["width"] % (found.get("heads", 16) * 16) == 0
    assert search.weight(found) < search.weight({"num_layers": 2}) / 10
    assert Search(Wide, {}).find() == found


def test_what_takes_no_input_is_told_with_its_reason(small: None):
    search = Search(Broken, {})
    search.find()
    assert "out of order" in search.failed["inputs"]
    search = Search(Wide, {"told": 3})
    search.find()
    assert "these do not fit" in search.failed["built"]


def test_classes_are_those_that_diffusers_exports():
    found = classes()
    assert len(found) > 100
    assert found["UNet2DConditionModel"] == "UNet"
    assert found["FluxTransformer2DModel"] == "transformer"
    assert found["ControlNetModel"] == "ControlNet"
    assert found["AutoencoderKL"] == "autoencoder"
    assert found["MotionAdapter"] == "other"  # holds parts for UNetMotionModel
    assert "ModelMixin" not in found


class Borrowing(Wide):
    """Has no last layer before another network lends its own."""

    @classmethod
    def from_lender(cls, network: Borrowing, lender: nn.Module) -> Borrowing:
        network.last = lender.last
        return network


def test_a_network_that_borrows_parts_is_made_with_their_lender(monkeypatch: pytest.MonkeyPatch):
    import diffusers

    monkeypatch.setattr(diffusers, "Wide", Wide, raising=False)
    own = {"num_layers": 1, "width": 32, "told": 32, "heads": 2}
    config = {**own, "from_lender": {"class": "Wide", **own, "num_layers": 2}}
    network = construct(Borrowing, config)
    assert isinstance(network.last, nn.Linear)
    assert len(network.layers) == 1
    assert construct(Borrowing, own).last is not network.last
    assert construct(Borrowing, {**own, "calls": ["double"]}).last.weight.dtype is torch.float64
    assert "from_lender" in config
    search = Search(Borrowing, config)
    assert search.build(config) is not None


def test_an_autoencoder_is_two_networks():
    found = networks()
    assert found["AutoencoderKL.decode"] == "autoencoder"
    assert found["AutoencoderKL.encode"] == "encoder"
    assert "AutoencoderKL" not in found
    assert found["UNet2DConditionModel"] == "UNet"


@pytest.mark.parametrize(("method", "shape"), [("decode", (2, 64, 4, 4)), ("encode", (2, 3, 4, 4))])
def test_stages_of_a_method(method: str, shape: tuple[int, ...]):
    assert Search(Pair, {}, method).works({"width": 64})
    subject = Subject(Pair, {"width": 64}, 4, method)
    done = run_stages(subject, lambda row: None, ("built", "inputs", "captured", "exact"))
    assert set(done.values()) == {True}
    assert next(iter(subject.given.values())).shape == shape


def test_stages_end_where_one_fails():
    told: list[Any] = []
    done = run_stages(Subject(Broken, {"width": 256, "told": 256, "num_layers": 1}, 8), told.append)
    assert done["built"] is True
    assert "out of order" in done["inputs"]
    assert "captured" not in done
    assert len(told) == 2


def test_stages_of_a_network():
    config = {"width": 32, "told": 32, "heads": 2, "num_layers": 2}
    stages = ("built", "inputs", "captured", "exact", "hoisted", "w8a8", "cached")
    told: list[Any] = []
    done = run_stages(Subject(Wide, config, 8), told.append, stages)
    assert {name for name, each in done.items() if each is True} >= set(stages[:6])
    assert told[-1]["error"] == 0.0
    assert told[-1]["w8a8_db"] > 20


def document() -> dict[str, Any]:
    rows = {
        "One": {"stages": {"built": True, "inputs": True, "captured": True}, "parameters": 1234},
        "Two": {"stages": {"built": "TypeError: no such thing"}},
    }
    kinds = {"One": "UNet", "Two": "transformer", "Three": "autoencoder"}
    return {"date": "2026-01-01", "versions": {"diffusers": "1"}, "classes": kinds, "rows": rows,
            "machine": {"processor": "x", "cores": 2}}  # fmt: skip


def test_counts_tell_what_was_tried():
    lines = counts(document())
    assert lines[2].startswith("| denoisers | 2 | 2 | 1 | 1 | 1 | 0 |")
    assert lines[3].startswith("| autoencoders | 1 | 0 | 0 |")


def test_every_miss_has_its_reason():
    text = markdown(document())
    assert "- Two, built: TypeError: no such thing" in text
    assert "| One | 1,234 | yes | yes | yes |" in text


def test_hints_name_classes_that_exist():
    hints = json.loads((BENCHMARKS / "coverage_hints.json").read_text(encoding="utf-8"))
    assert set(hints) <= set(classes())
