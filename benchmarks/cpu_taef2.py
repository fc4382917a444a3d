"""TAEF2, the tiny autoencoder of FLUX.2's latents (madebyollin/taesd, MIT), by its own keys."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

WIDTH, LATENT = 64, 32


class Clamp(nn.Module):
    """3·tanh(x/3): latents of any size, tamed."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


class Block(nn.Module):
    """Three convolutions around an identity; some add a normalised side branch first."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())
        wide = 4 * WIDTH
        self.pool = nn.Sequential(
            nn.Conv2d(WIDTH, wide, 1, bias=False), nn.GroupNorm(4, wide), nn.ReLU(),
            nn.Conv2d(wide, WIDTH, 1, bias=False),
        ) if norm else None  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


class Decoder(nn.Sequential):
    """Latent (batch, 32, h, w) to pixels in [0, 1], (batch, 3, 8h, 8w)."""

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return super().forward(sample)


def conv(inner: int = WIDTH, outer: int = WIDTH, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    """A 3×3 convolution."""
    return nn.Conv2d(inner, outer, 3, stride=stride, padding=1, bias=bias)


def decoder() -> Decoder:
    """The decoder with fresh weights."""
    layers = [Clamp(), conv(LATENT), nn.ReLU(), Block(True), Block(True), Block(True)]
    for blocks in (3, 3, 1):
        layers += [nn.Upsample(scale_factor=2), conv(bias=False), *(Block() for _ in range(blocks))]
    return Decoder(*layers, conv(outer=3))


def encoder() -> nn.Sequential:
    """The encoder with fresh weights."""
    layers: list[nn.Module] = [conv(3), Block()]
    for norm in (False, False, True):
        layers += [conv(stride=2, bias=False), *(Block(norm) for _ in range(3))]
    return nn.Sequential(*layers, conv(outer=LATENT))


def load(network: nn.Module, path: Path) -> nn.Module:
    """The network with the file's weights, in single precision."""
    network.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return network.eval()
