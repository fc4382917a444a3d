"""Mergeable statistics of activations, by group of timesteps; their size is the graph's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch

from effuse.errors import CalibrationError
from effuse.ranges import SETTERS, Histogram, Range, Rounding, extremes

Key = tuple[str, str]  # part, node
V = TypeVar("V")


@dataclass(frozen=True)
class Needs:
    """What calibration keeps of each value beside its least and greatest one.

    Args:
        histograms: 16 KiB for each group of timesteps that the value was seen in; for the setters
            `mse`, `percentile` and `entropy`.
        channels: 16 bytes for each group and channel; for smoothing and bias correction.
    """

    histograms: bool = False
    channels: bool = False

    def __or__(self, other: Needs) -> Needs:
        """What satisfies both."""
        return Needs(self.histograms or other.histograms, self.channels or other.channels)


RANGES_ONLY = Needs()


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
        low, high = extremes(tensor)
        self.low[group] = min(self.low[group].item(), low)
        self.high[group] = max(self.high[group].item(), high)

    def merge(self, other: Ranges) -> Ranges:
        """The ranges of both."""
        return Ranges(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

    @property
    def overall(self) -> tuple[float, float]:
        """Least and greatest value over all groups."""
        return self.low.min().item(), self.high.max().item()

    @property
    def unseen(self) -> tuple[int, ...]:
        """The groups that hold no value."""
        return tuple(int(group) for group in (self.low > self.high).nonzero())


@dataclass
class Channels:
    """Per channel of a tensor: least and greatest value, sum and count in each group of timesteps.

    `low`, `high` are float32, `total` float64, all (groups, channels); `count` int64, (groups,).
    Sums of runs merge to float64's rounding, all else exactly.
    """

    axis: int  # of the channels: -3 of images, else -1
    low: torch.Tensor
    high: torch.Tensor
    total: torch.Tensor
    count: torch.Tensor

    @classmethod
    def empty(cls, groups: int, channels: int, axis: int) -> Channels:
        """The neutral element of `merge`."""
        inf = torch.full((groups, channels), float("inf"))
        zeros = torch.zeros((groups, channels), dtype=torch.float64)
        return cls(axis, inf, -inf, zeros, torch.zeros(groups, dtype=torch.int64))

    def add(self, group: int, tensor: torch.Tensor) -> None:
        """Take in one tensor of that group."""
        if tensor.numel() == 0:
            return
        rows = tensor.detach().movedim(self.axis, -1).reshape(-1, tensor.shape[self.axis])
        low, high = rows.aminmax(dim=0)
        self.low[group] = torch.minimum(self.low[group], low.float())
        self.high[group] = torch.maximum(self.high[group], high.float())
        self.total[group] += rows.sum(0, dtype=torch.float64)
        self.count[group] += len(rows)

    def merge(self, other: Channels) -> Channels:
        """The channels of both."""
        return Channels(
            self.axis,
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
            self.total + other.total,
            self.count + other.count,
        )

    @property
    def absmax(self) -> torch.Tensor:
        """Greatest magnitude of each channel over all groups; (channels,) float32."""
        return torch.maximum(-self.low.amin(0), self.high.amax(0))

    @property
    def mean(self) -> torch.Tensor:
        """Mean of each channel over all that was seen; (channels,) float64."""
        return self.total.sum(0) / self.count.sum().clamp(min=1)


@dataclass
class Statistics:
    """What was seen of each (part, node), over `groups` equal stretches of the schedule."""

    groups: int = 10
    ranges: dict[Key, Ranges] = field(default_factory=dict)
    needs: Needs = RANGES_ONLY
    histograms: dict[Key, dict[int, Histogram]] = field(default_factory=dict)  # by group
    channels: dict[Key, Channels] = field(default_factory=dict)
    calls: int = 0  # that were recorded

    def add(self, key: Key, group: int, tensor: torch.Tensor, axis: int = -1) -> None:
        """Take in one tensor, whose channels are along `axis`: -3 in images, else -1.

        Raises:
            ValueError: it holds NaN or infinite values.
        """
        self.ranges.setdefault(key, Ranges.empty(self.groups)).add(group, tensor)
        if self.needs.histograms and tensor.numel():
            found = self.histograms.setdefault(key, {})
            found[group] = Histogram.of(tensor).merge(found.get(group, Histogram.empty()))
        if self.needs.channels and tensor.dim():
            empty = Channels.empty(self.groups, tensor.shape[axis], axis)
            self.channels.setdefault(key, empty).add(group, tensor)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both runs together; associative and commutative.

        Raises:
            ValueError: the two have different groups, or keep different things.
        """
        if self.groups != other.groups:
            raise ValueError(
                f"statistics of {self.groups} and of {other.groups} groups do not merge"
            )
        if self.needs != other.needs:
            raise ValueError(f"statistics with {self.needs} and with {other.needs} do not merge")
        return Statistics(
            self.groups,
            {
                key: self._ranges(key).merge(other._ranges(key))
                for key in self.ranges | other.ranges
            },
            self.needs,
            _merged_histograms(self.histograms, other.histograms),
            _merged_channels(self.channels, other.channels),
            self.calls + other.calls,
        )

    def lent(self, lent: Mapping[Key, Key]) -> Statistics:
        """With what was seen of one value known of another too: new key -> known key."""
        return replace(
            self,
            ranges=_with(self.ranges, lent),
            histograms=_with(self.histograms, lent),
            channels=_with(self.channels, lent),
        )

    def _ranges(self, key: Key) -> Ranges:
        return self.ranges.get(key, Ranges.empty(self.groups))

    def histogram(self, key: Key, group: int | None = None) -> Histogram:
        """The histogram of one group, or of all together; empty where nothing was seen."""
        found = self.histograms.get(key, {})
        if group is not None:
            return found.get(group, Histogram.empty())
        total = Histogram.empty()
        for each in found.values():
            total = total.merge(each)
        return total

    def range_of(
        self, key: Key, setter: str = "minmax", rounding: Rounding | None = None,
        group: int | None = None,
    ) -> Range:  # fmt: skip
        """The range that a setter (a name in `ranges.SETTERS`) gives, of one group or over all.

        Raises:
            CalibrationError: the value was not seen, or without the histogram that this takes.
        """
        ranges = self._ranges(key)
        if setter == "minmax" and len(ranges.unseen) < self.groups:
            low, high = ranges.low, ranges.high
            return ranges.overall if group is None else (low[group].item(), high[group].item())
        if len(ranges.unseen) < self.groups and key not in self.histograms:
            raise CalibrationError(
                f"ranges={setter!r}: calibration kept no histogram of {key[1]}; the pass has to "
                "ask for them: needs = Needs(histograms=True)"
            )
        return SETTERS[setter](self.histogram(key, group), rounding)


