"""The Triton back end: fused low-bit kernels, built for a GPU that need not be there.

`build` lowers the program to fused ops (triton_lower.py), compiles their kernels (triton_build.py)
and writes graphs, weights, cubins and the launch table. `load_session` runs them on the GPU; on a
CPU they run in Triton's interpreter, which is for checks.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import fx

from effuse.backends import reference
from effuse.backends.reference import TorchArrays
from effuse.backends.triton_build import TABLE_FILE, build_kernels
from effuse.backends.triton_cuda import Cubins, fits, present
from effuse.backends.triton_figures import figures
from effuse.backends.triton_lower import lower
from effuse.backends.triton_plan import tensors
from effuse.backends.triton_run import PartRun
from effuse.errors import ArtifactError, BackendError, require
from effuse.kernels.launch import INTERPRETED, Launch, run_jit
from effuse.plan import Input, ProgramSpec, factor_axes
from effuse.program import Program
from effuse.runtime import Session
from effuse.serial import graph_from_json
from effuse.targets import GPUS
from effuse.weights import Weights

log = logging.getLogger(__name__)

DEFAULT_TARGET = "sm_90"


class DeviceArrays(TorchArrays):
    """torch tensors on one device; what comes from elsewhere is brought there."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def take(self, value: Any, item: Input) -> torch.Tensor:
        """`value` on the device, in the input's dtype."""
        return super().take(value, item).to(self.device)

    def give(self, value: Any, like: Any) -> Any:
        """Where and as the caller's own tensors are."""
        return value.to(like.device) if isinstance(like, torch.Tensor) else value.cpu().numpy()

    def floats(self, value: Any) -> np.ndarray[Any, Any]:
        """The values as a float32 numpy array."""
        return np.asarray(value.float().cpu())

    def array(self, value: np.ndarray[Any, Any], dtype: str = "") -> Any:
        """A numpy array as a tensor on the device."""
        return super().array(value, dtype).to(self.device)


def available() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    try:
        require("triton", "triton")
    except ImportError as error:
        return str(error)
    return None


def absent(target: str | None) -> str | None:
    """Why what was built for `target` does not run here, or None."""
    here = present()
    if here is not None or INTERPRETED:
        return None
    return (
        f"no CUDA GPU is here, and this is built for {target or DEFAULT_TARGET}: run it there; or "
        "have Triton's interpreter run it on the CPU, slowly, with TRITON_INTERPRET=1 in the "
        "environment"
    )


def build(
    program: Program, folder: Path, progress: Any = lambda what, done, total: None,
    target: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write the lowered program, its cubins and the launch table; figures for the manifest.

    Args:
        target: a GPU as `sm_90`; None: the one that is here, else `DEFAULT_TARGET`.

    Raises:
        BackendError: sizes are left open, the GPU lacks a format, or a kernel does not build.
    """
    if program.symbolic:
        open_sizes = ", ".join(program.bounds)
        raise BackendError(
            f"triton: kernels are compiled for known sizes, and {open_sizes} is left open; list "
            "the sizes to build in shapes=[…], without dynamic="
        )
    gpu = GPUS[target or present() or DEFAULT_TARGET]
    lowered = lower(program)
    check_formats(lowered.program, gpu.name)
    reference.build(lowered.program, folder)
    table = build_kernels(lowered.program, gpu, folder, progress)
    return figures(program, lowered, table)


def check_formats(program: Program, target: str) -> None:
    """See that the GPU multiplies the program's numbers.

    Raises:
        BackendError: it does not; it names the nearest that does.
    """
    if GPUS[target].e4m3:
        return
    nodes = (node for part in program.parts for node in part.graph.nodes)
    if any(each.dtype == torch.float8_e4m3fn for node in nodes for each in tensors(node)):
        raise BackendError(
            f"triton: {target} ({GPUS[target].chips}) has no 8-bit float products; the nearest GPU "
            "that has them is sm_89; or quantize to int8, as Quantize('w8a8') and "
            "Quantize('w4a8') do"
        )


def rehearse(spec: ProgramSpec, folder: Path) -> Session:
    """A session over the lowered program by the ops' references, where no GPU is."""
    return reference.load_session(spec, folder)


def load_session(spec: ProgramSpec, folder: Path) -> Session:
    """A session on the GPU that is here, or in Triton's interpreter.

    Raises:
        BackendError: there is neither.
        ArtifactError: it is built for another GPU, and Triton is not there to compile it anew.
    """
    table = read_table(folder)
    if reason := absent(str(table["target"])):
        raise BackendError(f"triton: {reason}")
    here = present()
    device = torch.device("cpu") if here is None else torch.device("cuda")
    launch = run_jit if here is None else launcher(folder, table, here)
    stored = json.loads((folder / "graphs.json").read_text(encoding="utf-8"))
    graphs = {part.name: graph_from_json(stored[part.name]) for part in spec.parts}
    weights = load_file(folder / "weights.safetensors", device=str(device))
    return session(spec, graphs, weights, device, launch)


def session(
    spec: ProgramSpec, graphs: Mapping[str, fx.Graph], weights: Weights,
    device: torch.device, launch: Callable[[Launch], None],
) -> Session:  # fmt: skip
    """A session over lowered graphs, whose kernels `launch` runs."""
    swappable = factor_axes(spec.adapters)
    runs = {
        name: PartRun(graph, weights, device, launch, swappable, graphs=device.type == "cuda")
        for name, graph in graphs.items()
    }
    return Session(spec, runs, DeviceArrays(device))


def launcher(folder: Path, table: Mapping[str, Any], here: str) -> Callable[[Launch], None]:
    """What runs the kernels on the GPU that is here: those of the artifact, or Triton's JIT.

    Raises:
        ArtifactError: neither can.
    """
    built = str(table["target"])
    if fits(built, here):
        return Cubins(folder, table)
    if available() is None:
        log.warning("built for %s, and %s is here: Triton compiles the kernels anew", built, here)
        return run_jit
    raise ArtifactError(
        f"the artifact is built for {built}, and {here} is here; compile it again with "
        f"target={here!r}, or install Triton, which then compiles at the first call: "
        "pip install 'effuse[triton]'"
    )


def read_table(folder: Path) -> dict[str, Any]:
    """The launch table of an artifact.

    Raises:
        ArtifactError: it has none, or a damaged one.
    """
    try:
        table: dict[str, Any] = json.loads((folder / TABLE_FILE).read_text(encoding="utf-8"))
        return {**table, "target": str(table["target"]), "kernels": dict(table["kernels"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{TABLE_FILE}: missing or damaged ({error})") from None
