"""What a pass may listen to while a program is sampled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from effuse.program import Part


class Watch:
    """What a reference session tells as it runs; this one does not listen."""

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """A call of the network starts, at step `index` of the schedule."""

    def enter(self, part: Part, values: Mapping[str, torch.Tensor]) -> None:
        """A part is about to run on `values`."""

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """One value that the part has computed."""
