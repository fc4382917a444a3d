"""Rows of the CPU benchmark in ONNX Runtime: the float export, and quantize_static."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from cpu_job import Arrays, Job, Loaded, first_line
from cpu_torch import tensors


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
