"""Regions of autocast and no_grad, which torch.export keeps apart: put in line, or refused."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from effuse.capture import capture
from effuse.errors import CaptureError
from effuse.program import run_program
from effuse.verify import verify

# pytest's log capture makes torch.export write its trace of every symbol, at ten times the time.
logging.getLogger("torch.__trace").disabled = True


class Region(nn.Module):
    """A region within a region, of which two values are used."""

    def __init__(self, kind: str = "cpu", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.kind, self.dtype = kind, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.kind, dtype=self.dtype, enabled=self.dtype is not None):
            once = self.layer(x)
            with torch.autocast("cpu", enabled=False):
                twice = self.layer(once.sin())
        return self.last(once + twice)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("cpu", None), ("cuda", None)], ids=["off", "elsewhere"]
)
def test_what_changes_no_value_is_put_in_line(kind: str, dtype: torch.dtype | None):
    model, x = Region(kind, dtype).eval(), torch.randn(2, 4)
    program = capture(model, {"x": x})
    verify(program)
    (part,) = program.parts
    assert all("higher_order" not in str(node.target) for node in part.graph.nodes)
    assert torch.equal(run_program(program, {"x": x})[0], program.expected[0])


def test_autocast_that_rounds_is_refused():
    class Rounding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    with pytest.raises(CaptureError, match=r"autocast to torch\.bfloat16"):
        capture(Rounding().eval(), {"x": torch.randn(4, 4)})
