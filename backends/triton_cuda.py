"""Cubins through CUDA's driver: loaded once, launched on the caller's stream. Needs no Triton.

What a launch hands over is laid out by the kernel's signature (triton_kernels.py); the build has
compared it with the parameters that the compiler declared. Source: CUDA Driver API,
cuModuleLoadData and cuLaunchKernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from effuse.backends.triton_kernels import CONSTANT, specialize
from effuse.errors import ArtifactError, BackendError
from effuse.kernels.launch import Launch

DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
FREE_SHARED = 48 << 10  # bytes that a launch has without asking
SCRATCH = 2  # pointers that Triton adds behind a kernel's own parameters; unused ones are null
C_TYPES: Mapping[str, Any] = {
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}


def driver() -> Any:
    """The driver's library.

    Raises:
        BackendError: no driver is installed.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BackendError(f"triton: CUDA's driver cannot be loaded: {error}") from None


class Cubins:
    """The kernels of an artifact, by key; called with a launch."""

    def __init__(self, folder: Path, table: Mapping[str, Any]) -> None:
        self._folder = folder
        self._target = str(table["target"])
        self._kernels: Mapping[str, Any] = table["kernels"]
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._driver = driver()

    def __call__(self, launch: Launch) -> None:
        """Launch on the current stream.

        Raises:
            BackendError: the artifact has no such kernel, or the driver refuses.
        """
        kernel = specialize(launch)
        key = kernel.key(self._target)
        if key not in self._kernels:
            raise BackendError(missing(kernel.name, self._target))
        values = pack(launch, dict(kernel.signature))
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(each) for each in values))
        grid = (*launch.grid, 1, 1)[:3]
        told = self._kernels[key]
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self._check(
            self._driver.cuLaunchKernel(
                self._function(key), *grid, told["threads"], 1, 1, told["shared"], stream,
                pointers, None,
            ),
            f"launching {kernel.name}",
        )  # fmt: skip

    def _function(self, key: str) -> ctypes.c_void_p:
        if key not in self._functions:
            self._functions[key] = self._load(key)
        return self._functions[key]

    def _load(self, key: str) -> ctypes.c_void_p:
        told = self._kernels[key]
        binary = (self._folder / f"{key}.cubin").read_bytes()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), binary), f"loading {key}")
        name = str(told["entry"]).encode()
        self._check(
            self._driver.cuModuleGetFunction(ctypes.byref(function), module, name), f"finding {key}"
        )
        if told["shared"] > FREE_SHARED:
            self._check(
                self._driver.cuFuncSetAttribute(function, DYNAMIC_SHARED, told["shared"]),
                f"shared memory of {key}",
            )
        return function

    def _check(self, status: int, doing: str) -> None:
        if status:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(status, ctypes.byref(text))
            reason = (text.value or b"unknown error").decode()
            raise BackendError(f"triton: {doing}: CUDA error {status}: {reason}")


def pack(launch: Launch, signature: Mapping[str, str]) -> list[Any]:
    """A launch's arguments as C values, in the order of the kernel's parameters."""
    given = [(kind, launch.args[name]) for name, kind in signature.items() if kind != CONSTANT]
    values = [c_value(kind, value) for kind, value in given]
    return [*values, *(ctypes.c_void_p(None) for _ in range(SCRATCH))]


def c_value(kind: str, value: Any) -> Any:
    """One argument as a C value: a tensor as its address."""
    if kind.startswith("*"):
        return ctypes.c_void_p(value.data_ptr())
    return C_TYPES[kind](value)


def missing(name: str, target: str) -> str:
    """Why a launch has no kernel in the artifact."""
    return (
        f"triton: the artifact has no {name} for these shapes or types on {target}: it was built "
        "for other sizes, or by another version of effuse; compile again for these inputs"
    )


def present() -> str | None:
    """The GPU that is here, as `sm_90`; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def fits(built: str, here: str) -> bool:
    """Whether cubins for `built` run on `here`: the same generation, and not a later member of it.

    Raises:
        ArtifactError: `built` names no GPU.
    """
    try:
        (major, minor), (own, second) = (divmod(int(each[3:]), 10) for each in (built, here))
    except ValueError:
        raise ArtifactError(f"the launch table is built for {built!r}, which is no GPU") from None
    return major == own and minor <= second
