"""Low-bit formats through ONNX Runtime: its kernels run, and they compute what reference does."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import effuse
from effuse.errors import BackendError
from effuse.lint import lint
from effuse.metrics import sqnr_db
from effuse.ort import CONFIG
from effuse.passes import Hoist, Quantize

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

SCHEDULE = list(range(90, -1, -10))
OPTIONS = {"min_sqnr_db": -100.0, "edges": True}


class Net(nn.Module):
    """Convolutions, attention with its four linear layers, and a timestep that scales."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Conv2d(3, 32, 3, padding=1)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32, bias=False)
        self.value, self.join = nn.Linear(32, 32), nn.Linear(32, 32)
        self.leave = nn.Conv2d(32, 3, 1)

    def forward(self, sample, timestep):
        h = F.silu(self.enter(sample)) * (1 + timestep.float().cos())[:, None, None, None]
        tokens = h.flatten(2).transpose(1, 2)
        heads = [
            each(tokens).unflatten(-1, (4, 8)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens = tokens + self.join(mixed)
        return self.leave(tokens.transpose(1, 2).reshape(h.shape))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval()


def compiled(net, *passes, **options):
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    inputs = {"sample": noise, "timestep": torch.tensor([50, 50])}
    settings = effuse.Config(passes=(Hoist(), *passes), **options)
    return effuse.compile(net, settings, inputs=inputs, schedule=SCHEDULE, progress=False)


def kernels(folder, tmp_path):
    """How often each kernel runs in the optimized step program."""
    options = onnxruntime.SessionOptions()
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(folder / "full.onnx"), options)
    model = onnx.load(str(tmp_path / "optimized.onnx"), load_external_data=False)
    return Counter(node.op_type for node in model.graph.node)


W4A16 = "int4/group32:none:int4/channel:none"
W4A8 = "int4/group32:int8/group32/dynamic:int4/channel:uint8/tensor/asymmetric"
W4 = "int4/channel:uint8/tensor/asymmetric:int4/channel:uint8/tensor/asymmetric"
CASES = {
    "static": ("w8a8", "format", {"QLinearConv": 2, "QGemm": 3, "MatMulIntegerToFloat": 1}),
    "step": ("w8a8", "step", {"QLinearConv": 2, "MatMulIntegerToFloat": 4}),
    "w4a16": (W4A16, "format", {"MatMulNBits": 4, "Conv": 2}),
    "w4a8": (W4A8, "format", {"MatMulNBits": 4, "QLinearConv": 2}),
    "w8a16": ("w8a16", "format", {"Conv": 2}),
    "w4 by channel": (W4, "format", {"QLinearConv": 2, "QGemm": 3, "MatMulIntegerToFloat": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_runtimes_integer_kernels_run(net, case, tmp_path):
    name, activations, wanted = CASES[case]
    result = compiled(net, Quantize(name, activations=activations, **OPTIONS))
    result.save(tmp_path / "net.effuse")
    found = kernels(tmp_path / "net.effuse", tmp_path)
    for kernel, count in wanted.items():
        assert found[kernel] >= count, found
    manifest = json.loads((tmp_path / "net.effuse" / "manifest.json").read_text())
    assert all(not layer["reason"] for layer in manifest["layers"])
    assert set(manifest["native"].values()) == {"native"}
    assert found["MultiHeadAttention"] == 1
    if name in (W4A16, "w8a16"):  # convolutions' weights are stored small, and made float once
        assert not found["DequantizeLinear"] + found["Cast"]
        assert name == W4A16 or not found["MatMulNBits"]


@pytest.mark.parametrize("name", ["w8a16", "int4/channel:none"])
def test_weights_alone_in_few_bits_are_few_bits_in_the_file(name, tmp_path):
    """Of wide layers: the exporter makes constants of those under 8 kB."""
    wide = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.Flatten(2), nn.Linear(256, 256))
    model = effuse.compile(
        wide.eval(), effuse.Config(passes=(Quantize(name, **OPTIONS),)),
        inputs={"input": torch.randn(1, 64, 16, 16)}, progress=False,
    )  # fmt: skip
    model.save(tmp_path / "net.effuse")
    stored = onnx.load(str(tmp_path / "net.effuse" / "full.onnx"), load_external_data=False)
    whole = [each for each in stored.graph.initializer if each.data_type == onnx.TensorProto.FLOAT]
    assert sum(math.prod(each.dims) for each in whole) <= 2 * (64 + 256)  # scales and biases
    found = kernels(tmp_path / "net.effuse", tmp_path)
    assert not found["DequantizeLinear"] + found["Cast"] + found["MatMulNBits"]


@pytest.mark.parametrize("name", [W4A16, W4A8])
def test_four_bit_weights_are_stored_as_the_kernels_read_them(name):
    """Of a wide layer: the exporter computes a Reshape only where it is of under 8192 bytes."""
    wide = nn.Sequential(nn.Linear(256, 128)).eval()
    inputs = {"input": torch.randn(4, 256, generator=torch.Generator().manual_seed(1))}
    config = effuse.Config(passes=(Quantize(name, **OPTIONS),))
    model = effuse.compile(wide, config, inputs=inputs, progress=False)
    path = model.folder / "full.onnx"
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {each.name: tuple(each.dims) for each in graph.initializer}
    (product,) = graph.node
    assert product.op_type == "MatMulNBits"
    assert [stored[each] for each in product.input[1:3]] == [(128, 8, 16), (128 * 8,)]
    assert not [each for each in lint(path, "openvino") if each.rule == "nbits-constant"]
    reference = effuse.compile(
        wide, config.model_copy(update={"backend": "reference"}), inputs=inputs, progress=False
    )
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    assert sqnr_db(reference(x), model(x)) > 100


@pytest.mark.parametrize("index", [0, 4, 9])
def test_every_step_looks_up_its_own_scales(net, index):
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(index))
    times = torch.tensor([SCHEDULE[index]] * 2)
    passes = Quantize(activations="step", **OPTIONS)
    one = compiled(net, passes)(sample, times)
    other = compiled(net, passes, backend="reference")(sample, times)
    with torch.no_grad():
        eager = net(sample, times)
    error = (one - other).norm() / (eager - other).norm()
    assert error < 0.1  # the two agree far better than either does with float


@pytest.mark.parametrize("name", ["w4a4", "fp8", "nvfp4"])
def test_what_the_runtime_lacks_is_refused_with_what_it_has(net, name):
    if name == "w4a4":
        name = "int4/group32:int4/group32/dynamic"
    with pytest.raises(BackendError, match=r"ONNX Runtime computes nothing with .*w8a8.*w4a8"):
        compiled(net, Quantize(name, **OPTIONS))
