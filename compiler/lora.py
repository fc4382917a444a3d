"""LoRAs on a compiled network: what its swappable factors become (imports no torch).

    W x + U (D x)  ->  W x + [U, s·B] ([D; A] x)

Each time the factors are made from those that the artifact stores and the LoRAs that are loaded,
in that order: to unload one leaves what there is without it, to the bit. Where layers share D, the
rows that a LoRA adds to it for one layer meet zeros in the others' U.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from effuse.errors import InputError, nearest
from effuse.lora_file import Pair, read_lora
from effuse.lora_layouts import Layer
from effuse.plan import Adapter, ProgramSpec
from effuse.tensor_file import open_tensors, read_tensor

Array = np.ndarray[Any, Any]

WEIGHTS = "weights.safetensors"  # in every artifact
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LARGEST = {"float16": float(np.finfo(np.float16).max)}  # of the dtypes that a LoRA may exceed
SHOWN = 8  # layers that an error lists


@dataclass(frozen=True, eq=False)
class Loaded:
    """A LoRA that is loaded: weight' = weight + scale · up @ down."""

    name: str
    scale: float
    pairs: Mapping[str, Pair] = field(repr=False)  # by the layer's module path

    @property
    def ranks(self) -> dict[str, int]:
        """The rank in each layer, by module path."""
        return {path: pair.rank for path, pair in self.pairs.items()}


@dataclass(frozen=True)
class Factor:
    """A swappable weight: its value, and the dtype that the artifact stores it in."""

    value: Array
    dtype: str


@dataclass(frozen=True)
class Loras:
    """The LoRAs that are loaded on an artifact in `folder`; every change gives a new one."""

    spec: ProgramSpec
    folder: Path
    loaded: tuple[Loaded, ...] = ()

    def plus(self, path: Path, scale: float, name: str | None) -> Loras:
        """With the LoRA of a file behind the others.

        Raises:
            InputError: it does not fit: nothing has changed.
        """
        own = path.stem if name is None else name
        adapters = self.spec.adapters
        check_request(self.spec, self.loaded, own, scale)
        layers = {each.path: Layer(each.path, each.shape) for each in adapters if each.path}
        found = read_lora(path, list(layers.values()))
        check_slots(path, adapters, found.pairs)
        loaded = (*self.loaded, Loaded(own, float(scale), found.pairs))
        check_ranks(loaded, self.spec.max_rank)
        return replace(self, loaded=loaded)

    def minus(self, name: str | None) -> Loras:
        """Without the LoRA of that name; None: without any.

        Raises:
            InputError: none has the name.
        """
        names = [each.name for each in self.loaded]
        if name is not None and name not in names:
            raise InputError(f"name: no LoRA {name!r} is loaded{nearest(name, names)}")
        rest = (each for each in self.loaded if name is not None and each.name != name)
        return replace(self, loaded=tuple(rest))

    def factors(self) -> dict[str, Factor]:
        """The swappable weights that differ from the stored ones, by name.

        Raises:
            InputError: a factor is too large for the artifact's dtype.
        """
        changed = {path for each in self.loaded for path in each.pairs}
        touched = [group for group in groups(self.spec.adapters)
                   if changed & {each.path for each in group}]  # fmt: skip
        names = {name for group in touched for each in group
                 for name in (each.down, each.up, each.rows, each.columns) if name}  # fmt: skip
        stored = stored_factors(self.folder, names)
        return {
            name: _fitting(name, factor)
            for group in touched
            for name, factor in joined(group, stored, self.loaded).items()
        }


def check_request(spec: ProgramSpec, loaded: Sequence[Loaded], name: str, scale: float) -> None:
    """Raise InputError if no file can be loaded under this name and scale."""
    if not any(each.up and not each.reason for each in spec.adapters):
        raise InputError(
            "this artifact was compiled without slots for LoRAs; add Lora() to the passes of its "
            "configuration and compile it again"
        )
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise InputError(f"scale: expected a finite number, came {scale!r}")
    if not name or name in (each.name for each in loaded):
        raise InputError(
            f"name: {name!r} is {'loaded already' if name else 'empty'}; hand another name=, or "
            "unload_lora(name) first"
        )


