"""Every op that passes write: reference, fake, opcheck, integers by hand, ONNX translation."""

from __future__ import annotations

import logging
import re
from functools import partial

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from effuse.backends.onnx_ops import TRANSLATIONS
from effuse.devices import CPU
from effuse.kernels.dynamic import dynamic_range
from effuse.kernels.integer import conv_integer_reference
from effuse.kernels.quantize import along
from effuse.kernels.table import BY_TARGET, GRAPH_OPS

logging.getLogger("torch.__trace").disabled = True  # pytest's log capture would pay for it

ROWS = pytest.mark.parametrize("op", GRAPH_OPS, ids=lambda op: op.name)
WITHIN = ("unpack", "fake_quantize")  # they become parts of linear_nbits
IN_ONNX = [op for op in GRAPH_OPS if op.target in TRANSLATIONS]
few = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


def samples(op, seed=0):
    return op.samples(torch.Generator().manual_seed(seed))


# independent re-computation, in float64 and int64


def numpy_of(value):
    return value.numpy() if isinstance(value, torch.Tensor) else value


def shaped(vector, dims, axis):
    if np.ndim(vector) == 0:
        return vector
    shape = [1] * dims
    shape[axis] = -1
    return vector.reshape(shape)


def quantize_by_hand(x, scale, zero, axis):
    x, scale, zero = (numpy_of(each) for each in (x, scale, zero))
    limits = np.iinfo(zero.dtype)
    ratio = x.astype(np.float32) / shaped(scale, x.ndim, axis).astype(np.float32)
    steps = np.rint(ratio.astype(np.float64)) + shaped(zero, x.ndim, axis).astype(np.float64)
    return np.clip(steps, limits.min, limits.max).astype(np.int64)


def dequantize_by_hand(q, scale, zero, axis):
    q, scale, zero = (numpy_of(each) for each in (q, scale, zero))
    steps = q.astype(np.int64) - shaped(zero, q.ndim, axis).astype(np.int64)
    return steps.astype(np.float64) * shaped(scale, q.ndim, axis).astype(np.float64)


def dynamic_steps_by_hand(x):
    x = numpy_of(x).astype(np.float32)
    low, high = min(np.float32(0), x.min()), max(np.float32(0), x.max())
    scale = np.float32(high - low) / np.float32(255)
    scale = scale if scale else np.float32(1)
    zero = np.clip(np.rint(-low / scale), 0, 255)
    return (np.clip(np.rint(x / scale) + zero, 0, 255) - zero).astype(np.int64), float(scale)


def linear_by_hand(x, weight, scale, bias):
    steps, step = dynamic_steps_by_hand(x)
    y = np.einsum("...k,ok->...o", steps, numpy_of(weight).astype(np.int64)) * (
        step * numpy_of(scale).astype(np.float64)
    )
    return y if bias is None else y + numpy_of(bias).astype(np.float64)


def conv_by_hand(x, weight, scale, bias, stride, padding, dilation, groups):
    steps, step = dynamic_steps_by_hand(x)
    y = convolved_by_hand(steps, weight, stride, padding, dilation, groups)
    shape = (1, -1, *[1] * len(stride))
    y = y * (step * numpy_of(scale).astype(np.float64)).reshape(shape)
    return y if bias is None else y + numpy_of(bias).astype(np.float64).reshape(shape)


