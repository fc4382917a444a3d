"""Read LoRA files into pairs of factors by layer of the network: all of a file, or an error.

    weight' = weight + scale · up @ down        (arXiv 2106.09685; alpha / rank is in `up`)

Needs numpy alone: a device adds LoRAs to a compiled network without torch or safetensors.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from effuse.errors import InputError
from effuse.lora_layouts import (
    LEFT_OUT,
    Layer,
    Part,
    locator,
    numbered,
    other_method,
    parse,
    target_classes,
)
from effuse.lora_scale import Alphas, read_alphas
from effuse.tensor_file import DTYPES, FLOATS, Entry, TensorFile, open_tensors, read_tensor

__all__ = ["Layer", "Lora", "Pair", "read_lora"]

SHOWN = 8  # offenders of a kind that an error lists

Problems = dict[str, list[str]]  # a kind of problem -> what shows it


@dataclass(frozen=True, eq=False)
class Pair:
    """The two factors of one layer, float32 and contiguous; alpha / rank is in `up` already.

    Args:
        up: (out, rank).
        down: (rank, in) of a linear, (rank, in, kh, kw) of a convolution.
    """

    up: np.ndarray[Any, Any]
    down: np.ndarray[Any, Any]

    @property
    def rank(self) -> int:
        """The columns of `up`, which are the rows of `down`."""
        return int(self.up.shape[1])


@dataclass(frozen=True, eq=False)
class Lora:
    """What a LoRA file holds for the denoiser.

    Args:
        pairs: by path of a layer, in the order of the network.
        left_out: names of the file's tensors that are not the denoiser's: factors of text encoders,
            vectors of textual inversion.
        layout: "peft", "diffusers", "kohya" or "cloneofsimo" (several joined by ", ").
    """

    pairs: Mapping[str, Pair]
    left_out: tuple[str, ...]
    layout: str


@dataclass(frozen=True)
class _Site:
    """The tensors that belong to one layer: their names by role."""

    name: str  # the layer's path, or the file's name for it where the network has no such layer
    shape: tuple[int, ...] | None
    keys: Mapping[str, Sequence[str]]
    entries: Mapping[str, Entry]

    def key(self, role: str) -> str:
        return self.keys[role][0]

    def entry(self, role: str) -> Entry:
        return self.entries[self.key(role)]

    @property
    def names(self) -> list[str]:
        return sorted(key for keys in self.keys.values() for key in keys)


def read_lora(path: str | Path, layers: Sequence[Layer]) -> Lora:
    """The factors of a LoRA file by layer of the network.

    Args:
        path: a .safetensors file in a layout of peft, diffusers, kohya or cloneofsimo.
        layers: those of the network that can take a LoRA, in its order of registration.

    Raises:
        InputError: the file cannot be read, is no LoRA of two factors, or does not fit the network
            in any one of its layers.
    """
    file = open_tensors(Path(path))
    left_out = tuple(sorted(key for key in file.entries if _is_left_out(file, key)))
    parts = _parts(file, left_out)
    order = _order(file, parts, layers)
    sites = _sites(file, parts, layers, order)
    layout = ", ".join(sorted({part.layout for part in parts.values() if part.role != "alpha"}))
    if problems := _misfits(parts, sites, layers, order):
        raise _error(
            f"{file.path}: this LoRA ({layout}, {_count(len(sites), 'layer')}) does not fit the "
            f"network, in which {_count(len(layers), 'layer')} can take one; nothing was loaded:",
            "layer",
            problems,
        )
    pairs = _pairs(file, sites, read_alphas(file))
    return Lora(
        {layer.path: pairs[layer.path] for layer in layers if layer.path in pairs}, left_out, layout
    )


def _is_left_out(file: TensorFile, key: str) -> bool:
    return bool(LEFT_OUT.match(key)) or file.metadata.get(key) == "<embed>"


def _parts(file: TensorFile, left_out: Sequence[str]) -> dict[str, Part]:
    """What the denoiser's names say, in their natural order (2 before 10)."""
    keys = sorted(set(file.entries) - set(left_out), key=_natural)
    parts = {key: part for key in keys if (part := parse(key))}
    problems: Problems = defaultdict(list)
    for key in keys:
        if method := other_method(key):
            problems[f"of {method}"].append(key)
        elif key not in parts:
            problems["of a name that no layout of LoRA knows"].append(key)
    if all(part.role == "alpha" for part in parts.values()):
        problems["of a text encoder, which are left out"] = list(left_out)
        raise _error(
            f"{file.path}: no LoRA of two factors for a denoiser in it; expected names as "
            "unet.<layer>.lora_A.weight or lora_unet_<layer>.lora_down.weight, got "
            f"{_count(len(file.entries), 'tensor')}",
            "tensor",
            problems,
        )
    if problems:
        raise _error(
            f"{file.path}: not a LoRA of two factors alone; nothing was loaded:",
            "tensor",
            problems,
        )
    return parts


def _order(
    file: TensorFile, parts: Mapping[str, Part], layers: Sequence[Layer]
) -> tuple[Layer, ...]:
    """The network's layers as the file numbers them; none where it names them."""
    if all(part.layout != "cloneofsimo" for part in parts.values()):
        return ()
    try:
        return numbered(layers, target_classes(file.metadata))
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None


def _sites(
    file: TensorFile, parts: Mapping[str, Part], layers: Sequence[Layer], order: Sequence[Layer]
) -> tuple[_Site, ...]:
    shapes = {layer.path: layer.shape for layer in layers}
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    locate = locator(layers, order)
    try:
        for key, part in parts.items():
            groups[locate(part) or part.name][part.role].append(key)
    except InputError as error:
        raise InputError(f"{file.path}: {error}") from None
    return tuple(_Site(name, shapes.get(name), keys, file.entries) for name, keys in groups.items())


