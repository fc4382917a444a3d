"""Rotary embeddings in captured graphs become one kernel each: all forms, and what is not one."""

from __future__ import annotations

import logging
from collections import Counter
from functools import partial

import pytest
import torch
from torch import nn

pytest.importorskip("triton")

from diffusers import (
    CogView4Transformer2DModel,
    FluxTransformer2DModel,
)

from effuse.backends.triton_lower import lower
from effuse.backends.triton_run import PartRun
from effuse.capture import capture
from effuse.graph import calls
from effuse.kernels.launch import run_jit
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist
from effuse.program import run_program
from effuse.verify import relative_error

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

aten, ROTARY = torch.ops.aten, torch.ops.effuse.rotary.default
RULES = ("rotary", "rotary_pairs", "rotary_complex")
TERMS = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.neg.default, aten.stack.default,
         aten.view_as_complex.default, aten.slice_scatter.default)  # fmt: skip
B, S, H, D = 2, 5, 3, 8
EXACT = 1e-6  # of float32: sums of two products


class Net(nn.Module):
    """A function of a sample and tables, which are its buffers."""

    def __init__(self, function, *tables):
        super().__init__()
        self.function = function
        self.names = [f"table{index}" for index in range(len(tables))]
        for name, table in zip(self.names, tables, strict=True):
            self.register_buffer(name, table)

    def forward(self, sample):
        return self.function(sample, *(getattr(self, name) for name in self.names))


def uniform(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def program_of(function, x, *tables, **options):
    program = capture(Net(function, *tables).eval(), {"sample": x}, **options)
    return run_passes(program, (Canonicalize(),), None)


def found_in(lowered, part="full"):
    """What the rules for rotary embeddings did, and why they left sites alone."""
    log = lowered.logs[part]
    done = {rule: log.rewrites[rule] for rule in RULES if log.rewrites[rule]}
    return done, {why: n for rule in RULES for why, n in log.reasons[rule].items()}


def checked(program, done, closer=None):
    """The lowered program: kernels by rules, the same numbers, and nothing left to do."""
    lowered = lower(program)
    assert found_in(lowered) == (done, {})
    assert len(calls(lowered.program.part("full").graph, ROTARY)) == sum(done.values())
    before, after = (run_program(each, program.examples) for each in (program, lowered.program))
    for one, other in zip(before, after, strict=True):
        assert (other.dtype, other.shape) == (one.dtype, one.shape)
    if closer is None:
        assert relative_error(before, after) < EXACT
    else:  # half types are rounded once
        for one, other, exact in zip(before, after, closer, strict=True):
            assert relative_error([other], [exact]) <= relative_error([one], [exact])
    assert not any(log.rewrites for log in lower(lowered.program).logs.values())
    return lowered


# ---- forms: functions of x (…, d) and of tables that are broadcast over it -----------------------


def woven(x):
    first, second = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-second, first], -1).flatten(-2)


