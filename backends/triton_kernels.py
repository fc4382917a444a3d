"""Specializations: what a kernel is compiled for, told by a launch alone, and the key of each.

A kernel is compiled anew for the types of its arguments, for its constants, and for which pointers
and sizes are multiples of 16 (which lets it load 16 bytes at once). Sizes and strides are arguments
of their own, so that layers of many shapes share one kernel.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from effuse import kernels
from effuse.errors import BackendError
from effuse.kernels.launch import FP_FUSION, Launch

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
ALIGNMENT = 16  # bytes of an address, or the divisor of a size
INT32 = 1 << 31
CONSTANT = "constexpr"


@dataclass(frozen=True)
class Kernel:
    """A kernel for arguments of certain types.

    Args:
        module, name: where its source is.
        signature: each parameter and its type in Triton's words; `constexpr` for constants.
        constants: the value of each constant.
        aligned: the parameters that are multiples of 16.
        warps, stages: as in `Launch`.
    """

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    def data(self) -> dict[str, Any]:
        """All of it, as JSON holds it."""
        return asdict(self)

    def key(self, target: str) -> str:
        """A name for what the kernel is compiled to: the same wherever the same is compiled."""
        told = [self.data(), target, FP_FUSION, sources()]
        text = json.dumps(told, sort_keys=True, separators=(",", ":"))
        return f"{self.name.strip('_')}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def specialize(launch: Launch) -> Kernel:
    """What the kernel of a launch is compiled for.

    Raises:
        BackendError: an argument has no type in Triton; a defect of the launcher.
    """
    function = getattr(launch.kernel, "fn", launch.kernel)
    signature, constants, aligned = [], [], []
    for name in inspect.signature(function).parameters:
        value = launch.constants[name] if name in launch.constants else launch.args[name]
        fixed = name in launch.constants or value is None
        signature.append((name, CONSTANT if fixed else type_of(name, value)))
        if fixed:
            constants.append((name, value))
        elif is_aligned(value):
            aligned.append(name)
    return Kernel(
        function.__module__, function.__name__, tuple(signature), tuple(constants), tuple(aligned),
        launch.warps, launch.stages,
    )  # fmt: skip


def type_of(name: str, value: Any) -> str:
    """The type of an argument in Triton's words."""
    if isinstance(value, torch.Tensor) and value.dtype in TYPES:
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, int) and not isinstance(value, bool):
        return "i32" if -INT32 <= value < INT32 else "i64"
    if isinstance(value, float):
        return "fp32"
    what = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
    raise BackendError(f"triton: the argument {name!r} is of {what}, which no kernel takes")


def is_aligned(value: Any) -> bool:
    """Whether an address or a size is a multiple of 16; every storage begins at such an address."""
    if isinstance(value, FakeTensor):
        return int(value.storage_offset()) * value.element_size() % ALIGNMENT == 0
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % ALIGNMENT == 0
    return isinstance(value, int) and value % ALIGNMENT == 0


@cache
def sources() -> str:
    """A digest of the kernels' sources: an artifact built from others does not fit them."""
    folder = Path(str(kernels.__file__)).parent
    texts = [path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def kernel_from_json(data: Mapping[str, Any]) -> Kernel:
    """The inverse of `Kernel.data`, through JSON."""
    pairs = {word: tuple(map(tuple, data[word])) for word in ("signature", "constants")}
    return Kernel(**{**data, **pairs, "aligned": tuple(data["aligned"])})
