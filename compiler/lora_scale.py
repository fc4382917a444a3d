"""The factor that a LoRA's product is multiplied by: alpha / rank, from where its file keeps alpha.

kohya stores a scalar beside each pair; peft and diffusers keep a configuration, in the file's
metadata (`lora_adapter_metadata`, diffusers >= 0.34) or in `adapter_config.json` beside
`adapter_model.safetensors`. Without either, alpha is the rank and the factor 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any

from effuse.errors import InputError
from effuse.tensor_file import TensorFile

METADATA = "lora_adapter_metadata"
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # as peft saves a folder
OTHERS = re.compile(r"text_encoder(_\d+)?\.")
OWN = re.compile(r"(unet|transformer)\.")
LITERAL = re.compile(r"[\w.]+")


@dataclass(frozen=True)
class Alphas:
    """The alphas that a configuration gives to the layers.

    Args:
        alpha: of every layer that `by_name` does not name; None for the layer's rank.
        by_name: by the end of a layer's path.
        by_root: divide by the rank's square root instead of the rank (rsLoRA, arXiv 2312.03732).
    """

    alpha: float | None = None
    by_name: Mapping[str, float] = field(default_factory=dict)
    by_root: bool = False

    def scale(self, path: str, rank: int, own: float | None = None) -> float:
        """The factor of a layer's product; `own` is the alpha that is stored beside the pair."""
        if own is not None:
            return own / rank
        ends = (a for name, a in self.by_name.items() if f".{path}".endswith(f".{name}"))
        alpha = next(ends, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / (sqrt(rank) if self.by_root else rank)


def read_alphas(file: TensorFile) -> Alphas:
    """What the configuration of a file says about its alphas.

    Raises:
        InputError: the configuration is damaged, or names layers by regular expressions.
    """
    config = _config(file)
    alpha, by_name = config.get("lora_alpha"), config.get("alpha_pattern") or {}
    if not (alpha is None or _is_number(alpha)) or not _is_table(by_name):
        raise InputError(
            f"{file.path}: its configuration of adapters holds lora_alpha {alpha!r} and "
            f"alpha_pattern {by_name!r:.200}; expected a number, and numbers by the names of "
            "layers (no regular expressions); save it again with diffusers"
        )
    return Alphas(alpha, by_name, bool(config.get("use_rslora")))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_table(value: object) -> bool:
    """Whether these are numbers by literal names."""
    return isinstance(value, dict) and all(
        LITERAL.fullmatch(name) and _is_number(number) for name, number in value.items()
    )


def _config(file: TensorFile) -> dict[str, Any]:
    beside = file.path.with_name(CONFIG)
    text = file.metadata.get(METADATA)
    if text is None and file.path.name == TENSORS and beside.is_file():
        text = _text(beside)
    try:
        config = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise InputError(f"{file.path}: its configuration is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{file.path}: its configuration of adapters is not a JSON object")
    return {OWN.sub("", key, count=1): config[key] for key in config if not OTHERS.match(key)}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
