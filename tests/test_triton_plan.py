"""The arena: nothing that is alive is written over, and little is wasted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx

from effuse.backends.triton_plan import ALIGNMENT, Span, in_arena, place, plan_arena
from effuse.graph import record
from effuse.kernels.table import BY_TARGET

ops = torch.ops.effuse

spans = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 12), st.integers(0, 6)).map(
        lambda each: Span(each[0] * ALIGNMENT, each[1], each[1] + each[2])
    ),
    max_size=14,
)


def needed(some):
    """The most bytes that are alive at one time: no arena is smaller."""
    times = {time for span in some for time in (span.first, span.last)}
    return max((sum(s.bytes for s in some if s.first <= t <= s.last) for t in times), default=0)


@settings(deadline=None, max_examples=200)
@given(spans)
def test_what_is_alive_at_one_time_does_not_overlap(some):
    offsets, total = place(some)
    for i, one in enumerate(some):
        assert 0 <= offsets[i] <= offsets[i] + one.bytes <= total
        for j, other in enumerate(some[:i]):
            if one.first <= other.last and other.first <= one.last:
                apart = offsets[i] + one.bytes <= offsets[j]
                assert apart or offsets[j] + other.bytes <= offsets[i]
    assert needed(some) <= total <= sum(span.bytes for span in some)


def test_a_chain_takes_two_buffers_whatever_its_length():
    chain = [Span(4 * ALIGNMENT, i, i + 1) for i in range(20)]
    assert place(chain)[1] == 8 * ALIGNMENT


def quantized_chain(length):
    """x → codes → codes of codes …, each read by the next only."""
    graph = fx.Graph()
    value = graph.placeholder("x")
    scale, zero = graph.get_attr("scale"), graph.get_attr("zero")
    for _ in range(length):
        codes = graph.call_function(ops.quantize.default, (value, scale, zero, 0))
        value = graph.call_function(torch.ops.aten.to.dtype, (codes, torch.float32))
    graph.output((value,))
    weights = {"scale": torch.tensor(0.1), "zero": torch.tensor(0, dtype=torch.int8)}
    record(graph, weights, {"x": torch.zeros(16, 64)})
    return graph


def test_results_of_kernels_share_an_arena():
    assert BY_TARGET[ops.quantize.default].native is not None
    arena = plan_arena(quantized_chain(6))
    assert len(arena.offsets) == 6
    assert arena.bytes == 16 * 64  # each dies before the next is born: ATen's cast lies between


def test_a_view_keeps_what_it_looks_at_alive():
    graph = quantized_chain(2)
    first = next(node for node in graph.nodes if node.target is ops.quantize.default)
    with graph.inserting_after(first):
        view = graph.call_function(torch.ops.aten.view.default, (first, [64, 16]))
    graph.output_node().args = ((*graph.output_node().args[0], view),)
    weights = {"scale": torch.tensor(0.1), "zero": torch.tensor(0, dtype=torch.int8)}
    record(graph, weights, {"x": torch.zeros(16, 64)})
    assert plan_arena(graph).bytes == 2 * 16 * 64


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.bfloat16])
def test_a_place_in_the_arena_has_the_strides_of_what_it_stands_for(dtype):
    like = torch.empty(2, 8, 3, 5, dtype=dtype).to(memory_format=torch.channels_last)
    found = in_arena(torch.zeros(4096, dtype=torch.uint8), ALIGNMENT, like)
    assert (found.shape, found.stride(), found.dtype) == (like.shape, like.stride(), dtype)
    assert found.data_ptr() % 16 == 0
