"""The TensorRT back end: explicitly typed ONNX here, engines where TensorRT and a GPU are.

`build` writes for every part an ONNX file that TensorRT 10 and 11 take, the weights of all in one
file, the table from which engines are built, a script that does so with nothing but tensorrt, and
the lines for trtexec. `load_session` builds the engines that are missing, and runs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from effuse.backends import onnx
from effuse.backends.tensorrt_builder import BuildError, gpu_name
from effuse.backends.tensorrt_export import export
from effuse.backends.tensorrt_lower import adapt as adapt
from effuse.devices import HALF
from effuse.errors import BackendError, require
from effuse.graph import calls
from effuse.kernels.table import BY_TARGET
from effuse.lint import Finding, lint
from effuse.plan import PartSpec, ProgramSpec
from effuse.program import Program
from effuse.runtime import Run, Session
from effuse.targets import GPUS

INSTALL = "pip install tensorrt (11.x, CUDA 13), or tensorrt-cu12 (10.x); JetPack brings its own"
VERSIONS = ("tensorrt-10", "tensorrt-11")
LOW_BIT: dict[Any, int] = {  # effuse's ops, with the place of the quantizer among their arguments
    torch.ops.effuse.unpack.default: 4,
    torch.ops.effuse.fake_quantize.default: 3,
}
SINCE = {"e4m3": 89, "e2m1": 100}  # the first compute capability whose tensor cores have the grid
FATAL_ONLY = 4  # of ONNX Runtime's messages
UNDECIDED = "as the engine's builder decides"  # and no builder is on the machines that test this
SHOWN = 5  # findings that an error lists


def available() -> str | None:
    """Why ONNX files for TensorRT cannot be written here, or None."""
    return onnx.available()


def absent(target: str | None) -> str | None:
    """Why engines can be neither built nor run here, or None."""
    try:
        import tensorrt as trt
    except ImportError as error:
        return f"TensorRT cannot be loaded ({error}): {INSTALL}"
    if not hasattr(trt, "Builder"):  # a folder of that name, such as that of its stubs
        return f"what is called tensorrt here is not TensorRT: {INSTALL}"
    try:
        gpu_name()
    except BuildError as error:
        return f"engines are built on the GPU that runs them: {error}"
    if not torch.cuda.is_available():
        return "PyTorch here is without CUDA, and its tensors are what engines read and write"
    return None


def build(
    program: Program, folder: Path, progress: Any = lambda what, done, total: None,
    target: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the ONNX files, the weights, and all that engines are built from, into `folder`.

    Args:
        target: `tensorrt-10`, `tensorrt-11`, either with `-fp16`, or a GPU; what is not a version
            has to suit both.

    Raises:
        BackendError: an op or a format has no form that TensorRT takes.
    """
    asked = target or ""
    check_gpu(program, asked)
    table = export(program, folder, progress, half=asked.endswith(HALF))
    version = asked.removesuffix(HALF)
    targets = (version,) if version in VERSIONS else VERSIONS
    found = {
        name: [each for part in table["parts"] for each in lint(folder / f"{part}.onnx", name)]
        for name in targets
    }
    for name, findings in found.items():
        refuse(name, [each for each in findings if each.severity == "error"])
    counts = {
        name: {
            kind: sum(each.severity == kind for each in findings) for kind in ("warning", "info")
        }
        for name, findings in found.items()
    }
    return {"lint": counts, "native": dict.fromkeys(effuse_ops(program), UNDECIDED)}


def check_gpu(program: Program, target: str) -> None:
    """See that the GPU, if one is named, multiplies the program's numbers.

    Raises:
        BackendError: it does not; it names the first that does.
    """
    gpu = GPUS.get(target)
    nodes = (node for part in program.parts for node in calls(part.graph, *LOW_BIT))
    grids = {str(node.args[LOW_BIT[node.target]]).split("/")[0] for node in nodes}
    for grid, least in SINCE.items():
        if gpu is not None and grid in grids and gpu.capability < least:
            raise BackendError(
                f"tensorrt: {gpu.name} ({gpu.chips}) has no products of {grid}; the first GPU that "
                f"has is sm_{least}; or quantize to integers, as Quantize('w8a8') does"
            )


def effuse_ops(program: Program) -> list[str]:
    """The names of effuse's ops that a program holds."""
    targets = {node.target for part in program.parts for node in calls(part.graph)}
    return sorted(BY_TARGET[target].name for target in targets if target in BY_TARGET)


def refuse(target: str, errors: list[Finding]) -> None:
    """See that nothing breaks a rule of the target.

    Raises:
        BackendError: something does.
    """
    if not errors:
        return
    shown = "; ".join(f"{e.rule}: {e.op} {e.node}: {e.found}; {e.remedy}" for e in errors[:SHOWN])
    more = f" (and {len(errors) - SHOWN} more)" if len(errors) > SHOWN else ""
    raise BackendError(f"tensorrt: {target} would not take the ONNX files: {shown}{more}")


def rehearse(spec: ProgramSpec, folder: Path) -> Session | None:
    """A session over the same ONNX files in ONNX Runtime, node by node as they are written.

    None where it has no operator for one of them, such as 4-bit floats.
    """
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = FATAL_ONLY
    # fused, 8-bit floats have no kernel; and what is to be checked is what was written
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    runs: dict[str, Run] = {}
    for part in spec.parts:
        try:
            session = runtime.InferenceSession(str(folder / f"{part.name}.onnx"), options)
        except Exception as error:  # onnxruntime's exceptions have no common base
            if "NOT_IMPLEMENTED" in str(error):
                return None
            raise
        runs[part.name] = _run(session, part)
    return Session(spec, runs)


def _run(session: Any, part: PartSpec) -> Run:
    names = [item.name for item in session.get_inputs()]

    def run(values: Mapping[str, Any]) -> Sequence[Any]:
        return list(session.run(part.outputs, {name: values[name] for name in names}))

    return run


def load_session(spec: ProgramSpec, folder: Path) -> Session:
    """A session on the GPU, over engines that were built before or are built now.

    Raises:
        BackendError: TensorRT or a GPU is missing, or an engine cannot be built.
    """
    if reason := absent(None):
        raise BackendError(f"tensorrt: {reason}")
    from effuse.backends.tensorrt_run import open_session

    return open_session(spec, folder)
