"""Complex numbers for ONNX: pairs at a part's ends, products widened where torch widens them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import effuse
from effuse.backends.onnx_complex import LAYOUT, pair_ends, widen_pairs
from effuse.backends.tensorrt_export import export_part
from effuse.capture import capture
from effuse.errors import BackendError
from effuse.graph import calls, clone, eliminate, evaluate, inputs, outputs, value_of
from effuse.pass_manager import run_passes
from effuse.passes import Hoist
from effuse.plan import Role

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten = torch.ops.aten


class Turned(nn.Module):
    """Pairs turned by angles of a precision."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        angles = torch.linspace(0, 3, 12, dtype=dtype).reshape(3, 4)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(sample.unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * self.turns).flatten(-2).float()


@pytest.mark.parametrize(("dtype", "casts"), [(torch.float64, 1), (torch.float32, 0)])
def test_pairs_are_widened_before_they_are_numbers(dtype: torch.dtype, casts: int):
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(2, 3, 8)}
    program = capture(Turned(dtype).eval(), inputs)
    graph, _ = clone(program.parts[0].graph)
    before = evaluate(graph, program.weights, inputs)
    widen_pairs(graph)
    eliminate(graph)
    (made,) = calls(graph, aten.view_as_complex.default)
    assert value_of(made).real.dtype is dtype
    assert (made.args[0].target is aten._to_copy.default) is bool(casts)
    assert torch.equal(before[0], evaluate(graph, program.weights, inputs)[0])


class Rotary(nn.Module):
    """Tokens turned by a table that is told, sliced and laid out for heads."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, freqs: torch.Tensor
    ) -> torch.Tensor:
        rows = (freqs * freqs)[:2, :3].flatten(0, 1)[None].unsqueeze(-2)
        pairs = torch.view_as_complex(self.layer(sample).unflatten(-1, (2, 2, 2)))
        return torch.view_as_real(pairs * rows).flatten(-3) * timestep[:, None, None]


class Laid(nn.Module):
    """A table that is moved about in every way, and multiplied in the end."""

    def forward(self, sample: torch.Tensor, freqs: torch.Tensor) -> torch.Tensor:
        table = freqs.permute(-1, 0, 1).transpose(-1, 0).select(-1, 1)  # (2, 3)
        table = table.repeat(2, 1).unflatten(0, (2, -1)).reshape(2, -1)[:, 1:-1]  # (2, 4)
        table = table.index_select(-1, torch.tensor([2, 0, 1])).unsqueeze(-1).squeeze(-1)
        table = table.flatten(-2).unsqueeze(-3 + 2).expand(-1, 2).clone()
        return sample * torch.view_as_real(table).sum(-1)


def turns(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers of length 1."""
    angles = torch.linspace(0, 3, torch.Size(shape).numel(), dtype=dtype).reshape(shape)
    return torch.polar(torch.ones_like(angles), angles)


def paired(model: nn.Module, given: dict[str, Any]) -> tuple[Any, Any]:
    """The graph with pairs at its ends, and what it gives for `given`."""
    program = capture(model.eval(), given)
    graph, _ = clone(program.parts[0].graph)
    pair_ends(graph)
    eliminate(graph)
    fed = {n: torch.view_as_real(v) if v.is_complex() else v for n, v in given.items()}
    return graph, evaluate(graph, program.weights, fed)


def test_every_layout_of_a_number_is_one_of_its_pair():
    given = {"sample": torch.randn(6, 2), "freqs": turns(3, 2, 2)}
    graph, found = paired(Laid(), given)
    assert torch.equal(found[0], Laid()(**given))
    kept = calls(graph, *LAYOUT)
    assert len({node.target for node in kept}) >= 9
    assert not any(value_of(node).is_complex() for node in kept)
    assert [str(node.target) for node in inputs(graph)] == ["sample", "freqs"]


def test_an_output_of_complex_numbers_is_their_pairs():
    class Table(nn.Module):
        def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor, ...]:
            number = torch.view_as_complex(sample)
            return number * number, number, sample

    given = {"sample": torch.randn(3, 2)}
    graph, found = paired(Table(), given)
    wanted = Table()(**given)
    for made, value in zip(found, wanted, strict=True):
        assert torch.equal(made, torch.view_as_real(value) if value.is_complex() else value)
    assert outputs(graph)[1] is inputs(graph)[0]  # not through a number and back


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_complex_table_is_an_input(backend: str, dtype: torch.dtype):
    if backend == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    model = Rotary().eval()
    given = {"sample": torch.randn(2, 6, 8), "timestep": torch.tensor([3.0, 3.0]),
             "freqs": turns(3, 4, 2, dtype=dtype)[:, :3]}  # fmt: skip
    config = effuse.Config(passes=(Hoist(),), backend=backend, roles={"freqs": Role.PROMPT})
    compiled = effuse.compile(model, config, inputs=given)
    for freqs in (given["freqs"], given["freqs"].flip(0)):  # not a constant of the first call
        wanted = model(**{**given, "freqs": freqs})
        found = compiled(**{**given, "freqs": freqs})
        assert torch.allclose(found.to(wanted.dtype), wanted, rtol=1e-5, atol=1e-6)


def test_parts_hand_each_other_pairs():
    given = {"sample": torch.randn(2, 6, 8), "timestep": torch.tensor([3.0, 3.0]),
             "freqs": turns(3, 3, 2)}  # fmt: skip
    program = run_passes(capture(Rotary().eval(), given), (Hoist(),))
    between = [node for part in program.parts for node in outputs(part.graph)
               if value_of(node).is_complex()]  # fmt: skip
    assert between  # else the test above says nothing of them


def test_a_network_that_gives_complex_numbers_is_refused():
    class Table(nn.Module):
        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            return torch.view_as_complex(sample)

    with pytest.raises(BackendError, match="view_as_real"):
        effuse.compile(Table().eval(), effuse.Config(passes=(), backend="onnx"),
                       inputs={"sample": torch.randn(3, 2)})  # fmt: skip


def test_what_has_no_form_for_complex_inputs_says_so():
    given = {"sample": torch.randn(6, 2), "freqs": turns(3, 2, 2)}
    program = capture(Laid().eval(), given)
    with pytest.raises(BackendError, match=r"tensorrt: the part 'full' takes complex numbers"):
        export_part(program.part("full"), program.weights, set())
