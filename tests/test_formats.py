"""Grids, quantizers, packing and formats: against torch's casts, brute force, and themselves."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effuse.errors import ConfigError
from effuse.kernels import formats
from effuse.kernels import quantize as quantize  # registers the op
from effuse.kernels.formats import (
    ALIASES,
    E2M1,
    E4M3,
    E5M2,
    FORMATS,
    Grid,
    Quantizer,
    check_group,
    decode,
    describe,
    encode,
    find_scale,
    from_codes,
    join_scale,
    nearest,
    pack,
    parse,
    parse_grid,
    parse_quantizer,
    round_trip,
    scale_of_range,
    split_scale,
    spread,
    step,
    storable,
    stored_bits,
    to_codes,
    unpack,
)
from effuse.kernels.low_bit import pack_weight

GRIDS = [
    *(Grid("int", bits, signed=signed) for bits in range(2, 9) for signed in (True, False)),
    *(Grid("float", bits, mantissa) for bits in range(2, 9) for mantissa in range(bits - 1)),
]
EVERY_GRID = pytest.mark.parametrize("grid", GRIDS, ids=str)
SCALES = ("float32", "e4m3", "e8m0", "e8m0-floor")

few = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31)
grids = st.sampled_from(GRIDS)


def drawn(seed, *shape, spread=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


@st.composite
def quantizers(draw, granularities=("tensor", "channel", "token", "group")):
    grid = draw(grids)
    granularity = draw(st.sampled_from(granularities))
    return Quantizer(
        grid,
        granularity,
        draw(st.sampled_from([1, 2, 3, 6])) if granularity == "group" else 0,
        symmetric=grid.signed or draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
    )


# ---- grids ---------------------------------------------------------------------------------------


def probes(grid):
    """Levels, the ties between them, both with their float32 neighbours, and beyond the ends."""
    levels = grid.levels()
    points = torch.cat([levels, (levels[1:] + levels[:-1]) / 2, levels[-1:] * 3, levels[:1] - 9])
    infinity = torch.tensor(math.inf)
    return torch.cat([points, points.nextafter(infinity), points.nextafter(-infinity)])


def brute_force(x, grid):
    """The nearest level in float64; of two, the one with the even code."""
    levels = grid.levels()
    distances = (x.double().clamp(grid.low, grid.high)[:, None] - levels.double()).abs()
    odd = encode(levels, grid).to(torch.int64) % 2
    near = distances == distances.amin(1, keepdim=True)
    return levels[torch.where(near, odd, 2).argmin(1)]


@EVERY_GRID
def test_nearest_is_nearest_and_ties_go_to_even_codes(grid):
    x = torch.cat([probes(grid), drawn(0, 500, spread=grid.high / 3)])
    assert torch.equal(nearest(x, grid), brute_force(x, grid))


@few
@given(grids, st.floats(width=32, allow_nan=False, allow_subnormal=False))
def test_nearest_of_any_number(grid, value):
    x = torch.tensor([value])
    assert torch.equal(nearest(x, grid), brute_force(x, grid))


@EVERY_GRID
def test_codes_are_distinct_bit_patterns_of_the_levels(grid):
    levels = grid.levels()
    codes = encode(levels, grid)
    patterns = {int(code) & (1 << grid.bits) - 1 for code in codes}
    assert len(patterns) == len(levels) == len(set(levels.tolist()))
    assert torch.equal(decode(codes, grid), levels)
    assert codes.dtype == (torch.int8 if grid.kind == "int" and grid.signed else torch.uint8)
    assert (levels[0].item(), levels[-1].item()) == (grid.low, grid.high)
    assert torch.equal(levels, levels.sort().values) and levels.dtype == torch.float32


@EVERY_GRID
def test_the_step_is_the_distance_to_the_next_level_outwards(grid):
    levels = grid.levels()
    levels = levels[levels >= 0]
    gaps = levels.diff()
    assert torch.equal(step(levels[:-1], grid), gaps)
    assert torch.equal(step(-levels[:-1], grid), gaps)
    assert torch.equal(step(levels[:-1] + 0.4 * gaps, grid), gaps)


def test_nan_stays_nan_and_infinity_saturates():
    for grid in GRIDS:
        found = nearest(torch.tensor([math.nan, math.inf, -math.inf]), grid)
        assert found[0].isnan() and found[1:].tolist() == [grid.high, grid.low]


@pytest.mark.parametrize(
    "grid, dtype", [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)], ids=["e4m3", "e5m2"]
)
def test_8_bit_floats_are_torchs_to_the_bit(grid, dtype):
    high = torch.finfo(dtype).max
    assert grid.high == high
    every = torch.arange(256, dtype=torch.uint8)
    values = every.view(dtype).float()
    finite = values.isfinite()
    assert torch.equal(decode(every, grid)[finite], values[finite])
    assert decode(every, grid)[~finite].isnan().all()
    assert finite.sum() == len(grid.levels()) + 1  # two zeros
    exponents = drawn(1, 20_000, spread=8).exp2()  # of all binades, and below the least value
    x = torch.cat([drawn(0, 20_000), exponents, -exponents, probes(grid)]).clamp(-high, high)
    expected = x.to(dtype)
    assert torch.equal(nearest(x, grid), expected.float())
    assert torch.equal(encode(nearest(x, grid), grid), expected.view(torch.uint8))


# (n, M, m) of METHODS 0.4; its real-valued maximum is a scale
EXAMPLES = {
    (4, 1, 6.0): [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    (4, 0, 4.0): [0, *(2.0**n for n in range(-4, 3))],
    (4, 2, 3.5): [n / 2 for n in range(8)],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_methods_examples(example):
    bits, mantissa, most = example
    grid = Grid("float", bits, mantissa)
    levels = grid.levels() * (most / grid.high)
    expected = torch.tensor(EXAMPLES[example])
    assert torch.equal(levels[levels >= 0], expected)
    assert torch.equal(levels, -levels.flip(0))


def formula(x, bits, mantissa, most):
    """METHODS 0.4 as it is written, in float64."""
    exponent = bits - 1 - mantissa
    bias = 2**exponent - math.log2(most) + math.log2(2 - 2.0**-mantissa) - 1
    x = np.clip(x, -most, most)
    floor = np.floor(np.log2(np.maximum(np.abs(x), 1e-300)) + bias)
    steps = 2.0 ** (np.maximum(floor, 1) - mantissa - bias)
    return np.rint(x / steps) * steps


@pytest.mark.parametrize("bits, mantissa, most", [*EXAMPLES, (8, 4, 1.0), (6, 3, 0.7), (6, 2, 9.1)])
def test_methods_formula_of_a_real_valued_maximum(bits, mantissa, most):
    grid = Grid("float", bits, mantissa)
    x = drawn(0, 4000, spread=most / 3)
    scale = most / grid.high
    found = nearest(x / scale, grid).double().numpy() * scale
    expected = formula(x.double().numpy(), bits, mantissa, most)
    # float32's quotient may fall on the other side of a tie
    assert np.mean(np.abs(found - expected) > 1e-6 * most) <= 1e-3


def test_e3m4_has_255_values_and_e1m2_is_int4():
    assert len(parse_grid("e3m4").levels()) == 255
    assert torch.equal(parse_grid("e1m2").levels() * 2, parse_grid("int4").levels())
    assert E2M1.levels().tolist() == [
        -6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6,
    ]  # fmt: skip


# ---- packing -------------------------------------------------------------------------------------


@few
@given(st.integers(1, 8), st.lists(st.integers(0, 20), min_size=1, max_size=3), seeds)
def test_pack_and_unpack_of_any_shape(bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*shape[:-1], -(-shape[-1] * bits // 8))
    assert torch.equal(unpack(packed, bits, shape[-1]), codes)
    spelt = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little", count=bits)
    stream = spelt.reshape(*shape[:-1], shape[-1] * bits)
    assert np.array_equal(packed.numpy(), np.packbits(stream, axis=-1, bitorder="little"))


def test_the_lower_half_of_a_byte_is_the_even_column():
    codes = torch.tensor([[1, 2, 3], [-1, -7, 7]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0x21, 0x03], [0x9F, 0x07]]


@few
@given(grids, st.integers(1, 20), seeds)
def test_packed_codes_of_every_grid_decode_to_the_same_values(grid, columns, seed):
    values = nearest(drawn(seed, 3, columns, spread=grid.high / 2), grid)
    codes = unpack(pack(encode(values, grid), grid.bits), grid.bits, columns)
    assert torch.equal(decode(codes, grid), values)


def test_packing_says_what_is_wrong():
    for bits in (0, 9):
        with pytest.raises(ConfigError, match=f"bits: expected 1 to 8, got {bits}"):
            pack(torch.zeros(1, 4, dtype=torch.uint8), bits)
    with pytest.raises(ConfigError, match="5 columns of 4 bits take 3 bytes a row, got 2"):
        unpack(torch.zeros(1, 2, dtype=torch.uint8), 4, 5)


# ---- quantizers ----------------------------------------------------------------------------------


@few
@given(quantizers(), st.integers(1, 4), st.integers(1, 3), seeds, st.sampled_from([1e-3, 1, 1e3]))
def test_a_round_trip_is_its_codes_and_changes_nothing_twice(quantizer, rows, sixes, seed, size):
    x = drawn(seed, rows, 6 * sixes, spread=size)
    scale, zero = find_scale(x, quantizer)
    once = round_trip(x, quantizer)
    assert torch.equal(round_trip(x, quantizer, scale, zero), once)
    codes = to_codes(x, scale, zero, quantizer)
    assert codes.shape == x.shape and torch.equal(from_codes(codes, scale, zero, quantizer), once)
    assert torch.equal(round_trip(once, quantizer, scale, zero), once)
    assert torch.equal(to_codes(once, scale, zero, quantizer), codes)


@few
@given(quantizers(), seeds)
def test_an_error_is_at_most_half_the_widest_step_where_nothing_is_cut_off(quantizer, seed):
    quantizer = replace(quantizer, scale="float32")
    x = drawn(seed, 4, 12)
    if quantizer.symmetric and not quantizer.grid.signed:
        x = x.abs()
    scale, _ = find_scale(x, quantizer)
    levels = quantizer.grid.levels()
    # an asymmetric range moves by half a step when its zero point is rounded
    share = 0.5 if quantizer.symmetric else 1.0
    bound = share * levels.diff().max() * spread(scale, x, quantizer)
    assert ((round_trip(x, quantizer) - x).abs() <= bound * 1.0001).all()


def blocks_by_hand(x, quantizer):
    """Every block of a (rows, columns) tensor, with the index of its scale."""
    rows, columns = x.shape
    if quantizer.granularity == "tensor":
        return [((), x)]
    if quantizer.granularity in ("channel", "token"):
        return [((row, 0), x[row]) for row in range(rows)]
    size = quantizer.group
    return [
        ((row, place), x[row, place * size : (place + 1) * size])
        for row in range(rows)
        for place in range(columns // size)
    ]


@few
@given(quantizers(), seeds)
def test_every_block_has_the_scale_of_its_own_range(quantizer, seed):
    quantizer = replace(quantizer, scale="float32")
    x = drawn(seed, 3, 12) + drawn(seed + 1, 3, 12).mean()
    scale, zero = find_scale(x, quantizer)
    blocks = blocks_by_hand(x, quantizer)
    assert scale.numel() == len(blocks)
    for index, block in blocks:
        low, high = min(0.0, block.min().item()), max(0.0, block.max().item())
        if not quantizer.symmetric:
            expected = (high - low) / quantizer.grid.high
            steps = -low / expected if expected else 0
            assert abs(zero[index].item() - steps) <= 0.5001
        elif quantizer.grid.signed:
            expected = max(-low, high) / quantizer.grid.high
        else:
            expected = high / quantizer.grid.high
        assert scale[index].item() == pytest.approx(expected or 1.0, rel=1e-6)
    wide = spread(scale, x, quantizer)
    assert wide.shape == x.shape
    pieces = blocks_by_hand(wide, quantizer)
    assert all(bool((piece == scale[index]).all()) for index, piece in pieces)


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_data_gain_six_decibels_a_bit(bits):
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    x[:2] = torch.tensor([-1.0, 1.0])
    for grid, symmetric in ((Grid("int", bits), True), (Grid("int", bits, signed=False), False)):
        error = round_trip(x, Quantizer(grid, symmetric=symmetric)) - x
        sqnr = 10 * math.log10(x.square().mean() / error.square().mean())
        steps = 2**bits - (2 if symmetric else 1)
        assert sqnr == pytest.approx(20 * math.log10(steps), abs=0.1)
        assert bits < 4 or sqnr == pytest.approx(6.02 * bits, abs=1.3)


def test_convolution_weights_of_any_shape_have_a_scale_a_channel():
    weight, how = drawn(0, 4, 3, 3, 2), parse_quantizer("int4/channel")
    flat = round_trip(weight.flatten(1), how)
    assert torch.equal(round_trip(weight, how), flat.view_as(weight))


def test_activations_have_a_scale_a_token_or_group():
    x = drawn(0, 2, 3, 8)
    assert find_scale(x, parse_quantizer("e4m3/token/dynamic"))[0].shape == (2, 3, 1)
    assert find_scale(x, parse_quantizer("int8/group4/dynamic"))[0].shape == (2, 3, 2)
    row = round_trip(x[1, 2:], parse_quantizer("int8/group4"))
    assert torch.equal(round_trip(x, parse_quantizer("int8/group4"))[1, 2:], row)


def test_shrinking_cuts_the_range():
    x, how = drawn(0, 3, 8), parse_quantizer("uint4/channel/asymmetric")
    full, half = find_scale(x, how)[0], find_scale(x, how, 0.5)[0]
    assert torch.equal(half, full * 0.5)
    each = torch.tensor([[1.0], [0.5], [1.0]])
    assert torch.equal(find_scale(x, how, each)[0], torch.where(each == 1, full, half))
    assert torch.equal(find_scale(x, how, 1.0)[0], find_scale(x, how)[0])


@pytest.mark.parametrize("text", ["uint8/tensor/asymmetric", "int8/tensor"])
def test_codes_of_8_bits_are_those_of_the_quantize_op(text):
    how, scale = parse_quantizer(text), torch.tensor(0.5)
    x = torch.cat([torch.arange(-60.0, 60.0) / 4, drawn(0, 500, spread=9)])  # ties, and others
    for number in (0, 1, 37) if not how.symmetric else (0,):
        zero = torch.tensor(number, dtype=torch.int8 if how.symmetric else torch.uint8)
        expected = torch.ops.effuse.quantize(x, scale, zero, 0)
        codes = to_codes(x, scale, None if how.symmetric else zero, how)
        assert torch.equal(codes, expected)


def test_half_precision_is_computed_in_float32():
    x, how = drawn(0, 4, 8), parse_quantizer("e4m3/token")
    for dtype in (torch.float16, torch.bfloat16):
        found = round_trip(x.to(dtype), how)
        assert found.dtype == torch.float32
        assert torch.equal(found, round_trip(x.to(dtype).float(), how))
        in_graph = torch.ops.effuse.fake_quantize(x.to(dtype), None, None, "e4m3/token/dynamic")
        assert torch.equal(in_graph, found.to(dtype))


# ---- scales of a few bits ------------------------------------------------------------------------


@few
@given(st.sampled_from(SCALES), seeds, st.sampled_from([1e-30, 1e-3, 1.0, 1e20]), st.booleans())
def test_scales_are_stored_exactly(kind, seed, size, with_zeros):
    x = drawn(seed, 3, 12, spread=size)
    if with_zeros:
        x[1] = 0
    how = Quantizer(E2M1, "group", 4, scale=kind)
    scale, _ = find_scale(x, how)
    stored, over = split_scale(scale, how)
    assert (scale > 0).all() and scale.isfinite().all()
    assert torch.equal(join_scale(stored, over, how), scale)
    assert torch.equal(storable(scale, how), scale)
    assert (over is not None) == (kind == "e4m3")
    assert stored.dtype == (torch.float32 if kind == "float32" else torch.uint8)
    assert not with_zeros or not round_trip(x, how)[1].any()


@pytest.mark.parametrize("kind", SCALES)
def test_zeros_stay_zeros(kind):
    for grid in (E2M1, parse_grid("uint4")):
        how = Quantizer(grid, "group", 4, grid.kind == "float", scale=kind)
        zeros = torch.zeros(2, 8)
        assert torch.equal(round_trip(zeros, how), zeros)
        assert (find_scale(zeros, how)[0] > 0).all()


def test_nvfp4_scales_are_e4m3_under_amax_of_the_tensor():
    x = drawn(0, 16, 64) * drawn(1, 16, 1).exp()
    how = FORMATS["nvfp4"].weight
    stored, over = split_scale(find_scale(x, how)[0], how)
    expected = x.abs().max() / (6 * 448)
    assert over.item() == pytest.approx(expected.item(), rel=2**-22)
    of_torch = x.view(16, 4, 16).abs().amax(-1) / 6 / over
    assert torch.equal(stored, of_torch.to(torch.float8_e4m3fn).view(torch.uint8))
    assert stored.max() == 0x7E  # 448


def test_the_scale_over_scales_is_found_again_whatever_its_bits():
    significands = torch.arange(2**23, dtype=torch.int32).add_(127 << 23).view(torch.float32)
    over = significands / 448
    assert torch.equal(over * 448 / 448, over)


def test_powers_of_two_are_torchs_and_nothing_overflows():
    x = drawn(0, 64, 64) * drawn(1, 64, 1).mul(20).exp()
    amax = x.view(64, 2, 32).abs().amax(-1)
    how = FORMATS["mxfp4"].weight
    scale, _ = find_scale(x, how)
    assert torch.equal(split_scale(scale, how)[0],
                       scale.to(torch.float8_e8m0fnu).view(torch.uint8))  # fmt: skip
    assert torch.equal(scale.log2(), scale.log2().round())
    reach = amax / scale
    assert (reach <= 6).all() and (reach > 3).all()  # the least power of two that holds amax
    of_ocp, _ = find_scale(x, replace(how, scale="e8m0-floor"))
    assert torch.equal(of_ocp.log2(), amax.log2().floor() - 2)
    assert ((amax / of_ocp) > 6).any()


def test_powers_of_two_at_powers_of_two():
    how = Quantizer(E2M1, scale="e8m0")
    expected = ((6.0, 1, 1), (6.001, 2, 1), (8.0, 2, 2), (5.999, 1, 1), (3.0, 0.5, 0.5))
    for amax, ceiling, floor in expected:
        high = torch.tensor(amax)
        assert scale_of_range(-high / 2, high, how)[0] == ceiling
        assert scale_of_range(-high / 2, high, replace(how, scale="e8m0-floor"))[0] == floor


# ---- storage -------------------------------------------------------------------------------------


@few
@given(
    quantizers(("tensor", "channel", "group")),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    seeds,
)
def test_stored_bits_are_those_of_the_stored_tensors(quantizer, sizes, seed):
    shape = (sizes[0], 6 * sizes[-1], *sizes[1:])
    weight = drawn(seed, *shape)
    stored = pack_weight(weight, quantizer)
    held = sum(each.numel() * each.element_size() for each in stored if each is not None)
    assert stored_bits(quantizer, shape) == 8 * held
    found = torch.ops.effuse.unpack(*stored, str(quantizer), list(shape))
    assert torch.equal(found, round_trip(weight.flatten(1), quantizer).view(shape))


def test_a_static_range_needs_its_scale():
    x = drawn(0, 2, 4)
    with pytest.raises(ConfigError, match="int8/tensor needs a scale; only /dynamic"):
        torch.ops.effuse.fake_quantize(x, None, None, "int8/tensor")


@pytest.mark.parametrize(
    "group, columns, around",
    [(64, 96, "group48 and group96"), (64, 32, "group32$"), (7, 30, "group6 and group10")],
)
def test_groups_that_do_not_divide(group, columns, around):
    how = Quantizer(E2M1, "group", group)
    expected = f"groups of {group} do not fill rows of {columns} columns; .*{around}"
    for call in (
        lambda: check_group(columns, how),
        lambda: round_trip(drawn(0, 2, columns), how),
        lambda: stored_bits(how, (2, columns)),
    ):
        with pytest.raises(ConfigError, match=expected):
            call()
    check_group(4 * group, how)
    check_group(columns, Quantizer(E2M1))


# ---- texts and formats ---------------------------------------------------------------------------


@EVERY_GRID
def test_the_text_of_a_grid_is_read_back(grid):
    assert parse_grid(str(grid)) == grid


@few
@given(quantizers(), st.sampled_from(["static", "dynamic", "step"]))
def test_the_text_of_a_quantizer_is_read_back(quantizer, ranges):
    quantizer = replace(quantizer, ranges=ranges)
    assert parse_quantizer(str(quantizer)) == quantizer


def test_texts_as_they_are_written():
    assert str(Quantizer(Grid("int", 4), "group", 64)) == "int4/group64"
    texts = ("uint8/tensor/asymmetric/step", "e2m1/group16/scale-e4m3", "e4m3/token/dynamic")
    assert all(str(parse_quantizer(text)) == text for text in texts)
    assert str(parse_quantizer("uint8/step/asymmetric")) == "uint8/tensor/asymmetric/step"
    assert str(parse_quantizer("int4")) == "int4/tensor"


@pytest.mark.parametrize("name", FORMATS)
def test_the_text_of_a_format_is_read_back(name):
    assert parse(name) is FORMATS[name]
    text = str(FORMATS[name])
    assert replace(parse(text), name=name, summary=FORMATS[name].summary) == FORMATS[name]


def test_study_formats():
    found = parse("int3/group32:uint6/tensor/asymmetric")
    assert str(found.weight) == str(found.conv_weight) == "int3/group32"
    assert str(found.activation) == str(found.conv_activation) == "uint6/tensor/asymmetric"
    assert parse("e3m0/group128:none").activation is None
    rows = parse("int8/channel:e4m3/token/dynamic")
    assert str(rows.conv_activation) == "e4m3/tensor/dynamic"  # an image has no row of channels
    assert parse("fp4") is FORMATS["nvfp4"] and set(ALIASES) == {"fp4"}


ERRORS = {
    "w8a9": "'w8a9' is unknown; did you mean 'w8a8'",
    "mxpf4": "did you mean 'mxfp4'",
    "int4/group64": "say what activations are: 'int4/group64:none'",
    "int4": "say what activations are: 'int4:none'",
    "int4/gruop64:none": "'gruop64' is unknown; did you mean 'group64'",
    "itn4:none": "did you mean 'int4'",
    "int9/channel:none": "expected 2 to 8 bits, got 9",
    "e8m0:none": "expected 2 to 8 bits, got 9",
    "e0m3:none": "at least 1 bit of exponent",
    "int4/group64/channel:none": "'channel' says again",
    "int4/group0:none": "'group0' is unknown",
    "int4/asymmetric:none": "asymmetric needs an unsigned int",
    "e4m3/asymmetric:none": "asymmetric needs an unsigned int",
    "int4/token:none": "a token is of activations",
    "int4/dynamic:none": "dynamic is of activations",
    "int4:int8/channel": "a channel is of weights",
    "int4:int8/token": "add /dynamic",
    "int4:int8:int4": "expected '<weights>:<activations>'",
    "": "'' is unknown",
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors_say_what_is_wrong(text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert ERRORS[text] in str(caught.value)


def test_quantizers_that_contradict_themselves():
    for wrong in ({"granularity": "group"}, {"group": 4}, {"symmetric": False}):
        with pytest.raises(ConfigError):
            Quantizer(Grid("int", 4), **wrong)
    with pytest.raises(ConfigError, match="only a float has a mantissa"):
        Grid("int", 4, 1)


BITS = {"w8a8": 8, "w8a16": 8, "w4a16": 4.5, "w4a8": 4.5, "w4a4": 4.5, "fp8": 8, "nvfp4": 4.5,
        "mxfp4": 4.25}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_descriptions(name):
    row = describe(FORMATS[name])
    assert row["bits_per_weight"] == BITS[name]
    assert row["name"] == name and row["summary"]
    many = (8192, 8192)  # what channels and tensors add is next to nothing
    for kind, quantizer in (("", FORMATS[name].weight), ("conv_", FORMATS[name].conv_weight)):
        assert str(quantizer.grid) in row[f"{kind}weights"]
        share = stored_bits(quantizer, many) / math.prod(many)
        assert share == pytest.approx(row[f"{kind}bits_per_weight"], rel=1e-3)


def test_phrases():
    row = describe(FORMATS["w4a8"])
    assert row["weights"] == "int4 in groups of 64"
    assert row["activations"] == "int8 in groups of 64, ranges at run time"
    assert row["conv_activations"] == "uint8 asymmetric per tensor"
    assert describe(FORMATS["w8a16"])["activations"] == "float"
    nvfp4 = describe(FORMATS["nvfp4"])["weights"]
    assert nvfp4 == "e2m1 in groups of 16 with e4m3 scales under one float32"


def test_every_public_name_is_there():
    assert all(hasattr(formats, name) for name in formats.__all__)
