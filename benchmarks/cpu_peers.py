"""The rows of the CPU benchmark: how each peer, and effuse, builds a network and runs it.

`build` makes files in a process that ends; `load` opens them in the process that is timed. What
works on modules has no `build`. Libraries are imported where they are used, so that a process's
memory is that of its own row.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]
BASELINE = "ORT fp32"
OURS = "effuse"


@dataclass(frozen=True)
class Job:
    """What a child process is to do; goes to it as JSON."""

    row: str
    network: str
    threads: int
    shared: str  # folder of the inputs
    folder: str  # of this row's files
    timesteps: tuple[int, ...] | None
    transformer: bool
    config: str = ""  # of effuse

    def place(self, name: str) -> Path:
        """A file of this row."""
        return Path(self.folder) / name

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def calibration(self) -> list[dict[str, np.ndarray]]:
        """The inputs of calibration."""
        return read_inputs(Path(self.shared) / "calibration.npz")

    @property
    def judged(self) -> list[dict[str, np.ndarray]]:
        """The inputs that are timed and compared."""
        return read_inputs(Path(self.shared) / "judged.npz")


@dataclass(frozen=True)
class Loaded:
    """What is timed; its size (bytes) where it is no file."""

    run: Run
    remark: str = ""
    size: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    load: Callable[[Job, Any], Loaded]  # the module is None where the row has a build
    build: Callable[[Job, Any], str] | None = None  # gives a remark
    imports: tuple[str, ...] = ()  # of `build`, imported before its clock starts
    runtime: tuple[str, ...] = ()  # of `load`, likewise
    config: str = ""


def read_inputs(path: Path) -> list[dict[str, np.ndarray]]:
    """Inputs from the names "number/input"."""
    found: list[dict[str, np.ndarray]] = []
    with np.load(path) as file:
        for key in file:
            number, name = key.split("/")
            found += [{} for _ in range(int(number) + 1 - len(found))]
            found[int(number)][name] = file[key]
    return found


def write_inputs(path: Path, inputs: Sequence[Arrays]) -> None:
    """The reverse of `read_inputs`."""
    named = {f"{n}/{name}": value for n, each in enumerate(inputs) for name, value in each.items()}
    np.savez(path, **named)


# ---- torch ---------------------------------------------------------------------------------------


def in_torch(module: Any, names: Sequence[str]) -> Run:
    """Arrays in, array out."""
    import torch

    def run(inputs: Arrays) -> np.ndarray:
        with torch.no_grad():
            found: np.ndarray = module(*(torch.from_numpy(inputs[name]) for name in names)).numpy()
        return found

    return run


def tensors(job: Job) -> list[tuple[Any, ...]]:
    """The inputs of calibration as tensors by place."""
    import torch

    return [tuple(map(torch.from_numpy, each.values())) for each in job.calibration]


def stored(module: Any) -> int:
    """Bytes of the parameters and buffers."""
    return sum(
        each.numel() * each.element_size() for each in (*module.parameters(), *module.buffers())
    )


def eager(job: Job, plain: Any) -> Loaded:
    """The module itself."""
    return Loaded(in_torch(plain, plain.names), size=stored(plain))


def inductor(job: Job, plain: Any) -> Loaded:
    """torch.compile with its defaults."""
    import torch

    return Loaded(in_torch(torch.compile(plain), plain.names), size=stored(plain))


def ao_static(job: Job, plain: Any) -> Loaded:
    """torchao's x86 flow: export, prepare, calibrate, convert, torch.compile with freezing."""
    import torch
    from torch._inductor import config
    from torchao.quantization.pt2e import move_exported_model_to_eval
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    calibration = tensors(job)
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        exported = torch.export.export(plain, calibration[0]).module()
        prepared = prepare_pt2e(exported, quantizer)
        for each in calibration:
            prepared(*each)
        converted = move_exported_model_to_eval(convert_pt2e(prepared))
    config.freezing = True
    return Loaded(in_torch(torch.compile(converted), plain.names), size=stored(converted))


