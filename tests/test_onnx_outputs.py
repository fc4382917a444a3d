"""Outputs that are inputs, weights or other outputs, through ONNX Runtime."""

from __future__ import annotations

import torch
from torch import nn

from effuse.backends.onnx import build, load_session
from effuse.capture import capture
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist


class Handing(nn.Module):
    """Computes one value, and hands others through."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(5.0))

    def forward(self, x: torch.Tensor, prompt: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.layer(x)
        return y, x, prompt, y, self.table, x


def test_what_is_handed_through_keeps_its_place(tmp_path) -> None:
    torch.manual_seed(0)
    model = Handing().eval().requires_grad_(False)
    given = {"x": torch.randn(2, 4), "prompt": torch.randn(2, 3)}
    roles = {"x": "latent", "prompt": "prompt"}
    program = run_passes(capture(model, given, roles=roles), (Canonicalize(), Hoist()))
    build(program, tmp_path)
    other = {name: value + 1 for name, value in given.items()}
    found = load_session(program.spec(), tmp_path)(**other)
    for one, wanted in zip(found, model(**other), strict=True):
        torch.testing.assert_close(torch.as_tensor(one), wanted, rtol=1e-5, atol=1e-5)
