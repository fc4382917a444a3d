"""Builds TensorRT engines from the ONNX files of an effuse artifact.

    python build_engines.py [folder of the artifact] [--out folder] [options]

Needs Python 3.9, tensorrt 10 or 11, and the GPU that the engines are for; nothing else. The same
code builds them inside effuse. An engine belongs to its ONNX file, to one kind of GPU and to one
version of TensorRT; its name says which.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import tensorrt as trt

FORMAT = 1
TABLE = "engines.json"
TIMING = "timing.cache"
MEGABYTE = 1 << 20


class Option(NamedTuple):
    """A builder flag, by the option's name; what trtexec is told with it, and without; what for."""

    name: str
    flag: str
    trtexec: str
    without: str
    help: str


OPTIONS = (
    Option(
        "tf32", "TF32", "", "--noTF32",
        "let float32 products have 10-bit mantissas: faster, and exact to 60 dB only",
    ),
    Option(
        "weight-streaming", "WEIGHT_STREAMING", "--allowWeightStreaming", "",
        "let weights stay in the host's memory, as far as the budget at run time says",
    ),
    Option(
        "strip", "STRIP_PLAN", "--stripWeights", "",
        "leave the weights out of the engine: they are read from the artifact when it is loaded",
    ),
    Option(
        "version-compatible", "VERSION_COMPATIBLE", "--versionCompatible", "",
        "let later releases of the same major version run the engine",
    ),
)  # fmt: skip
FLAGS = {option.name: option.flag for option in OPTIONS}
REFIT_FLAG, REFIT_WORD = "REFIT_INDIVIDUAL", "--refit"  # where LoRAs can be loaded


class Settings(NamedTuple):
    """How engines are built.

    Args:
        options: names of `OPTIONS` that are on.
        workspace: the most scratch memory, in megabytes; None: all that there is.
        timing_cache: a file of measurements, which later builds need not repeat.
    """

    options: tuple[str, ...] = ()
    workspace: int | None = None
    timing_cache: Path | None = None


DEFAULTS = Settings()


class BuildError(Exception):
    """An engine cannot be built; the message says why."""


