"""The writer of quantized layers: weights and biases as stored, scales of activations, casts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from effuse.graph import emit, emit_weight, value_of
from effuse.kernels import dynamic as dynamic  # registers the ops
from effuse.kernels.low_bit import Packed, pack_weight
from effuse.kernels.packing import pack
from effuse.kernels.quantizers import Quantizer, find_scale, to_codes
from effuse.passes.activation_scales import Ranges, Scale, Scales
from effuse.passes.quantize_sites import VOLUME, Recipe
from effuse.weights import WeightStore, derive_parts

aten, ops = torch.ops.aten, torch.ops.effuse

DYNAMIC = (ops.linear_dynamic.default, ops.conv2d_dynamic.default, ops.conv3d_dynamic.default)
LEAST_SCALE = 1e-12  # of a channel of zeros
BIAS_LIMIT = 1 << 30  # of a bias in int32: as much again is left for the sum of the products


@dataclass(frozen=True)
class Rounded:
    """A weight as rounding chose it: real values (rows, columns) on the grid of its scales."""

    values: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None = None


def plain(weight: torch.Tensor, how: Recipe) -> Rounded:
    """The weight as it is, with the scales of its least and greatest values."""
    return nearest(weight, how.weight)


def nearest(weight: torch.Tensor, how: Quantizer) -> Rounded:
    """The weight as it is, with the scales of its least and greatest values."""
    rows = weight.float().flatten(1)
    return Rounded(rows, *find_scale(rows, how))


def packed_rows(weight: torch.Tensor, how: Quantizer) -> Packed:
    """A weight as it is, packed."""
    chosen = nearest(weight, how)
    return pack_weight(chosen.values, how, chosen.scale, chosen.zero)


def channel_codes(weight: torch.Tensor, how: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight as it is as stored codes, and a scale for each channel."""
    return stored_codes(narrowed(nearest(weight, how)), how, weight.shape)


