"""ONNX for TensorRT: what is written is what its rules ask for, and computes what it should."""

from __future__ import annotations

import functools
import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn import functional as F

import effuse
from effuse.backends import tensorrt
from effuse.calibrate import calibrate, layer_values, needs_of
from effuse.capture import capture
from effuse.errors import BackendError, ConfigError
from effuse.lint import lint
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import PRESETS, Canonicalize, Hoist, LowRank, Quantize
from effuse.program import run_program
from effuse.targets import TENSORRT

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

TIMES = (90.0, 50.0, 10.0)
OPTIONS = {"min_sqnr_db": -100.0, "edges": True}
MIXED = (("query", "int4/group64:none"), ("key", "e4m3/channel:e4m3/tensor"),
         ("value", "int8/channel:none"), ("enter", "e4m3/channel:e4m3/tensor"),
         ("leave", "int4/channel:none"), ("middle", "int8/channel:int8/tensor"),
         ("narrow", "int8/channel:int8/tensor"))  # fmt: skip
CASES = {
    "as it is": (Quantize("w8a8", layers=MIXED, **OPTIONS),),
    "changed": (
        LowRank(rank=4),
        Quantize("w4a8", activations="step", layers=(("narrow", "w8a8"),), **OPTIONS),
    ),
    "nvfp4": (Quantize("e2m1/group16/scale-e4m3:none:int8/channel:none", **OPTIONS),),
}
TYPES = {  # of the codes that a file stores
    "as it is": {"INT4", "INT8", "FLOAT8E4M3FN"},
    "changed": {"INT4", "INT8"},
    "nvfp4": {"FLOAT4E2M1", "FLOAT8E4M3FN"},
}


