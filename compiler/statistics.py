"""Mergeable statistics of activations, by group of timesteps; their size is the graph's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

Key = tuple[str, str]  # part, node


@dataclass
class Ranges:
    """Least and greatest value of a tensor in each group of timesteps (float64, (groups,))."""

    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def empty(cls, groups: int) -> Ranges:
        """The neutral element of `merge`."""
        inf = torch.full((groups,), float("inf"), dtype=torch.float64)
        return cls(inf, -inf)

    def add(self, group: int, tensor: torch.Tensor) -> None:
        """Take in one tensor of that group.

        Raises:
            ValueError: it holds NaN or infinite values.
        """
        if tensor.numel() == 0:
            return
        low, high = (bound.item() for bound in tensor.aminmax())  # NaN shows in both
        if not math.isfinite(low) or not math.isfinite(high):
            raise ValueError("a range cannot hold NaN or infinite values")
        self.low[group] = min(self.low[group].item(), low)
        self.high[group] = max(self.high[group].item(), high)

    def merge(self, other: Ranges) -> Ranges:
        """The ranges of both."""
        return Ranges(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    @property
    def overall(self) -> tuple[float, float]:
        """Least and greatest value over all groups."""
        return self.low.min().item(), self.high.max().item()


@dataclass
class Statistics:
    """Ranges by (part, node), over `groups` equal stretches of the schedule."""

    groups: int = 10
    ranges: dict[Key, Ranges] = field(default_factory=dict)

    def add(self, key: Key, group: int, tensor: torch.Tensor) -> None:
        """Take in one tensor."""
        self.ranges.setdefault(key, Ranges.empty(self.groups)).add(group, tensor)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both runs together; associative and commutative.

        Raises:
            ValueError: the two have different groups.
        """
        if self.groups != other.groups:
            raise ValueError(
                f"statistics of {self.groups} and of {other.groups} groups do not merge"
            )
        nothing = Ranges.empty(self.groups)
        merged = {
            key: self.ranges.get(key, nothing).merge(other.ranges.get(key, nothing))
            for key in self.ranges | other.ranges
        }
        return Statistics(self.groups, merged)


@dataclass
class Probes:
    """At most 2 · `limit` of the inputs that a part was run on, spread evenly over the runs."""

    limit: int
    kept: list[Mapping[str, torch.Tensor]] = field(default_factory=list)
    runs: int = 0
    every: int = 1

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """The part is run on `values`."""
        if self.runs % self.every == 0:
            self.kept.append({name: value.clone() for name, value in values.items()})
            if len(self.kept) >= 2 * self.limit:
                self.kept = self.kept[::2]
                self.every *= 2
        self.runs += 1

    def chosen(self) -> tuple[Mapping[str, torch.Tensor], ...]:
        """At most `limit` of them, the first and the last kept ones included."""
        count, last = min(self.limit, len(self.kept)), len(self.kept) - 1
        return tuple(self.kept[index * last // max(1, count - 1)] for index in range(count))


@dataclass(frozen=True)
class Calibration:
    """What a run over calibration data leaves: statistics, and a few whole inputs of each part."""

    statistics: Statistics
    probes: Mapping[str, tuple[Mapping[str, torch.Tensor], ...]]
    calls: int
