"""Rows of the CPU benchmark that work on modules: eager torch, torch.compile, torchao."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from cpu_job import Arrays, Job, Loaded, Run


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
    """Bytes of the parameters and buffers; of a traced graph, of those that it reads."""
    found = [*module.parameters(), *module.buffers()]
    if hasattr(module, "graph"):
        read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
        found = [operator.attrgetter(name)(module) for name in sorted(read)]
    return sum(held(each) for each in found)


def held(tensor: Any) -> int:
    """Bytes of a tensor; of a quantized one, of the tensors inside."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(held(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    size: int = tensor.numel() * tensor.element_size()
    return size


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
