"""Rows of the CPU benchmark in OpenVINO: single precision, bfloat16, and int8 by NNCF."""

from __future__ import annotations

from typing import Any

import numpy as np
from cpu_job import Arrays, Job, Loaded
from cpu_onnx import export


def to_openvino(job: Job, plain: Any) -> Any:
    """OpenVINO's model of the exported ONNX, shapes fixed."""
    import openvino

    return openvino.convert_model(export(job, plain, "source.onnx"))


def build_openvino(job: Job, plain: Any, half: bool = True) -> str:
    """Weights as save_model writes them by default, in half precision, or in single."""
    save_openvino(job, to_openvino(job, plain), half)
    return ""


def build_nncf(job: Job, plain: Any, transformer: bool = False) -> str:
    """nncf.quantize with its defaults, or told that the network is a transformer."""
    import nncf

    calibration = job.calibration
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    found = nncf.quantize(
        to_openvino(job, plain), nncf.Dataset(calibration),
        subset_size=len(calibration), model_type=kind,
    )  # fmt: skip
    save_openvino(job, found, True)
    return "model_type=TRANSFORMER" if transformer else ""


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