def convolved_by_hand(steps, weight, stride, padding, dilation, groups):
    weight = numpy_of(weight).astype(np.int64)
    steps = np.pad(steps, [(0, 0), (0, 0), *((each, each) for each in padding)])
    out, per_group, *kernel = weight.shape
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    sizes = zip(steps.shape[2:], spans, stride, strict=True)
    y = np.zeros((len(steps), out, *((n - p) // s + 1 for n, p, s in sizes)), dtype=np.int64)
    for o in range(out):
        first = o // (out // groups) * per_group
        for at in np.ndindex(y.shape[2:]):
            starts = [i * s for i, s in zip(at, stride, strict=True)]
            read = [slice(i, i + p, d) for i, p, d in zip(starts, spans, dilation, strict=True)]
            window = steps[:, first : first + per_group, *read]
            y[:, o, *at] = (window * weight[o]).sum(axis=tuple(range(1, window.ndim)))
    return y


def grid_by_hand(name):
    """The value of every code, by its definition."""
    if "int" in name:
        bits = int(name[-1])
        codes = np.arange(2**bits)
        return codes.astype(np.float64) if name[0] == "u" else (codes ^ 2**bits // 2) - 2**bits / 2
    exponent, mantissa = int(name[1]), int(name[3])
    code = np.arange(2 ** (exponent + mantissa))
    binade, fraction = code >> mantissa, code % 2**mantissa / 2**mantissa
    bias = 2 ** (exponent - 1) - 1
    normal = (1 + fraction) * 2.0 ** (binade - bias)
    values = np.where(binade == 0, fraction * 2.0 ** (1 - bias), normal)
    values = np.where(code == 127, np.nan, values) if name == "e4m3" else values
    return np.concatenate([values, -values])


def widened(values, size, quantizer):
    """Scales or zero points, one for each of `size` columns where groups share them."""
    values = numpy_of(values).astype(np.float64)
    return np.repeat(values, size // values.shape[-1], -1) if "group" in quantizer else values


def unpack_by_hand(packed, scale, zero, over, quantizer, shape):
    grid = quantizer.split("/")[0]
    bits, (rows, *rest) = len(grid_by_hand(grid)).bit_length() - 1, shape
    columns = int(np.prod(rest))
    spelt = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : columns * bits]
    codes = spelt.reshape(rows, columns, bits) @ 2 ** np.arange(bits)
    for word, dtype in (("e4m3", torch.float8_e4m3fn), ("e8m0", torch.float8_e8m0fnu)):
        scale = scale.view(dtype).double() if f"scale-{word}" in quantizer else scale
    scale = widened(scale, columns, quantizer) * (1 if over is None else over.item())
    centre = 0 if zero is None else widened(zero, columns, quantizer)
    return ((grid_by_hand(grid)[codes] - centre) * scale).reshape(shape)


def fake_quantize_by_hand(x, scale, zero, quantizer):
    levels = grid_by_hand(quantizer.split("/")[0])
    levels = levels[np.abs(levels) <= 2**7 - 1] if quantizer.startswith("int8") else levels
    levels, x = np.unique(levels[~np.isnan(levels)]), numpy_of(x).astype(np.float64)
    if scale is None:
        size = re.search(r"group(\d+)", quantizer)
        blocks = x.reshape(*x.shape[:-1], -1, int(size[1]) if size else x.shape[-1])
        most = np.abs(x).max() if "tensor" in quantizer else np.abs(blocks).max(-1)
        scale = np.asarray(most / levels.max())
        scale = 2.0 ** np.ceil(np.log2(scale)) if "e8m0" in quantizer else scale
    scale = widened(scale, x.shape[-1], quantizer)
    centre = 0 if zero is None else int(zero)
    steps = x / scale + centre
    return (levels[np.abs(steps[..., None] - levels).argmin(-1)] - centre) * scale


def widen_by_hand(packed, bits, shape):
    ones = torch.ones(shape[0], 1)
    return unpack_by_hand(packed, ones, None, None, f"int{bits}/channel", shape).astype(np.int64)


def nbits_by_hand(x, packed, scale, bias, weight, activation, rows):
    x = fake_quantize_by_hand(x, None, None, activation) if activation else numpy_of(x)
    codes, scales = packed.reshape(rows, -1) ^ 0x88, scale.reshape(rows, -1)
    real = unpack_by_hand(codes, scales, None, None, weight, [rows, x.shape[-1]])
    y = x.astype(np.float64) @ real.T
    return y if bias is None else y + numpy_of(bias)


def attention_by_hand(q, k, v, bias, heads, scale, causal):
    q, k, v = (numpy_of(each).astype(np.float64) for each in (q, k, v))
    q, k, v = (each.reshape(*each.shape[:2], heads, -1) for each in (q, k, v))
    scores = np.einsum("nshd,nthd->nhst", q, k) * scale
    scores = scores if bias is None else scores + numpy_of(bias)
    if causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return np.einsum("nhst,nthe->nshe", shares, v).reshape(*q.shape[:2], -1)


def attention_log2_by_hand(q, k, v, mask, causal, scale, bits, start):
    q, k, v = (numpy_of(each).astype(np.float64) for each in (q, k, v))
    logits = np.einsum("nhsd,nhtd->nhst", q, k) * scale
    if mask is not None:
        mask = numpy_of(mask)
        logits = np.where(mask, logits, -np.inf) if mask.dtype == bool else logits + mask
    if causal:
        logits = np.where(np.tri(*logits.shape[-2:], dtype=bool), logits, -np.inf)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    most = shares[..., start:].max((1, 2, 3), keepdims=True)
    with np.errstate(divide="ignore"):
        steps = np.clip(np.rint(-np.log2(shares / most)), 0, 2**bits - 1)
    rounded = np.where(shares == 0, 0, most * 0.5**steps)
    rounded[..., :start] = shares[..., :start]
    return np.einsum("nhst,nhte->nhse", rounded, v)


def project_by_hand(x, matrix):
    return np.einsum("...i,oi->...o", numpy_of(x).astype(np.float64), numpy_of(matrix))


def project_conv_by_hand(x, matrix, stride, padding, dilation):
    x, matrix = numpy_of(x).astype(np.float64), numpy_of(matrix).astype(np.float64)
    x = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)))
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, matrix.shape[2:], strict=True)]
    windows = np.lib.stride_tricks.sliding_window_view(x, reach, (2, 3))
    windows = windows[:, :, :: stride[0], :: stride[1], :: dilation[0], :: dilation[1]]
    return np.einsum("nchwkl,ockl->nohw", windows, matrix)


