"""Networks of three-dimensional and transposed convolutions, in 8 bits through every back end."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effuse
from effuse import openvino_run
from effuse.backends import tensorrt
from effuse.backends.triton_lower import lower
from effuse.calibrate import calibrate, layer_values, needs_of
from effuse.capture import capture
from effuse.errors import PassError
from effuse.graph import calls
from effuse.lint import lint
from effuse.metrics import sqnr_db
from effuse.ort import CONFIG
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, Lora, LowRank, Pass, Quantize, SplitShortcut
from effuse.program import Program, run_program

logging.getLogger("torch.__trace").disabled = True

aten, ops = torch.ops.aten, torch.ops.effuse

TIMES = [90.0, 60.0, 30.0, 0.0]
EIGHT = Quantize(min_sqnr_db=0, edges=True)
ALL = {"down": "conv3d", "mid": "linear", "skip": "conv3d", "up": "conv_transpose3d.input",
       "wide": "conv_transpose3d.input", "join": "conv3d", "row": "conv_transpose1d",
       "image": "conv_transpose2d.input"}  # fmt: skip


class Volume(nn.Module):
    """Frames down and up again, with a linear layer between, a skip, and a row and an image."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.Conv3d(4, 8, (1, 2, 2), stride=(1, 2, 2))
        self.mid, self.skip = nn.Linear(8, 8), nn.Conv3d(4, 8, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose3d(8, 8, 2, stride=2)
        self.wide = nn.ConvTranspose3d(8, 8, 3, (1, 2, 2), 1, (0, 1, 1), groups=2, bias=False)
        self.join = nn.Conv3d(16, 4, 3, stride=(2, 1, 1), padding=1)
        self.row = nn.ConvTranspose1d(4, 6, 8, stride=4, padding=2)
        self.image = nn.ConvTranspose2d(4, 6, (4, 3), stride=(2, 3), padding=(1, 0))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h = F.silu(self.down(x) * (1 + t.cos())[:, None, None, None, None]).movedim(1, -1)
        h = self.mid(h).movedim(-1, 1)
        up = F.silu(self.up(F.silu(h)))[:, :, ::2] + self.wide(h)
        y = self.join(torch.cat([up, self.skip(x)], dim=1))
        return y, self.row(y.flatten(2)), self.image(F.silu(y[:, :, 0]))


def inputs() -> dict[str, torch.Tensor]:
    x = torch.randn(2, 4, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return {"x": x, "t": torch.full((2,), 60.0)}


@pytest.fixture(scope="module")
def program() -> Program:
    captured = capture(Volume().eval().requires_grad_(False), inputs(), timesteps=TIMES)
    return run_passes(captured, (Canonicalize(), Hoist()))


def rewritten(program: Program, *passes: Pass) -> Program:
    return run_passes(
        program, passes, lambda now: calibrate(now, None, layer_values, needs=needs_of(passes))
    )


def differ(one: Program, other: Program) -> float:
    """SQNR, dB, of the worst output."""
    pairs = zip(run_program(one, one.examples), run_program(other, other.examples), strict=True)
    return min(sqnr_db(a.numpy(), b.numpy()) for a, b in pairs)


def count(program: Program, *targets: object) -> int:
    return sum(len(calls(part.graph, *targets)) for part in program.parts)


def test_every_layer_is_quantized(program: Program) -> None:
    found = rewritten(program, EIGHT)
    assert {each.name: each.op for each in found.layers} == ALL
    assert {each.format for each in found.layers} == {"w8a8"}
    assert all(each.sqnr_db and each.sqnr_db > 25 for each in found.layers)
    parameters = {each.name: each.parameters for each in found.layers}
    assert parameters["down"] == 4 * 8 * 4 and parameters["wide"] == 8 * 4 * 27
    assert 20 < differ(program, found) < 80
    assert not count(found, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
                     aten.conv_transpose3d.input)  # fmt: skip


@pytest.mark.parametrize("how", [
    {"activations": "step"}, {"activations": "dynamic"}, {"rounding": "gptq"},
    {"weight_ranges": "mse"}, {"correct_bias": True}, {"ranges": "mse"},
    {"rounding": "reconstruct", "iterations": 3},
])  # fmt: skip
def test_in_every_way(program: Program, how: dict[str, object]) -> None:
    found = rewritten(program, Quantize(min_sqnr_db=0, edges=True, **how))  # type: ignore[arg-type]
    assert all(not each.reason for each in found.layers)
    assert 18 < differ(program, found) < 80


def test_what_is_not_quantized_is_as_it_was(program: Program) -> None:
    whole = rewritten(program, Quantize(min_sqnr_db=1000, edges=True))
    assert all(each.reason.startswith("under the bound") for each in whole.layers)
    assert {each.name: each.op for each in whole.layers} == ALL
    assert differ(program, whole) == differ(program, program)
    assert whole.weights.keys() == program.weights.keys()
    some = rewritten(program, Quantize(min_sqnr_db=0, edges=True, layers=(("up", "float"),)))
    assert count(some, aten.conv_transpose3d.input) == 1
    (up,) = (each for each in some.layers if each.name == "up")
    assert up.reason == "asked for in float" and up.op == "conv_transpose3d.input"


def test_first_and_last_layers_are_found_through_transposed_ones(program: Program) -> None:
    found = {each.name: each.reason for each in rewritten(program, Quantize(min_sqnr_db=0)).layers}
    assert {name for name, why in found.items() if why == "first layer"} == {"down", "skip"}
    assert {name for name, why in found.items() if why == "last layer"} == {"join", "row", "image"}


def test_weights_alone_in_few_bits_leave_transposed_ones(program: Program) -> None:
    found = rewritten(program, Quantize("w8a16", min_sqnr_db=0, edges=True))
    reasons = {each.name: each.reason for each in found.layers}
    why = "transposed convolution: in 8-bit integers alone it is computed as a convolution of "
    assert reasons["up"] == reasons["row"] == f"{why}sub-pixels"
    assert not reasons["down"] and not reasons["join"]
    with pytest.raises(PassError, match="layers: 'up' is a transposed convolution: in 8-bit"):
        rewritten(program, Quantize("w8a16", edges=True, layers=(("up", "w8a16"),)))


def test_low_rank_branches_and_loras_leave_volumes_out(program: Program) -> None:
    branched = rewritten(program, LowRank(rank=2, inputs=False, edges=True))
    assert branched.records[-1].reasons["low_rank"]["a three-dimensional convolution"] == 3
    slots = {each.path: each.reason for each in rewritten(program, Lora()).adapters}
    assert slots["down"] == "a three-dimensional convolution" and not slots["mid"]


def test_a_concatenation_of_videos_is_split(program: Program) -> None:
    split = rewritten(program, SplitShortcut())
    assert count(split, aten.conv3d.default) == 4 and not count(split, aten.cat.default)
    assert differ(program, split) > 110
    assert all(not each.reason for each in rewritten(split, EIGHT).layers)


def compiled(backend: str, *passes: Pass) -> effuse.Compiled:
    config = effuse.Config(passes=(Hoist(), *passes), backend=backend)
    return effuse.compile(
        Volume().eval(), config, inputs=inputs(), schedule=TIMES, progress=False
    )  # fmt: skip


def worst(one: effuse.Compiled, other: effuse.Compiled) -> float:
    pairs = zip(one(**inputs()), other(**inputs()), strict=True)
    return min(sqnr_db(a.numpy(), b.numpy()) for a, b in pairs)


def kernels(folder: Path, tmp_path: Path) -> Counter[str]:
    """How often each kernel runs in the optimized step program."""
    options = onnxruntime.SessionOptions()
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "full.onnx"), options)
    model = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("activations", ["static", "step", "dynamic"])
