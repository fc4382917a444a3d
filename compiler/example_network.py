"""What the rows of example inputs are told about a network, and the sizes that follow from it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from effuse.errors import InputError

SIZE = 32  # latent pixels a side, where the config has no sample_size
TOKEN_SIZE = 128  # the same for networks on packed tokens: 1024 pixels, their pipelines' default
FRAMES = 8
LARGEST = 1 << 28  # elements of an example
WAY_OUT = "pass example inputs yourself: inputs={...}, by the names of forward's arguments"
PACKED = ("img_ids", "img_shapes", "video_coords")  # arguments of networks on packed tokens

# Prompt lengths as the pipelines make them: the first key that is set in the config or an argument.
LENGTHS = (
    ("txt_ids", 512),
    ("joint_attention_dim", 333),
    ("use_additional_conditions", 120),
    ("caption_channels", 300),
)
LENGTH = 77  # CLIP's
# Where configs keep a length that a prompt is padded to.
LENGTH_KEYS = ("max_text_seq_length", "text_len", "caption_length", "text_max_length")


@dataclass(frozen=True)
class Network:
    """What the rows are told about a network: its config, its arguments, and the sizes wanted."""

    config: Mapping[str, Any]
    parameters: Mapping[str, inspect.Parameter]
    entry: nn.Module | None  # the first convolution or linear layer
    batch: int
    size: int | None
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> torch.Tensor:
        """Seeded noise in the network's dtype.

        Raises:
            InputError: it would not fit into memory.
        """
        if math.prod(shape) > LARGEST:
            raise InputError(f"inputs: an example of shape {shape} is too large; {WAY_OUT}")
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    @property
    def arguments(self) -> frozenset[str]:
        """The names of forward's arguments."""
        return frozenset(self.parameters)

    @property
    def packed(self) -> bool:
        """Whether the latent is a sequence of packed 2×2 patches, with positions beside it."""
        return any(name in self.arguments for name in PACKED)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, rows and columns of a latent that is a sequence of tokens."""
        height, width = self.sides
        if "num_frames" in self.arguments:
            return 2, height // 2, width // 2
        return 1, height // 2, width // 2

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in latent pixels."""
        default = TOKEN_SIZE if "img_ids" in self.arguments else SIZE
        found = self.size or self.config.get("sample_size") or default
        if isinstance(found, int):
            return found, found
        return int(found[-2:][0]), int(found[-1])

    @property
    def length(self) -> int:
        """How many tokens a prompt has."""
        if padded := width_of(self, LENGTH_KEYS):
            return padded
        known = (n for key, n in LENGTHS if self.config.get(key) or key in self.arguments)
        return next(known, LENGTH)


def width_of(net: Network, keys: Sequence[str]) -> int | None:
    """The first of the keys that the config sets to a number, or to several: the first of them."""
    values = (net.config.get(key) for key in keys)
    firsts = (value[0] if isinstance(value, (list, tuple)) and value else value for value in values)
    return next((value for value in firsts if value and isinstance(value, int)), None)


def required(net: Network, name: str) -> bool:
    """Whether forward has no default for an argument."""
    return name in net.parameters and net.parameters[name].default is inspect.Parameter.empty