def ao_dynamic(job: Job, plain: Any) -> Loaded:
    """torchao's dynamic int8 linears, torch.compile."""
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    linears = sum(isinstance(each, torch.nn.Linear) for each in plain.modules())
    quantize_(plain, Int8DynamicActivationInt8WeightConfig())
    remark = f"{linears} linears in 8 bits; convolutions stay float"
    return Loaded(in_torch(torch.compile(plain), plain.names), remark, stored(plain))


# ---- ONNX Runtime --------------------------------------------------------------------------------


def export(job: Job, plain: Any, name: str = "model.onnx") -> Path:
    """torch.onnx.export, the default of torch 2.9 and later: from torch.export, optimised."""
    import torch

    path = job.place(name)
    torch.onnx.export(
        plain, tensors(job)[0], path, input_names=list(plain.names), dynamo=True, verbose=False
    )
    return path


def build_ort(job: Job, plain: Any) -> str:
    """The float model."""
    export(job, plain)
    return ""


class Reader:
    """Inputs of calibration, as onnxruntime.quantization asks for them."""

    def __init__(self, inputs: Iterable[Arrays]) -> None:
        self.inputs = iter(inputs)

    def get_next(self) -> Arrays | None:
        return next(self.inputs, None)


def build_ort_static(job: Job, plain: Any) -> str:
    """quantize_static with its defaults (QDQ, uint8 activations, int8 weights per tensor)."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    CalibrationDataReader.register(Reader)
    source = export(job, plain, "float.onnx")
    prepared, remark = preprocess(source, job.place("prepared.onnx"))
    rename_constants(prepared)
    quantize_static(prepared, job.place("model.onnx"), Reader(job.calibration))
    for path in (*job.place("").glob("float.onnx*"), *job.place("").glob("prepared.onnx*")):
        path.unlink()
    return remark


def preprocess(source: Path, target: Path) -> tuple[Path, str]:
    """onnxruntime's own preprocessing, without symbolic shapes where those fail."""
    from onnxruntime.quantization.preprocess import quant_pre_process

    try:
        quant_pre_process(source, target)
    except Exception as error:
        quant_pre_process(source, target, skip_symbolic_shape=True)
        return target, f"preprocessed without symbolic shapes ({first_line(error)})"
    return target, "preprocessed"


def rename_constants(path: Path) -> None:
    """Let no stored name followed by a digit be another name.

    quantize_static copies a shared bias `val_46` as `val_466`, and the exporter's names have both:
    on UNets it then fails ("Quantization parameter shared mode is not supported for weight yet").
    """
    import onnx

    model = onnx.load(path)
    names = {each.name: f"{each.name}_" for each in model.graph.initializer}
    for each in model.graph.initializer:
        each.name = names[each.name]
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    path.unlink()
    for part in path.parent.glob(f"{path.name}.data"):
        part.unlink()
    onnx.save(model, path)


def load_ort(job: Job, _: Any) -> Loaded:
    """A session with all optimisations, which is the default."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    path = str(job.place("model.onnx"))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = {item.name for item in session.get_inputs()}

    def run(inputs: Arrays) -> np.ndarray:
        feed = {name: value for name, value in inputs.items() if name in names}
        found: np.ndarray = session.run(None, feed)[0]
        return found

    return Loaded(run)


# ---- OpenVINO ------------------------------------------------------------------------------------


def to_openvino(job: Job, plain: Any) -> Any:
    """OpenVINO's model of the exported ONNX, shapes fixed."""
    import openvino

    return openvino.convert_model(export(job, plain, "source.onnx"))


def build_openvino(job: Job, plain: Any, half: bool = True) -> str:
    """Weights as save_model writes them by default, in half precision, or in single."""
    save_openvino(job, to_openvino(job, plain), half)
    return ""


