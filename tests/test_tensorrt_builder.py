"""What builds and runs engines: its calls exist in TensorRT 10 and 11, its files are right.

Nothing here runs TensorRT. That the calls exist is read off the bindings' own list of symbols, and
what they are given off their types (mypy, .ci/tensorrt_stubs.py).
"""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from effuse.backends import tensorrt, tensorrt_builder, tensorrt_run
from effuse.backends.tensorrt_builder import OPTIONS, Settings, command, engine_name
from effuse.backends.tensorrt_export import export
from effuse.capture import capture
from effuse.errors import InputError
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Lora
from effuse.plan import factor_axes
from effuse.program import run_program

SYMBOLS = json.loads(Path(__file__).with_name("tensorrt_symbols.json").read_text(encoding="utf-8"))
CLASSES = SYMBOLS["classes"]
FILES = (tensorrt_builder, tensorrt_run)


class Calls(ast.NodeVisitor):
    """The members of TensorRT's classes that a file uses: `trt.Class.member`, `value.member`.

    A value's class is what its annotation says, or what the call that gave it gives.
    """

    def __init__(self):
        self.used = set()
        self._classes = {}
        self._given = {}  # by functions of the file

    def kind(self, node):
        """The class of an expression, if it is one of TensorRT's."""
        if isinstance(node, ast.Name):
            return self._classes.get(node.id) or self._given.get(node.id)
        if isinstance(node, ast.Call):
            return self.kind(node.func)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "trt":
                return node.attr
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self._classes.get(f"self.{node.attr}")
            owner = self.kind(node.value)
            return CLASSES.get(owner, {}).get(node.attr) or None
        return None

    def visit_Module(self, node):
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and each.returns is not None:
                self._given[each.name] = ast.unparse(each.returns).removeprefix("trt.")
        self.generic_visit(node)

    def visit_FunctionDef(self, node):
        self._classes = {name: kind for name, kind in self._classes.items() if "." in name}
        self.generic_visit(node)

    def visit_arg(self, node):
        text = "" if node.annotation is None else ast.unparse(node.annotation)
        if text.startswith("trt."):
            self._classes[node.arg] = text.removeprefix("trt.").split(" ")[0]

    def visit_Assign(self, node):
        kind, target = self.kind(node.value), node.targets[0]
        if kind and isinstance(target, (ast.Name, ast.Attribute)):
            self._classes[ast.unparse(target)] = kind
        self.generic_visit(node)

    def visit_Attribute(self, node):
        owner = self.kind(node.value)
        if owner in CLASSES:
            self.used.add((owner, node.attr))
        self.generic_visit(node)


def used():
    found = set()
    for module in FILES:
        visitor = Calls()
        visitor.visit(ast.parse(inspect.getsource(module)))
        found |= visitor.used
    flags = {("BuilderFlag", option.flag) for option in OPTIONS}
    types = {("DataType", word) for word in tensorrt_run.DTYPES}
    return found | flags | types | {("BuilderFlag", tensorrt_builder.REFIT_FLAG)}


