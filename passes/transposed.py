"""Transposed convolutions as ordinary ones of sub-pixels, which integer kernels compute.

    y[s·q + r - p] = Σ_m x[q - m] · w[s·m + r]        r = 0 … s-1 (phases), m = 0 … ⌈K/s⌉-1

Of K taps each phase of the output reads every s-th: all phases together are the channels of one
convolution of step 1, and laying them side by side gives y, but for p positions at either end.
Where s does not divide K some taps are 0. The products are the transposed convolution's own, summed
in another order. In float that is slower than the transposed convolution (0.45 ms against 0.94 for
64 channels to 32, 16 taps, step 8, 1024 positions, in ONNX Runtime on one core), in 8-bit integers
faster (0.21 ms): it is done for those alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from effuse.graph import calls, clone, emit, emit_weight, substitute, value_of
from effuse.program import Part, Program
from effuse.statistics import Calibration, Key
from effuse.weights import WeightStore, copied, derive

aten = torch.ops.aten

TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input,
              aten.conv_transpose3d.input)  # fmt: skip
CONVS = {4: aten.conv2d.default, 5: aten.conv3d.default}  # by the weight's dimensions


@dataclass(frozen=True)
class Turned:
    """A transposed convolution, and what computes the same beside it: a convolution's rearranged.

    The transposed one stays in the graph, and is dead, until it is known which of both is wanted.
    """

    node: fx.Node
    conv: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class Options:
    """Those of a transposed convolution, one for each dimension, and the sizes of its kernel."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    more: tuple[int, ...]  # output_padding
    groups: int
    dilation: tuple[int, ...]

    @classmethod
    def of(cls, node: fx.Node) -> Options:
        """Those of a call."""
        kernel = tuple(value_of(node.args[1]).shape[2:])  # type: ignore[arg-type]
        given: Any = (*node.args, *(None, 1, 0, 0, 1, 1)[len(node.args) - 2 :])
        stride, padding, more, dilation = (_each(given[i], len(kernel)) for i in (3, 4, 5, 7))
        return cls(kernel, stride, padding, more, given[6], dilation)

    def as_rows(self) -> Options:
        """Of a row of an image."""
        return Options((1, *self.kernel), (1, *self.stride), (0, *self.padding), (0, *self.more),
                       self.groups, (1, *self.dilation))  # fmt: skip

    @property
    def taps(self) -> list[int]:
        """⌈K/s⌉: what each phase reads at most, zeros included."""
        return [-(-size // step) for size, step in zip(self.kernel, self.stride, strict=True)]

    def margins(self) -> list[tuple[int, int, int]]:
        """Zeros around x on either side, and how much is cut off the result at its two ends."""
        found = []
        sizes = zip(self.kernel, self.stride, self.padding, self.more, self.taps, strict=True)
        for size, step, pad, more, taps in sizes:
            end = step * taps + pad - size - more
            # whole positions that are cut off need no computing, and others may be asked for
            shift = max(1 - taps, -(pad // step), -(end // step))
            found.append((taps - 1 + shift, pad + step * shift, end + step * shift))
        return found


def _each(given: Any, count: int) -> tuple[int, ...]:
    many = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return many * count if len(many) == 1 else many


def unfit(node: fx.Node) -> str | None:
    """Why a transposed convolution is no convolution of sub-pixels, or None."""
    weight: Any = node.args[1]
    if weight.op != "get_attr":
        return "its weight is computed"
    if len(node.args) > 2 and isinstance(node.args[2], fx.Node) and node.args[2].op != "get_attr":
        return "its bias is computed"
    if value_of(node).dim() != value_of(weight).dim():
        return "it is without a batch"
    if any(each != 1 for each in Options.of(node).dilation):
        return "it is dilated"
    return None


def turned(
    program: Program, wanted: Callable[[Part, fx.Node], bool], calibration: Calibration
) -> tuple[Program, dict[str, list[Turned]], Calibration]:
    """The program with the wanted transposed convolutions turned; by part, which they are.

    The calibration knows the ranges of what is new: those of what it computes anew.
    """
    weights = copied(program.weights)
    found: dict[str, list[Turned]] = {}
    parts, lent = [], dict[Key, Key]()
    for part in program.parts:
        graph, mapping = clone(part.graph)
        nodes = [node for node in calls(part.graph, *TRANSPOSED) if wanted(part, node)]
        found[part.name] = made = [turn(graph, weights, mapping[node]) for node in nodes]
        for each in made:
            known = (part.name, each.node.name)
            given, read = (node.all_input_nodes[0] for node in (each.node, each.conv))
            lent |= {(part.name, each.conv.name): known, (part.name, each.result.name): known}
            if read is not given:
                lent[part.name, read.name] = (part.name, given.name)
        parts.append(replace(part, graph=graph) if made else part)
    if not lent:
        return program, found, calibration
    statistics = calibration.statistics.lent(lent)
    result = replace(program, parts=tuple(parts), weights=weights)
    return result, found, replace(calibration, statistics=statistics)


def turn(graph: fx.Graph, weights: WeightStore, node: fx.Node) -> Turned:
    """The convolution of sub-pixels before a transposed one, for those that read its result."""
    x, weight = node.args[:2]
    options, row = Options.of(node), node.target is aten.conv_transpose1d.default
    options = options.as_rows() if row else options
    margins = options.margins()
    with graph.inserting_before(node):
        if row:
            x = emit(graph, aten.unsqueeze.default, x, -2, like=node)
        stored = _stored(graph, weights, weight, subpixels, options)
        bias = node.args[2] if len(node.args) > 2 else None
        if isinstance(bias, fx.Node):
            bias = _stored(graph, weights, bias, repeated, options)
        ones = [1] * len(margins)
        conv = emit(graph, CONVS[len(ones) + 2], x, stored, bias, ones,
                    [pad for pad, _, _ in margins], ones, options.groups, like=node)  # fmt: skip
        result = _cropped(graph, _interleaved(graph, conv, options), margins)
        if row:
            result = emit(graph, aten.squeeze.dim, result, -2, like=node)
    substitute(node, result)
    return Turned(node, conv, result)


def _stored(
    graph: fx.Graph, weights: WeightStore, node: Any, make: Callable[..., torch.Tensor],
    options: Options,
) -> fx.Node:  # fmt: skip
    """A weight or a bias made anew, under a name that says how."""
    how = "x".join(map(str, options.stride)) + (f"g{options.groups}" if options.groups > 1 else "")
    name = f"{node.target}.phases{how}"
    fresh = derive(weights, [str(node.target)], partial(make, options=options), f"phases {how}")
    found: fx.Node = emit_weight(graph, weights, name, weights.get(name, fresh))
    return found


def subpixels(weight: torch.Tensor, options: Options) -> torch.Tensor:
    """(in, out/groups, *kernel) -> (groups · phases · out/groups, in/groups, *taps)."""
    count, taps, stride = len(options.kernel), options.taps, options.stride
    lack = [t * s - k for t, s, k in zip(taps, stride, options.kernel, strict=True)]
    ends = [end for amount in reversed(lack) for end in (0, amount)]
    pairs = [size for pair in zip(taps, stride, strict=True) for size in pair]
    rows, columns = weight.shape[0] // options.groups, weight.shape[1]
    whole = torch.nn.functional.pad(weight, ends)
    whole = whole.reshape(options.groups, rows, columns, *pairs)
    steps = [3 + 2 * place for place in range(count)]
    phases = [place + 1 for place in steps]
    turned = whole.flip(steps).permute(0, *phases, 2, 1, *steps)
    return turned.flatten(0, count + 1).contiguous()


def repeated(bias: torch.Tensor, options: Options) -> torch.Tensor:
    """(out,) -> the same for every phase."""
    rows = bias.reshape(options.groups, 1, -1)
    return rows.expand(-1, math.prod(options.stride), -1).flatten()


def _interleaved(graph: fx.Graph, conv: fx.Node, options: Options) -> fx.Node:
    """Phases in channels -> side by side.

    Channels go last for it: integer kernels write them so, and a step in one dimension is then a
    reshape.
    """
    count, grouped = len(options.stride), options.groups > 1
    places = [place for place, step in enumerate(options.stride) if step > 1]
    if not places:
        return conv
    sizes = [options.groups] * grouped + [options.stride[place] for place in places]
    first = 1 + count + grouped  # of the phases
    order = [0]
    for place in range(count):
        order += [1 + place, *(first + n for n, each in enumerate(places) if each == place)]
    order += [1 + count] * grouped + [first + len(places)]
    made = emit(graph, aten.permute.default, conv, [0, *range(2, count + 2), 1], like=conv)
    channels = value_of(conv).shape[1] // math.prod(sizes)
    made = emit(graph, aten.unflatten.int, made, -1, [*sizes, channels], like=conv)
    if order != sorted(order):
        made = emit(graph, aten.permute.default, made, order, like=conv)
    for place in [*places, *[count] * grouped]:
        made = emit(graph, aten.flatten.using_ints, made, 1 + place, 2 + place, like=conv)
    back = [0, count + 1, *range(1, count + 1)]
    found: fx.Node = emit(graph, aten.permute.default, made, back, like=conv)
    return found


def _cropped(
    graph: fx.Graph, node: fx.Node, margins: Sequence[tuple[int, int, int]]
) -> fx.Node:  # fmt: skip
    for axis, (_, start, end) in enumerate(margins, start=2):
        if start or end:
            stop = -end if end else torch.iinfo(torch.int64).max
            node = emit(graph, aten.slice.Tensor, node, axis, start, stop, like=node)
    return node
