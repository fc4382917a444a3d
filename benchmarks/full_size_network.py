"""Networks of full size with random weights: a folder as save_pretrained writes it, in shards."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from effuse.weights import FILE

SHARD_BYTES = 4 * 10**9
Shapes = Mapping[str, tuple[int, ...]]
Progress = Callable[[str, int, int], None]


def write_network(network: nn.Module, folder: Path, progress: Progress, seed: int = 0) -> int:
    """config.json and random bfloat16 weights in shards, one tensor at a time; their bytes."""
    network.save_config(str(folder))  # type: ignore[operator]
    shards = list(split({n: tuple(each.shape) for n, each in network.state_dict().items()}))
    generator = torch.Generator().manual_seed(seed)
    table: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        name = FILE.replace(".safetensors", f"-{number:05d}-of-{len(shards):05d}.safetensors")
        table |= dict.fromkeys(shapes, name)
        write_shard(folder / name, shapes, generator)
        progress("write shards", number, len(shards))
    total = sum(map(size_of, (shape for shapes in shards for shape in shapes.values())))
    index = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / f"{FILE}.index.json").write_text(json.dumps(index, indent=1))
    return total


def split(shapes: Shapes) -> Iterator[Shapes]:
    """The tensors in shards of at most SHARD_BYTES, in their order."""
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, shape in shapes.items():
        if shard and held + size_of(shape) > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = shape
        held += size_of(shape)
    yield shard


def size_of(shape: tuple[int, ...]) -> int:
    """Bytes in bfloat16."""
    return 2 * math.prod(shape)


def write_shard(path: Path, shapes: Shapes, generator: torch.Generator) -> None:
    """One safetensors file of random weights."""
    header, position = {}, 0
    for name, shape in shapes.items():
        span = [position, position + size_of(shape)]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": span}
        position += size_of(shape)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values = drawn(name, shape, generator).bfloat16()
            file.write(values.flatten().view(torch.uint8).numpy().data)


def drawn(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A weight by its shape: matrices and filters that keep a signal's power; norms are one."""
    if len(shape) < 2:
        return torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
    values = torch.randn(shape, generator=generator)
    return values / math.sqrt(math.prod(shape[1:]))