def test_every_call_exists_in_tensorrt_11():
    found = used()
    assert [f"{kind}.{name}" for kind, name in sorted(found) if name not in CLASSES[kind]] == []
    # what has to be among them, so that the search above cannot find nothing
    assert {
        ("Builder", "build_serialized_network"), ("IBuilderConfig", "set_flag"),
        ("INetworkDefinition", "mark_weights_refittable"), ("OnnxParser", "parse_from_file"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"), ("ITimingCache", "serialize"),
        ("IExecutionContext", "execute_async_v3"), ("Refitter", "set_named_weights"),
        ("OnnxParserRefitter", "refit_from_file"), ("ICudaEngine", "weight_streaming_budget_v2"),
        ("IOptimizationProfile", "set_shape"), ("MemoryPoolType", "WORKSPACE"),
    } <= found  # fmt: skip


def test_the_search_sees_a_call_that_does_not_exist():
    visitor = Calls()
    visitor.visit(ast.parse("def f(b: trt.Builder):\n c = b.create_builder_config()\n c.int8 = 1"))
    assert ("IBuilderConfig", "int8") in visitor.used and "int8" not in CLASSES["IBuilderConfig"]


def test_the_symbols_are_of_tensorrt_11():
    assert SYMBOLS["version"].startswith("11.")
    assert "FP16" not in CLASSES["BuilderFlag"]  # gone with weak typing


# ---- the files -----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two linear layers and a convolution, over an open number of rows."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Conv2d(2, 8, 1), nn.Linear(8, 2)

    def forward(self, sample, timestep):
        h = torch.relu(self.enter(sample)) * timestep[:, None, None, None]
        return self.leave(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def program():
    torch.manual_seed(0)
    values = {"sample": torch.randn(2, 2, 8, 8), "timestep": torch.tensor([2.0, 3.0])}
    dynamic = {"batch": (1, 8), "height": (4, 32)}
    captured = capture(Net().eval(), values, dynamic=dynamic)
    return run_passes(captured, (Canonicalize(), Lora(max_rank=6)), None)


@pytest.fixture(scope="module")
def built(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact")
    return folder, export(program, folder, lambda what, done, total: None)


def test_open_sizes_become_a_profile(built):
    profile = built[1]["parts"]["full"]["profile"]
    assert profile["sample"] == [[1, 2, 4, 8], [2, 2, 8, 8], [8, 2, 32, 8]]
    assert profile["timestep"] == [[1], [2], [8]]


def test_the_line_for_trtexec(built):
    table = built[1]
    line = command("full", table, Settings(("version-compatible", "strip"), workspace=512))
    assert line == (
        "trtexec --onnx=full.onnx --saveEngine=full.engine --stronglyTyped "
        "--timingCacheFile=timing.cache --refit --noTF32 --stripWeights --versionCompatible "
        "--memPoolSize=workspace:512M --minShapes=sample:1x2x4x8,timestep:1 "
        "--optShapes=sample:2x2x8x8,timestep:2 --maxShapes=sample:8x2x32x8,timestep:8"
    )
    lines = (built[0] / "trtexec.txt").read_text().splitlines()
    assert lines == [command(part, table) for part in table["parts"]]


def test_the_script_is_the_builder_and_runs_alone(built):
    script = built[0] / "build_engines.py"
    assert script.read_text() == Path(tensorrt_builder.__file__).read_text()
    nodes = list(ast.walk(ast.parse(script.read_text())))
    imported = {each.name for node in nodes if isinstance(node, ast.Import) for each in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in imported}
    assert roots <= {*sys.stdlib_module_names, "tensorrt"}
    shown = subprocess.run(
        [sys.executable, "-I", script, "--help"], capture_output=True, text=True, check=True
    )
    assert all(f"--{option.name}" in shown.stdout for option in OPTIONS)


def test_the_script_says_what_is_missing(built, tmp_path):
    for folder in (built[0], tmp_path):
        run = subprocess.run(
            [sys.executable, "-I", built[0] / "build_engines.py", folder],
            capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 1 and run.stderr.startswith("error: TensorRT cannot be loaded")
    with pytest.raises(tensorrt_builder.BuildError, match="missing or damaged"):
        tensorrt_builder.read_table(tmp_path)


def test_engines_are_named_after_all_that_they_depend_on():
    one = engine_name("full", "ab" * 32, "NVIDIA H200", "11.4.0")
    assert one == "full.abababababababab.NVIDIA-H200.trt11.4.0.engine"
    others = {engine_name("full", "cd" * 32, "NVIDIA H200", "11.4.0"),
              engine_name("full", "ab" * 32, "Orin (nvgpu)", "11.4.0"),
              engine_name("full", "ab" * 32, "NVIDIA H200", "10.3.0")}  # fmt: skip
    assert len({one, *others}) == 4


def test_what_is_absent_is_named():
    assert "pip install tensorrt" in tensorrt.absent(None)


# ---- LoRAs ---------------------------------------------------------------------------------------


def test_a_refit_computes_what_the_factors_do(program, built, tmp_path):
    """The numbers that a refit hands over, put into the ONNX file, give what reference gives."""
    folder, table = built
    rows = table["parts"]["full"]["refit"]
    axes = factor_axes(program.adapters)
    assert set(rows) == set(axes)
    generator = torch.Generator().manual_seed(1)
    factors = {}
    for name, (axis, _) in axes.items():
        shape = list(program.weights[name].shape)
        shape[axis] = 3
        factors[name] = torch.randn(shape, generator=generator)
    model = onnx.load(folder / "full.onnx")
    stored = {each.name: each for each in model.graph.initializer}
    for name, row in rows.items():
        value = tensorrt_run.fitted(factors[name], row)
        assert list(value.shape) == row["shape"] == list(stored[row["initializer"]].dims)
        found = onnx.numpy_helper.from_array(value.numpy(), row["initializer"])
        stored[row["initializer"]].CopyFrom(found)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    given = {name: value.numpy() for name, value in program.examples.items()}
    (result,) = session.run(None, given)
    (expected,) = run_program(program, program.examples, weights={**program.weights, **factors})
    (plain,) = run_program(program, program.examples)
    assert torch.allclose(torch.from_numpy(result), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, plain, rtol=1e-2)


def test_without_loras_the_room_for_them_changes_nothing(program, built):
    session = tensorrt.rehearse(program.spec(), built[0])
    given = {name: value.numpy() for name, value in program.examples.items()}
    (found,) = session.step(given).values()
    (expected,) = run_program(program, program.examples)
    assert torch.allclose(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_a_rank_beyond_the_room_is_refused(built):
    name, row = next(iter(built[1]["parts"]["full"]["refit"].items()))
    shape = list(row["shape"])
    shape[row["axis"]] += 1
    factor = torch.zeros(shape).t() if row["transposed"] else torch.zeros(shape)
    with pytest.raises(InputError, match="greater max_rank"):
        tensorrt_run.fitted(factor, row)
    assert name