def test_onnx_runs_them_in_integers(activations: str, tmp_path: Path) -> None:
    rewrite = Quantize(min_sqnr_db=0, edges=True, activations=activations)  # type: ignore[arg-type]
    found = compiled("onnx", rewrite)
    ran = kernels(Path(found.folder), tmp_path)
    wanted = "ConvInteger" if activations == "dynamic" else "QLinearConv"
    assert ran[wanted] == 7 and not ran["Conv"] and not ran["ConvTranspose"]
    assert set(found.manifest["native"].values()) == {"native"}
    assert worst(compiled("reference", rewrite), found) > 45


def test_openvino_runs_them_in_integers() -> None:
    openvino = pytest.importorskip("openvino")
    found = compiled("openvino", EIGHT)
    settings = openvino_run.read_settings(found.folder).of("full")
    path = Path(found.folder) / "full.onnx"
    model = openvino_run.compile_part(openvino.Core(), path, settings)
    low = openvino_run.low_bit_layers(model)
    assert low == {"Convolution": (7, 7), "FullyConnected": (1, 1)}
    assert worst(compiled("reference", EIGHT), found) > 45


def test_tensorrt_is_handed_pairs_that_its_rules_allow(program: Program, tmp_path: Path) -> None:
    changed = tensorrt.adapt(rewritten(program, EIGHT))
    tensorrt.build(changed, tmp_path)
    path = tmp_path / "full.onnx"
    for target in tensorrt.VERSIONS:
        assert not lint(path, target)
    stored = onnx.load(str(path)).graph
    codes = [each for each in stored.initializer if each.data_type == onnx.TensorProto.INT8]
    volumes = [each for each in codes if len(each.dims) == 5]
    assert len(volumes) == 5  # three-dimensional ones, and transposed ones as such
    session = tensorrt.rehearse(changed.spec(), tmp_path)
    values = {name: value.numpy() for name, value in changed.examples.items()}
    found = session.step(values).values()  # type: ignore[union-attr]
    expected = run_program(changed, changed.examples)
    pairs = zip(expected, found, strict=True)
    assert min(sqnr_db(one.numpy(), other) for one, other in pairs) > 45


def test_triton_leaves_volumes_to_pytorch_and_says_so(program: Program) -> None:
    found = rewritten(program, EIGHT)
    lowered = lower(found)
    (log,) = (each for name, each in lowered.logs.items() if name == "full")
    assert log.reasons["conv"]["a three-dimensional convolution"] == 5
    assert log.rewrites["conv"] == 2  # the row and the image
    assert differ(found, lowered.program) > 100


class Widened(nn.Module):
    """An image at twice the size in each direction."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.last(F.silu(self.up(F.silu(self.first(sample)))))


def drawn(*sizes: int) -> torch.Tensor:
    return torch.randn(2, 4, *sizes, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_one_artifact_in_integers_at_every_size(backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    model = Widened().eval()
    sizes = {"height": (4, 64), "width": (4, 64)}
    config = effuse.Config(passes=(EIGHT,), backend=backend, dynamic=sizes)
    found = effuse.compile(model, config, inputs={"sample": drawn(6, 8)}, progress=False)
    assert all(layer["format"] == "w8a8" for layer in found.manifest["layers"])
    for given in (drawn(6, 8), drawn(16, 5)):
        with torch.no_grad():
            expected = model(given)
        assert 20 < sqnr_db(expected.numpy(), found(sample=given).numpy()) < 80