def read_table(folder: Path) -> dict[str, Any]:
    """The table that effuse wrote: by part, its ONNX file and how an engine is built of it.

    Raises:
        BuildError: there is none, or a newer effuse wrote it.
    """
    try:
        table: dict[str, Any] = json.loads((folder / TABLE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BuildError(f"{folder / TABLE}: missing or damaged ({error})") from None
    if table.get("format") != FORMAT:
        raise BuildError(f"{TABLE}: format {table.get('format')}, and this reads {FORMAT}")
    return table


def gpu_name() -> str:
    """The product's name of the first GPU, from CUDA's driver.

    Raises:
        BuildError: there is no driver, or no GPU.
    """
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError as error:
        raise BuildError(f"CUDA's driver cannot be loaded: {error}") from None
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetName(name, len(name), device)
    )
    if failed:
        raise BuildError(f"CUDA's driver finds no GPU (error {failed})")
    return name.value.decode()


def engine_name(part: str, digest: str, gpu: str, version: str) -> str:
    """The file of a part's engine: what it is of, and what it runs on."""
    chip = re.sub(r"[^A-Za-z0-9]+", "-", gpu)
    return f"{part}.{digest[:16]}.{chip}.trt{version}.engine"


def command(part: str, table: Mapping[str, Any], settings: Settings = DEFAULTS) -> str:
    """The line for trtexec that builds a part's engine, in the folder of the artifact."""
    row = table["parts"][part]
    words = [
        "trtexec", f"--onnx={row['onnx']}", f"--saveEngine={part}.engine", "--stronglyTyped",
        f"--timingCacheFile={TIMING}", REFIT_WORD if row["refit"] else "",
    ]  # fmt: skip
    words += [o.trtexec if o.name in settings.options else o.without for o in OPTIONS]
    if settings.workspace is not None:
        words.append(f"--memPoolSize=workspace:{settings.workspace}M")
    for place, kind in enumerate(("min", "opt", "max")):
        sizes = sorted(row["profile"].items())
        shapes = [f"{name}:{'x'.join(map(str, each[place]))}" for name, each in sizes]
        words.append(f"--{kind}Shapes={','.join(shapes)}" if shapes else "")
    return " ".join(filter(None, words))


def build(
    folder: Path, part: str, settings: Settings = DEFAULTS, logger: trt.ILogger | None = None
) -> bytes:
    """The engine of one part of the artifact in a folder, serialized.

    Raises:
        BuildError: TensorRT takes the model, or one of the settings, not.
    """
    import tensorrt as trt

    logger = logger or trt.Logger(trt.Logger.WARNING)
    row = read_table(folder)["parts"][part]
    builder = trt.Builder(logger)
    strongly_typed = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED  # all that 11 knows
    network = builder.create_network(1 << int(strongly_typed))
    parse(network, folder / row["onnx"], logger)
    config = builder.create_builder_config()
    configure(config, settings)
    add_profile(builder, config, row["profile"])
    mark_refittable(network, config, [each["initializer"] for each in row["refit"].values()])
    cache = attach_timing_cache(config, settings.timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise BuildError(f"{row['onnx']}: TensorRT built no engine; its messages say why")
    if settings.timing_cache is not None:
        write(settings.timing_cache, bytes(cache.serialize()))
    return bytes(engine)


def parse(network: trt.INetworkDefinition, path: Path, logger: trt.ILogger) -> None:
    """Read an ONNX file, and the weights beside it, into a network.

    Raises:
        BuildError: the parser has no layer for a node.
    """
    import tensorrt as trt

    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        said = "; ".join(str(parser.get_error(each)) for each in range(parser.num_errors))
        raise BuildError(f"{path.name}: {said}")


def configure(config: trt.IBuilderConfig, settings: Settings) -> None:
    """Set the flags that were asked for, and clear the others."""
    import tensorrt as trt

    for name, flag in FLAGS.items():
        change = config.set_flag if name in settings.options else config.clear_flag
        change(getattr(trt.BuilderFlag, flag))
    if settings.workspace is not None:
        size = settings.workspace * MEGABYTE
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, size)


def add_profile(
    builder: trt.Builder, config: trt.IBuilderConfig, sizes: Mapping[str, Sequence[Sequence[int]]]
) -> None:
    """Tell the least, usual and greatest sizes of the inputs that leave them open.

    Raises:
        BuildError: they contradict each other.
    """
    import tensorrt as trt

    if not sizes:
        return
    profile = builder.create_optimization_profile()
    for name, (least, usual, greatest) in sorted(sizes.items()):
        profile.set_shape(name, *(trt.Dims(list(each)) for each in (least, usual, greatest)))
    if config.add_optimization_profile(profile) < 0:
        raise BuildError(f"the sizes of {', '.join(sorted(sizes))} are no optimization profile")


def mark_refittable(
    network: trt.INetworkDefinition, config: trt.IBuilderConfig, names: Sequence[str]
) -> None:
    """Let an engine take other values of these initializers.

    Raises:
        BuildError: the network has no such initializer.
    """
    import tensorrt as trt

    if names:
        config.set_flag(getattr(trt.BuilderFlag, REFIT_FLAG))
    for name in names:
        if not network.mark_weights_refittable(name):
            raise BuildError(f"the network has no weights {name!r} to take others for")


def attach_timing_cache(config: trt.IBuilderConfig, path: Path | None) -> trt.ITimingCache:
    """The measurements of earlier builds, which this one adds to."""
    data = path.read_bytes() if path is not None and path.exists() else b""
    cache = config.create_timing_cache(data)
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_bytes(data)
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Build the engines that are missing."""
    given = read_arguments(arguments)
    import tensorrt as trt

    out: Path = given.out or given.folder
    on = tuple(each.name for each in OPTIONS if getattr(given, each.name.replace("-", "_")))
    settings = Settings(on, given.workspace, out / TIMING)
    logger = trt.Logger(trt.Logger.VERBOSE if given.verbose else trt.Logger.WARNING)
    gpu = gpu_name()
    for part, row in read_table(given.folder)["parts"].items():
        path = out / engine_name(part, row["digest"], gpu, trt.__version__)
        if given.force or not path.exists():
            write(path, build(given.folder, part, settings, logger))
        print(f"{path}  {path.stat().st_size / MEGABYTE:.1f} MB")
    return 0


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description="Build the TensorRT engines of an artifact.")
    here = Path(__file__).resolve().parent
    parser.add_argument("folder", nargs="?", type=Path, default=here, help="the artifact's")
    parser.add_argument("--out", type=Path, help="where engines go; else beside the ONNX files")
    parser.add_argument("--workspace", type=int, metavar="MB", help="the most scratch memory")
    parser.add_argument("--force", action="store_true", help="build engines that are there too")
    parser.add_argument("--verbose", action="store_true", help="let TensorRT tell all")
    for option in OPTIONS:
        parser.add_argument(f"--{option.name}", action="store_true", help=option.help)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BuildError as error:
        sys.exit(f"error: {error}")
    except ImportError as error:
        sys.exit(f"error: TensorRT cannot be loaded ({error}); run: pip install tensorrt")
