"""What a program can be built for, present or not: devices of ONNX Runtime, GPUs by their chip.

Facts about chips are rows of `GPUS`. A GPU runs what was built for its own compute capability; the
low-bit arithmetic of tensor cores differs by generation: int8 from sm_80, e4m3 from sm_89.
"""

from __future__ import annotations

from dataclasses import dataclass

from effuse.devices import DEVICES
from effuse.errors import ConfigError, nearest


@dataclass(frozen=True)
class Gpu:
    """A chip as the compiler of kernels knows it.

    Args:
        name: NVIDIA's name of the architecture, `sm_` and the compute capability.
        chips: products, for people.
        products: the instruction that multiplies matrices.
        shared: bytes of shared memory that one program may have.
        e4m3: whether tensor cores multiply 8-bit floats.
    """

    name: str
    chips: str
    products: str
    shared: int
    e4m3: bool

    @property
    def capability(self) -> int:
        """The compute capability as one number: 90 for 9.0."""
        return int(self.name.removeprefix("sm_"))


GPUS = {
    row.name: row
    for row in (
        Gpu("sm_80", "A100, A30", "mma", 163 << 10, False),
        Gpu("sm_86", "RTX 3090, A10, A40", "mma", 99 << 10, False),
        Gpu("sm_87", "Jetson Orin", "mma", 163 << 10, False),
        Gpu("sm_89", "RTX 4090, L4, L40", "mma", 99 << 10, True),
        Gpu("sm_90", "H100, H200", "wgmma", 227 << 10, True),
        Gpu("sm_100", "B200", "tcgen05", 227 << 10, True),
        Gpu("sm_120", "RTX 5090", "mma", 99 << 10, True),
    )
}
TENSORRT = ("tensorrt-10", "tensorrt-11", "tensorrt-10-fp16", "tensorrt-11-fp16")
OPENVINO = ("openvino-bf16",)  # without a target it computes in float32
TARGETS = (*DEVICES, *GPUS, *TENSORRT, *OPENVINO)


def check_target(name: str) -> None:
    """See that a target is one that effuse builds for.

    Raises:
        ConfigError: it is not; it names the nearest that is.
    """
    if name in TARGETS:
        return
    number = name.removeprefix("sm_")
    if name.startswith("sm_") and number.isdigit():
        raise ConfigError(f"target: {name!r}: {_no_gpu(int(number))}")
    raise ConfigError(f"target: {name!r} is not in this version{nearest(name, TARGETS)}")


def _no_gpu(number: int) -> str:
    known = [gpu.capability for gpu in GPUS.values()]
    closest = min(known, key=lambda each: abs(each - number))
    if number < min(known):
        return (
            "too old: the tensor cores' int8 products that the kernels use begin with sm_80; the "
            f"nearest that works is sm_{closest}; for older GPUs build with backend='onnx'"
        )
    return f"not in this version; the nearest is sm_{closest} (known: {', '.join(GPUS)})"


def check_backend(target: str | None, backend: str) -> None:
    """See that target and back end go together.

    Raises:
        ConfigError: a GPU's chip for a back end of other devices, or the other way round.
    """
    device = DEVICES.get(target or "")
    if device is not None and backend == "triton":
        kind = "a CPU" if device.is_cpu else "for ONNX Runtime"
        raise ConfigError(f"target: {target!r} is {kind}; backend='triton' builds for {list(GPUS)}")
    if device is not None and backend in ("reference", "openvino") and not device.is_cpu:
        raise ConfigError(f"target: {target!r} is for ONNX Runtime; set backend='onnx'")
    if target in TENSORRT and backend != "tensorrt":
        raise ConfigError(f"target: {target!r} is for TensorRT; set backend='tensorrt'")
    if device is not None and backend == "tensorrt":
        known = [*TENSORRT, *GPUS]
        raise ConfigError(f"target: {target!r} is not one of backend='tensorrt', which has {known}")
    if target in OPENVINO and backend != "openvino":
        raise ConfigError(f"target: {target!r} is for OpenVINO; set backend='openvino'")
    if target in GPUS and backend not in ("triton", "tensorrt", "auto"):
        raise ConfigError(
            f"target: {target!r} is a GPU, which backend={backend!r} does not build for; set "
            "backend='triton' or 'tensorrt'"
        )
