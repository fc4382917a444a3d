"""torch.compile sees into the fused ops: traced for a GPU, they become Triton kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

# in a process of its own: tracing needs the kernels as they are compiled, not interpreted
TRACE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from effuse.kernels import linear_scaled, quantize_rows

ops = torch.ops.effuse

def layer(x, weight, scale, bias):
    codes, step, _ = ops.quantize_rows(x, None, None, "int8/token/dynamic")
    y = ops.linear_scaled(codes, step, None, weight, scale, None, bias, None, None, None, None,
                          "gelu_tanh", 1, torch.bfloat16)
    return y * 2

for device in ("cuda", "cpu"):
    with FakeTensorMode():
        x = torch.empty(64, 128, dtype=torch.bfloat16, device=device)
        weight = torch.empty(96, 128, dtype=torch.int8, device=device)
        vector = torch.empty(96, device=device)
        traced = make_fx(dispatch_functionalize(layer, FunctionalTensorMode()))
        graph = traced(x, weight, vector, vector).graph
    print(device, sum("triton_kernel_wrapper" in str(node.target) for node in graph.nodes))
"""


def test_a_compiler_that_traces_sees_the_kernels():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", TRACE],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.split() == ["cuda", "2", "cpu", "0"], done.stderr
