"""One namespace over top-level folders (STYLE 3), imports in one direction, and a light start."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import effuse

ROOT = Path(__file__).resolve().parent.parent
TOOL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
FOLDERS = {name: ROOT / folder for name, folder in TOOL["package-dir"].items()}
HEAVY = ("torch", "onnxruntime", "pydantic", "numpy", "onnx", "diffusers", "rich", "typer")
DEVICE = (
    "errors",
    "plan",
    "formula",
    "arguments",
    "buckets",
    "arrays",
    "decision",
    "guidance",
    "trajectory",
    "runtime",
    "sampler",
    "tensor_file",
    "resume",
    "lora_layouts",
    "lora_scale",
    "lora_file",
    "lora",
    "devices",
    "ort",
    "openvino_run",
    "artifact",
    "api",
    "onnx_store",
    "metrics",
    "noise",
    "pipeline_calls",
    "pipeline_parts",
    "pipeline_play",
    "pipeline_run",
    "pipeline_tokens",
)


def modules() -> dict[str, Path]:
    """Every module of effuse, by its dotted name."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in folder.glob("*.py"):
            name = package if path.stem == "__init__" else f"{package}.{path.stem}"
            found[name] = path
    return found


MODULES = modules()


def imports(path: Path, top_only: bool = False) -> set[str]:
    """The dotted names that a file imports; those of modules as far as they are effuse's."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if not top_only else executed(tree.body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            base = str(node.module)
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= {base} | (inner & MODULES.keys())
            found -= {base} if base in FOLDERS and inner <= MODULES.keys() else set()
    return found


def executed(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements that run when a module is imported."""
    found = []
    for node in body:
        found.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            found += executed([*node.body, *node.orelse])
        elif isinstance(node, ast.Try):
            found += executed([*node.body, *node.orelse, *node.finalbody])
    return found


def package(name: str) -> str:
    """The sub-package that a module is in: `effuse.passes.hoist` -> `passes`; else `compiler`."""
    home = ".".join(name.split(".")[:2])
    return home.removeprefix("effuse.") if home in FOLDERS and home != "effuse" else "compiler"


def python(code: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300, **options
    )


# ---- STYLE 3's four rules ------------------------------------------------------------------------


def test_rule_1_nothing_puts_the_root_on_the_path():
    assert not (ROOT / "conftest.py").exists()
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert str(ROOT) not in sys.path
    addopts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert "--import-mode=importlib" in addopts["addopts"]


@pytest.mark.parametrize("name", ["passes", "backends", "kernels"])
def test_rule_1_a_folder_found_by_its_bare_name_says_so(name):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {name}"
    result = python(code, cwd=ROOT)
    assert result.returncode == 1
    assert f"'{name}' is a folder of effuse's checkout; import effuse.{name}" in result.stderr


def test_rule_2_the_packages_are_the_folders_with_an_init():
    found = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert sorted(TOOL["packages"]) == sorted(TOOL["package-dir"])
    assert {FOLDERS[name].name for name in TOOL["packages"]} == found
    nested = [path for folder in FOLDERS.values() for path in folder.glob("*/*.py")]
    assert not nested, "folders are flat"


