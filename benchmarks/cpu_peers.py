"""The rows of the CPU benchmark: the peers, and effuse.

`build` makes files in a process that ends; `load` opens them in the process that is timed. What
works on modules has no `build`. Libraries are imported where they are used, so that a process's
memory is that of its own row.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cpu_job import Arrays, Job, Loaded, Row
from cpu_onnx import build_ort, build_ort_static, load_ort
from cpu_openvino import build_nncf, build_openvino, load_openvino
from cpu_torch import ao_dynamic, ao_static, eager, inductor, tensors

BASELINE = "ORT fp32"
OURS = "effuse"
ON_OPENVINO = ("exact", "w8a8", "w8a8-cache", "w4a16", "w4a8")  # presets that have a row there, too


def build_effuse(job: Job, plain: Any, **options: str) -> str:
    """compile with the schedule and the inputs of calibration; save."""
    import effuse
    from effuse.config import resolve

    names, settings = plain.names, resolve(job.config)
    settings = settings.model_copy(update=options)
    inputs = [dict(zip(names, each, strict=True)) | plain.fixed for each in tensors(job)]
    compiled = effuse.compile(
        plain.module, settings, inputs=inputs[0], schedule=job.timesteps,
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


ORT, OV = ("onnxruntime",), ("openvino",)
SINGLE = functools.partial(build_openvino, half=False)
TOLD = functools.partial(build_nncf, transformer=True)
NNCF = ("nncf", "openvino")
AS_SINGLE = functools.partial(load_openvino, precision="f32")
PEERS = (
    Row("eager fp32", eager),
    Row("torch.compile", inductor),
    Row(BASELINE, load_ort, build_ort, ("onnxscript",), ORT),
    Row("ORT quantize_static", load_ort, build_ort_static, ("onnxruntime.quantization",), ORT),
    Row("OpenVINO f32", AS_SINGLE, SINGLE, OV, OV),
    Row("OpenVINO bf16", load_openvino, build_openvino, OV, OV),
    Row("OpenVINO + NNCF int8", load_openvino, build_nncf, NNCF, OV),
    Row("OpenVINO + NNCF int8, f32", AS_SINGLE, build_nncf, NNCF, OV),
    Row("OpenVINO + NNCF int8, transformer", load_openvino, TOLD, NNCF, OV, transformers=True),
    Row("torchao static int8", ao_static, runtime=("torchao",)),
    Row("torchao dynamic int8", ao_dynamic, runtime=("torchao",)),
)


def effuse_row(config: str) -> Row:
    """A row of ours: a preset's name, or the path of a TOML file."""
    name = f"{OURS} {Path(config).stem if config.endswith('.toml') else config}"
    return Row(name, load_effuse, build_effuse, ("effuse.build",), ("effuse.ort",), config)


def openvino_rows(preset: str) -> list[Row]:
    """Rows of ours through OpenVINO: floats in single precision, and in bfloat16."""
    needed = ("effuse.openvino_run", *OV)
    ways = {"": {}, " bf16": {"target": "openvino-bf16"}}
    return [
        Row(f"{OURS} {preset}, OpenVINO{name}", load_effuse,
            functools.partial(build_effuse, backend="openvino", **options),
            ("effuse.build", *OV), needed, preset)
        for name, options in ways.items()
    ]  # fmt: skip


def all_rows(configs: Sequence[str]) -> list[Row]:
    """The peers, then ours."""
    again = (row for each in configs if each in ON_OPENVINO for row in openvino_rows(each))
    return [*PEERS, *map(effuse_row, configs), *again]
