"""The rows of the low-rank benchmark, as data: a layer in a format, by methods and by ranks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from low_rank_layers import Layer
from quantize_rows import LABELS, NO_BOUND

import effuse
from effuse.passes import LowRank, Pass, Quantize, Smooth

FORMATS = ("w4a4", "w4a8", "nvfp4", *LABELS)
RANK = 32
RANKS = (8, 16, 32, 64)  # and 0, which is the format alone
RANKED = ("w4a4", "w4a8")
MOST = 1_500_000  # numbers in a weight that is tried at every rank


@dataclass(frozen=True)
class Method:
    """What is done about a format's error."""

    name: str
    smooth: bool = False
    branch: bool = False
    gptq: bool = False
    aware: bool = False  # of the branch, where smoothing is searched


METHODS = (
    Method("plain"),
    Method("smooth", smooth=True),
    Method("GPTQ", gptq=True),
    Method("low-rank", branch=True),
    Method("low-rank + GPTQ", branch=True, gptq=True),
    Method("smooth + low-rank", smooth=True, branch=True),
    Method("smooth + low-rank + GPTQ", smooth=True, branch=True, gptq=True),
    Method("smooth for the branch + low-rank", smooth=True, branch=True, aware=True),
)
PLAIN, SMOOTH, BRANCH, BOTH = METHODS[0], METHODS[1], METHODS[3], METHODS[5]
WITHOUT = {BRANCH: PLAIN, BOTH: SMOOTH}  # the methods of rank 0


@dataclass(frozen=True)
class Row:
    """One layer in one format by one method."""

    layer: Layer
    format: str
    method: Method
    rank: int = RANK

    @property
    def label(self) -> str:
        """The format's name."""
        return LABELS.get(self.format, self.format)

    @property
    def name(self) -> str:
        """Layer, format, method, and the rank where it is another."""
        rank = f", rank {self.rank}" if self.rank != RANK else ""
        return f"{self.layer.name}: {self.label} {self.method.name}{rank}"

    @property
    def named(self) -> dict[str, Any]:
        """What a result says of it."""
        return {"name": self.name, "layer": self.layer.name, "format": self.format,
                "method": self.method.name, "rank": self.rank}  # fmt: skip

    @property
    def described(self) -> str:
        """The passes, as data."""
        return str(effuse.Config(passes=self.passes).data()["passes"])

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes; the layer is the first and the last of its network, hence `edges`."""
        smooth = Smooth(format=self.format, rank=self.rank if self.method.aware else 0)
        found: list[Pass] = [smooth] if self.method.smooth else []
        if self.method.branch:
            found.append(LowRank(rank=self.rank, format=self.format, edges=True))
        rounding = "gptq" if self.method.gptq else "nearest"
        quantize = Quantize(self.format, rounding=rounding, min_sqnr_db=NO_BOUND, edges=True)  # type: ignore[arg-type]
        return *found, quantize


def rows(layers: Sequence[Layer], only: str = "") -> list[Row]:
    """All rows, by layer, whose name the expression `only` finds, and the plain ones of those."""
    found = [row for layer in layers for row in of_layer(layer)]
    wanted = {(row.layer, row.format) for row in found if re.search(only, row.name)}
    return [row for row in found if re.search(only, row.name)
            or (row.method == PLAIN and (row.layer, row.format) in wanted)]  # fmt: skip


def of_layer(layer: Layer) -> list[Row]:
    """Every method in every format, and the other ranks in some."""
    found = [Row(layer, format, method) for format in FORMATS for method in METHODS]
    if layer.inner * layer.outer * max(1, layer.kernel**2) > MOST:
        return found
    return found + [
        Row(layer, format, method, rank)
        for format in RANKED for method in WITHOUT for rank in RANKS if rank != RANK
    ]  # fmt: skip
