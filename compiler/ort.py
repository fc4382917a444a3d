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
# One arena for all sessions: variants run in turns, so each reuses the memory of the last.
CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1", "session.use_env_allocators": "1"}
PATIENT = "session.intra_op.allow_spinning"  # a session's idle threads wait without using a core


def open_session(
    spec: ProgramSpec, folder: Path, *, threads: int = 0, providers: Sequence[str] = ()
) -> Session:
    """A Session over `<part>.onnx` in `folder`.

    Args:
        threads: for one operator; 0 lets onnxruntime choose.
        providers: execution providers in order of preference; the CPU by default.
    """
    shared_threads = _share() and not threads
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ONLY
    options.use_per_session_threads = not shared_threads
    if not shared_threads and len(spec.parts) > 1:
        options.add_session_config_entry(PATIENT, "0")
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    chosen = list(providers) or ["CPUExecutionProvider"]
    runs = {part.name: _run(part, folder, options, chosen) for part in spec.parts}
    return Session(spec, runs)


@cache
def _share() -> bool:
    """Give the process's sessions one arena and one pool of threads; whether the pool is there.

    With a pool each, the threads of the variant before go on spinning while the next one runs: a
    full step behind a cached one took 1.4 times as long on two cores.
    """
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    try:
        onnxruntime.set_global_thread_pool_sizes(0, 1)
        shared = True
    except Exception:  # the application has run onnxruntime before, with pools of its own
        shared = False
    with contextlib.suppress(Exception):  # the application has registered an arena: that is shared
        onnxruntime.create_and_register_allocator(memory, None)
    return shared


def _run(part: PartSpec, folder: Path, options: Any, providers: list[str]) -> Run:
    path = folder / f"{part.name}.onnx"
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ArtifactError(f"{path.name}: onnxruntime cannot load it: {error}") from error
    names = {item.name for item in session.get_inputs()}

    def run(values: Mapping[str, Any]) -> Sequence[Any]:
        feed = {name: value for name, value in values.items() if name in names}
        try:
            return list(session.run(part.outputs, feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise InputError(f"{part.name}: onnxruntime refused {shapes}: {error}") from error

    return run
