"""The text of a graph is an API: golden, stable over captures and processes, and fit for diffs."""

from __future__ import annotations

import logging
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from effuse.capture import capture
from effuse.dump import around, dump, target_text, type_text
from effuse.graph import calls, clone

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(2, 4)])
        self.time = nn.Linear(1, 4)

    def forward(self, sample, timestep):
        h = self.first(sample) + self.time(timestep.float()[:, None])[:, :, None, None]
        one, other = F.silu(self.norms[0](h)).chunk(2, dim=1)
        return torch.cat([one, other * 0.1], dim=1), h.half()


def block(**options):
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 2, 4, 4), "timestep": torch.tensor([7, 7])}
    return capture(Block().eval(), inputs, **options)


GOLDEN = """\
%0: float32[2x2x4x4] = input sample
%1: int64[2] = input timestep
%2: float32[4x2x3x3] = weight first.weight
%3: float32[4] = weight first.bias
%4: float32[4] = weight norms.0.weight
%5: float32[4] = weight norms.0.bias
%6: float32[4x1] = weight time.weight
%7: float32[4] = weight time.bias
%8: float32[2x4x4x4] = aten.conv2d.default(%0, %2, %3, [1, 1], [1, 1])  # first
%9: float32[2] = aten.to.dtype(%1, float32)
%10: float32[2x1] = aten.unsqueeze.default(%9, 1)
%11: float32[2x4] = aten.linear.default(%10, %6, %7)  # time
%12: float32[2x4x1] = aten.unsqueeze.default(%11, 2)
%13: float32[2x4x1x1] = aten.unsqueeze.default(%12, 3)
%14: float32[2x4x4x4] = aten.add.Tensor(%8, %13)
%15: float32[2x4x4x4] = aten.group_norm.default(%14, 2, %4, %5, 1e-05, False)  # norms.0
%16: float32[2x4x4x4] = aten.silu.default(%15)
%17: (float32[2x2x4x4], float32[2x2x4x4]) = aten.chunk.default(%16, 2, 1)
%18: float32[2x2x4x4] = operator.getitem(%17, 0)
%19: float32[2x2x4x4] = operator.getitem(%17, 1)
%20: float32[2x2x4x4] = aten.mul.Tensor(%19, 0.1)
%21: float32[2x4x4x4] = aten.cat.default([%18, %20], 1)
%22: float16[2x4x4x4] = aten.to.dtype(%14, float16)
return [%21, %22]
"""


def test_golden():
    assert dump(block().parts[0].graph) == GOLDEN


OPEN = {"batch": (1, 8), "height": (4, 32), "width": (4, 32)}


@pytest.mark.parametrize("dynamic", [None, OPEN], ids=["static", "open"])
def test_equal_over_captures_and_processes(dynamic):
    text = dump(block(dynamic=dynamic).parts[0].graph)
    assert dump(block(dynamic=dynamic).parts[0].graph) == text
    code = (
        "import runpy, sys, logging\n"
        f"names = runpy.run_path({str(Path(__file__))!r})\n"
        f"sys.stdout.write(names['dump'](names['block'](dynamic={dynamic!r}).parts[0].graph))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=True,
        cwd=os.sep,
        env=os.environ | {"PYTHONHASHSEED": "4711"},
    )
    assert found.stdout.decode() == text


def test_open_sizes_stand_in_the_types():
    text = dump(block(dynamic=OPEN).parts[0].graph)
    first = text.splitlines()[0]
    assert first.startswith("%0: float32[s")
    assert first.count("x2x") == 1


def test_a_small_change_changes_one_line():
    graph, _ = clone(block().parts[0].graph)
    (scaled,) = calls(graph, aten.mul.Tensor)
    for factor in (0.1 + 1e-12, 1, 1.0, True):
        scaled.args = (scaled.args[0], factor)
        changed = dump(graph)
        pairs = zip(GOLDEN.splitlines(), changed.splitlines(), strict=True)
        assert [new for old, new in pairs if old != new] == [
            f"%20: float32[2x2x4x4] = aten.mul.Tensor(%19, {factor!r})"
        ]


def test_keywords_are_sorted():
    graph, _ = clone(block().parts[0].graph)
    (scaled,) = calls(graph, aten.mul.Tensor)
    scaled.kwargs = {"b": [1, 2], "a": torch.float16}
    assert "aten.mul.Tensor(%19, 0.1, a=float16, b=[1, 2])" in dump(graph)


def test_around_marks_the_node_and_keeps_its_numbers():
    graph = block().parts[0].graph
    (node,) = calls(graph, aten.cat.default)
    lines = GOLDEN.splitlines()
    assert around(node, 1).splitlines() == [f"  {lines[20]}", f"> {lines[21]}", f"  {lines[22]}"]
    first = next(iter(graph.nodes))
    assert around(first, 2).splitlines() == [f"> {lines[0]}", f"  {lines[1]}", f"  {lines[2]}"]
    assert len(around(node).splitlines()) == 10 + 1 + 2


def test_texts_of_types_and_targets():
    assert type_text(torch.zeros(())) == "float32[]"
    assert type_text(torch.zeros(2, 0, dtype=torch.bfloat16)) == "bfloat16[2x0]"
    assert type_text([torch.zeros(1), 3]) == "(float32[1], int)"
    assert type_text(None) == "none"
    assert target_text(aten.add.Tensor) == "aten.add.Tensor"
    assert target_text(operator.getitem) == "operator.getitem"
