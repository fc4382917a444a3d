"""What the scripts of this folder share: prompts, DDIM and PNG files with numpy alone."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from effuse.tensor_file import open_tensors, read_tensor

FOLDER = Path(__file__).resolve().parent.parent / "models" / "emoji-unet"
WORDS, TRAINED, GUIDANCE = 8, 1000, 1.5
Array = np.ndarray[Any, Any]


def embed(prompt: str) -> Array:
    """A prompt as (8, 64) embeddings; the empty prompt is the unconditional one."""
    index = {
        word: number for number, word in enumerate(json.loads((FOLDER / "words.json").read_text()))
    }
    file = open_tensors(FOLDER / "words.safetensors")
    with file.path.open("rb") as data:
        table = read_tensor(data, file.entries["weight"])
    known = [index[word] for word in prompt.replace("-", " ").split() if word in index]
    ids = [index["<bos>"], *known[: WORDS - 1]]
    return table[ids + [index["<pad>"]] * (WORDS - len(ids))]


def kept_signal() -> Array:
    """How much of a picture is left at each timestep: the cosine schedule, (1000,)."""
    edges = np.cos((np.arange(TRAINED + 1) / TRAINED + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.cumprod(1 - np.minimum(1 - edges[1:] / edges[:-1], 0.999))


def ddim(net: Any, prompt: str, steps: int = 10, seed: int = 0) -> Iterator[Array]:
    """Every step's picture, (3, 32, 32) in [-1, 1], guided."""
    kept, states = kept_signal(), np.stack([embed(""), embed(prompt)])
    times = [number * (TRAINED // steps) for number in reversed(range(steps))]
    x = np.random.default_rng(seed).standard_normal((3, 32, 32))
    for time, after in zip(times, [*times[1:], None], strict=True):
        both = np.stack([x, x]).astype(np.float32)
        free, told = net(both, time, encoder_hidden_states=states, return_dict=False)[0]
        noise = free + GUIDANCE * (told - free)
        now, then = kept[time], 1.0 if after is None else kept[after]
        clean = np.clip((x - np.sqrt(1 - now) * noise) / np.sqrt(now), -1, 1)
        x = np.sqrt(then) * clean + np.sqrt(1 - then) * noise
        yield np.clip(x, -1, 1)


def write_png(path: str, picture: Array) -> None:
    """A picture (3, h, w) in [-1, 1] as a PNG file."""
    pixels = ((picture.transpose(1, 2, 0) + 1) * 127.5).astype(np.uint8)
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    written = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    Path(path).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
