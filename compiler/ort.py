"""Runs the parts of an ONNX artifact with onnxruntime (imports no torch)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

from effuse.errors import ArtifactError, InputError
from effuse.plan import PartSpec, ProgramSpec
from effuse.runtime import Run, Session

ERRORS_ONLY = 3
# A matmul with stored int8 weights becomes MatMulNBits, which by default (4) would quantize the
# activations too; 1 keeps float32 arithmetic, as the graph says.
#
# One arena for all sessions: variants run in turns, so each reuses the memory of the last. And no
# session's threads go on spinning after its run: on two cores a full step behind a cached one took
# 1.4 times as long.
CONFIG = {
    "session.qdq_matmulnbits_accuracy_level": "1",
    "session.use_env_allocators": "1",
    "session.force_spinning_stop": "1",
}


def open_session(
    spec: ProgramSpec, folder: Path, *, threads: int = 0, providers: Sequence[str] = ()
) -> Session:
    """A Session over `<part>.onnx` in `folder`.

    Args:
        threads: for one operator; 0 lets onnxruntime choose.
        providers: execution providers in order of preference; the CPU by default.
    """
    _share_memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ONLY
    # an int8 UNet took 67.5 ms in the default order and 65.1 in this one, with no more memory
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    chosen = list(providers) or ["CPUExecutionProvider"]
    runs = {part.name: _run(part, folder, options, chosen) for part in spec.parts}
    return Session(spec, runs)


@cache
def _share_memory() -> None:
    """Register the arena that the process's sessions share; once."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    with contextlib.suppress(Exception):  # the application has registered one: that is shared
        onnxruntime.create_and_register_allocator(memory, None)


def _run(part: PartSpec, folder: Path, options: Any, providers: list[str]) -> Run:
    path = folder / f"{part.name}.onnx"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ArtifactError(f"{path.name}: onnxruntime cannot load it: {error}") from error
    names = {item.name for item in session.get_inputs()}
    names |= {item.name for item in session.get_overridable_initializers()}

    def run(values: Mapping[str, Any]) -> Sequence[Any]:
        feed = {name: value for name, value in values.items() if name in names}
        try:
            return list(session.run(part.outputs, feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise InputError(f"{part.name}: onnxruntime refused {shapes}: {error}") from error

    return run
