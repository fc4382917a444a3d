"""Small values of the settings that networks of this field share, by what a name says.

They fit each other: heads x width of a head = width, and the rotary axes share a head's width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

HEADS, HEAD = 4, 32
WIDTH = HEADS * HEAD
TEXT = 64

# First match first; a name that matches nothing keeps its value.
SMALL: tuple[tuple[str, int], ...] = (
    (r"num_(key_value|kv).*heads", HEADS // 2),
    (r"heads$", HEADS),
    (r"^(audio_)?(attention_|linear_|cross_attention_)?head_dim$|^d_kv$|rotary_dim$", HEAD),
    (r"^(ffn?|intermediate|d_ff|moe).*(dim|size|ff)$|hidden_dim$", 2 * WIDTH),
    (r"^(hidden_size|dim|d_model|model_dim|inner_dim|embed_dim|dit_dim|token_dim)$", WIDTH),
    (r"^(caption_projection_dim|(audio_)?cross_attention_dim)$", WIDTH),
    (r"(text|txt|caption|cap|joint|pooled|context|cond|clip|image_proj|image_embed|encoder_hid|llm)"
     r".*(dim2?|channels|size)$", TEXT),
    (r"^(freq_dim|time_dim|time_embed_dim|timestep_\w+_dim|adaln\w*_dim)$", TEXT),
)  # fmt: skip
AXES = re.compile(r"^(axes_dims?(_rope)?|axes_dim_rope|rope_axes_dim|rope_dim(_list)?)$")


def small_settings(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have smaller values by their names, of those that are numbers."""
    found = {name: small_value(name, each) for name, each in defaults.items()}
    return {name: each for name, each in found.items() if each is not None}


def small_value(name: str, value: Any) -> Any:
    """A smaller value of a setting, or None."""
    if isinstance(value, (list, tuple)) and AXES.search(name) and len(value) > 1:
        return type(value)(shares(len(value)))
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    small = next((each for pattern, each in SMALL if re.search(pattern, name)), value)
    return small if small < value else None


def shares(count: int) -> list[int]:
    """A head's width in even parts, the first of them the smallest."""
    part = -(-HEAD // count)
    part += part % 2
    return [HEAD - part * (count - 1), *[part] * (count - 1)]
