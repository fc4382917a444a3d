"""Runs the parts of an ONNX artifact with onnxruntime (imports no torch)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime

from effuse.arrays import real_pairs
from effuse.devices import CPU, Device, device_of, missing, plugin_devices
from effuse.errors import ArtifactError, BackendError, InputError
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
    spec: ProgramSpec, folder: Path, *, threads: int = 0, providers: Sequence[Any] = (),
    target: str | None = None,
) -> Session:  # fmt: skip
    """A Session over `<part>.onnx`, or `<part>.ort`, in `folder`.

    Args:
        threads: for one operator; 0 lets onnxruntime choose.
        providers: execution providers in order of preference; by default those of the target.
        target: the device that the files were built for; None: this machine's CPU.

    Raises:
        BackendError: onnxruntime here lacks the device's provider.
        ArtifactError: a file cannot be loaded.
    """
    _share_memory()
    device = device_of(target)
    if not providers and (reason := missing(device)):
        raise BackendError(reason)
    options = session_options(device, threads)
    chosen = providers or device.providers
    found = [] if providers else plugin_devices(device)
    if found:
        options.add_provider_for_devices(found, dict(device.providers[0][1]))
    named, wanted = None if found else list(chosen), name_of(chosen[0])
    runs = {part.name: _run(part, folder, options, named, wanted) for part in spec.parts}
    return Session(spec, runs)


def name_of(provider: Any) -> str:
    """The name of an execution provider, given with options or without."""
    return provider if isinstance(provider, str) else str(provider[0])


def session_options(device: Device, threads: int = 0) -> Any:
    """The options of a session on a device."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = ERRORS_ONLY
    # an int8 UNet took 67.5 ms in the default order and 65.1 in this one, with no more memory
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    for key, value in {**CONFIG, **device.settings}.items():
        options.add_session_config_entry(key, value)
    return options


def _check_first(session: Any, wanted: str) -> None:
    """See that the first provider runs: onnxruntime leaves out one whose libraries are missing.

    Raises:
        BackendError: it was left out.
    """
    if wanted not in session.get_providers():
        raise BackendError(
            f"{wanted}: onnxruntime has it and could not start it (its log says why; for CUDA: the "
            f"driver, or libraries of another version); or ask for the CPU: providers=[{CPU!r}]"
        )


@cache
def _share_memory() -> None:
    """Register the arena that the process's sessions share; once."""
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    with contextlib.suppress(Exception):  # the application has registered one: that is shared
        onnxruntime.create_and_register_allocator(memory, None)


def model_file(folder: Path, part: str) -> Path:
    """The file of a part: in ORT format where that is there, else in ONNX."""
    small = folder / f"{part}.ort"
    return small if small.is_file() else folder / f"{part}.onnx"


def _run(
    part: PartSpec, folder: Path, options: Any, providers: Sequence[Any] | None, wanted: str
) -> Run:
    path = model_file(folder, part.name)
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=providers, enable_fallback=0
        )
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise ArtifactError(f"{path.name}: onnxruntime cannot load it: {error}") from error
    _check_first(session, wanted)
    names = {item.name for item in session.get_inputs()}
    names |= {item.name for item in session.get_overridable_initializers()}

    def run(values: Mapping[str, Any]) -> Sequence[Any]:
        feed = {name: real_pairs(value) for name, value in values.items() if name in names}
        try:
            return list(session.run(part.outputs, feed))
        except Exception as error:
            shapes = ", ".join(f"{name} {value.shape}" for name, value in feed.items())
            raise InputError(f"{part.name}: onnxruntime refused {shapes}: {error}") from error

    return run