class Net(nn.Module):
    """Convolutions, a norm, attention over tokens, and a timestep that scales."""

    def __init__(self):
        super().__init__()
        self.enter, self.norm = nn.Conv2d(2, 64, 3, padding=1), nn.GroupNorm(4, 64)
        self.middle = nn.Conv2d(64, 64, 3, padding=1)
        self.query, self.key = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.value, self.narrow = nn.Linear(64, 128), nn.Linear(128, 64)
        self.leave = nn.Conv2d(64, 2, 1)

    def forward(self, sample, timestep):
        h = F.silu(self.norm(self.enter(sample))) * (0.5 + timestep[:, None, None, None] / 90)
        tokens = F.relu(self.middle(h)).flatten(2).transpose(1, 2)
        heads = [
            each(tokens).unflatten(-1, (2, -1)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        ]
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        tokens = tokens + self.narrow(F.gelu(mixed))
        return self.leave(tokens.transpose(1, 2).reshape(h.shape))


class Small(nn.Module):
    """A long skip around a convolution and a linear layer; a timestep scales."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(2, 64, 3, padding=1), nn.Conv2d(128, 2, 1)
        self.middle, self.mix = nn.Conv2d(64, 64, 1), nn.Linear(64, 64)

    def forward(self, sample, timestep):
        skip = self.enter(sample) * (0.5 + timestep[:, None, None, None] / 90)
        h = F.silu(self.middle(skip))
        tokens = self.mix(h.flatten(2).transpose(1, 2))
        return self.leave(torch.cat([tokens.transpose(1, 2).reshape(h.shape), skip], 1))


def given():
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(2, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([50.0, 50.0]),
    }


@functools.cache
def captured(network=Net):
    torch.manual_seed(0)
    return capture(network().eval(), given(), timesteps=TIMES)


def rewritten(*passes, network=Net):
    def calibration(program):
        return calibrate(program, None, layer_values, groups=2, needs=needs_of(passes))

    return run_passes(captured(network), (Canonicalize(), *passes), calibration)


@pytest.fixture(scope="module", params=CASES)
def built(request, tmp_path_factory):
    """A case's name, its program, the same as TensorRT computes it, and the folder of its files."""
    program = rewritten(Hoist(), *CASES[request.param])
    changed = tensorrt.adapt(program)
    folder = tmp_path_factory.mktemp("artifact")
    told = tensorrt.build(changed, folder)
    return request.param, program, changed, folder, told


def evaluated(changed, folder):
    """The outputs of the written files: by ONNX Runtime, or by ONNX's own evaluator for e2m1."""
    session = tensorrt.rehearse(changed.spec(), folder)
    values = {name: value.numpy() for name, value in changed.examples.items()}
    if session is not None:
        (found,) = session.step(values).values()
        return found
    env = values | {"step_index": np.array([TIMES.index(50.0)])}
    for part in changed.spec().parts:
        model = ReferenceEvaluator(onnx.load(folder / f"{part.name}.onnx"))
        found = model.run(part.outputs, {name: env[name] for name in part.inputs})
        env |= dict(zip(part.outputs, found, strict=True))
    return env[changed.outputs[0]]


def test_the_files_compute_what_reference_does(built):
    name, _, changed, folder, _ = built
    (expected,) = run_program(changed, changed.examples)
    found = evaluated(changed, folder)
    # a value that rounding in another order moves across a tie is a whole step of 8 bits off
    assert sqnr_db(expected.numpy(), found) > (100 if name == "nvfp4" else 45)


def test_both_versions_take_the_files(built):
    _, _, changed, folder, told = built
    for part in changed.parts:
        path = folder / f"{part.name}.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        for target in tensorrt.VERSIONS:
            assert [each for each in lint(path, target) if each.severity == "error"] == []
    assert set(told["lint"]) == set(tensorrt.VERSIONS)


def test_codes_are_stored_in_their_own_types(built):
    name, _, _, folder, _ = built
    model = onnx.load(folder / "full.onnx", load_external_data=False)
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    kinds = {TensorProto.DataType.Name(each.data_type) for each in model.graph.initializer
             if each.name in read}  # fmt: skip
    assert kinds == TYPES[name]
    assert model.opset_import[0].version == (23 if name == "nvfp4" else 21)


def test_pairs_are_on_the_inputs_of_layers_only(built):
    _, _, _, folder, _ = built
    model = onnx.load(folder / "full.onnx")
    readers = {}
    for node in model.graph.node:
        for value in node.input:
            readers.setdefault(value, []).append(node.op_type)
    constants = {each.name: onnx.numpy_helper.to_array(each) for each in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert readers[node.output[0]] == ["DequantizeLinear"]
            assert constants[node.input[1]].shape == () and constants[node.input[1]] > 0
            assert not constants[node.input[2]].astype(np.float32).any()
        if node.op_type == "DequantizeLinear":
            assert set(readers[node.output[0]]) <= {"MatMul", "Conv", "Transpose",
                                                     "DequantizeLinear"}  # fmt: skip


def test_what_tensorrt_has_as_it_is_stays_and_the_rest_is_named(built):
    name, program, changed, _, _ = built
    (before,), (after,) = (run_program(each, program.examples) for each in (program, changed))
    ratio = sqnr_db(before.numpy(), after.numpy())
    if name != "changed":
        assert len(changed.records) == len(program.records) and ratio > 45
        return
    record = changed.records[-1]
    assert record.name == "tensorrt" and not record.exact
    assert record.sqnr_db == pytest.approx(ratio, abs=0.1)
    assert record.rewrites == {"symmetric": 4, "by step": 4, "weight only": 3, "outputs": 3}
    assert sum(record.rewrites.values()) == sum(int(n.split(":")[0]) for n in record.notes)


def test_scales_by_step_become_one_that_covers_them_all():
    program = captured()
    changed = tensorrt.adapt(program)
    assert changed.records == program.records  # nothing to change in float
    how = "int8/channel:uint8/tensor/asymmetric/step"
    program = rewritten(Hoist(), Quantize(how, **OPTIONS))
    rows = [t for n, t in program.weights.items() if n.startswith("range.") and ".scale" in n]
    zeros = [t for n, t in program.weights.items() if n.startswith("range.") and ".zero" in n]
    reach = [(torch.maximum(z.float(), 255 - z.float()) * s).max() / 127
             for s, z in zip(rows, zeros, strict=True)]  # fmt: skip
    changed = tensorrt.adapt(program)
    found = [t for n, t in changed.weights.items() if n.startswith("scale.")]
    assert len(found) == 5  # one for each tensor that a layer reads; three layers share theirs
    assert all(any(torch.isclose(scale, each) for each in reach) for scale in found)


@pytest.mark.parametrize(
    ("format", "options", "told"),
    [
        ("fp8", {}, "activations='static'"),
        ("w8a8", {"activations": "dynamic"}, "activations='static'"),
        ("mxfp4", {}, "nearest formats that it has are w8a8"),
        ("int8/channel:int4/token/dynamic", {}, "TensorRT has no activations int4"),
        ("w8a16", {"scores": 4}, "leave Quantize"),
    ],
)
def test_what_tensorrt_lacks_is_refused_with_the_way_out(format, options, told):
    program = run_passes(captured(), (Canonicalize(), Quantize(format, **options, **OPTIONS)), None)
    with pytest.raises(BackendError, match=r"tensorrt: .*in the part 'full'") as caught:
        tensorrt.adapt(program)
    assert told in str(caught.value)


def test_files_that_break_a_rule_are_refused_with_the_remedy(tmp_path):
    passes = (Canonicalize(), Quantize("int4/group32:none:int8/channel:none", **OPTIONS))
    program = tensorrt.adapt(run_passes(captured(Small), passes, None))
    with pytest.raises(BackendError, match=r"tensorrt-11 would not take .* blocks of 64 or 128"):
        tensorrt.build(program, tmp_path, target="tensorrt-11")


REFUSED = {"w8a8-dynamic": "quantize with activations='static'"}


@pytest.mark.parametrize("preset", PRESETS)
def test_both_versions_take_every_preset(preset, tmp_path):
    program = rewritten(*PRESETS[preset], network=Small)
    if preset in REFUSED:
        with pytest.raises(BackendError, match=REFUSED[preset]):
            tensorrt.adapt(program)
        return
    told = tensorrt.build(tensorrt.adapt(program), tmp_path)  # refuses what breaks a rule
    assert set(told["lint"]) == set(tensorrt.VERSIONS)
    models = sorted(tmp_path.glob("*.onnx"))
    assert len(models) == len(program.parts)
    for path in models:
        onnx.checker.check_model(str(path), full_check=True)
    names = {node.op_type for path in models for node in onnx.load(path).graph.node}
    quantized = any(isinstance(each, Quantize) for each in PRESETS[preset])
    assert ("DequantizeLinear" in names) == quantized


def test_a_gpu_without_the_numbers_is_refused(tmp_path):
    passes = (Canonicalize(), Quantize("e4m3/channel:none", **OPTIONS))
    program = tensorrt.adapt(run_passes(captured(), passes, None))
    tensorrt.check_gpu(program, "sm_89")
    with pytest.raises(BackendError, match=r"sm_87 \(Jetson Orin\) has no products of e4m3.*sm_89"):
        tensorrt.build(program, tmp_path, target="sm_87")


def test_two_builds_give_the_same_bytes(built, tmp_path):
    name, _, changed, folder, _ = built
    if name != "changed":
        return
    tensorrt.build(changed, tmp_path)
    assert {each.name: each.read_bytes() for each in tmp_path.iterdir()} == {
        each.name: each.read_bytes() for each in folder.iterdir()
    }


def test_an_artifact_without_a_gpu_is_read_and_says_what_is_missing(tmp_path):
    torch.manual_seed(0)
    inputs = given()
    config = effuse.Config(passes="w8a8", backend="tensorrt", target="tensorrt-10")
    compiled = effuse.compile(Small().eval(), config, inputs=inputs, schedule=list(TIMES),
                              progress=False)  # fmt: skip
    assert compiled.manifest["parity"]["sqnr_db"] > 60
    assert "TensorRT" in compiled.manifest["absent"]
    assert set(compiled.manifest["native"]) == {"quantize", "dequantize"}  # and none said to be so
    assert not {"native", "simulated"} & set(compiled.manifest["native"].values())
    loaded = effuse.load(compiled.save(tmp_path / "net.effuse"))
    assert loaded.manifest["passes"][-1]["name"] == "tensorrt"
    assert {"engines.json", "build_engines.py", "trtexec.txt"} <= set(loaded.manifest["files"])
    with pytest.raises(BackendError, match="pip install tensorrt"):
        loaded(inputs["sample"], inputs["timestep"])


def test_targets_are_versions_or_gpus():
    for target in (*TENSORRT, "sm_89", None):
        assert effuse.Config(backend="tensorrt", target=target).target == target
    with pytest.raises(ConfigError, match="not one of backend='tensorrt'"):
        effuse.Config(backend="tensorrt", target="cpu-avx2")
    with pytest.raises(ConfigError, match="set backend='tensorrt'"):
        effuse.Config(backend="onnx", target="tensorrt-11")