def _with(seen: Mapping[Key, V], lent: Mapping[Key, Key]) -> dict[Key, V]:
    return {**seen, **{own: seen[known] for own, known in lent.items() if known in seen}}


def _merged_histograms(
    one: Mapping[Key, Mapping[int, Histogram]], other: Mapping[Key, Mapping[int, Histogram]]
) -> dict[Key, dict[int, Histogram]]:
    result: dict[Key, dict[int, Histogram]] = {key: dict(found) for key, found in one.items()}
    for key, found in other.items():
        own = result.setdefault(key, {})
        for group, histogram in found.items():
            own[group] = own.get(group, Histogram.empty()).merge(histogram)
    return result


def _merged_channels(
    one: Mapping[Key, Channels], other: Mapping[Key, Channels]
) -> dict[Key, Channels]:
    found = {}
    for key in {**one, **other}:
        first, *rest = [each[key] for each in (one, other) if key in each]
        groups, channels = first.low.shape
        neutral = Channels.empty(groups, channels, first.axis)
        found[key] = first.merge(rest[0] if rest else neutral)  # shares nothing with either
    return found


def check_groups(
    statistics: Statistics, part: str, node: str, needed: Collection[int] | None = None
) -> None:
    """Refuse parameters by group of timesteps where a group has seen nothing of the value.

    Args:
        statistics: of the calibration.
        part: the part that computes the value.
        node: the value's name.
        needed: the groups that the part runs in; None: all.

    Raises:
        CalibrationError: calibration was too short; it names the groups.
    """
    ranges = statistics.ranges.get((part, node), Ranges.empty(statistics.groups))
    groups = range(statistics.groups) if needed is None else needed
    missing = sorted(set(ranges.unseen) & set(groups))
    if missing:
        raise CalibrationError(
            f"calibration is too short for the step groups: {node} of {part} was not recorded in "
            f"{'group' if len(missing) == 1 else 'groups'} {', '.join(map(str, missing))} of "
            f"{statistics.groups} (0 to {statistics.groups - 1}; {statistics.calls} calls were "
            "recorded); use fewer step_groups, or calibrate over more steps of the schedule: a "
            "longer run, or calibration_steps='all'"
        )


def step_ranges(
    statistics: Statistics,
    part: str,
    node: str,
    setter: str = "minmax",
    rounding: Rounding | None = None,
    needed: Collection[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each group of timesteps, (groups,) float64 twice (TFMQ's finite sets, 1.3).

    A group that is not `needed` and saw nothing has the range over all groups: it is there for
    calls that no plan foresaw.

    Raises:
        CalibrationError: a needed group (None: any group) saw nothing.
    """
    check_groups(statistics, part, node, needed)
    key = (part, node)
    unseen = statistics.ranges[key].unseen
    overall = statistics.range_of(key, setter, rounding) if unseen else (0.0, 0.0)
    found = [
        overall if group in unseen else statistics.range_of(key, setter, rounding, group)
        for group in range(statistics.groups)
    ]
    low, high = torch.tensor(found, dtype=torch.float64).unbind(1)
    return low, high


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