def woven_by_slices(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def halves(x):
    first, second = x.chunk(2, -1)
    return torch.cat([-second, first], -1)


def halves_by_slices(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def halves_by_unbind(x):
    first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    return torch.cat([-second, first], -1)


def straight(rotate, x, cos, sin):
    return (x.float() * cos + rotate(x).float() * sin).to(x.dtype)


def turned_first(x, cos, sin):
    return (sin * woven(x) + cos * x).to(x.dtype)


def scattered(x, cos, sin):
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    y = torch.empty_like(x)
    y[..., 0::2] = first * cos - second * sin
    y[..., 1::2] = first * sin + second * cos
    return y.type_as(x)


def stacked(x, cos, sin):
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    cos, sin = cos[..., ::2], sin[..., ::2]
    left = (first * cos - second * sin).to(x.dtype)
    return torch.stack([left, (first * sin + second * cos).to(x.dtype)], -1).flatten(-2)


def side_by_side(x, cos, sin):
    first, second = x.chunk(2, -1)
    cos, sin = cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def complexes(x, cos, sin):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    table = torch.complex(cos[..., ::2].float(), sin[..., ::2].float())
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


FORMS = {  # by how they pair
    "interleaved": (partial(straight, woven), partial(straight, woven_by_slices), turned_first,
                    scattered, stacked, complexes),
    "halves": (partial(straight, halves), partial(straight, halves_by_slices),
               partial(straight, halves_by_unbind), side_by_side),
}  # fmt: skip
DONE = {"rotary": 6, "rotary_pairs": 3, "rotary_complex": 1}
LAYOUTS = {  # of x, how tables (s, d) are broadcast over it, and the axis of the positions
    "positions first": ((B, S, H, D), lambda table: table[None, :, None], 1),
    "heads first": ((B, H, S, D), lambda table: table, 2),
    "all heads as one": ((B, S, D), lambda table: table[None], 1),
    "by batch": ((B, H, S, D), lambda table: torch.stack([table, table.flip(0)])[:, None], 2),
}


def every_form(x, *tables):
    """All forms, each of tables for its pairing."""
    by_pairs = {"interleaved": tables[:2], "halves": tables[2:]}
    return tuple(form(x, *by_pairs[pairs]) for pairs, forms in FORMS.items() for form in forms)


def case(layout, dtype=torch.float32, tables=torch.float32):
    """A program of every form, and its results in float64 for the same values."""
    shape, place, _ = LAYOUTS[layout]
    x, angles = uniform(*shape, dtype=dtype), uniform(S, D // 2, seed=1)
    spread = [angles.repeat_interleave(2, 1), angles.repeat(1, 2)]
    given = [place(f(each)).to(tables) for each in spread for f in (torch.cos, torch.sin)]
    wide, (cos, sin, cos_2, sin_2) = x.double(), [each.double() for each in given]
    expected = [wide * cos + woven(wide) * sin] * len(FORMS["interleaved"])
    expected += [wide * cos_2 + halves(wide) * sin_2] * len(FORMS["halves"])
    return program_of(every_form, x, *given), expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_form_is_one_kernel(layout):
    program, expected = case(layout)
    lowered = checked(program, DONE)
    assert relative_error(run_program(lowered.program, program.examples), expected) < EXACT
    graph = lowered.program.part("full").graph
    assert not calls(graph, *TERMS)
    found = Counter(call.args[3:] for call in calls(graph, ROTARY))
    axis = LAYOUTS[layout][2]
    assert found == {(pairs, axis): len(forms) for pairs, forms in FORMS.items()}


def test_half_types_are_rounded_once():
    program, expected = case("positions first", torch.bfloat16)
    lowered = checked(program, DONE, closer=expected)
    assert not calls(lowered.program.part("full").graph, aten.to.dtype)  # it is the kernel's


def test_products_in_a_half_type_are_not_rounded_between():
    program, expected = case("heads first", torch.float16, torch.float16)
    lowered = checked(program, DONE, closer=expected)
    before, after = (
        relative_error(run_program(each, program.examples), expected)
        for each in (program, lowered.program)
    )
    assert after < 0.8 * before


def test_a_result_in_float32_stays_one():
    def function(x, cos, sin):
        y = x.float() * cos + woven(x).float() * sin
        return y, y.to(x.dtype)

    x, table = uniform(B, H, S, D, dtype=torch.bfloat16), uniform(S, D)
    lowered = checked(program_of(function, x, table, table), {"rotary": 1})
    (call,) = calls(lowered.program.part("full").graph, ROTARY)
    assert call.meta["val"].dtype == torch.float32


def test_queries_and_keys_share_their_tables():
    def function(x, cos, sin):
        return tuple(
            straight(woven, each, cos[:, :, None], sin[:, :, None]) for each in x.unbind(2)
        )

    x, table = uniform(B, S, 2, H, D), uniform(1, S, D)
    lowered = checked(program_of(function, x, table, table.flip(1)), {"rotary": 2})
    query, key = calls(lowered.program.part("full").graph, ROTARY)
    assert query.args[1:3] == key.args[1:3]
    run = PartRun(lowered.program.part("full").graph, lowered.program.weights,
                  torch.device("cpu"), run_jit)  # fmt: skip
    expected = run_program(lowered.program, {"sample": x})
    assert relative_error(run({"sample": x}), expected) < EXACT  # planes are read where they lie


def test_sizes_that_are_left_open():
    function = partial(straight, halves)
    x, table = uniform(B, H, S, D), uniform(S, D)
    program = program_of(function, x, table, table, dynamic={"batch": (1, 8)})
    lowered = checked(program, {"rotary": 1})
    other = {"sample": uniform(3, H, S, D)}
    assert relative_error(*(run_program(p, other) for p in (program, lowered.program))) < EXACT


# ---- what is not one, and what no kernel has -----------------------------------------------------


def refused(function, x, *tables):
    """Why a site was left alone; the graph computes what it did."""
    program = program_of(function, x, *tables)
    lowered = lower(program)
    done, reasons = found_in(lowered)
    assert not done and not calls(lowered.program.part("full").graph, ROTARY)
    before, after = (run_program(each, program.examples) for each in (program, lowered.program))
    assert all(map(torch.equal, before, after))
    return reasons


def new_order(x, cos, sin):
    first, second = x.chunk(2, -1)
    left, right = first * cos - second * sin, first * sin + second * cos
    return torch.stack([left, right], -1).flatten(-2)


X, TABLE = uniform(B, H, S, D), uniform(S, D)
TURN = partial(straight, woven)
REFUSED = {
    "angles that vary over the heads": (TURN, X, uniform(H, S, D), uniform(H, S, D)),
    "one angle for all positions": (TURN, X, uniform(1, D), uniform(1, D)),
    "cosines and sines of different shapes": (TURN, X, TABLE, uniform(H, 1, D)),
    "values of 2 axes, and angles of 2": (TURN, X[0, 0], TABLE, TABLE),
    "torch.float32 in, and torch.float64 out": (
        lambda x, cos, sin: x * cos + woven(x) * sin, X, TABLE.double(), TABLE.double()
    ),
    "a product in torch.complex128": (
        lambda x, table: torch.view_as_real(
            torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * table
        ).flatten(-2).float(),
        X, torch.complex(TABLE, TABLE)[:, ::2].to(torch.complex128),
    ),
    "pairs lie in a new order": (new_order, X, TABLE[:, :4], TABLE[:, :4]),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_a_site_that_is_left_alone_says_why(reason):
    assert refused(*REFUSED[reason]) == {reason: 1}


def test_what_the_kernel_refuses_is_a_reason():
    (reason,) = refused(TURN, X.float(), uniform(S, 1), uniform(S, 1))
    assert reason.startswith("cos: expected (5, 8) or (5, 4)")


def no_rotations(x, cos, sin):
    first, second = x.chunk(2, -1)
    left, right = cos[..., : D // 2], sin[..., : D // 2]
    even, odd = first * left - second * right, first * left + second * right
    return (
        x * cos - woven(x) * sin,  # turned the other way
        x * cos + torch.cat([second, -first], -1) * sin,
        x * cos + woven(x.flip(0)) * sin,  # of another value
        x * cos + torch.stack([-x[..., ::2], x[..., 1::2]], -1).flatten(-2) * sin,
        x * cos + torch.cat([-x[..., 1::2], x[..., ::2]], -1) * sin,
        torch.cat([even, odd], -1),  # with unequal factors
        torch.slice_scatter(torch.slice_scatter(x, even, 3, 0, D, 2), odd, 3, 0, D, 2),
        torch.slice_scatter(torch.slice_scatter(x, even, 3, 0, D // 2), odd, 3, 1, D, 2),
        woven(x), halves(x),
    )  # fmt: skip


def test_what_is_no_rotation_stays():
    assert refused(no_rotations, X, TABLE, TABLE.flip(0)) == {}


# ---- networks ------------------------------------------------------------------------------------


def flux():
    net = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return net, {"hidden_states": uniform(2, 9, 4), "encoder_hidden_states": uniform(2, 6, 16),
                 "timestep": torch.ones(2), "pooled_projections": uniform(2, 16),
                 "img_ids": uniform(9, 3), "txt_ids": torch.zeros(6, 3)}  # fmt: skip


def cogview4():
    net = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        out_channels=4, text_embed_dim=8, time_embed_dim=8, condition_dim=4, rope_axes_dim=(16, 16),
    )  # fmt: skip
    size = torch.tensor([[8, 8]])
    return net, {"hidden_states": uniform(1, 4, 8, 8), "encoder_hidden_states": uniform(1, 6, 8),
                 "timestep": torch.tensor([3]), "original_size": size, "target_size": size,
                 "crop_coords": torch.zeros(1, 2).long()}  # fmt: skip


@pytest.mark.parametrize(
    ("make", "done", "pairs"),
    [
        (flux, {"rotary": 4}, "interleaved"),
        (cogview4, {"rotary": 2}, "halves"),
    ],
)
def test_networks(make, done, pairs):
    torch.manual_seed(0)
    net, inputs = make()
    program = run_passes(capture(net.eval(), inputs), (Canonicalize(), Hoist()), None)
    lowered = checked(program, done)
    found = calls(lowered.program.part("full").graph, ROTARY)
    assert {each.args[3] for each in found} == {pairs}
