"""What the scripts of this folder share: prompts, pictures and PNG files with numpy alone."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

import effuse
from effuse.tensor_file import open_tensors, read_tensor

FOLDER = Path(__file__).resolve().parent.parent / "models" / "emoji-unet"
WORDS, GUIDANCE = 8, 1.5
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


def picture(net: Any, prompt: str, seed: int = 0) -> Array:
    """A picture of a prompt, (3, 32, 32) in [-1, 1], by the scheduler that the artifact keeps."""
    noise = np.random.default_rng(seed).standard_normal((1, 3, 32, 32))
    told, free = ({"encoder_hidden_states": embed(words)[None]} for words in (prompt, ""))
    return np.clip(effuse.sample(net, noise, told, free, guidance=GUIDANCE)[0], -1, 1)


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
