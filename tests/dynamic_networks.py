"""Tiny networks whose sizes are left open: UNet, DiT of a native size, tokens with ids, videos."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.k, self.v = nn.Linear(context, width), nn.Linear(context, width)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, context=None, turn=None):
        context = x if context is None else context
        q, k, v = self.split(self.q(x)), self.split(self.k(context)), self.split(self.v(context))
        if turn is not None:
            q, k = rotated(q, *turn), rotated(k, *turn)
        found = F.scaled_dot_product_attention(q, k, v)
        return self.out(found.transpose(1, 2).flatten(2))


def rotated(x, cos, sin):
    one, two = x.chunk(2, -1)
    return x * cos + torch.cat((-two, one), -1) * sin


def waves(position, width):
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10000.0) / (width // 2)))
    angles = position[..., None].float() * rates
    return torch.cat((torch.cos(angles), torch.sin(angles)), -1)


class Block(nn.Module):
    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.cross = Attention(width, width), Attention(width, context)
        wide = 2 * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x, context, turn=None):
        x = x + self.self_attn(self.one(x), turn=turn)
        x = x + self.cross(self.two(x), context)
        return x + self.mlp(self.two(x))


class UNet(nn.Module):
    """One level down and up, a long skip, cross attention at the bottom."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 16))
        self.enter = nn.Conv2d(4, 16, 3, padding=1)
        self.norm = nn.GroupNorm(4, 16)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.block = Block(16, 32)
        self.up = nn.Conv2d(16, 16, 3, padding=1)
        self.join = nn.Conv2d(32, 16, 3, padding=1)
        self.leave = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample, timestep, encoder_hidden_states):
        t = self.time(waves(timestep.expand(sample.shape[0]), 16))
        x = self.enter(sample)
        skip = x + self.conv(F.silu(self.norm(x) + t[:, :, None, None]))
        x = self.down(skip)
        height, width = x.shape[-2:]
        x = self.block(x.flatten(2).transpose(1, 2), encoder_hidden_states)
        x = x.transpose(1, 2).unflatten(2, (height, width))
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.leave(F.silu(self.join(torch.cat((x, skip), 1))))


class DiT(nn.Module):
    """Patches of 2; positions stored for its native size, computed for every other."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(4, 32, 2, stride=2)
        self.size = size // 2
        self.register_buffer("table", self.positions(self.size, self.size))
        self.time = nn.Linear(16, 64)
        self.block = Block(32, 32)
        self.leave = nn.Linear(32, 16)

    @staticmethod
    def positions(height, width):
        rows = waves(torch.arange(height), 16)[:, None].expand(-1, width, -1)
        columns = waves(torch.arange(width), 16)[None].expand(height, -1, -1)
        return torch.cat((rows, columns), -1).flatten(0, 1)[None]

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        x = self.patch(hidden_states)
        height, width = x.shape[-2:]
        native = height == self.size and width == self.size
        x = x.flatten(2).transpose(1, 2) + (self.table if native else self.positions(height, width))
        shift, scale = self.time(waves(timestep, 16))[:, None].chunk(2, -1)
        x = self.leave(self.block(x * (1 + scale) + shift, encoder_hidden_states))
        x = x.unflatten(1, (height, width)).unflatten(-1, (2, 2, 4))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Tokens(nn.Module):
    """Packed tokens and a prompt in one sequence; rotary tables from the ids of both."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.text = nn.Linear(8, 32), nn.Linear(32, 32)
        self.time = nn.Linear(16, 64)
        self.attn, self.norm = Attention(32, 32), nn.LayerNorm(32)
        self.leave = nn.Linear(32, 8)

    def forward(self, hidden_states, encoder_hidden_states, timestep, img_ids, txt_ids):
        ids = torch.cat((txt_ids, img_ids), 0)
        turn = torch.cat([waves(ids[:, axis], 8)[:, :4] for axis in range(2)], -1)
        turn = (torch.cat((turn, turn), -1).cos(), torch.cat((turn, turn), -1).sin())
        shift, scale = self.time(waves(timestep, 16))[:, None].chunk(2, -1)
        x = torch.cat((self.text(encoder_hidden_states), self.enter(hidden_states)), 1)
        x = x + self.attn(self.norm(x) * (1 + scale) + shift, turn=turn)
        return self.leave(x[:, encoder_hidden_states.shape[1] :])