def linear_integer_by_hand(q, scale, zero, weight, weight_scale, bias):
    steps = numpy_of(q).astype(np.int64) - int(zero)
    y = steps @ numpy_of(weight).astype(np.int64).T
    y = y * (scale.double().item() * numpy_of(weight_scale).astype(np.float64))
    return y if bias is None else y + numpy_of(bias)


def conv_integer_by_hand(q, scale, zero, weight, weight_scale, bias, out_scale, out_zero, *options):
    steps = numpy_of(q).astype(np.int64) - int(zero)
    shape = (1, -1, *[1] * len(options[0]))
    sums = convolved_by_hand(steps, weight, *options)
    sums = sums + (0 if bias is None else numpy_of(bias).reshape(shape))
    factor = (scale * weight_scale / out_scale).double().numpy().reshape(shape)
    return np.clip(np.rint(sums * factor) + int(out_zero), 0, 255).astype(np.int64)


BY_HAND = {
    "widen": widen_by_hand,
    "project": project_by_hand,
    "project_conv": project_conv_by_hand,
    "linear_nbits": nbits_by_hand,
    "attention": attention_by_hand,
    "attention_log2": attention_log2_by_hand,
    "linear_integer": linear_integer_by_hand,
    "conv2d_integer": conv_integer_by_hand,
    "conv3d_integer": conv_integer_by_hand,
    "unpack": unpack_by_hand,
    "fake_quantize": fake_quantize_by_hand,
    "quantize": quantize_by_hand,
    "dequantize": dequantize_by_hand,
    "linear_dynamic": linear_by_hand,
    "conv2d_dynamic": conv_by_hand,
    "conv3d_dynamic": conv_by_hand,
}


def agrees(found, op, arguments):
    """Integers exactly; floats to float32's rounding of two multiplications and one sum."""
    expected = BY_HAND[op.name](*arguments)
    if not found.is_floating_point():
        assert np.array_equal(found.numpy().astype(np.int64), expected)
        return
    bias = arguments[3] if op.name.endswith("_dynamic") else None
    summands = np.abs(expected).max(initial=0.0)  # the sum may be smaller than what is added
    summands += 0.0 if bias is None else 2 * bias.abs().max().item()
    assert found.shape == expected.shape
    summed = {"linear_nbits": 64, "attention": 12, "attention_log2": 12}.get(
        op.name, 1
    )  # float32 sums of so many
    bound = 4 * np.finfo(np.float32).eps * max(1e-30, summands) * summed
    assert np.abs(found.double().numpy() - expected).max(initial=0.0) <= bound


@ROWS
def test_the_op_is_its_reference_and_the_computation_by_hand(op):
    for sample in samples(op):
        found = op.target(*sample)
        assert torch.equal(found, op.reference(*sample))
        agrees(found, op, sample)


@ROWS
def test_the_fake_has_the_shape_type_and_strides_of_the_real(op):
    for sample in samples(op):
        check_fake(op, sample)


def check_fake(op, sample):
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in sample]
        fake = op.target(*fakes)
    real = op.target(*sample)
    assert (tuple(fake.shape), fake.dtype) == (tuple(real.shape), real.dtype)
    assert strides(fake) == strides(real)


