"""The rotary kernel in Triton's interpreter, and its reference, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from effuse.errors import BackendError
from effuse.kernels import rotary
from effuse.kernels.launch import run_native

few = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SAMPLES = range(len(rotary.samples(torch.Generator())))


def uniform(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# how x may lie: each gives (b, n, m, d)
LAYOUTS = {
    "dense": uniform,
    "plane": lambda b, n, m, d, **options: uniform(b, n, 3, m, d, **options)[:, :, 1],
    "columns": lambda b, n, m, d, **options: uniform(b, n, 3 * m * d, **options)[
        ..., m * d : 2 * m * d
    ].unflatten(-1, (m, d)),
    "transposed": lambda b, n, m, d, **options: uniform(b, m, n, d, **options).transpose(1, 2),
    "rows of a whole": lambda b, n, m, d, **options: uniform(b, n + 3, m, d, **options)[:, 3:],
    "every second value": lambda *shape, **options: uniform(*shape, 2, **options)[..., 1],
}  # fmt: skip


def wide(tensor):
    return tensor.double().numpy()


def exact(x, cos, sin, pairs, axis):
    """y in float64, one value and its partner at a time, and the sum of its terms' magnitudes."""
    width = x.shape[-1]
    index = np.arange(width)
    partner = index ^ 1 if pairs == "interleaved" else (index + width // 2) % width
    pair = index // 2 if pairs == "interleaved" else index % max(1, width // 2)
    x, tables = wide(x), []
    for table in map(wide, (cos, sin)):
        every = table if table.shape[-1] == width else table[..., pair]
        every = np.broadcast_to(every, (x.shape[0], *every.shape[-2:]))
        tables.append(every[:, :, None] if axis == 1 else every[:, None])
    straight, turned = x * tables[0], x[..., partner] * tables[1]
    sign = np.where(index < partner, -1.0, 1.0)
    return straight + sign * turned, np.abs(straight) + np.abs(turned)


def check_close(y, args):
    expected, terms = exact(*args)
    assert y.shape == args[0].shape and y.dtype == args[0].dtype and y.is_contiguous()
    kind = torch.finfo(y.dtype)
    size = np.maximum(np.abs(expected), kind.smallest_normal)  # below it steps are as at it
    bound = kind.eps * size + 4 * torch.finfo(torch.float32).eps * terms
    assert (np.abs(wide(y) - expected) <= bound).all()


@st.composite
def arguments(draw):
    batch, positions, heads = draw(
        st.tuples(*[st.integers(0, 2), st.integers(0, 37), st.integers(1, 6)])
    )
    width = 2 * draw(st.sampled_from([1, 2, 3, 6, 8, 10, 32, 64, 67, 160]))
    pairs, axis = draw(st.sampled_from(rotary.PAIRS)), draw(st.sampled_from([1, 2]))
    middle = (positions, heads) if axis == 1 else (heads, positions)
    make = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    x = make(batch, *middle, width, dtype=draw(st.sampled_from(DTYPES)))
    tables = []
    for seed in (1, 2):
        lead = draw(st.sampled_from([(), (1,), (batch,)]))
        columns = draw(st.sampled_from([width, width // 2]))
        dtype = draw(st.sampled_from(DTYPES))
        tables.append(uniform(*lead, positions, columns, dtype=dtype, seed=seed))
    return (x, *tables, pairs, axis)


@few
@given(arguments())
def test_the_kernel_is_exact_to_rounding(args):
    check_close(run_native(rotary.NATIVE, *args), args)
    check_close(rotary.reference(*args), args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pairs", rotary.PAIRS)
@pytest.mark.parametrize("axis", [1, 2])
def test_values_are_read_where_they_lie(layout, pairs, axis):
    middle = (5, 3) if axis == 1 else (3, 5)
    x = LAYOUTS[layout](2, *middle, 8, dtype=torch.bfloat16)
    args = (x, uniform(5, 8, seed=1), uniform(2, 5, 4, seed=2), pairs, axis)
    check_close(run_native(rotary.NATIVE, *args), args)


def test_tables_are_read_where_they_lie():
    turns = torch.view_as_real(torch.complex(uniform(9, 4), uniform(9, 4, seed=1)))
    whole = uniform(9, 16, seed=2)
    for cos, sin in (
        turns.unbind(-1),
        (whole[:, ::2][:, :4], whole[:, 1::4]),
        whole.T[:9, :8].chunk(2, -1),
    ):
        args = (uniform(2, 9, 3, 8), cos, sin, "interleaved", 1)
        check_close(run_native(rotary.NATIVE, *args), args)


def test_a_rotation_keeps_lengths_and_turns_back():
    x, angles = uniform(2, 7, 3, 16), uniform(7, 8)
    for pairs in rotary.PAIRS:
        turned = run_native(rotary.NATIVE, x, angles.cos(), angles.sin(), pairs, 1)
        back = run_native(rotary.NATIVE, turned, angles.cos(), -angles.sin(), pairs, 1)
        torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
        torch.testing.assert_close(back, x)


@pytest.mark.parametrize("index", SAMPLES)
def test_samples(index):
    sample = rotary.samples(torch.Generator().manual_seed(0))[index]
    torch.library.opcheck(rotary.TARGET, sample, test_utils=("test_schema", "test_faketensor"))
    check_close(run_native(rotary.NATIVE, *sample), sample)
    check_close(rotary.TARGET(*sample), sample)


def test_a_launch_is_the_same_on_recorded_tensors():
    sample = rotary.samples(torch.Generator().manual_seed(0))[0]
    launch = rotary.launch((rotary.empty(*sample),), *sample)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in sample]
        told = rotary.launch((rotary.empty(*fakes),), *fakes)
    assert (told.grid, told.constants, told.warps) == (launch.grid, launch.constants, launch.warps)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": "thirds"}, "pairs: expected one of interleaved, halves, got 'thirds'"),
        ({"axis": 0}, r"axis: expected 1 or 2"),
        ({"x": uniform(2, 5, 8)}, r"x: expected four axes"),
        ({"x": uniform(2, 5, 3, 7)}, r"x: expected four axes, of which the last is even"),
        ({"x": uniform(1, 5, 1, 8194)}, r"at most 8192"),
        ({"x": uniform(2, 5, 3, 8).double()}, r"x: expected a float of 16 or 32 bits"),
        ({"x": uniform(2, 3, 5, 8)}, r"cos: expected \(3, 8\) or \(3, 4\)"),
        ({"sin": uniform(5, 2)}, r"sin: expected \(5, 8\) or \(5, 4\)"),
        ({"cos": uniform(3, 5, 8)}, r"for each of a batch of 2, got \(3, 5, 8\)"),
        ({"cos": uniform(1, 1, 5, 8)}, r"cos: .* index it by x's positions first"),
        ({"cos": uniform(8)}, r"cos: expected"),
        ({"sin": uniform(5, 8).double()}, r"sin: expected a float"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change, message):
    given = {"x": uniform(2, 5, 3, 8), "cos": uniform(5, 8), "sin": uniform(5, 8),
             "pairs": "halves", "axis": 1, **change}  # fmt: skip
    for call in (
        rotary.empty,
        rotary.reference,
        lambda **each: run_native(rotary.NATIVE, *each.values()),
    ):
        with pytest.raises(BackendError, match=message):
            call(**given)
