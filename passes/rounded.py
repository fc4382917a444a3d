"""Weights on their grids: ranges by search, and rounding that looks at the layer's inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from effuse.graph import evaluate, value_of
from effuse.kernels.grids import nearest
from effuse.kernels.quantizers import Quantizer, scale_of_range
from effuse.passes.activation_scales import rounding_of
from effuse.passes.gptq import Hessian, gptq, unfolded
from effuse.passes.quantize_sites import Recipe
from effuse.passes.quantize_writer import Rounded, options_of, plain
from effuse.ranges import weight_scale_search

aten = torch.ops.aten

MEMORY = 1 << 29  # bytes of Hessians held at once

Weights = Mapping[str, torch.Tensor]
Recipes = Mapping[fx.Node, Recipe]
Probes = Sequence[Mapping[str, torch.Tensor]]
Progress = Callable[[str, int, int], None]


def searched(weight: torch.Tensor, how: Quantizer) -> Rounded:
    """The weight under the scales of least mean |w - ŵ|^2.4 (METHODS 0.2), block by block."""
    rows = weight.float().flatten(1)
    blocks = _blocks(rows, how)
    low, high = weight_scale_search(blocks, rounding_of(how))
    shape = (len(rows), -1) if how.granularity != "tensor" else ()
    return Rounded(rows, *scale_of_range(low.reshape(shape), high.reshape(shape), how))


def _blocks(rows: torch.Tensor, how: Quantizer) -> torch.Tensor:
    """(blocks, values) that share a scale."""
    if how.granularity == "group":
        return rows.reshape(-1, how.group)
    return rows.reshape(1, -1) if how.granularity == "tensor" else rows


def rounded_by_gptq(
    graph: fx.Graph, weights: Weights, start: Mapping[str, Rounded], recipes: Recipes,
    probes: Probes, progress: Progress, settle: Callable[..., torch.Tensor] = gptq,
) -> dict[str, Rounded]:  # fmt: skip
    """GPTQ of every layer but grouped convolutions, on its float inputs at the probes, by weight.

    `start` has the scales of weights; those of the others are their greatest magnitudes'. `settle`
    is `gptq`, or `compensated`, whose values are not on the grid yet.
    """
    layers = [site for site in recipes if _groups(site) == 1]
    found: dict[str, Rounded] = {}
    for chunk, hessians in hessians_by_chunk(graph, weights, layers, probes):
        for site in chunk:
            name, how = weight_name(site), recipes[site]
            first = start.get(name) or plain(weights[name], how)
            found[name] = _gptq(first, hessians[name], how.weight, settle)
            progress("GPTQ", len(found), len(layers))
    return found


def _gptq(
    start: Rounded, hessian: Hessian, how: Quantizer, settle: Callable[..., torch.Tensor]
) -> Rounded:
    values = settle(
        start.values, hessian, start.scale, how.group, partial(nearest, grid=how.grid), start.zero
    )
    return Rounded(values, start.scale, start.zero)


def hessians_by_chunk(
    graph: fx.Graph, weights: Weights, layers: Sequence[fx.Node], probes: Probes
) -> Iterator[tuple[list[fx.Node], dict[str, Hessian]]]:
    """So many layers at once as memory allows, with what their weights' inputs were at the probes.

    Layers are convolutions of one group and linears.
    """
    for chunk in _chunks(layers):
        yield chunk, _hessians(graph, weights, chunk, probes)


def _hessians(
    graph: fx.Graph, weights: Weights, layers: Sequence[fx.Node], probes: Probes
) -> dict[str, Hessian]:
    """Of the inputs that each weight meets."""
    found = {weight_name(site): Hessian(_columns(site)) for site in layers}
    readers: dict[fx.Node, list[fx.Node]] = {}
    for site in layers:
        readers.setdefault(site.args[0], []).append(site)  # type: ignore[arg-type]

    def observe(node: fx.Node, value: Any) -> None:
        for site in readers.get(node, ()):
            for rows in _inputs(site, value):
                found[weight_name(site)].add(rows)

    for probe in probes:
        evaluate(graph, weights, probe, observe)
    return found


def _inputs(site: fx.Node, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """The layer's inputs as rows of a matrix, (…, columns)."""
    if site.target is aten.linear.default:
        yield x
        return
    kernel = value_of(site.args[1]).shape[2:]  # type: ignore[arg-type]
    stride, padding, dilation, _ = options_of(site)
    batch = x if x.dim() == len(kernel) + 2 else x[None]
    yield from unfolded(batch.float(), kernel, stride, padding, dilation)


def _chunks(layers: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Layers whose Hessians fit into memory together; one weight's are never apart."""
    chunk: list[fx.Node] = []
    size = 0
    for site in sorted(layers, key=weight_name):
        needed = 4 * _columns(site) ** 2
        if chunk and size + needed > MEMORY and weight_name(chunk[-1]) != weight_name(site):
            yield chunk
            chunk, size = [], 0
        chunk.append(site)
        size += needed
    if chunk:
        yield chunk


def weight_name(site: fx.Node) -> str:
    """The name of a layer's weight."""
    return str(site.args[1].target)  # type: ignore[union-attr]


def _columns(site: fx.Node) -> int:
    columns: int = value_of(site.args[1])[0].numel()  # type: ignore[arg-type]
    return columns


def _groups(site: fx.Node) -> int:
    return 1 if site.target is aten.linear.default else options_of(site)[3]
