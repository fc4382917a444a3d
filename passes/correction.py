"""Correction of what a cache forecasts: per channel and step, F ≈ a ⊙ F̂ + b (DEC, METHODS 1.13).

Least squares over the calibration's features: a = cov(F, F̂) / var(F̂), b = E[F] - a E[F̂]. The
tables are weights of the reading variant, read by the step's number; steps that nothing is reused
at have a = 1, b = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.graph import emit, emit_input, emit_weight, fake_mode, inputs, value_of
from effuse.passes.features import Array, Features, channel_axis
from effuse.plan import STEP_INPUT, PlanStep, Slot
from effuse.weights import WeightStore

aten = torch.ops.aten

LEAST_SPREAD = 1e-12  # of a channel's forecast, relative to its power: below, only b is fitted

Table = tuple[torch.Tensor, torch.Tensor]  # a and b, (steps, channels) each
Adjust = Callable[[fx.Graph, Slot, fx.Node], fx.Node]


def corrections(features: Features, steps: Sequence[PlanStep], runs: int) -> dict[str, Table]:
    """The tables of each slot, fitted over `runs` whole trajectories."""
    return {slot: _table(features, node, steps, runs) for slot, node in features.nodes.items()}


def _table(features: Features, node: str, steps: Sequence[PlanStep], runs: int) -> Table:
    channels, count = features.channels[node], features.widths[node]
    scale, shift = np.ones((len(steps), count)), np.zeros((len(steps), count))

    def value(step: int) -> Array:
        kept = (features.by_step[step][run][node].double().numpy() for run in range(runs))
        return np.concatenate(list(kept))

    places = np.tile(channels, runs)
    for index, step in enumerate(steps):
        if step.sources:
            pairs = zip(step.weights or (1.0,), step.sources, strict=False)
            forecast = np.sum([weight * value(source) for weight, source in pairs], axis=0)
            scale[index], shift[index] = least_squares(forecast, value(index), places, count)
    return torch.from_numpy(scale).float(), torch.from_numpy(shift).float()


def least_squares(x: Array, y: Array, channels: Array, count: int) -> tuple[Array, Array]:
    """a and b with the least Σ (y - a x - b)², for each of `count` channels; (count,) each."""

    def mean(values: Array) -> Array:
        return np.bincount(channels, values, count) / np.maximum(
            np.bincount(channels, None, count), 1
        )

    mean_x, mean_y = mean(x), mean(y)
    spread = mean(x * x) - mean_x**2
    fitted = spread > LEAST_SPREAD * mean(x * x)
    slope = np.where(fitted, (mean(x * y) - mean_x * mean_y) / np.where(fitted, spread, 1.0), 1.0)
    return slope, mean_y - slope * mean_x


def corrector(tables: Mapping[str, Table], weights: WeightStore) -> Adjust:
    """What writes a slot's correction behind its forecast; its tables become weights."""

    def adjust(graph: fx.Graph, slot: Slot, forecast: fx.Node) -> fx.Node:
        scale, shift = (
            _row(graph, weights, f"correction.{slot.name}.{kind}", table, forecast)
            for kind, table in zip(("scale", "shift"), tables[slot.name], strict=True)
        )
        scaled = emit(graph, aten.mul.Tensor, forecast, scale, like=forecast)
        corrected: fx.Node = emit(graph, aten.add.Tensor, scaled, shift, like=forecast)
        return corrected

    return adjust


def _row(
    graph: fx.Graph, weights: WeightStore, name: str, table: torch.Tensor, like: fx.Node
) -> Any:
    """The step's row of a table, shaped to broadcast over `like`."""
    dims = value_of(like).dim()
    shape = [1] * dims
    shape[channel_axis(dims)] = table.shape[1]
    stored = emit_weight(graph, weights, name, table.to(value_of(like).dtype))
    row = emit(graph, aten.index_select.default, stored, 0, _step(graph), like=like)
    return emit(graph, aten.view.default, row, shape, like=like)


def _step(graph: fx.Graph) -> fx.Node:
    """The input that is the step's number."""
    for node in inputs(graph):
        if node.target == STEP_INPUT:
            return node
    zero = torch.zeros(1, dtype=torch.int64)
    return emit_input(graph, STEP_INPUT, fake_mode(graph).from_tensor(zero, static_shapes=True))
