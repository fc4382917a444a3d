"""Scales and zero points of static activations, as nodes: one for all steps, or looked up by step.

By step (TFMQ's finite set calibration, METHODS 1.3): each group of timesteps has its own range; the
tables are read with the group of the step index, which one more table gives.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import fx

from effuse.graph import emit, emit_input, emit_weight, fake_mode, inputs
from effuse.kernels.quantizers import Quantizer, scale_of_range
from effuse.plan import STEP_INPUT
from effuse.ranges import Levels, Rounding, Uniform
from effuse.statistics import Statistics, step_ranges
from effuse.step_groups import group_of
from effuse.weights import WeightStore

aten = torch.ops.aten


@dataclass
class Scale:
    """Nodes of a scale and its zero point (None: symmetric); its numbers, () or (groups,)."""

    scale: fx.Node
    zero: fx.Node | None
    numbers: torch.Tensor


def rounding_of(quantizer: Quantizer) -> Rounding:
    """How range setters see a quantizer."""
    grid = quantizer.grid
    if grid.kind == "int":
        return Uniform(grid.bits, quantizer.symmetric)
    return Levels(tuple(grid.levels().tolist()))


@dataclass
class Ranges:
    """Where the ranges of a part's values come from.

    Args:
        setter: a name in `ranges.SETTERS`.
        steps: of the schedule; 0 without one.
        planned: the groups of timesteps in which the plan runs the part.
    """

    part: str
    statistics: Statistics
    setter: str = "minmax"
    steps: int = 0
    planned: Collection[int] = ()
    _known: dict[tuple[str, str], tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def seen(self, node: fx.Node) -> bool:
        """Whether calibration has a range of the value."""
        return (self.part, node.name) in self.statistics.ranges

    def of(self, node: fx.Node, how: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
        """The least and greatest value to cover: scalars, or (groups,) where ranges go by step.

        Raises:
            CalibrationError: a group of timesteps was never recorded.
        """
        key = (node.name, str(how))
        if key not in self._known:
            self._known[key] = self._find(node, how)
        return self._known[key]

    def _find(self, node: fx.Node, how: Quantizer) -> tuple[torch.Tensor, torch.Tensor]:
        find = rounding_of(how)
        if how.ranges == "step":
            return step_ranges(
                self.statistics, self.part, node.name, self.setter, find, self.planned
            )
        low, high = self.statistics.range_of((self.part, node.name), self.setter, find)
        return torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)


@dataclass
class Scales:
    """Writes scales into one graph; the group of the step is looked up once."""

    graph: fx.Graph
    weights: WeightStore
    ranges: Ranges
    _group: fx.Node | None = None

    def of(self, measured: fx.Node, how: Quantizer) -> Scale:
        """The scale of a value whose range was seen at `measured`, at the insertion point."""
        low, high = self.ranges.of(measured, how)
        numbers, zero = scale_of_range(low, high, how)
        name = f"range.{self.ranges.part}.{measured.name}"
        if how.ranges == "step":
            name += ".by_step"
        read = partial(self._read, like=measured)
        scale = read(f"{name}.scale", numbers, how)
        return Scale(scale, None if zero is None else read(f"{name}.zero", zero, how), numbers)

    def _read(
        self, name: str, values: torch.Tensor, how: Quantizer, like: fx.Node | None = None
    ) -> fx.Node:
        if str(how.grid) != "uint8":
            name = f"{name}.{how.grid}"
        return self.looked_up(name, values, by_step=how.ranges == "step", like=like)

    def looked_up(
        self, name: str, table: torch.Tensor, *, by_step: bool, like: fx.Node | None = None
    ) -> fx.Node:
        """A stored tensor; by step, the row of it that belongs to the step's group."""
        if not by_step:
            return emit_weight(self.graph, self.weights, name, table)
        group = self._step_group()
        stored = emit_weight(self.graph, self.weights, name, table)
        row = emit(self.graph, aten.index_select.default, stored, 0, group, like=like)
        node: fx.Node = emit(self.graph, aten.squeeze.dim, row, 0, like=like)
        return node

    def front(self) -> fx.Node:
        """The last of the nodes that every value may come behind."""
        return self._group or inputs(self.graph)[-1]

    def _step_group(self) -> fx.Node:
        """The group of timesteps that the step belongs to, (1,) int64, in front of all calls."""
        if self._group is not None:
            return self._group
        groups = self.ranges.statistics.groups
        steps = self.ranges.steps
        of_step = torch.tensor([group_of(index, steps, groups) for index in range(steps)])
        step = next((node for node in inputs(self.graph) if node.target == STEP_INPUT), None)
        if step is None:
            index = torch.zeros(1, dtype=torch.int64)
            fake = fake_mode(self.graph).from_tensor(index, static_shapes=True)
            step = emit_input(self.graph, STEP_INPUT, fake)
        with self.graph.inserting_after(inputs(self.graph)[-1]):
            stored = emit_weight(self.graph, self.weights, f"groups.{steps}.{groups}", of_step)
        with self.graph.inserting_after(stored):
            self._group = emit(self.graph, aten.index_select.default, stored, 0, step)
        return self._group