class Video(nn.Module):
    """Patches of (1, 2, 2) over frames, rotary tables by frame, row and column."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(4, 32, (1, 2, 2), stride=(1, 2, 2))
        self.time = nn.Linear(16, 32)
        self.block = Block(32, 32)
        self.leave = nn.Linear(32, 16)

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        x = self.patch(hidden_states)
        frames, height, width = x.shape[-3:]
        place = torch.cartesian_prod(
            torch.arange(frames), torch.arange(height), torch.arange(width)
        )
        turn = torch.cat([waves(place[:, axis], 4) for axis in (0, 1, 2, 2)], -1)
        x = x.flatten(2).transpose(1, 2) + self.time(waves(timestep, 16))[:, None]
        x = self.leave(self.block(x, encoder_hidden_states, (turn.cos(), turn.sin())))
        x = x.unflatten(1, (frames, height, width)).unflatten(-1, (2, 2, 4))
        return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class Clip(nn.Module):
    """Frames before channels; rotary tables as inputs, positions written through `.data`."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.time = nn.Conv2d(4, 32, 2, stride=2), nn.Linear(16, 32)
        self.attn, self.leave = Attention(32, 32), nn.Linear(32, 16)

    def forward(self, hidden_states, timestep, encoder_hidden_states, rotary_emb):
        batch, frames, channels, height, width = hidden_states.shape
        x = self.patch(hidden_states.reshape(-1, channels, height, width)).flatten(2)
        x = x.transpose(1, 2).reshape(batch, -1, 32)
        places = x.new_zeros(1, x.shape[1], 32)
        places.data[:, :, :8].copy_(waves(torch.arange(x.shape[1]), 8))
        x = x + places + (self.time(waves(timestep, 16)) + encoder_hidden_states.mean(1))[:, None]
        x = self.leave(x + self.attn(x, turn=rotary_emb))
        x = x.reshape(batch, frames, height // 2, width // 2, 4, 2, 2)
        return x.permute(0, 1, 4, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


def build(kind):
    torch.manual_seed(0)
    net = kind().eval()
    for value in net.parameters():
        value.requires_grad_(False)
    return net


def values(kind, time=500.0, batch=2, height=8, width=8, frames=3, length=6, tokens=16, seed=0):
    """Inputs of a network at these sizes."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(*shape, generator=generator)

    prompt = noise(batch, length, 32)
    if kind is Tokens:
        return {
            "hidden_states": noise(batch, tokens, 8), "encoder_hidden_states": prompt,
            "timestep": torch.full((batch,), time),
            "img_ids": torch.arange(2 * tokens).reshape(tokens, 2).float(),
            "txt_ids": torch.zeros(length, 2),
        }  # fmt: skip
    if kind is UNet:
        given = {"sample": noise(batch, 4, height, width), "timestep": torch.tensor(time)}
    elif kind is DiT:
        given = {"hidden_states": noise(batch, 4, height, width)}
    elif kind is Clip:
        given = {"hidden_states": noise(batch, frames, 4, height, width)}
        turn = noise(frames * (height // 2) * (width // 2), 16)
        return {"timestep": torch.full((batch,), time), **given, "encoder_hidden_states": prompt,
                "rotary_emb": (turn.cos(), turn.sin())}  # fmt: skip
    else:
        given = {"hidden_states": noise(batch, 4, frames, height, width)}
    return {"timestep": torch.full((batch,), time), **given, "encoder_hidden_states": prompt}
