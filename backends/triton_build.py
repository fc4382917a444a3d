"""Ahead of time: which kernels a lowered program launches, and all of them compiled for a GPU.

The shapes that are recorded in the graphs tell every launch. Each distinct kernel becomes a cubin;
the launch table says what each one needs. At load nothing is compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx

from effuse.backends.triton_kernels import Kernel, specialize
from effuse.backends.triton_plan import native_of
from effuse.errors import BackendError
from effuse.graph import calls, recorded, value_of
from effuse.kernels.launch import Launch, as_tuple
from effuse.program import Program
from effuse.targets import Gpu

TABLE_FILE = "kernels.json"
SPILL_BOUND = 64  # bytes of a thread's registers that may go through memory
WORKER = "effuse.backends.triton_worker"
FAR_AWAY = {"TRITON_INTERPRET": "0", "TRITON_DISABLE_LINE_INFO": "1"}  # lines name this machine

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Call:
    """One launch of a part: the node that it computes, and the key of its kernel."""

    node: str
    op: str
    key: str
    grid: tuple[int, ...]


def launches(graph: fx.Graph) -> Iterator[tuple[fx.Node, Launch]]:
    """The launches of a graph, in order, by its recorded values."""
    for node in calls(graph):
        native = native_of(node)
        if native is None:
            continue
        launch = native.launch(as_tuple(value_of(node)), *recorded(node.args))
        if launch is not None:
            yield node, launch


def calls_of(graph: fx.Graph, target: str) -> tuple[list[Call], dict[str, Kernel]]:
    """The launches of a graph as they are kept, and the kernels that they need."""
    found: list[Call] = []
    kernels: dict[str, Kernel] = {}
    for node, launch in launches(graph):
        kernel = specialize(launch)
        key = kernel.key(target)
        kernels[key] = kernel
        op = str(node.target).removeprefix("effuse.").removesuffix(".default")
        found.append(Call(node.name, op, key, launch.grid))
    return found, kernels


def build_kernels(program: Program, gpu: Gpu, folder: Path, progress: Progress) -> dict[str, Any]:
    """Write a cubin for each kernel of the lowered program, and the launch table; the table.

    Raises:
        BackendError: a kernel does not compile, or needs more than the GPU has.
    """
    parts: dict[str, list[Call]] = {}
    kernels: dict[str, Kernel] = {}
    for part in program.parts:
        parts[part.name], found = calls_of(part.graph, gpu.name)
        kernels |= found
    told = compile_all({key: (kernels[key], gpu) for key in kernels}, folder, progress)
    table = {
        "target": gpu.name,
        "kernels": {key: {"name": kernels[key].name, **told[key]} for key in sorted(kernels)},
        "parts": {
            name: [[each.node, each.op, each.key, list(each.grid)] for each in found]
            for name, found in parts.items()
        },
    }
    text = json.dumps(table, sort_keys=True, separators=(",", ":"))
    (folder / TABLE_FILE).write_text(text, encoding="utf-8")
    return table


def compile_all(
    kernels: Mapping[str, tuple[Kernel, Gpu]], folder: Path, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Compile kernels by key, each for its GPU, into `folder`, on all cores; what became of each.

    Raises:
        BackendError: one does not compile, or needs more than the GPU has.
    """
    keys = sorted(kernels)
    count = max(1, min(os.cpu_count() or 1, len(keys)))
    told: dict[str, dict[str, Any]] = {}
    lock = threading.Lock()

    def take(line: str) -> None:
        found = json.loads(line)
        with lock:
            told[found.pop("key")] = found
            progress("compile kernels", len(told), len(keys))

    shares = [keys[start::count] for start in range(count)]
    jobs = [{"folder": str(folder), "kernels": {key: request(*kernels[key]) for key in share}}
            for share in shares if share]  # fmt: skip
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(lambda job: run_worker(job, take), jobs))
    for key in keys:
        check_kernel(*kernels[key], told[key])
    return told


def request(kernel: Kernel, gpu: Gpu) -> dict[str, Any]:
    """What a worker is told of one kernel."""
    return {"kernel": kernel.data(), "capability": gpu.capability}


def run_worker(job: Mapping[str, Any], take: Callable[[str], None]) -> None:
    """One worker's share of the kernels; `take` gets its lines.

    Raises:
        BackendError: the compiler aborted.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", WORKER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, **FAR_AWAY},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()))
    reader.start()
    process.stdin.write(json.dumps(job))
    process.stdin.close()
    done = 0
    for line in process.stdout:
        take(line)
        done += 1
    reader.join()
    if process.wait() or done < len(job["kernels"]):
        kernel = list(job["kernels"])[min(done, len(job["kernels"]) - 1)]
        said = [line.strip() for line in errors if line.strip()]
        last = said[-1] if said else f"exit status {process.returncode}"
        raise BackendError(f"triton: the compiler aborted at {kernel}: {last}")


def check_kernel(kernel: Kernel, gpu: Gpu, told: Mapping[str, Any]) -> None:
    """See that a kernel was compiled, and that it runs well on the GPU.

    Raises:
        BackendError: it was not, or it does not.
    """
    if "error" in told:
        raise BackendError(
            f"triton: {kernel.name} does not compile for {gpu.name}: {told['error']}"
        )
    if told["shared"] > gpu.shared:
        raise BackendError(
            f"triton: {kernel.name} needs {told['shared']} bytes of shared memory, and {gpu.name} "
            f"has {gpu.shared}; its tiles in effuse.kernels are too large for this GPU"
        )
    if told["spills"] > SPILL_BOUND:
        raise BackendError(
            f"triton: {kernel.name} spills {told['spills']} bytes of registers a thread on "
            f"{gpu.name} ({SPILL_BOUND} are allowed); its tiles in effuse.kernels are too large"
        )
