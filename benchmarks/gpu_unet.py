"""SDXL's UNet for gpu.py, written out in plain PyTorch: official widths, fewer transformer blocks.

320, 640 and 1280 channels, two residual blocks a level (three on the way up), transformers of
`depths` blocks at each level: (0, 2, 10) in SDXL's 2.6 billion weights, (0, 1, 2) in the quarter
of its 70 blocks that is the default here. Source: Stability AI, SDXL (Podell et al. 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from gpu_blocks import Inputs, embedder, sinusoids
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """What a UNet is as large as; the defaults are SDXL's at 1024 by 1024 pixels, but the depths.

    Args:
        batch: 2 is one picture with guidance.
    """

    channels: tuple[int, ...] = (320, 640, 1280)
    depths: tuple[int, ...] = (0, 1, 2)
    head: int = 64
    prompt: int = 2048
    added: int = 2816
    batch: int = 2
    side: int = 128
    tokens: int = 77
    groups: int = 32


SDXL = Shape()


class Residual(nn.Module):
    """Two convolutions with the timestep's embedding between them, and a shortcut."""

    def __init__(self, inner: int, outer: int, time: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inner), nn.GroupNorm(groups, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.time = nn.Linear(time, outer)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """The image (batch, channels, height, width), changed."""
        y = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(temb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class Attention(nn.Module):
    """Attention of tokens to themselves, or to the prompt."""

    def __init__(self, width: int, source: int, head: int) -> None:
        super().__init__()
        self.heads = width // head
        self.q = nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(source, width, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        given = ((self.q, x), (self.k, source), (self.v, source))
        q, k, v = (layer(of).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer, of in given)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A transformer block: self-attention, cross-attention, GEGLU feed-forward layers."""

    def __init__(self, width: int, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.own = Attention(width, width, shape.head)
        self.cross = Attention(width, shape.prompt, shape.head)
        self.wide, self.narrow = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """(batch, tokens, width)."""
        n = self.norm1(x)
        x = x + self.own(n, n)
        x = x + self.cross(self.norm2(x), prompt)
        hidden, gate = self.wide(self.norm3(x)).chunk(2, -1)
        return x + self.narrow(hidden * F.gelu(gate))


class Transformer(nn.Module):
    """Some blocks over the pixels of an image."""

    def __init__(self, width: int, depth: int, shape: Shape) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(shape.groups, width, eps=1e-6)
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, shape) for _ in range(depth))

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        """The image, changed."""
        tokens = self.first(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.blocks:
            tokens = block(tokens, prompt)
        return x + self.last(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class Stage(nn.Module):
    """A residual block, and a transformer where the level has one."""

    def __init__(self, inner: int, level: int, shape: Shape) -> None:
        super().__init__()
        width = shape.channels[level]
        self.residual = Residual(inner, width, 4 * shape.channels[0], shape.groups)
        depth = shape.depths[level]
        self.transformer = Transformer(width, depth, shape) if depth else None

    def forward(self, x: Tensor, temb: Tensor, prompt: Tensor) -> Tensor:
        """The image, changed."""
        x = self.residual(x, temb)
        return x if self.transformer is None else self.transformer(x, prompt)


def skips(shape: Shape) -> Iterator[int]:
    """The channels that the way down leaves for the way up, in order."""
    yield shape.channels[0]
    for level, width in enumerate(shape.channels):
        yield from (width, width)
        if level + 1 < len(shape.channels):
            yield width


class Unet(nn.Module):
    """SDXL's denoiser."""

    def __init__(self, shape: Shape = SDXL) -> None:
        super().__init__()
        first, last, levels = shape.channels[0], shape.channels[-1], range(len(shape.channels))
        self.time, self.added = embedder(first, 4 * first), embedder(shape.added, 4 * first)
        self.start = nn.Conv2d(4, first, 3, padding=1)
        before = (first, *shape.channels)
        self.down = nn.ModuleList(
            Stage(before[level] if n == 0 else shape.channels[level], level, shape)
            for level in levels for n in range(2)
        )  # fmt: skip
        self.shrink = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride=2, padding=1) for width in shape.channels[:-1]
        )
        self.middle = Stage(last, len(levels) - 1, shape)
        self.bottom = Residual(last, last, 4 * first, shape.groups)
        left, width = list(skips(shape)), last
        self.up = nn.ModuleList()
        for level in reversed(levels):
            for _ in range(3):
                self.up.append(Stage(width + left.pop(), level, shape))
                width = shape.channels[level]
        self.grow = nn.ModuleList(nn.Conv2d(w, w, 3, padding=1) for w in shape.channels[:0:-1])
        self.norm, self.end = nn.GroupNorm(shape.groups, first), nn.Conv2d(first, 4, 3, padding=1)
        self.first = first

    def forward(self, sample: Tensor, timestep: Tensor, prompt: Tensor, added: Tensor) -> Tensor:
        """One step: sample (batch, 4, side, side) -> the same shape."""
        temb = self.time(sinusoids(timestep, self.first).to(sample.dtype)) + self.added(added)
        x = self.start(sample)
        kept = [x]
        for n, stage in enumerate(self.down):
            x = stage(x, temb, prompt)
            kept.append(x)
            if n % 2 and n // 2 < len(self.shrink):
                x = self.shrink[n // 2](x)
                kept.append(x)
        x = self.bottom(self.middle(x, temb, prompt), temb)
        for n, stage in enumerate(self.up):
            x = stage(torch.cat([x, kept.pop()], 1), temb, prompt)
            if n % 3 == 2 and n // 3 < len(self.grow):
                x = self.grow[n // 3](F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.end(F.silu(self.norm(x)))


def unet_inputs(shape: Shape = SDXL, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random inputs of a step, by forward's names."""
    return {
        "sample": torch.randn(shape.batch, 4, shape.side, shape.side).to(dtype),
        "timestep": torch.full((shape.batch,), 500.0),
        "prompt": torch.randn(shape.batch, shape.tokens, shape.prompt).to(dtype),
        "added": torch.randn(shape.batch, shape.added).to(dtype),
    }