def build_nncf(job: Job, plain: Any) -> str:
    """nncf.quantize with its defaults, told if the network is a transformer."""
    import nncf

    calibration = job.calibration
    kind = nncf.ModelType.TRANSFORMER if job.transformer else None
    found = nncf.quantize(
        to_openvino(job, plain), nncf.Dataset(calibration),
        subset_size=len(calibration), model_type=kind,
    )  # fmt: skip
    save_openvino(job, found, True)
    return "model_type=TRANSFORMER" if job.transformer else ""


def save_openvino(job: Job, model: Any, half: bool) -> None:
    """The model alone in the row's folder."""
    import openvino

    openvino.save_model(model, job.place("model.xml"), compress_to_fp16=half)
    for path in job.place("").glob("source.onnx*"):
        path.unlink()


def load_openvino(job: Job, _: Any, precision: str = "bf16") -> Loaded:
    """One stream, that many threads, this inference precision."""
    import openvino

    core = openvino.Core()
    able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    settings = {
        "INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": job.threads,
        "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
    }  # fmt: skip
    compiled = core.compile_model(str(job.place("model.xml")), "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    request = compiled.create_infer_request()
    names = {name for item in compiled.inputs for name in item.names}

    def run(inputs: Arrays) -> np.ndarray:
        request.infer({name: value for name, value in inputs.items() if name in names})
        return np.array(request.get_output_tensor(0).data, dtype=np.float32)

    lacks = "" if precision == "f32" or "BF16" in able else "; the processor has no bf16"
    return Loaded(run, f"computes in {used} outside int8{lacks}" if able else used)


# ---- effuse --------------------------------------------------------------------------------------


def build_effuse(job: Job, plain: Any) -> str:
    """compile with the schedule and the inputs of calibration; save."""
    import effuse

    names = plain.names
    inputs = [dict(zip(names, each, strict=True)) | plain.fixed for each in tensors(job)]
    compiled = effuse.compile(
        plain.module, job.config, inputs=inputs[0], schedule=job.timesteps,
        calibration=inputs, progress=False,
    )  # fmt: skip
    compiled.save(job.place("artifact"))
    return ""


def load_effuse(job: Job, _: Any) -> Loaded:
    """The artifact, as a device loads it."""
    import effuse

    compiled = effuse.load(job.place("artifact"), threads=job.threads)

    def run(inputs: Arrays) -> np.ndarray:
        output = compiled(**inputs)
        return np.asarray(output if isinstance(output, np.ndarray) else output[0])

    return Loaded(run, "torch was imported" if "torch" in sys.modules else "")


# ---- all rows ------------------------------------------------------------------------------------

ORT, OV = ("onnxruntime",), ("openvino",)
SINGLE = functools.partial(build_openvino, half=False)
AS_SINGLE = functools.partial(load_openvino, precision="f32")
PEERS = (
    Row("eager fp32", eager),
    Row("torch.compile", inductor),
    Row(BASELINE, load_ort, build_ort, ("onnxscript",), ORT),
    Row("ORT quantize_static", load_ort, build_ort_static, ("onnxruntime.quantization",), ORT),
    Row("OpenVINO f32", AS_SINGLE, SINGLE, OV, OV),
    Row("OpenVINO bf16", load_openvino, build_openvino, OV, OV),
    Row("OpenVINO + NNCF int8", load_openvino, build_nncf, ("nncf", "openvino"), OV),
    Row("torchao static int8", ao_static, runtime=("torchao",)),
    Row("torchao dynamic int8", ao_dynamic, runtime=("torchao",)),
)


def effuse_row(config: str) -> Row:
    """A row of ours: a preset's name, or the path of a TOML file."""
    name = f"{OURS} {Path(config).stem if config.endswith('.toml') else config}"
    return Row(name, load_effuse, build_effuse, ("effuse.build",), ("effuse.ort",), config)


def all_rows(configs: Sequence[str]) -> list[Row]:
    """The peers, then ours."""
    return [*PEERS, *map(effuse_row, configs)]


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
