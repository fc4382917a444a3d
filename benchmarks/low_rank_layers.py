"""Wide layers as trained networks have them: a decaying spectrum, and inputs with loud channels.

    W  =  Q₁ diag(i^-a) Q₂ᵀ,  scaled to a mean square of 1 / in          a = DECAY
    x  =  (z M + e) / √2 · loud                       z, e ~ N(0, 1), z of in / MIX channels

Q₁ and Q₂ are random with orthonormal columns; on the trained examples a is 0.2 to 0.5. M mixes z
into all channels, so that they are correlated, each with variance 1. `loud` is 1 but for SHARE of
the channels, drawn at random, which are multiplied by 10 to 100, uniform in the logarithm. The
weight's columns there are as all others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

DECAY = 0.3  # of singular values: the first 32 of 1152 hold a fifth of the energy
MIX = 8
SHARE, LEAST, MOST = 0.01, 10.0, 100.0  # of the channels that stand out
CALLS = 4  # of calibration: as many as it keeps whole
POSITIONS = 2048  # tokens of a call, or pixels
SIDE = 32  # of images


@dataclass(frozen=True)
class Layer:
    """A linear layer, or a convolution with `kernel` > 0, with seeded weights and inputs."""

    inner: int
    outer: int
    kernel: int = 0
    positions: int = POSITIONS

    @property
    def name(self) -> str:
        """Kind and sizes."""
        if self.kernel:
            return f"conv {self.inner}x{self.outer}x{self.kernel}x{self.kernel}"
        return f"linear {self.inner}->{self.outer}"

    @cached_property
    def module(self) -> nn.Module:
        """The layer alone, in eval mode, without bias."""
        made = (
            nn.Conv2d(self.inner, self.outer, self.kernel, padding=self.kernel // 2, bias=False)
            if self.kernel
            else nn.Linear(self.inner, self.outer, bias=False)
        )
        made.weight.data = decaying(self.outer, made.weight[0].numel()).view_as(made.weight)
        return Alone(made).eval()

    def inputs(self, seed: int) -> Tensor:
        """x of one call, (positions, in) or (images, in, SIDE, SIDE)."""
        generator = torch.Generator().manual_seed(seed)
        mixer = normal(self.inner // MIX, self.inner, seed=1) / (self.inner // MIX) ** 0.5
        sources = torch.randn(self.positions, len(mixer), generator=generator)
        own = torch.randn(self.positions, self.inner, generator=generator)
        x: Tensor = (sources @ mixer + own) / 2**0.5 * loudness(self.inner)
        return x.T.reshape(self.inner, -1, SIDE, SIDE).transpose(0, 1) if self.kernel else x

    def calibration(self) -> Iterator[dict[str, Tensor]]:
        """The inputs of calibration; none of them is measured on."""
        return ({"x": self.inputs(seed)} for seed in range(10, 10 + CALLS))

    @cached_property
    def judged(self) -> Tensor:
        """The inputs that rows are measured on."""
        return self.inputs(99)

    @cached_property
    def truth(self) -> Tensor:
        """The float layer's output on them."""
        with torch.no_grad():
            found: Tensor = self.module(self.judged)
        return found

    @cached_property
    def loud_share(self) -> float:
        """Of the output's power, what the loud channels bring in on the judged inputs."""
        loud = (loudness(self.inner) > 1).float()
        mask = loud[:, None, None] if self.kernel else loud
        with torch.no_grad():
            part = self.module(self.judged * mask)
        return float(part.square().sum() / self.truth.square().sum())


class Alone(nn.Module):
    """A network that is one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        found: Tensor = self.layer(x)
        return found


def normal(rows: int, columns: int, seed: int) -> Tensor:
    """N(0, 1), (rows, columns)."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def decaying(rows: int, columns: int) -> Tensor:
    """W, (rows, columns): its singular values fall with i^-DECAY."""
    rank = min(rows, columns)
    values = torch.arange(1, rank + 1, dtype=torch.float32) ** -DECAY
    left, _ = torch.linalg.qr(normal(rows, rank, seed=2))
    right, _ = torch.linalg.qr(normal(columns, rank, seed=3))
    matrix = (left * values) @ right.T
    found: Tensor = matrix * (matrix.numel() / columns) ** 0.5 / matrix.norm()
    return found


def loudness(channels: int) -> Tensor:
    """The factor of each channel, (channels,)."""
    generator = torch.Generator().manual_seed(4)
    chosen = torch.randperm(channels, generator=generator)[: max(1, round(SHARE * channels))]
    found = torch.ones(channels)
    drawn = torch.rand(len(chosen), generator=generator)
    found[chosen] = LEAST * (MOST / LEAST) ** drawn
    return found


WIDE = (Layer(1152, 1152), Layer(320, 320, 3), Layer(1152, 4608), Layer(3072, 3072))
SMALL = (Layer(128, 128, positions=64), Layer(64, 64, 3, positions=SIDE**2))  # of --smoke
