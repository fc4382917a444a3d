"""FlexAttention, with functions of scores and of masks: captured as ordinary ops."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.overrides import _get_current_function_mode_stack

from effuse.capture import capture
from effuse.errors import CaptureError
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize
from effuse.program import run_program
from effuse.verify import exact_bound, relative_error, verify

# pytest's log capture makes torch.export write its trace of every symbol, at ten times the time.
logging.getLogger("torch.__trace").disabled = True

Tensor = torch.Tensor


class Attending(nn.Module):
    """Attention of four heads over twelve tokens, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.qkv = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.bias = nn.Parameter(torch.randn(4, 12, 12))

    def forward(self, sample: Tensor) -> Tensor:
        q, k, v = (each(sample).unflatten(2, (4, 8)).transpose(1, 2) for each in self.qkv)
        options: dict[str, Any] = getattr(self, self.way)(q)
        if options.get("enable_gqa"):
            k, v = k[:, :2], v[:, :2]
        found = flex_attention(q, k, v, **options)
        out, more = found if isinstance(found, tuple) else (found, None)
        out = out.transpose(1, 2).flatten(2)
        return out if more is None else out + more.mean()

    def plain(self, q: Tensor) -> dict[str, Any]:
        return {"scale": 0.3}

    def biased(self, q: Tensor) -> dict[str, Any]:
        """A score that reads a weight, and what was computed of the input."""
        slope = q.mean(dim=(2, 3))
        return {"score_mod": lambda score, b, h, i, j:
                score.tanh() + self.bias[h, i, j] - slope[b, h] * (i - j).abs()}  # fmt: skip

    def masked(self, q: Tensor) -> dict[str, Any]:
        """A mask of blocks made in forward, under which the first token sees nothing."""
        mask = create_block_mask(lambda b, h, i, j: (i // 2 >= j // 2) & (i > 0) & (j != 3),
                                 None, None, 12, 12, device=str(q.device))  # fmt: skip
        return {"block_mask": mask}

    def listed(self, q: Tensor) -> dict[str, Any]:
        """Blocks listed by what the data say, which torch's eager mode computes all the same."""
        order = q.mean(dim=(2, 3)).argsort(dim=1)[:, :, None, None].int() * 0
        count = torch.ones_like(order[..., 0])
        return {"block_mask": BlockMask.from_kv_blocks(count * 0, order, count, order,
                                                       BLOCK_SIZE=12, mask_mod=None)}  # fmt: skip

    def grouped(self, q: Tensor) -> dict[str, Any]:
        return {"enable_gqa": True, "score_mod": lambda score, b, h, i, j: score * (h + 1)}

    def summed(self, q: Tensor) -> dict[str, Any]:
        return {"return_lse": True}


WAYS = ("plain", "biased", "masked", "listed", "grouped", "summed")


def made(way: str) -> tuple[nn.Module, Tensor]:
    """A small network, and a latent."""
    torch.manual_seed(0)
    return Attending(way).eval(), torch.randn(2, 12, 32)


@pytest.mark.parametrize("way", WAYS)
def test_it_is_what_eager_computes(way: str):
    model, x = made(way)
    program = capture(model, {"sample": x})
    verify(program)
    assert not any("higher_order" in str(node.target) for node in program.parts[0].graph.nodes)
    for other in (x, torch.randn(2, 12, 32), 5 * torch.randn(2, 12, 32)):
        with torch.no_grad():
            assert torch.equal(run_program(program, {"sample": other})[0], model(other))


def test_passes_take_it_as_any_other_ops():
    model, x = made("masked")
    program = run_passes(capture(model, {"sample": x}), (Canonicalize(),))
    other = torch.randn(2, 12, 32)
    with torch.no_grad():
        error = relative_error(run_program(program, {"sample": other}), [model(other)])
    assert error <= exact_bound(torch.float32)


def test_half_precision_is_computed_as_eager_does():
    model, x = made("biased")
    model, x = model.bfloat16(), x.bfloat16()
    program = capture(model, {"sample": x})
    other = torch.randn(2, 12, 32).bfloat16()
    with torch.no_grad():
        assert torch.equal(run_program(program, {"sample": other})[0], model(other))


def test_a_compiled_network_gives_the_same_program():
    model, x = made("biased")
    program = capture(torch.compile(model), {"sample": x})
    other = torch.randn(2, 12, 32)
    with torch.no_grad():
        assert torch.equal(run_program(program, {"sample": other})[0], model(other))


def test_functions_of_one_row_applied_to_all_are_ordinary_ops():
    class Mapped(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return torch.vmap(lambda row: row.softmax(dim=0) @ row)(sample)[:, None] * sample

    x = torch.randn(3, 5)
    program = capture(Mapped().eval(), {"sample": x})
    verify(program)
    other = torch.randn(3, 5)
    torch.testing.assert_close(run_program(program, {"sample": other})[0], Mapped()(other))


def test_a_capture_that_fails_leaves_no_mode_behind():
    class Failing(nn.Module):
        def forward(self, sample: Tensor) -> Tensor:
            return sample * 2 if sample.mean() > 0 else sample

    before = _get_current_function_mode_stack()
    with pytest.raises(CaptureError):
        capture(Failing().eval(), {"sample": torch.randn(3, 5)})
    assert _get_current_function_mode_stack() == before
