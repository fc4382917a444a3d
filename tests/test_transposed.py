"""Transposed convolutions as convolutions of sub-pixels: the same numbers, of any options."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from effuse.capture import capture
from effuse.graph import calls, clone, eliminate, evaluate, value_of
from effuse.passes.transposed import CONVS, TRANSPOSED, Options, turn, unfit
from effuse.program import Part, Program
from effuse.weights import copied

logging.getLogger("torch.__trace").disabled = True

KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def captured(layer: nn.Module, *shape: int, **options: object) -> Program:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return capture(layer.eval().requires_grad_(False), {"input": x}, **options)  # type: ignore[arg-type]


def only(part: Part) -> object:
    (node,) = calls(part.graph, *TRANSPOSED)
    return node


def rewritten(program: Program) -> tuple[Part, dict[str, torch.Tensor]]:
    """The network with its one transposed convolution turned."""
    (part,) = program.parts
    graph, mapping = clone(part.graph)
    weights = copied(program.weights)
    made = turn(graph, weights, mapping[only(part)])  # type: ignore[index]
    eliminate(graph)
    assert not calls(graph, *TRANSPOSED)
    assert calls(graph, *CONVS.values()) == [made.conv]
    return Part(part.name, part.depends, graph, part.outputs), dict(weights)


def agrees(program: Program) -> None:
    part, weights = rewritten(program)
    assert program.expected is not None
    (found,) = evaluate(part.graph, weights, program.examples)
    (expected,) = program.expected
    assert found.shape == expected.shape
    assert value_of(part.graph.output_node().args[0][0]).shape == expected.shape
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-12)


@st.composite
def layers(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride = each(1, 6 - dims), each(1, 4)
    groups = draw(st.integers(1, 3))
    padding = tuple(draw(st.integers(0, size - 1)) for size in kernel)
    more = tuple(draw(st.integers(0, step - 1)) for step in stride)
    sizes = each(1, 4)
    every = zip(sizes, stride, padding, kernel, more, strict=True)
    outs = [(n - 1) * s - 2 * p + k + m for n, s, p, k, m in every]
    assume(min(outs) > 0)
    torch.manual_seed(0)
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 3))
    layer = KINDS[dims](*channels, kernel, stride, padding, more, groups,
                        bias=draw(st.booleans()), dtype=torch.float64)  # fmt: skip
    return layer, (draw(st.integers(1, 2)), channels[0], *sizes)


@settings(max_examples=80, deadline=None)
@given(layers())
def test_a_convolution_of_sub_pixels_is_the_transposed_one(
    drawn: tuple[nn.Module, tuple[int, ...]],
) -> None:
    layer, shape = drawn
    agrees(captured(layer, *shape))


@pytest.mark.parametrize(
    ("layer", "shape", "taps"),
    [
        (nn.ConvTranspose1d(2, 3, 16, 8, 4), (2, 2, 5), 2),
        (nn.ConvTranspose2d(2, 3, 2, 2), (2, 2, 5, 3), 1),
        (nn.ConvTranspose2d(2, 3, 4, 2, 1), (2, 2, 5, 3), 4),
        (nn.ConvTranspose3d(2, 3, 3, (1, 2, 2), 1, (0, 1, 1)), (1, 2, 3, 4, 5), 12),
    ],
)
def test_no_tap_is_computed_in_vain(layer: nn.Module, shape: tuple[int, ...], taps: int) -> None:
    program = captured(layer.double(), *shape)
    agrees(program)
    part, _ = rewritten(program)
    (conv,) = calls(part.graph, *CONVS.values())
    sizes = value_of(conv.args[1]).shape
    assert math.prod(sizes[2:]) == taps and sizes[0] == 3 * math.prod(layer.stride)  # type: ignore[arg-type]


def test_positions_that_are_cut_off_are_not_computed() -> None:
    options = Options((5,), (2,), (4,), (1,), 1, (1,))
    assert options.margins() == [(0, 0, 0)]
    assert Options((2,), (2,), (0,), (1,), 1, (1,)).margins() == [(1, 2, 1)]  # more than there is


def test_sizes_may_stay_open() -> None:
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(4, 6, (7, 4), (3, 2), (2, 1), (1, 0), 2, dtype=torch.float64)
    program = captured(layer, 2, 4, 6, 8, dynamic={"height": (2, 64), "width": (2, 64)})
    part, weights = rewritten(program)
    for sizes in ((3, 9), (12, 2)):
        x = torch.randn(2, 4, *sizes, dtype=torch.float64)
        (name,) = part.inputs
        (found,) = evaluate(part.graph, weights, {name: x})
        assert torch.allclose(found, layer(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        (nn.ConvTranspose2d(2, 3, 3, 2, dilation=2), (1, 2, 4, 4), "it is dilated"),
        (nn.ConvTranspose1d(2, 3, 3, 2), (2, 4), "it is without a batch"),
    ],
)
def test_what_cannot_be_turned_says_why(
    layer: nn.Module, shape: tuple[int, ...], reason: str
) -> None:
    (part,) = captured(layer.double(), *shape).parts
    assert unfit(only(part)) == reason  # type: ignore[arg-type]


class Computed(nn.Module):
    """A transposed convolution whose weight depends on the input."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.bias, self.weight = bias, nn.Parameter(torch.ones(2, 3, 2, 2).double())

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        mean = input.mean()
        if self.bias:
            return nn.functional.conv_transpose2d(input, self.weight, mean.expand(3), 2)
        return nn.functional.conv_transpose2d(input, self.weight * mean, None, 2)


@pytest.mark.parametrize(("bias", "word"), [(True, "bias"), (False, "weight")])
def test_computed_weights_and_biases_stay(bias: bool, word: str) -> None:
    (part,) = captured(Computed(bias), 1, 2, 4, 4).parts
    assert unfit(only(part)) == f"its {word} is computed"  # type: ignore[arg-type]