def stored_codes(
    chosen: Rounded, how: Quantizer, shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, int8 in the weight's shape or fewer bits packed, and a scale for each channel."""
    steps = to_codes(chosen.values, chosen.scale, None, how)
    bits = how.grid.bits
    codes = steps.reshape(shape) if bits == 8 else pack(steps, bits)
    return codes, chosen.scale[:, 0].contiguous()


def narrowed(chosen: Rounded) -> Rounded:
    """A channel of zeros gets a small scale: its bias is stored at the scale of the products."""
    dead = (chosen.values == 0).all(1, keepdim=True)
    return replace(chosen, scale=torch.where(dead, LEAST_SCALE, chosen.scale))


@dataclass
class Writer:
    """Writes quantized layers into one graph; a tensor that several read is quantized once.

    Args:
        rounded: of weights by name, where they are not simply rounded to nearest.
        shifts: by layer, what the bias has to take back: the mean error of its output (out,).
    """

    graph: fx.Graph
    weights: WeightStore
    ranges: Ranges
    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    shifts: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._scales = Scales(self.graph, self.weights, self.ranges)
        self._pairs: dict[tuple[fx.Node, str], tuple[fx.Node, Scale]] = {}
        self._rounded: dict[tuple[fx.Node, str], fx.Node] = {}
        self._layers: dict[fx.Node, fx.Node] = {}  # a new layer -> the one it stands for

    def quantized(self, site: fx.Node, how: Recipe) -> fx.Node:
        """New nodes after `site` that compute it as `how` says; the last of them."""
        with self.graph.inserting_after(site):
            anchor = self.graph.create_node("call_function", _nothing)
        with self.graph.inserting_before(anchor):
            new = self._method(how)(site, how)
        self.graph.erase_node(anchor)
        self._layers[new] = site
        return new

    def _method(self, how: Recipe) -> Callable[[fx.Node, Recipe], fx.Node]:
        if how.activation is None or not how.integer:
            return self._simulated
        return self._dynamic if how.activation.ranges == "dynamic" else self._integer

    # ---- the three ways to compute a layer -------------------------------------------------------

    def _simulated(self, site: fx.Node, how: Recipe) -> fx.Node:
        """The layer in float, on weights and perhaps activations that are on their grids."""
        x: fx.Node = site.args[0]  # type: ignore[assignment]
        if how.activation is not None:
            x = self._rounded_activation(x, how)
        return self._emit(
            site, site.target, x, self._real(site, how), self._bias(site), *site.args[3:]
        )

    def _dynamic(self, site: fx.Node, how: Recipe) -> fx.Node:
        codes, scale, _ = self._codes(site, how)
        x, bias = site.args[0], self._bias(site)
        if site.target is aten.linear.default:
            return self._emit(site, ops.linear_dynamic.default, x, codes, scale, bias)
        conv = ops.conv3d_dynamic if site.target is VOLUME else ops.conv2d_dynamic
        return self._emit(site, conv.default, x, codes, scale, bias, *options_of(site))

    def _integer(self, site: fx.Node, how: Recipe) -> fx.Node:
        x, step = self._activation(site.args[0], how)  # type: ignore[arg-type]
        codes, scale, numbers = self._codes(site, how, self._least_scale(site, step.numbers))
        real = self._real_of_codes(site, codes, scale)
        bias = self._integer_bias(site, how, step.numbers, numbers)
        new = self._emit(site, site.target, x, real, bias, *site.args[3:])
        if site.target is aten.linear.default:
            return new
        pair = self._pair(new, site, how)
        # a layer that reads this output takes its 8 bits as they are
        self._pairs[pair[0], str(how.activation)] = pair
        return pair[0]

    # ---- weights ---------------------------------------------------------------------------------

    def _real(self, site: fx.Node, how: Recipe) -> fx.Node:
        """The quantized weight in float."""
        if how.integer_weight:
            codes, scale, _ = self._codes(site, how)
            return self._real_of_codes(site, codes, scale)
        name, shape = weight_of(site)
        stored = [
            None if tensor is None else self._weight(f"{name}.{how.weight}.{part}", tensor)
            for part, tensor in zip(Packed._fields, self._packed(name, how.weight), strict=True)
        ]
        node = self._emit(site, ops.unpack.default, *stored, str(how.weight), shape)
        return self._cast(site, node, site)

    def _packed(self, name: str, how: Quantizer) -> tuple[torch.Tensor | None, ...]:
        if chosen := self.rounded.get(name):
            return pack_weight(chosen.values, how, chosen.scale, chosen.zero)
        make = partial(packed_rows, how=how)
        return derive_parts(self.weights, [name], make, f"packed {how}")

    def _real_of_codes(self, site: fx.Node, codes: fx.Node, scale: fx.Node) -> fx.Node:
        rows = weight_of(site)[1][0]
        zeros = self._weight(f"zeros.int8.{rows}", torch.zeros(rows, dtype=torch.int8))
        return self._dequantized(site, codes, scale, zeros)

    def _codes(
        self, site: fx.Node, how: Recipe, least: torch.Tensor | None = None
    ) -> tuple[fx.Node, fx.Node, torch.Tensor]:
        """A weight's stored codes and its scale, as nodes, and the scale as numbers (out,)."""
        name, shape = weight_of(site)
        chosen = self.rounded.get(name)
        if chosen is None and least is None:
            make = partial(channel_codes, how=how.weight)
            codes, numbers = derive_parts(self.weights, [name], make, f"codes {how.weight}")
        else:
            chosen = narrowed(chosen or plain(self.weights[name], how))
            if least is not None and (least > chosen.scale[:, 0]).any():
                scale = torch.maximum(chosen.scale, least[:, None])
                chosen = Rounded(self.weights[name].float().flatten(1), scale)
                name = f"{name}.{self.ranges.part}.{site.name}"  # another may share the weight
            codes, numbers = stored_codes(chosen, how.weight, shape)
        kind = "" if how.weight.grid.bits == 8 else f"{how.weight.grid}."
        node = self._widened(site, name, codes, how)
        return node, self._weight(f"{name}.{kind}scale", numbers), numbers

    def _widened(self, site: fx.Node, name: str, codes: torch.Tensor, how: Recipe) -> fx.Node:
        """int8 as it is; fewer bits are packed, and widened in the graph."""
        bits = how.weight.grid.bits
        if bits == 8:
            return self._weight(f"{name}.int8", codes)
        packed = self._weight(f"{name}.{how.weight.grid}", codes)
        return self._emit(site, ops.widen.default, packed, bits, weight_of(site)[1])

    # ---- activations -----------------------------------------------------------------------------

    def _rounded_activation(self, source: fx.Node, how: Recipe) -> fx.Node:
        """The layer's input, rounded to its grid; once for all that read it."""
        key = (source, str(how.activation))
        if key not in self._rounded:
            with self._after(source):
                self._rounded[key] = self._fake(source, how)
        return self._rounded[key]

    def _fake(self, source: fx.Node, how: Recipe) -> fx.Node:
        assert how.activation is not None
        scale: tuple[fx.Node | None, fx.Node | None] = (None, None)
        if how.activation.ranges != "dynamic":
            found = self._scales.of(self._measured(source), how.activation)
            scale = (found.scale, found.zero)
        text = str(how.activation)
        return self._emit(source, ops.fake_quantize.default, source, *scale, text)

    def _activation(self, source: fx.Node, how: Recipe) -> tuple[fx.Node, Scale]:
        """The dequantized input of a layer, and its scale."""
        key = (source, str(how.activation))
        if key not in self._pairs:
            with self._after(source):
                self._pairs[key] = self._pair(source, self._measured(source), how)
        return self._pairs[key]

    def _measured(self, source: fx.Node) -> fx.Node:
        """The node at which calibration saw a value: a new layer has another name."""
        return self._layers.get(source, source)

    def _after(self, source: fx.Node) -> Any:
        """The place behind a value; an input's is behind all inputs, and the step's group."""
        return _Behind(self.graph, self._scales.front() if source.op == "placeholder" else source)

    def _pair(self, node: fx.Node, measured: fx.Node, how: Recipe) -> tuple[fx.Node, Scale]:
        """quantize → dequantize of `node`, with the range that was seen at `measured`."""
        assert how.activation is not None
        found = self._scales.of(measured, how.activation)
        at = (found.scale, found.zero)
        steps = self._emit(measured, ops.quantize.default, self._cast(measured, node), *at, 0)
        return self._dequantized(measured, steps, *at), found

    # ---- biases ----------------------------------------------------------------------------------

    def _bias(self, site: fx.Node) -> Any:
        """The layer's bias in float, corrected if it has to be."""
        node, shift = _bias_of(site), self.shifts.get(site.name)
        if shift is None or (node is not None and node.op != "get_attr"):
            return node
        real = self._corrected(node, shift).to(value_of(site).dtype)
        return self._weight(f"bias.{self.ranges.part}.{site.name}", real)

    def _corrected(self, node: fx.Node | None, shift: torch.Tensor | None) -> torch.Tensor:
        own = torch.zeros(()) if node is None else self.weights[str(node.target)]
        return own.double() - (0.0 if shift is None else shift.double())

    def _integer_bias(
        self, site: fx.Node, how: Recipe, step: torch.Tensor, numbers: torch.Tensor
    ) -> fx.Node | None:
        """The bias in int32 at the scale of the products, as the integer kernels add it.

        A linear whose scale goes by step adds its bias in float.
        """
        node, shift = _bias_of(site), self.shifts.get(site.name)
        by_step = how.activation is not None and how.activation.ranges == "step"
        if node is None and shift is None:
            return None
        if (node is not None and node.op != "get_attr") or (
            by_step and site.target is aten.linear.default
        ):
            return self._bias(site)  # type: ignore[no-any-return]
        scale = step[..., None] * numbers if by_step else step * numbers
        steps = torch.round(self._corrected(node, shift) / scale.double())
        stored = steps.clamp(-BIAS_LIMIT, BIAS_LIMIT).to(torch.int32)
        given = f"{node.target}." if node is not None else "bias."
        name = f"{given}{self.ranges.part}.{site.name}"
        if by_step:
            name += ".by_step"
        looked_up = self._scales.looked_up
        return self._dequantized(
            site,
            looked_up(f"{name}.int32", stored, by_step=by_step, like=site),
            looked_up(f"{name}.scale", scale, by_step=by_step, like=site),
            self._weight(f"zeros.int32.{len(numbers)}", torch.zeros(len(numbers)).int()),
        )

    def _least_scale(self, site: fx.Node, step: torch.Tensor) -> torch.Tensor | None:
        """The least weight scales with which the bias fits at the products' scale; None without."""
        node, shift = _bias_of(site), self.shifts.get(site.name)
        if (node is None and shift is None) or (node is not None and node.op != "get_attr"):
            return None
        return self._corrected(node, shift).float().abs() / (step.min().float() * BIAS_LIMIT)

    # ---- nodes -----------------------------------------------------------------------------------

    def _dequantized(self, like: fx.Node, *args: Any) -> fx.Node:
        """dequantize(…), which is float32, in the type of `like`."""
        return self._cast(like, self._emit(like, ops.dequantize.default, *args, 0), like)

    def _cast(self, like: fx.Node, node: fx.Node, to: fx.Node | None = None) -> fx.Node:
        """`node` in the type of `to`, or in float32."""
        dtype = torch.float32 if to is None else value_of(to).dtype
        same = value_of(node).dtype == dtype
        return node if same else self._emit(like, aten.to.dtype, node, dtype)

    def _emit(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        node: fx.Node = emit(self.graph, target, *args, like=like)
        return node

    def _weight(self, name: str, tensor: torch.Tensor) -> fx.Node:
        return emit_weight(self.graph, self.weights, name, tensor)


class _Behind:
    """Inserts behind a node, in the order of insertion."""

    def __init__(self, graph: fx.Graph, node: fx.Node) -> None:
        self._graph, self._node = graph, node

    def __enter__(self) -> None:
        with self._graph.inserting_after(self._node):
            self._anchor = self._graph.create_node("call_function", _nothing)
        self._place = self._graph.inserting_before(self._anchor)
        self._place.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._place.__exit__(*error)
        self._graph.erase_node(self._anchor)


def weight_of(site: fx.Node) -> tuple[str, list[int]]:
    """The name of a layer's weight, and its shape."""
    node: Any = site.args[1]
    return str(node.target), list(value_of(node).shape)


def _arguments(site: fx.Node) -> list[Any]:
    return [*site.args, *[None] * (3 - len(site.args))]


def _bias_of(site: fx.Node) -> fx.Node | None:
    node = site.args[2] if len(site.args) > 2 else None
    return node if isinstance(node, fx.Node) else None


def _nothing() -> None:
    """A place in the graph, for inserting before."""


def options_of(site: fx.Node) -> tuple[list[int], list[int], list[int], int]:
    """Stride, padding, dilation and groups of a convolution with their defaults filled in."""
    given, dims = tuple(site.args[3:]), len(weight_of(site)[1]) - 2
    defaults: tuple[Any, ...] = ([1] * dims, [0] * dims, [1] * dims, 1)
    stride, padding, dilation, groups = given + defaults[len(given) :]
    return stride, padding, dilation, groups
