"""Devices that ONNX Runtime runs on, as data: providers, formats, shapes (imports no torch).

A provider takes the nodes that it has kernels for and leaves the rest to the next, so a graph runs
on any of them; the rows say on which it computes in low bits what it was quantized for. Sources:
the providers' pages in ONNX Runtime's documentation; CUDA's provider has no kernels for QLinearConv
(microsoft/onnxruntime#24807), and Core ML's none for quantized layers.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from effuse.errors import BackendError, ConfigError

CPU = "CPUExecutionProvider"
HALF = "-fp16"  # end of the name of a target whose floats are float16
BRAIN = "-bf16"  # the same of bfloat16
WHEEL = "pip install onnxruntime"


@dataclass(frozen=True)
class Device:
    """What a build must know of a device that ONNX Runtime runs on.

    Args:
        name: the target's name.
        providers: execution providers in order of preference, each with its options.
        install: what brings the first of them.
        formats: what it computes in low bits; static activations are uint8, weights signed.
        stored: formats of which only the file is small: weights are float once a session starts.
        ranges: when ranges of activations may be found: `static`, `step`, `dynamic`.
        contrib: whether it has ONNX Runtime's own operators; otherwise standard ones are written.
        fixed: whether every size must be known when compiling.
        half: whether floats are float16.
        settings: entries of the session's configuration.
        plugin: a module that holds the first provider as a library to register, where the wheel of
            onnxruntime lacks it.
    """

    name: str
    providers: tuple[tuple[str, Mapping[str, str]], ...] = ((CPU, {}),)
    install: str = WHEEL
    formats: tuple[str, ...] = ("w8a8", "w4a16", "w4a8")
    stored: tuple[str, ...] = ("w8a16",)
    ranges: tuple[str, ...] = ("static", "step", "dynamic")
    contrib: bool = True
    fixed: bool = False
    half: bool = False
    settings: Mapping[str, str] = field(default_factory=dict)
    plugin: str = ""

    @property
    def is_cpu(self) -> bool:
        """Whether the CPU's own provider comes first."""
        return self.providers[0][0] == CPU


# Products of uint8 and int8 are summed in 16 bits without VNNI, and saturate; this is exact there.
AVX2 = {"session.x64quantprecision": "1"}
ARM = Device("cpu-arm64")
CUDA = Device(
    "cuda",
    (("CUDAExecutionProvider", {"use_tf32": "0"}), (CPU, {})),
    "pip install onnxruntime-gpu",
    formats=("w4a16",),
)
QNN = Device(
    "qnn",  # the Hexagon processor; linear layers of w8a8, whose outputs are float, stay on the CPU
    # float32 runs in float16 by default; as an option, that wants the chip's number (soc_model) too
    (("QNNExecutionProvider", {"backend_type": "htp"}), (CPU, {})),
    "pip install onnxruntime-qnn",
    formats=("w8a8",),
    ranges=("static",),
    contrib=False,
    fixed=True,
    plugin="onnxruntime_qnn",
)
CORE_ML = Device(
    "coreml",
    (
        ("CoreMLExecutionProvider", {"ModelFormat": "MLProgram", "RequireStaticInputShapes": "1"}),
        (CPU, {}),
    ),
    "pip install onnxruntime, on macOS; the pod onnxruntime-objc on iOS",
    formats=(),
    ranges=(),
    contrib=False,
    fixed=True,
)
XNNPACK = Device(
    "xnnpack",
    (("XnnpackExecutionProvider", {}), (CPU, {})),
    "the packages onnxruntime-android and onnxruntime-objc, or a build with --use_xnnpack",
    formats=("w8a8",),
    ranges=("static",),
    contrib=False,
    fixed=True,
)