def check_slots(path: Path, adapters: Sequence[Adapter], pairs: Mapping[str, Pair]) -> None:
    """Raise InputError if the LoRA reaches layers that have no slot."""
    reasons = {each.path: each.reason for each in reversed(adapters) if each.reason}
    without = [f"  {layer}: {reasons[layer]}" for layer in pairs if layer in reasons]
    if without:
        raise InputError(
            f"{path}: {len(without)} of its {len(pairs)} layers take no LoRA in this artifact; "
            f"nothing was loaded:\n{shortened(without)}"
        )


def check_ranks(loaded: Sequence[Loaded], max_rank: int) -> None:
    """Raise InputError if the LoRAs' ranks in a layer exceed `max_rank` together."""
    ranks: dict[str, list[int]] = defaultdict(list)
    for each in loaded:
        for path, rank in each.ranks.items():
            ranks[path].append(rank)
    beyond = [f"  {path}: {' + '.join(map(str, found))}"
              for path, found in ranks.items() if sum(found) > max_rank]  # fmt: skip
    if beyond:
        raise InputError(
            f"ranks beyond the maximum of {max_rank} in {len(beyond)} layers; unload another "
            f"LoRA, or compile with Lora(max_rank=…); nothing was loaded:\n{shortened(beyond)}"
        )


def shortened(lines: Sequence[str]) -> str:
    """The first few lines, and how many more there are."""
    more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n".join([*lines[:SHOWN], *more])


def groups(adapters: Sequence[Adapter]) -> list[list[Adapter]]:
    """The layers with factors, together with those that share their D."""
    found: dict[str, list[Adapter]] = defaultdict(list)
    for each in adapters:
        if each.down:
            found[each.down].append(each)
    return list(found.values())


def stored_factors(folder: Path, names: set[str]) -> dict[str, Factor]:
    """The factors as the artifact stores them."""
    if not names:
        return {}
    file = open_tensors(folder / WEIGHTS)
    with file.path.open("rb") as opened:
        return {
            name: Factor(read_tensor(opened, entry), DTYPES[entry.dtype])
            for name in sorted(names)
            for entry in (file.entries[name],)
        }


def joined(
    group: Sequence[Adapter], stored: Mapping[str, Factor], loaded: Sequence[Loaded]
) -> dict[str, Factor]:
    """[D; A …] of layers that share D, and each one's [U, s·B …]; a D of zeros is left away."""
    down = stored[group[0].down]
    kept = len(down.value) if down.value.any() else 0
    downs = [down.value[:kept]]
    ups = {each.up: [stored[each.up].value[:, :kept]] for each in group}
    for lora in loaded:
        for each in group:
            pair = lora.pairs.get(each.path)
            if pair is None or each.reason:
                continue
            pair = smoothed(pair, each, stored)
            downs.append(pair.down.reshape(-1, *down.value.shape[1:]))
            for other in group:
                scale = lora.scale if other is each else 0.0
                ups[other.up].append(_columns(stored[other.up].value, pair, scale))
    found = {name: Factor(np.concatenate(parts, 1), stored[name].dtype)
             for name, parts in ups.items()}  # fmt: skip
    return {group[0].down: replace(down, value=np.concatenate(downs)), **found}


def smoothed(pair: Pair, adapter: Adapter, stored: Mapping[str, Factor]) -> Pair:
    """B A for a layer whose weight is stored as diag(rows) W diag(columns): likewise."""
    up, down = pair.up, pair.down
    if adapter.rows:
        up = up * stored[adapter.rows].value[:, None]
    if adapter.columns:
        columns = stored[adapter.columns].value
        down = down * columns.reshape(-1, *[1] * (down.ndim - 2))
    return Pair(up, down)


def _columns(up: Array, pair: Pair, scale: float) -> Array:
    """s·B as columns beside the stored U; zeros, of U's rows, for a scale of 0."""
    if scale == 0.0:
        return np.zeros((len(up), pair.rank, *up.shape[2:]), np.float32)
    return (scale * pair.up.astype(np.float64)).reshape(len(up), pair.rank, *up.shape[2:])


def _fitting(name: str, factor: Factor) -> Factor:
    """The factor, if its dtype can hold it."""
    greatest = float(np.abs(factor.value).max(initial=0.0))
    limit = LARGEST.get(factor.dtype, float(np.finfo(np.float32).max))
    if greatest > limit:
        raise InputError(
            f"{name}: a factor of {greatest:.3g} is beyond {factor.dtype}, in which this artifact "
            f"keeps it (up to {limit:.3g}); take a smaller scale=; nothing was loaded"
        )
    return factor