def strides(tensor):
    """Strides that matter: those of sizes over one, of a tensor that holds anything."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size > 1 and tensor.numel()]


@ROWS
def test_opcheck(op):
    for sample in samples(op):
        torch.library.opcheck(op.target, sample)


@ROWS
def test_the_given_tensors_are_left_alone(op):
    for sample in samples(op):
        before = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample]
        op.target(*sample)
        for one, other in zip(before, sample, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@ROWS
def test_every_row_is_complete(op):
    assert BY_TARGET[op.target] is op
    assert op.implementations["reference"] == "simulated"
    assert ("onnx" in op.implementations) == (op.target in TRANSLATIONS or op.name in WITHIN)
    assert str(op.target) == f"effuse.{op.name}.default"
    assert op.name in BY_HAND
    assert samples(op)


# generated shapes

seeds = st.integers(0, 2**31)
sizes = st.integers(1, 5)


def drawn(shape, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator) * spread


def int8s(shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, tuple(shape), generator=generator, dtype=torch.int8)


@st.composite
def quantize_arguments(draw):
    shape = draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    axis = draw(st.integers(0, len(shape) - 1))
    dtype = draw(st.sampled_from([torch.int8, torch.uint8]))
    vector = [shape[axis]] if draw(st.booleans()) and shape[axis] else []
    seed = draw(seeds)
    limits = torch.iinfo(dtype)
    generator = torch.Generator().manual_seed(seed)
    zero = torch.randint(limits.min, limits.max + 1, vector, generator=generator).to(dtype)
    x = drawn(shape, seed, draw(st.sampled_from([0.01, 1.0, 1e6])))
    if len(shape) > 1 and draw(st.booleans()):  # not contiguous
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    return x, drawn(vector, seed + 1).abs() + 1e-3, zero, axis


@few
@given(quantize_arguments())
def test_quantize_and_dequantize_of_any_shape(arguments):
    x, scale, zero, axis = arguments
    quantize, dequantize = GRAPH_OPS[0], GRAPH_OPS[1]
    q = quantize.target(*arguments)
    assert torch.equal(q, quantize.reference(*arguments))
    agrees(q, quantize, arguments)
    back = (q, scale, zero, axis)
    agrees(dequantize.target(*back), dequantize, back)
    check_fake(quantize, arguments)
    check_fake(dequantize, back)
    if x.numel():  # within half a step wherever nothing is cut off
        limits = torch.iinfo(zero.dtype)
        inside = (q.int() > limits.min) & (q.int() < limits.max)
        step = along(scale, x.dim(), axis).expand_as(x)
        error = (dequantize.target(*back) - x).abs()
        assert (error[inside] <= 0.5001 * step[inside]).all()
        assert torch.equal(quantize.target(dequantize.target(*back), scale, zero, axis), q)


@st.composite
def linear_arguments(draw):
    lead = draw(st.lists(sizes, min_size=0, max_size=3))
    width, out, seed = draw(sizes), draw(sizes), draw(seeds)
    x = drawn([*lead, width], seed) + draw(st.sampled_from([-5.0, 0.0, 5.0]))
    x = x * draw(st.sampled_from([0.0, 1e-3, 1.0]))
    bias = drawn([out], seed + 1) if draw(st.booleans()) else None
    return x, int8s([out, width], seed), drawn([out], seed).abs() + 1e-3, bias


@few
@given(linear_arguments())
def test_linear_of_any_shape(arguments):
    op = next(op for op in GRAPH_OPS if op.name == "linear_dynamic")
    found = op.target(*arguments)
    assert torch.equal(found, op.reference(*arguments))
    agrees(found, op, arguments)
    check_fake(op, arguments)


@st.composite
def conv_arguments(draw):
    dims = draw(st.integers(2, 3))
    groups = draw(st.integers(1, 2))
    per_group, out = draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    each = {"min_size": dims, "max_size": dims}
    kernel = draw(st.lists(st.integers(1, 3), **each))
    stride, dilation = (draw(st.lists(st.integers(1, 2), **each)) for _ in "ab")
    padding = draw(st.lists(st.integers(0, 2), **each))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    extra = draw(st.lists(st.integers(0, 3), **each))
    seed = draw(seeds)
    size = [s + e for s, e in zip(spans, extra, strict=True)]
    x = drawn([draw(st.integers(1, 2)), groups * per_group, *size], seed)
    x = x + draw(st.sampled_from([-5.0, 0.0, 5.0]))
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last if dims == 2 else torch.channels_last_3d)
    bias = drawn([out], seed + 1) if draw(st.booleans()) else None
    weight = int8s([out, per_group, *kernel], seed)
    return x, weight, drawn([out], seed).abs() + 1e-3, bias, stride, padding, dilation, groups


@few
@given(conv_arguments())
def test_convolution_of_any_shape(arguments):
    name = f"conv{arguments[0].dim() - 2}d_dynamic"
    op = next(op for op in GRAPH_OPS if op.name == name)
    found = op.target(*arguments)
    assert torch.equal(found, op.reference(*arguments))
    agrees(found, op, arguments)
    check_fake(op, arguments)


@few
@given(conv_arguments(), seeds)
def test_onnx_runtimes_integer_convolution_of_any_shape(arguments, seed):
    x, weight, channels, _, stride, padding, dilation, groups = arguments
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, x.shape, generator=generator, dtype=torch.uint8)
    byte, step = partial(torch.tensor, dtype=torch.uint8), torch.tensor(0.02)
    bias = torch.randint(-999, 999, channels.shape, generator=generator, dtype=torch.int32)
    named = {"s": step, "z": byte(117), "w": weight, "t": channels,
             "o": torch.zeros(len(weight), dtype=torch.int8), "p": step * 600, "r": byte(101),
             "b": bias}  # fmt: skip
    call = onnx.helper.make_node(
        "QLinearConv", ["q", *named], ["y"], strides=stride, pads=padding * 2, group=groups,
        dilations=dilation,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [call], "one",
        [onnx.helper.make_tensor_value_info("q", onnx.TensorProto.UINT8, codes.shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, None)],
        [onnx.numpy_helper.from_array(each.numpy(), name) for name, each in named.items()],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 21)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), None, [CPU])
    (found,) = session.run(None, {"q": codes.numpy()})
    options = (stride, padding, dilation, groups)
    values = (codes, step, byte(117), weight, channels, bias, step * 600, byte(101), *options)
    expected = conv_integer_reference(*values)
    # float32 factors may round another way at ties, by a step
    assert (torch.from_numpy(found).int() - expected.int()).abs().max() <= 1
    assert (torch.from_numpy(found) == expected).float().mean() > 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_activations_of_other_types_give_their_own_type(dtype):
    for op in GRAPH_OPS:
        if not op.name.endswith("_dynamic"):
            continue
        x, *rest = samples(op)[0]
        found = op.target(x.to(dtype), *rest)
        assert found.dtype == dtype
        check_fake(op, (x.to(dtype), *rest))
        expected = op.target(x.to(dtype).float(), *rest)
        assert torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize("name", ["conv2d_dynamic", "conv3d_dynamic"])
def test_a_convolution_without_a_batch(name):
    op = next(op for op in GRAPH_OPS if op.name == name)
    for x, *rest in samples(op):
        found = op.target(x[0], *rest)
        assert torch.equal(found, op.target(x[:1], *rest)[0])
        check_fake(op, (x[0], *rest))


def test_ties_go_to_even_and_limits_hold():
    quantize = torch.ops.effuse.quantize.default
    x = torch.tensor([-0.5, 0.5, 1.5, 2.5, 1e9, -1e9])
    one = torch.tensor(1.0)
    found = quantize(x, one, torch.tensor(0, dtype=torch.int8), 0)
    assert found.tolist() == [0, 0, 2, 2, 127, -128]
    # the zero point is added to what was rounded: ties do not depend on it
    found = quantize(x, one, torch.tensor(1, dtype=torch.uint8), 0)
    assert found.tolist() == [1, 1, 3, 3, 255, 0]


def test_dynamic_ranges_hold_zero():
    for x, scale, zero in (
        (torch.tensor([1.0, 2.0]), 2 / 255, 0.0),
        (torch.tensor([-1.0, -2.0]), 2 / 255, 255.0),
        (torch.tensor([-1.0, 254.0]), 1.0, 1.0),
        (torch.zeros(3), 1.0, 0.0),
    ):
        found = dynamic_range(x)
        assert (found[0].item(), found[1].item()) == (pytest.approx(scale, rel=1e-6), zero)


# ONNX


class Call(nn.Module):
    """One call of an op on the module's input; its other tensors are stored, its numbers fixed."""

    def __init__(self, op, sample):
        super().__init__()
        self.op, self.rest = op, sample[1:]
        for index, value in enumerate(self.rest):
            if isinstance(value, torch.Tensor):
                self.register_buffer(f"stored{index}", value)

    def forward(self, x):
        stored = dict(self.named_buffers())
        rest = (stored.get(f"stored{index}", value) for index, value in enumerate(self.rest))
        return self.op.target(x, *rest)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", IN_ONNX, ids=lambda op: op.name)
def test_the_onnx_translation_computes_the_reference(op):
    for sample in samples(op):
        exported = torch.export.export(Call(op, sample).eval(), sample[:1], strict=False)
        program = torch.onnx.export(
            exported, dynamo=True, opset_version=21, custom_translation_table=TRANSLATIONS,
            verbose=False,
        )  # fmt: skip
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), options, ["CPUExecutionProvider"]
        )
        (given,) = session.get_inputs()
        (found,) = session.run(None, {given.name: sample[0].numpy()})
        expected = op.reference(*sample)
        assert found.dtype == expected.numpy().dtype
        if op.name in ("quantize", "dequantize"):
            assert np.array_equal(found, expected.numpy())
        else:
            agrees(torch.from_numpy(found), op, sample)