DEVICES: Mapping[str, Device] = {
    row.name: row
    for row in (
        Device("cpu"),
        Device("cpu-avx2", settings=AVX2),
        Device("cpu-avx512vnni"),
        ARM,
        replace(ARM, name="cpu-neon"),
        replace(ARM, name="cpu-arm64" + HALF, half=True),
        CUDA,
        replace(CUDA, name="cuda" + HALF, half=True),
        QNN,
        replace(QNN, name="qnn" + HALF, half=True),
        CORE_ML,
        replace(CORE_ML, name="coreml" + HALF, half=True),
        XNNPACK,
    )
}


def device_of(target: str | None) -> Device:
    """The row of a target, the plain CPU for a target without one."""
    return DEVICES.get(target or "cpu", DEVICES["cpu"])


def check_formats(target: str | None, formats: Iterable[str], ranges: Iterable[str]) -> None:
    """See that a device computes the formats in low bits, or stores them so.

    What a CPU makes of a format that is spelled out is for the lowering to say.

    Raises:
        ConfigError: it would only simulate one; the message names the nearest that it has.
    """
    device = DEVICES.get(target or "")
    if device is None:
        return
    for name in formats:
        spelled = ":" in name and device.is_cpu
        if name not in (*device.formats, *device.stored, "float") and not spelled:
            raise ConfigError(
                f"target: {target!r} would only simulate {name!r}; {_way_out(device, name)}"
            )
    for when in ranges:
        if when not in (*device.ranges, "format"):
            known = ", ".join(map(repr, device.ranges)) or "none"
            raise ConfigError(
                f"target: {target!r} has no layers whose ranges are {when!r} (it has: {known}); "
                "leave activations='format', or choose another target"
            )


def _way_out(device: Device, wanted: str) -> str:
    if not device.formats:
        return (
            f"it computes nothing in low bits: leave Quantize out (and see the target "
            f"{device.name.removesuffix(HALF) + HALF!r}), or keep a small file with "
            f"{device.stored[0]!r}"
        )
    near = sorted(device.formats, key=lambda name: name[:2] != wanted[:2])  # as many weight bits
    return (
        f"the nearest that it computes in low bits is {near[0]!r} (all: "
        f"{', '.join(device.formats)}; small in the file alone: {', '.join(device.stored)})"
    )


def check_sizes(target: str | None, open_sizes: Sequence[str]) -> None:
    """See that a device that wants fixed sizes gets them.

    Raises:
        ConfigError: some are left open.
    """
    if device_of(target).fixed and open_sizes:
        raise ConfigError(
            f"target: {target!r} takes fixed sizes only, and dynamic= leaves {list(open_sizes)} "
            "open; list the sizes to build in shapes=[…]"
        )


def missing(device: Device) -> str | None:
    """Why onnxruntime here does not run a device's first provider, or None."""
    import onnxruntime

    wanted, known = device.providers[0][0], onnxruntime.get_available_providers()
    if wanted in known or (device.plugin and _plugin(device) is not None):
        return None
    return (
        f"target {device.name!r} needs {wanted}, and onnxruntime {onnxruntime.__version__} here "
        f"has {', '.join(known)}; get it by: {device.install}; or ask for the CPU: "
        f"effuse.load(path, providers=[{CPU!r}]), effuse run --cpu"
    )


def _plugin(device: Device) -> Any:
    """The module with the provider's library, or None."""
    found = importlib.util.find_spec(device.plugin)
    return None if found is None else importlib.import_module(device.plugin)


def plugin_devices(device: Device) -> list[Any]:
    """Devices of a provider that comes as a library of its own, which is registered once.

    Raises:
        BackendError: the library finds no such device in this machine.
    """
    import onnxruntime

    name = device.providers[0][0]
    if not device.plugin or _plugin(device) is None:
        return []  # built in: it goes by its name
    found = [each for each in onnxruntime.get_ep_devices() if each.ep_name == name]
    if not found:
        library = _plugin(device).get_library_path()
        onnxruntime.register_execution_provider_library(name, library)
        found = [each for each in onnxruntime.get_ep_devices() if each.ep_name == name]
    if not found:
        raise BackendError(f"target {device.name!r}: {device.plugin} finds no device for {name}")
    return found
