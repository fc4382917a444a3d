"""AdaRound: learn for each value of a weight which of its two neighbours on the grid it takes.

    Ŵ = low + (high - low) · h(V)      h(V) = clip(σ(V / s)(ζ - γ) + γ, 0, 1)      γ = -0.1, ζ = 1.1

low and high are the neighbours; s is their distance in units of the scale, so that V moves at one
learning rate in every binade of a float grid ("scale-aware", METHODS 1.10); on an integer grid
s = 1, which is the published form (METHODS 0.3). V starts where Ŵ is the clamped weight. Under Adam
s matters little: on small e2m1 and e3m0 units the loss left was within a few hundredths of s = 1's.
Source: Nagel et al., Up or Down?, 2020; q-diffusion `qdiff/adaptive_rounding.py`; FP4DiT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from effuse.passes.gptq import per_column

GAMMA, ZETA = -0.1, 1.1  # h reaches 0 and 1 at finite V


class Rounding:
    """The learnable rounding of one weight.

    Attributes:
        v: the parameter V, shaped as the weight.
        low, high: the neighbours of each value, real, float32; both on the grid.

    Args:
        weight: (rows, ...), seen as (rows, columns); or what `gptq.compensated` made of it, to
            start from GPTQ's rounding instead of the nearest.
        scale: a scalar, (rows, 1) or (rows, groups), positive.
        levels: the grid's values in units of the scale, sorted.
        group: consecutive columns that share a scale; 0: all of them.
        zero: of an integer grid, the level that stands for 0, shaped as `scale`; None: 0.

    Raises:
        PassError: the scales do not fit the columns.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, levels: Tensor, group: int = 0,
        zero: Tensor | None = None,
    ) -> None:  # fmt: skip
        flat = weight.detach().float().flatten(1)
        scales = per_column(scale, flat.shape[1], group)
        zeros = 0.0 if zero is None else per_column(zero, flat.shape[1], group)
        levels = levels.to(flat)
        codes = (flat / scales + zeros).clamp(levels[0], levels[-1])
        below = (
            torch.searchsorted(levels, codes.contiguous(), right=True)
            .sub(1)
            .clamp(max=len(levels) - 2)
        )
        low, high = levels[below], levels[below + 1]
        share = (codes - low) / (high - low)
        self.span = (high - low).view(weight.shape)
        self.low = ((low - zeros) * scales).view(weight.shape)
        self.high = ((high - zeros) * scales).view(weight.shape)
        start = -torch.log((ZETA - GAMMA) / (share.view(weight.shape) - GAMMA) - 1)
        self.v = nn.Parameter(self.span * start)

    def h(self) -> Tensor:
        """How far each value is on its way from low to high, 0 to 1."""
        return (torch.sigmoid(self.v / self.span) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight that training sees, differentiable in V."""
        return torch.lerp(self.low, self.high, self.h())

    def hard(self) -> Tensor:
        """The weight on its grid: high where V ≥ 0; before training, round to nearest."""
        return torch.where(self.v.detach() >= 0, self.high, self.low)

    def regulariser(self, beta: float) -> Tensor:
        """Σ (1 - |2h - 1|^β): how many values have not settled on a neighbour."""
        return (1 - (2 * self.h() - 1).abs().pow(beta)).sum()
