"""The networks that gpu.py runs end to end, written out in plain PyTorch with the official shapes.

FLUX.1-dev (Black Forest Labs): 3072 wide, 24 heads of 128, feed-forward 12288, 512 + 4096 tokens;
`Double` and `Single` are its two kinds of block, `Flux` the network with fewer of them (2 of 19 and
5 of 38 is an eighth). SDXL's UNet: gpu_unet.py. Weights are random: times are those of the trained
network, and nothing is said about pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = dict[str, Tensor]
STD = 0.02  # of random weights


@dataclass(frozen=True)
class Sizes:
    """What a FLUX network is as large as; the defaults are FLUX.1-dev's at 1024 by 1024 pixels."""

    width: int = 3072
    heads: int = 24
    text: int = 512
    image: int = 4096
    prompt: int = 4096
    pooled: int = 768
    latent: int = 64

    @property
    def head(self) -> int:
        """Channels of a head."""
        return self.width // self.heads


FLUX = Sizes()


# ---- FLUX ----------------------------------------------------------------------------------------


def rotation(sizes: Sizes) -> tuple[Tensor, Tensor]:
    """cos and sin (tokens, head) of the rotary embedding: three axes, as FLUX cuts a head."""
    side = max(1, round(sizes.image**0.5))
    index = torch.arange(sizes.image)
    grid = torch.stack([torch.zeros_like(index), index // side, index % side], -1)
    places = torch.cat([torch.zeros(sizes.text, 3, dtype=grid.dtype), grid]).double()
    eighth = sizes.head // 8  # 16, 56 and 56 channels of FLUX's 128
    axes = (eighth, *[(sizes.head - eighth) // 2] * 2)
    angles = torch.cat([_angles(places[:, n], size) for n, size in enumerate(axes)], -1)
    return angles.cos().float(), angles.sin().float()


def _angles(place: Tensor, size: int) -> Tensor:
    speeds = 10000.0 ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (place[:, None] * speeds).repeat_interleave(2, -1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (batch, heads, tokens, head), turned pair by pair."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)  # as diffusers has it
    turned = torch.stack([-imaginary, real], -1).flatten(3)
    return (x.float() * cos + turned.float() * sin).to(x.dtype)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Layer norm without parameters, times 1 + scale, plus shift, each (batch, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class Heads(nn.Module):
    """Q, K and V of some tokens, in heads, with RMS norms of Q and K."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(sizes.width, sizes.width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.RMSNorm(sizes.head, eps=1e-6) for _ in range(2))
        self.heads = sizes.heads

    def forward(self, x: Tensor) -> list[Tensor]:
        """Three of (batch, heads, tokens, head)."""
        q, k, v = (each(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for each in (self.q, self.k, self.v))  # fmt: skip
        return [self.norm_q(q), self.norm_k(k), v]


def attention(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Attention of all tokens among each other, (batch, tokens, width)."""
    found = F.scaled_dot_product_attention(rotated(q, cos, sin), rotated(k, cos, sin), v)
    return found.transpose(1, 2).flatten(2)


def feed_forward(width: int) -> nn.Sequential:
    """The GELU feed-forward layers, four times as wide."""
    return nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
    )


class Stream(nn.Module):
    """What a double block has once for the image and once for the text."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.modulation = nn.Linear(sizes.width, 6 * sizes.width)
        self.heads = Heads(sizes)
        self.out = nn.Linear(sizes.width, sizes.width)
        self.feed_forward = feed_forward(sizes.width)

    def before(self, x: Tensor, temb: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Q, K, V, and what `after` needs of the modulation."""
        shift, scale, *rest = self.modulation(F.silu(temb)).chunk(6, -1)
        return self.heads(modulated(x, scale, shift)), rest

    def after(self, x: Tensor, attended: Tensor, rest: list[Tensor]) -> Tensor:
        """The residual stream behind attention and feed-forward."""
        gate, shift, scale, second = rest
        x = x + gate[:, None] * self.out(attended)
        return x + second[:, None] * self.feed_forward(modulated(x, scale, shift))


class Double(nn.Module):
    """A FLUX double block: two streams that attend to each other."""

    def __init__(self, sizes: Sizes = FLUX) -> None:
        super().__init__()
        self.image, self.text = Stream(sizes), Stream(sizes)

    def forward(
        self, hidden_states: Tensor, text: Tensor, temb: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both streams, changed."""
        (q, k, v), rest = self.image.before(hidden_states, temb)
        (text_q, text_k, text_v), text_rest = self.text.before(text, temb)
        joined = (torch.cat(pair, 2) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        found = attention(*joined, cos, sin)
        own, other = found[:, text.shape[1] :], found[:, : text.shape[1]]
        return self.image.after(hidden_states, own, rest), self.text.after(text, other, text_rest)


class Single(nn.Module):
    """A FLUX single block: attention and feed-forward beside each other, over all tokens."""

    def __init__(self, sizes: Sizes = FLUX) -> None:
        super().__init__()
        self.modulation = nn.Linear(sizes.width, 3 * sizes.width)
        self.heads = Heads(sizes)
        self.wide = nn.Linear(sizes.width, 4 * sizes.width)
        self.out = nn.Linear(5 * sizes.width, sizes.width)

    def forward(self, hidden_states: Tensor, temb: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """All tokens, changed."""
        shift, scale, gate = self.modulation(F.silu(temb)).chunk(3, -1)
        x = modulated(hidden_states, scale, shift)
        wide = F.gelu(self.wide(x), approximate="tanh")
        both = torch.cat([attention(*self.heads(x), cos, sin), wide], -1)
        return hidden_states + gate[:, None] * self.out(both)


def sinusoids(time: Tensor, size: int) -> Tensor:
    """The embedding of timesteps (batch,) -> (batch, size), float32."""
    half = size // 2
    speeds = 10000.0 ** -(torch.arange(half, device=time.device, dtype=torch.float32) / half)
    angles = time.float()[:, None] * speeds
    return torch.cat([angles.cos(), angles.sin()], -1)


def embedder(size: int, width: int) -> nn.Sequential:
    """Two layers with a SiLU between them."""
    return nn.Sequential(nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width))


class Flux(nn.Module):
    """FLUX with `double` and `single` blocks of its 19 and 38; latents in, latents out."""

    def __init__(self, double: int = 2, single: int = 5, sizes: Sizes = FLUX) -> None:
        super().__init__()
        width = sizes.width
        self.patches, self.prompt = nn.Linear(sizes.latent, width), nn.Linear(sizes.prompt, width)
        self.time, self.guidance = embedder(256, width), embedder(256, width)
        self.pooled = embedder(sizes.pooled, width)
        self.doubles = nn.ModuleList(Double(sizes) for _ in range(double))
        self.singles = nn.ModuleList(Single(sizes) for _ in range(single))
        self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, sizes.latent)

    def forward(
        self, hidden_states: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor,
        guidance: Tensor, cos: Tensor, sin: Tensor,
    ) -> Tensor:  # fmt: skip
        """One step."""
        kind = hidden_states.dtype
        temb = self.time(sinusoids(timestep, 256).to(kind)) + self.pooled(pooled)
        temb = temb + self.guidance(sinusoids(guidance, 256).to(kind))
        x, text = self.patches(hidden_states), self.prompt(text)
        for block in self.doubles:
            x, text = block(x, text, temb, cos, sin)
        both = torch.cat([text, x], 1)
        for block in self.singles:
            both = block(both, temb, cos, sin)
        scale, shift = self.modulation(F.silu(temb)).chunk(2, -1)
        return self.out(modulated(both[:, text.shape[1] :], scale, shift))


def flux_inputs(names: tuple[str, ...], sizes: Sizes = FLUX, dtype: Any = torch.bfloat16) -> Inputs:
    """Random inputs of a FLUX network or block, by forward's names."""
    cos, sin = rotation(sizes)
    block = "timestep" not in names
    tokens = sizes.image if not block or "text" in names else sizes.image + sizes.text
    shapes = {
        "hidden_states": (1, tokens, sizes.width if block else sizes.latent),
        "text": (1, sizes.text, sizes.width if block else sizes.prompt),
        "temb": (1, sizes.width),
        "pooled": (1, sizes.pooled),
    }
    made = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    made |= {"timestep": torch.tensor([500.0]), "guidance": torch.tensor([3500.0])}
    made |= {"cos": cos, "sin": sin}
    return {name: made[name] for name in names}


# ---- what is measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """One network to run end to end.

    Args:
        name, summary: of the row.
        make: builds it, on the default device, in float32.
        inputs: makes inputs by forward's names, on the CPU.
        convolutions: whether it has some, which then want channels_last memory.
        autotune: whether torch.compile's max-autotune can be done in a minute.
    """

    name: str
    summary: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    convolutions: bool = False
    autotune: bool = True


def parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """The names of forward's arguments."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def randomized(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with random weights in place: norms near 1, biases small, none of them zero."""
    device = next(network.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, each in network.named_parameters():
            each.normal_(0.0, STD, generator=generator)
            if each.dim() == 1 and name.endswith("weight"):
                each.add_(1.0)
    return network.eval()


def roles(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Every input changes from step to step: nothing is left out of what is timed."""
    return dict.fromkeys(inputs, "latent")