@pytest.mark.parametrize("name", TOOL["packages"])
def test_rule_3_no_function_hides_a_module(name):
    parent = importlib.import_module(name)
    for path in FOLDERS[name].glob("*.py"):
        if path.stem not in ("__init__", "__main__"):
            importlib.import_module(f"{name}.{path.stem}")
            assert isinstance(getattr(parent, path.stem), ModuleType), path.stem


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rule_4_absolute_imports_only(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"line {node.lineno}"


ALLOWED = {
    "kernels": {"kernels", "compiler"},
    "passes": {"passes", "kernels", "compiler"},
    "backends": {"backends", "passes", "kernels", "compiler"},
}


def graph_layer() -> set[str]:
    """compiler's modules that kernels, passes and back ends stand on, directly or not."""
    queue = [name for name in MODULES if package(name) != "compiler"]
    found: set[str] = set()
    while queue:
        for other in imports(MODULES[queue.pop()]) & MODULES.keys():
            if package(other) == "compiler" and other not in found and other != "effuse":
                found.add(other)
                queue.append(other)
    return found


@pytest.mark.parametrize("name", sorted(n for n in MODULES if package(n) != "compiler"))
def test_rule_4_in_one_direction(name):
    own = {other for other in imports(MODULES[name]) if other.split(".")[0] == "effuse"}
    assert own <= MODULES.keys()
    assert {package(other) for other in own} <= ALLOWED[package(name)]


def test_rule_4_the_graph_layer_stands_on_itself():
    layer = graph_layer()
    assert {"effuse.graph", "effuse.program", "effuse.plan", "effuse.errors"} <= layer
    assert not layer & {"effuse.api", "effuse.build", "effuse.config", "effuse.pass_manager"}
    for name in layer:
        above = {each for each in imports(MODULES[name]) & MODULES.keys() if each not in layer}
        assert above <= {"effuse"}, f"{name} imports {above}"


# ---- a light start -------------------------------------------------------------------------------


def test_importing_effuse_is_quick():
    code = (
        "import time; start = time.process_time(); import effuse;print(time.process_time() - start)"
    )
    best = min(float(python(code).stdout) for _ in range(5))
    assert best < 0.3


@pytest.mark.parametrize(
    "code", ["import effuse", "import effuse.plan", "import effuse; dir(effuse)"]
)
def test_importing_effuse_loads_nothing_heavy(code):
    result = python(f"{code}; import sys; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_public_names_are_all_there():
    for name in effuse.__all__:
        assert getattr(effuse, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'compil'"):
        _ = effuse.compil


@pytest.mark.parametrize("name", DEVICE)
def test_device_modules_do_not_import_torch_at_the_top(name):
    allowed = {"numpy", "onnxruntime"} | sys.stdlib_module_names
    outside = {other.split(".")[0] for other in imports(FOLDERS["effuse"] / f"{name}.py", True)}
    assert outside - {"effuse"} <= allowed
    for other in imports(FOLDERS["effuse"] / f"{name}.py", True) & MODULES.keys():
        assert other == "effuse" or other.removeprefix("effuse.") in DEVICE


# ---- where only numpy and onnxruntime are --------------------------------------------------------

BARE = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
BLOCKED = {"torch", "onnx", "onnx_ir", "onnxscript", "pydantic", "pydantic_core", "rich", "typer",
           "safetensors", "diffusers", "transformers", "networkx", "jinja2", "matplotlib", "PIL"}
sys.meta_path.insert(0, Blocked())
"""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.prompt = nn.Linear(4, 3)

    def forward(self, sample, timestep, prompt, return_dict=True):
        h = (
            self.layers[0](sample) * torch.cos(timestep * 0.01)
            + self.prompt(prompt)[:, :, None, None]
        )
        y = self.layers[2](torch.relu(self.layers[1](torch.relu(h))))
        return {"sample": y} if return_dict else (y,)


@pytest.fixture(scope="module", params=["exact", "w8a8"])
def saved(request, tmp_path_factory):
    given = {
        "sample": torch.ones(1, 3, 4, 4),
        "timestep": torch.tensor(5),
        "prompt": torch.ones(1, 4),
    }
    compiled = effuse.compile(
        Net().eval(), request.param, inputs=given, schedule=[9, 5, 1], progress=False
    )
    path = compiled.save(tmp_path_factory.mktemp("saved") / "net.zip")
    return path, float(compiled(**given).sample.sum())


def test_an_artifact_runs_without_torch(saved):
    path, expected = saved
    code = f"""{BARE}
import effuse, effuse.runtime, effuse.ort, effuse.artifact, effuse.plan
import numpy as np
net = effuse.load({str(path)!r})
y = net(np.ones((1, 3, 4, 4), np.float32), 5, np.ones((1, 4), np.float32))
assert type(y.sample) is np.ndarray and y.sample.dtype == np.float32
assert net.dtype == np.float32 and str(net.device) == "cpu"
assert net.to("cpu").eval() is net
assert "every step: full" in net.plan and "Compiled Net" in repr(net) and net.size > 0
try:
    net(np.ones((1, 3, 4, 4)), 5, np.ones((1, 4), np.float32))
except effuse.EffuseError as error:
    assert "expected float32, got float64" in str(error)
else:
    raise SystemExit("no error")
assert not BLOCKED & set(sys.modules)
print(float(y.sample.sum()))
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "use", ["effuse.compile(None)", "effuse.Config()", "effuse.compile('x', {})"]
)
@pytest.mark.parametrize("missing", [{"torch"}, {"pydantic", "pydantic_core"}, {"rich"}, None])
def test_a_missing_extra_says_what_installs_it(use, missing):
    if missing == {"rich"} and "Config" in use:
        pytest.skip("a Config needs no bars")
    narrowed = "" if missing is None else f"BLOCKED.intersection_update({missing!r})\n"
    code = f"""{BARE}{narrowed}
import effuse
from effuse.errors import MissingExtra
try:
    {use}
except MissingExtra as error:
    print(error)
"""
    result = python(code, env={**os.environ})
    assert result.returncode == 0, result.stderr
    assert "pip install 'effuse[compiler]'" in result.stdout
    named = missing or {"torch", "pydantic"}
    assert any(f"{name!r}" in result.stdout for name in named), result.stdout
    assert "Traceback" not in result.stdout and len(result.stdout.splitlines()) == 1


def test_a_reference_artifact_without_torch_says_so(tmp_path):
    given = {
        "sample": torch.ones(1, 3, 4, 4),
        "timestep": torch.tensor(5),
        "prompt": torch.ones(1, 4),
    }
    config = {"passes": "none", "backend": "reference"}
    path = effuse.compile(Net().eval(), config, inputs=given, progress=False).save(
        tmp_path / "a.zip"
    )
    code = f"""{BARE}
import effuse
try:
    effuse.load({str(path)!r})
except ImportError as error:
    print(type(error).__name__, error)
"""
    result = python(code)
    assert "MissingExtra" in result.stdout and "effuse[compiler]" in result.stdout, result.stderr


def test_importing_everything_starts_no_device_and_sets_no_flag():
    names = [name for name in sorted(MODULES) if not name.endswith("__main__")]
    code = f"""
import importlib, torch
before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
          torch.backends.cudnn.benchmark, torch.initial_seed())
for name in {names!r}:
    importlib.import_module(name)
after = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),
         torch.backends.cudnn.benchmark, torch.initial_seed())
assert before == after and not torch.cuda.is_initialized()
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