def _misfits(
    parts: Mapping[str, Part],
    sites: Sequence[_Site],
    layers: Sequence[Layer],
    order: Sequence[Layer],
) -> Problems:
    """Every layer of the file that does not fit the network, by what is wrong with it."""
    problems: Problems = defaultdict(list)
    for i, name in enumerate(site.name for site in sites if site.shape is None):
        near = _near(name, layers) if i < SHOWN else ""  # nobody reads the others
        problems["that the network does not have"].append(f"{name}{near}")
    for site in sites:
        faults = ((title, say(site)) for title, say in CHECKS if site.shape is not None)
        if fault := next((found for found in faults if found[1]), None):
            problems[fault[0]].append(str(fault[1]))
    names = {part.name for part in parts.values()}
    for i, layer in enumerate(order):
        if f"unet:{i}" not in names:
            text = f"unet:{i}: {layer.path} {layer.shape}"
            problems["that the file would number for this network, and does not"].append(text)
    return problems


def _near(name: str, layers: Sequence[Layer]) -> str:
    """What the network has that reads like a name of the file."""
    spelled = {layer.path.replace(".", "_"): layer.path for layer in layers}
    word = re.sub(r"lora_(unet|transformer)_", "", name).replace(".", "_")
    close = difflib.get_close_matches(word, spelled, n=1, cutoff=0.7)
    return f" (near: {spelled[close[0]]})" if close else ""


def _twice(site: _Site) -> str | None:
    several = [key for keys in site.keys.values() if len(keys) > 1 for key in keys]
    return f"{site.name}: {', '.join(several)}" if several else None


def _half(site: _Site) -> str | None:
    return None if {"up", "down"} <= set(site.keys) else f"{site.name}: {', '.join(site.names)}"


def _unread(site: _Site) -> str | None:
    known = {"up": FLOATS, "down": FLOATS, "alpha": DTYPES}  # an alpha may be an integer
    odd = [role for role in site.keys if site.entry(role).dtype not in known[role]]
    return f"{site.key(odd[0])}: {site.entry(odd[0]).dtype}" if odd else None


def _ranks(site: _Site) -> str | None:
    up, down = site.entry("up").shape, site.entry("down").shape
    same = len(up) >= 2 <= len(down) and up[1] == down[0] > 0
    return None if same else f"{site.name}: {site.key('up')} {up}, {site.key('down')} {down}"


def _shapes(site: _Site) -> str | None:
    up, down = site.entry("up").shape, site.entry("down").shape
    out, *reads = site.shape or ()
    wanted = (out, up[1]), _core((up[1], *reads))
    if (_core(up), _core(down)) == wanted:
        return None
    return f"{site.name} {site.shape}: {site.key('up')} {up}, {site.key('down')} {down}"


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape without the kernel of a 1x1 convolution, which is a linear."""
    return tuple(shape if any(axis != 1 for axis in shape[2:]) else shape[:2])


def _scalar(site: _Site) -> str | None:
    shape = site.entry("alpha").shape if "alpha" in site.keys else ()
    return f"{site.key('alpha')} {shape}" if set(shape) - {1} else None


CHECKS: tuple[tuple[str, Callable[[_Site], str | None]], ...] = (
    ("with two entries for one factor", _twice),
    ("without up, or without down", _half),
    (f"of a dtype that is not read (known: {', '.join(FLOATS)})", _unread),
    ("of up and down whose ranks differ", _ranks),
    ("of other shapes (the network's layer: the file's factors)", _shapes),
    ("with an alpha that is not one number", _scalar),
)


def _pairs(file: TensorFile, sites: Sequence[_Site], alphas: Alphas) -> dict[str, Pair]:
    with file.path.open("rb") as opened:
        pairs = {site.name: _pair(opened, site, alphas) for site in sites}
    odd = [
        f"{name}: {role}"
        for name, pair in pairs.items()
        for role, array in (("up · alpha / rank", pair.up), ("down", pair.down))
        if not np.isfinite(array).all()
    ]
    if odd:
        raise _error(
            f"{file.path}: expected finite factors (in float32); nothing was loaded:",
            "factor",
            {"with NaN or infinity": odd},
        )
    return pairs


def _pair(file: BinaryIO, site: _Site, alphas: Alphas) -> Pair:
    up, down = (read_tensor(file, site.entry(role)) for role in ("up", "down"))
    rank, (out, *reads) = up.shape[1], site.shape or ()
    own = float(read_tensor(file, site.entry("alpha")).item()) if "alpha" in site.keys else None
    scale = alphas.scale(site.name, rank, own)
    with np.errstate(over="ignore", invalid="ignore"):  # the caller finds and says what it gives
        return Pair(
            np.multiply(up, scale, dtype=np.float64).astype(np.float32).reshape(out, rank),
            down.astype(np.float32).reshape(rank, *reads),
        )


def _error(headline: str, noun: str, problems: Mapping[str, Sequence[str]]) -> InputError:
    """An error that lists what the problems were found in, a few of each kind."""
    lines = [headline]
    for title, found in problems.items():
        if found:
            lines.append(f"  {_count(len(found), noun)} {title}:")
            lines += [f"    {line}" for line in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"    ... and {len(found) - SHOWN} more")
    return InputError("\n".join(lines))


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _natural(key: str) -> tuple[tuple[int, str], ...]:
    """Sorts numbers inside names by their value."""
    words = re.split(r"(\d+)", key)
    return tuple((int(word), "") if word.isdecimal() else (-1, word) for word in words)
