"""Networks of one-dimensional convolutions, as of audio and motion, through the rewrites."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effuse
from effuse.backends.onnx import build, load_session
from effuse.calibrate import calibrate, layer_values
from effuse.capture import capture
from effuse.graph import calls
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, LowRank, Quantize, SplitShortcut
from effuse.program import Program, run_program
from effuse.statistics import Calibration

logging.getLogger("torch.__trace").disabled = True

aten = torch.ops.aten


class Rows(nn.Module):
    """A level down and up, with a skip concatenation, on (batch, channels, length)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time = nn.Conv1d(4, 16, 3, padding=1), nn.Linear(1, 16)
        self.down = nn.Conv1d(16, 16, 4, stride=2, padding=1)
        self.mid = nn.Conv1d(16, 16, 3, padding="same", dilation=2, groups=2)
        self.up = nn.ConvTranspose1d(16, 16, 4, stride=2, padding=1)
        self.join, self.last = nn.Conv1d(32, 16, 5, padding=2), nn.Conv1d(16, 4, 1, bias=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        skip = self.first(x) + self.time(t[:, None])[:, :, None]
        h = self.mid(F.silu(self.down(F.silu(skip))))
        return self.last(F.silu(self.join(torch.cat([self.up(h), skip], dim=1))))


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(2, 4, 16), "t": torch.full((2,), 5.0)}
    captured = capture(Rows().eval().requires_grad_(False), inputs)
    return run_passes(captured, (Canonicalize(), Hoist()))


def outputs(program: Program) -> torch.Tensor:
    return run_program(program, program.examples)[0]


def count(program: Program, *targets: object) -> int:
    return sum(len(calls(part.graph, *targets)) for part in program.parts)


def test_rows_are_images_of_one_row_to_the_bit(program: Program) -> None:
    assert program.expected is not None
    assert torch.equal(outputs(program), program.expected[0])
    assert count(program, aten.conv1d.default) == 0
    assert count(program, aten.conv2d.default) == 5
    assert program.weights["join.weight.row"].shape == (16, 32, 1, 5)
    assert "join.weight" not in program.weights


def test_onnx_agrees(program: Program, tmp_path) -> None:
    build(program, tmp_path)
    session = load_session(program.spec(), tmp_path)
    found = session(**program.examples)
    torch.testing.assert_close(torch.as_tensor(found), outputs(program), rtol=1e-4, atol=1e-5)


def test_a_concatenation_of_rows_is_split(program: Program) -> None:
    split = run_passes(program, (SplitShortcut(),))
    assert count(split, aten.conv2d.default) == 6
    assert count(split, aten.cat.default) == 0


@pytest.mark.parametrize(
    "rewrite", [LowRank(rank=2, inputs=False, edges=True), Quantize(edges=True, min_sqnr_db=0)]
)
def test_layers_of_rows_are_rewritten(program: Program, rewrite: LowRank | Quantize) -> None:
    def measured(current: Program) -> Calibration:
        return calibrate(current, [current.examples], layer_values)

    found = run_passes(program, (rewrite,), measured)
    assert found.records[-1].rewrites
    assert sqnr_db(outputs(program).numpy(), outputs(found).numpy()) > 20


def test_a_cache_of_rows_in_eight_bits() -> None:
    model, times = Rows().eval().requires_grad_(False), [9.0, 7.0, 5.0, 3.0, 1.0]
    start = torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(1))

    def run(net: Callable[..., torch.Tensor]) -> torch.Tensor:
        x = start
        for time in times:
            x = x - 0.1 * net(x, torch.full((2,), time))
        return x

    passes = (Hoist(), Cache(interval=2, warmup=1), Quantize(activations="step", min_sqnr_db=0))
    compiled = effuse.compile(
        model, effuse.Config(passes=passes), inputs={"x": start, "t": torch.full((2,), 9.0)},
        schedule=times, calibration=run, progress=False,
    )  # fmt: skip
    before = compiled.session.steps.copy()
    found = run(compiled)
    assert compiled.manifest["backend"] == "onnx"
    assert compiled.session.steps - before == {"full": 3, "reuse": 2}
    formats = {layer["name"]: layer["format"] for layer in compiled.manifest["layers"]}
    assert formats == {"first": "float", "down": "w8a8", "mid": "w8a8", "join": "w8a8",
                       "last": "float", "up": "w8a8"}  # fmt: skip
    assert 30 < sqnr_db(run(model).numpy(), found.numpy()) < 100


class Padded(nn.Module):
    """Paddings by name, of every number of dimensions; one cannot be even on both sides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.row = nn.Conv1d(4, 4, 3, padding="same", dilation=2)
        self.image = nn.Conv2d(4, 4, (3, 5), padding="same", groups=2)
        self.valid = nn.Conv2d(4, 4, 3, stride=2, padding="valid", bias=False)
        self.volume = nn.Conv3d(4, 4, 3, padding="same")
        self.uneven = nn.Conv2d(4, 4, 2, padding="same")
        self.uneven_row = nn.Conv1d(4, 4, 4, padding="same", dilation=3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.row(x.flatten(2)), self.image(x), self.valid(x), self.volume(x[..., None]),
                self.uneven(x), self.uneven_row(x.flatten(2)))  # fmt: skip


def test_paddings_by_name_are_numbers_to_the_bit() -> None:
    torch.manual_seed(1)
    model = Padded().eval().requires_grad_(False)
    captured = capture(model, {"x": torch.randn(2, 4, 8, 8)}, roles={"x": "latent"})
    found = run_passes(captured, (Canonicalize(),))
    assert captured.expected is not None
    for one, other in zip(run_program(found, found.examples), captured.expected, strict=True):
        assert torch.equal(one, other)
    named = (aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
    assert count(found, *named) == 0 and count(found, aten.constant_pad_nd.default) == 2
    assert count(found, aten.conv2d.default) == 5 and count(found, aten.conv3d.default) == 1
    again = run_passes(found, (Canonicalize(),))
    assert not again.records[-1].rewrites


class Normed(nn.Module):
    """Rows under weights that are computed of weights, one of them padded unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = nn.utils.parametrizations.weight_norm
        self.first, self.last = norm(nn.Conv1d(4, 8, 3, padding=1)), norm(nn.Conv1d(8, 4, 1))
        self.mid = norm(nn.Conv1d(8, 8, 4, padding="same"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(F.silu(self.mid(F.silu(self.first(x)))))


def test_rows_under_normed_weights_are_quantized() -> None:
    torch.manual_seed(1)
    model = Normed().eval().requires_grad_(False)
    plain = run_passes(capture(model, {"x": torch.randn(2, 4, 16)}), (Canonicalize(),))
    assert count(plain, aten.conv1d.default) == 0
    assert run_passes(plain, (Canonicalize(),)).records[-1].rewrites == {}

    def measured(current: Program) -> Calibration:
        return calibrate(current, [current.examples], layer_values)

    found = run_passes(plain, (Quantize(min_sqnr_db=0),), measured)
    assert {each.name: each.reason for each in found.layers} == {
        "first": "first layer", "mid": "", "last": "last layer",
    }  # fmt: skip
    assert 30 < sqnr_db(outputs(plain).numpy(), outputs(found).numpy()) < 100
