"""Runs engines on torch's CUDA tensors: one for each part, all with one piece of scratch memory.

An engine's own weights are its alone: engines of one artifact share them on disk (stripped engines
take theirs from the artifact's one file), not on the GPU. LoRAs are refits: an engine built for
them has room for their ranks, and takes other numbers while it stays loaded.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from effuse.backends.tensorrt_builder import (
    TIMING,
    BuildError,
    Settings,
    build,
    engine_name,
    gpu_name,
    read_table,
    write,
)
from effuse.backends.triton import DeviceArrays
from effuse.errors import ArtifactError, BackendError, InputError
from effuse.plan import PartSpec, ProgramSpec
from effuse.runtime import Session

if TYPE_CHECKING:
    import tensorrt as trt

log = logging.getLogger(__name__)

DTYPES = {
    "FLOAT": torch.float32, "HALF": torch.float16, "BF16": torch.bfloat16, "INT8": torch.int8,
    "UINT8": torch.uint8, "INT32": torch.int32, "INT64": torch.int64, "BOOL": torch.bool,
}  # fmt: skip
WORDS = {dtype: word for word, dtype in DTYPES.items()}


def open_session(spec: ProgramSpec, folder: Path) -> Session:
    """A Session over the engines of the artifact in `folder`; those that are missing are built.

    Raises:
        BackendError: an engine cannot be built or opened.
        ArtifactError: the files from which it is built are gone.
    """
    import tensorrt as trt

    logger = trt.Logger(trt.Logger.WARNING)
    runtime = trt.Runtime(logger)
    table = read_table(folder)["parts"]
    parts = {part.name: (part, table[part.name]) for part in spec.parts}
    engines = {}
    for name, (_, row) in parts.items():
        plan = engine_file(name, row, folder).read_bytes()
        engines[name] = opened(runtime, plan, folder / row["onnx"], logger)
    size = max(engine.device_memory_size_v2 for engine in engines.values())
    shared = Shared(torch.empty(max(size, 1), dtype=torch.uint8, device="cuda"))
    runs = {}
    for name, (part, row) in parts.items():
        factors = Factors(row["refit"], folder, trt.Refitter(engines[name], logger))
        runs[name] = EngineRun(part, engines[name], shared, factors if row["refit"] else None)
    return Session(spec, runs, DeviceArrays(torch.device("cuda")))


# ---- engines -------------------------------------------------------------------------------------


def engine_file(part: str, row: Mapping[str, Any], folder: Path) -> Path:
    """The engine of a part for the GPU and the TensorRT that are here; it is built if need be.

    Raises:
        BackendError: it cannot be built.
        ArtifactError: there are engines of something else only, and no ONNX file to build from.
    """
    import tensorrt as trt

    name = engine_name(part, row["digest"], gpu_name(), trt.__version__)
    cache = cache_folder()
    for place in (folder, cache):
        if (place / name).is_file():
            return place / name
    others = sorted(each.name for each in folder.glob(f"{part}.*.engine"))
    if not (folder / row["onnx"]).is_file():
        raise ArtifactError(
            f"{row['onnx']} is missing, and so is {name}, the engine for this GPU and TensorRT; "
            f"there is {', '.join(others) or 'none'}; copy the artifact again"
        )
    if others:
        log.warning("%s is not for this GPU and TensorRT: %s is built", ", ".join(others), name)
    cache.mkdir(parents=True, exist_ok=True)
    log.info("%s is built, which takes minutes", name)
    try:
        write(cache / name, build(folder, part, Settings(timing_cache=cache / TIMING)))
    except BuildError as error:
        raise BackendError(f"tensorrt: {error}") from error
    return cache / name


def cache_folder() -> Path:
    """Where engines that were built here are kept."""
    given = os.environ.get("EFFUSE_CACHE") or os.environ.get("XDG_CACHE_HOME")
    return (Path(given) if given else Path.home() / ".cache") / "effuse" / "tensorrt"


def opened(runtime: trt.Runtime, plan: bytes, model: Path, logger: trt.ILogger) -> trt.ICudaEngine:
    """An engine from its file, with its weights.

    Raises:
        BackendError: it is not for this GPU and TensorRT, or damaged.
    """
    import tensorrt as trt

    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendError(
            f"tensorrt: the engine of {model.name} cannot be opened: it is damaged, or of another "
            "GPU or TensorRT; delete it, and it is built again"
        )
    if engine.refittable:
        refitter = trt.Refitter(engine, logger)
        if refitter.get_missing_weights():  # stripped
            parser = trt.OnnxParserRefitter(refitter, logger)
            if not parser.refit_from_file(str(model)) or not refitter.refit_cuda_engine():
                raise BackendError(f"tensorrt: {model.name} does not fill its stripped engine")
    if engine.streamable_weights_size:
        engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
    return engine


# ---- runs ----------------------------------------------------------------------------------------


class Shared:
    """What the runs of a session share: scratch memory, and the stream on which they take turns."""

    def __init__(self, scratch: torch.Tensor) -> None:
        self.scratch = scratch
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]


class EngineRun:
    """Runs one part's engine."""

    def __init__(
        self, part: PartSpec, engine: trt.ICudaEngine, shared: Shared, factors: Factors | None
    ) -> None:
        import tensorrt as trt

        self._part = part
        self._engine = engine
        self._shared = shared
        self._factors = factors
        self._context = engine.create_execution_context(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        self._context.set_device_memory(shared.scratch.data_ptr(), shared.scratch.numel())
        names = [engine.get_tensor_name(each) for each in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._places = {n: _place(engine.get_tensor_location(n)) for n in inputs}

    def __call__(self, values: Mapping[str, Any]) -> Sequence[torch.Tensor]:
        """The part's outputs.

        Raises:
            InputError: sizes that the engine's profile leaves out.
            BackendError: the engine refuses to run.
        """
        if self._factors is not None:
            self._factors.load(values)
        given = {n: values[n].to(place).contiguous() for n, place in self._places.items()}
        for name, value in given.items():
            if not self._context.set_input_shape(name, tuple(value.shape)):
                raise InputError(f"{name}: the engine does not take {tuple(value.shape)}")
            self._context.set_tensor_address(name, value.data_ptr())
        found = [self._result(name) for name in self._part.outputs]
        self._execute([*given.values(), *found])
        return found

    def _result(self, name: str) -> torch.Tensor:
        """An empty tensor for an output, bound to it."""
        dtype = DTYPES[self._engine.get_tensor_dtype(name).name]
        sizes = self._context.get_tensor_shape(name)
        shape = [sizes[each] for each in range(len(sizes))]
        result = torch.empty(shape, dtype=dtype, device="cuda")
        self._context.set_tensor_address(name, result.data_ptr())
        return result

    def _execute(self, tensors: Sequence[torch.Tensor]) -> None:
        stream, caller = self._shared.stream, torch.cuda.current_stream()
        stream.wait_stream(caller)
        if not self._context.execute_async_v3(stream.cuda_stream):
            raise BackendError(f"tensorrt: the engine of {self._part.name!r} did not run")
        caller.wait_stream(stream)
        for tensor in tensors:
            if tensor.is_cuda:
                tensor.record_stream(stream)


def _place(location: trt.TensorLocation) -> str:
    """Where an input has to lie: shapes are read on the host."""
    return "cpu" if location.name == "HOST" else "cuda"


# ---- low-rank factors ----------------------------------------------------------------------------


class Factors:
    """The low-rank factors of one engine: as they are stored, or as LoRAs made them."""

    def __init__(
        self, rows: Mapping[str, Mapping[str, Any]], folder: Path, refitter: trt.Refitter
    ) -> None:
        self._rows = rows
        self._folder = folder
        self._refitter = refitter
        self._loaded: dict[str, Any] = dict.fromkeys(rows)  # None: as stored

    def load(self, values: Mapping[str, Any]) -> None:
        """Let the engine compute with the factors in `values`, and with the stored ones of others.

        Raises:
            BackendError: the engine refuses them.
        """
        import tensorrt as trt

        wanted = {name: values.get(name) for name in self._rows}
        changed = [name for name in wanted if wanted[name] is not self._loaded[name]]
        if not changed:
            return
        torch.cuda.synchronize()  # no engine may be at work while it is refitted
        kept = {name: self._fitted(name, wanted[name]) for name in changed}
        for name, factor in kept.items():
            kind = getattr(trt.DataType, WORDS[factor.dtype])
            weights = trt.Weights(kind, factor.data_ptr(), factor.numel())
            if not self._refitter.set_named_weights(self._rows[name]["initializer"], weights):
                raise BackendError(f"tensorrt: the engine does not take the factor {name!r}")
        if not self._refitter.refit_cuda_engine():
            missing = ", ".join(self._refitter.get_missing_weights())
            raise BackendError(f"tensorrt: the engine was not refitted; it misses {missing}")
        self._loaded = wanted

    def _fitted(self, name: str, factor: torch.Tensor | None) -> torch.Tensor:
        if factor is None:
            with safe_open(self._folder / "weights.safetensors", "pt") as file:
                factor = file.get_tensor(name)
        return fitted(factor, self._rows[name])


def fitted(factor: torch.Tensor, row: Mapping[str, Any]) -> torch.Tensor:
    """A factor as an engine stores it: as its row says, with zeros up to the room that there is.

    Raises:
        InputError: its rank is greater than that.
    """
    laid = factor.cpu().t() if row["transposed"] else factor.cpu()
    shape, axis = list(laid.shape), row["axis"]
    room = row["shape"][axis] - shape[axis]
    if room < 0:
        raise InputError(
            f"{row['initializer']}: rank {shape[axis]}, and the engine has room for "
            f"{row['shape'][axis]}; compile with a greater max_rank"
        )
    shape[axis] = room
    whole = torch.cat([laid, laid.new_zeros(shape)], axis)
    return whole.to(getattr(torch, row["dtype"])).contiguous()
