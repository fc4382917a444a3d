"""What an example of each argument of the field follows from: the config, and the other arguments.

`ROWS` go by an argument's name, `PATTERNS` by a part of it; no network's class is looked at. Sizes
that the config does not tell are guessed here, and put right by trial (`effuse.example_repair`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from effuse.errors import InputError
from effuse.example_network import FRAMES, WAY_OUT, Network, required, width_of
from effuse.roles import LATENT_NAMES, TIMESTEP_NAMES

PIXELS = 8  # image pixels a latent pixel, for the sizes that SDXL is told

# Where configs keep the width of the prompt's embedding, most specific first.
WIDTHS = ("caption_channels", "joint_attention_dim", "encoder_hid_dim", "cross_attention_dim",
          "text_embed_dim", "text_dim", "text_states_dim", "caption_dim", "cap_feat_dim",
          "text_hidden_dim", "in_text_dim", "embedding_dim")  # fmt: skip
# Where configs keep the latent's channels.
CHANNELS = ("in_channels", "in_visual_dim", "in_dim", "latent_channels", "channels")
UNKNOWN = 67  # a width that the config does not tell: a prime, by which a trial knows it again


def latent(net: Network) -> torch.Tensor:
    """Noise of shape (batch, channels, height, width), or (batch, tokens, channels)."""
    conv = isinstance(net.entry, nn.modules.conv._ConvNd)
    known: Any = getattr(net.entry, "in_channels" if conv else "in_features", None)
    channels: int = width_of(net, CHANNELS) or known or UNKNOWN
    height, width = net.sides
    if net.packed or {"num_frames", "height", "width"} <= net.arguments:
        return net.normal(net.batch, math.prod(net.grid), channels)
    axes = len(net.entry.kernel_size) if conv else 2  # type: ignore[union-attr,arg-type]
    return net.normal(net.batch, channels, *(FRAMES, height, width)[-axes:])


def time(net: Network) -> torch.Tensor:
    """The middle of the noise levels: of 0 to 1 on packed tokens, of 0 to 1000 elsewhere."""
    return torch.tensor(0.5 if net.packed else 500.0)


def prompt(net: Network) -> torch.Tensor | None:
    """An embedded prompt, shape (batch, length, width)."""
    width = width_of(net, WIDTHS)
    if width is None and required(net, "encoder_hidden_states"):
        width = UNKNOWN
    return None if width is None else net.normal(net.batch, net.length, width)


def other_prompt(net: Network, word: str) -> torch.Tensor | None:
    """The prompt by another text encoder, whose settings end in a word, or hold it."""
    keys = [key for key in net.config if re.search(rf"(dim|embed)_{word}(_dim)?$", key)]
    width = width_of(net, keys)
    return None if width is None else net.normal(net.batch, other_length(net, word), width)


def layered_prompt(net: Network) -> torch.Tensor | None:
    """A prompt by several layers of its encoder, shape (layers, batch, length, width)."""
    layers = net.config.get("llama_layers")
    alone = prompt(net)
    return alone.expand(len(layers), *alone.shape) if layers and alone is not None else None


def other_length(net: Network, word: str) -> int:
    """How many tokens it has by another text encoder."""
    return width_of(net, (f"text_len_{word}",)) or net.length


def prompt_mask(net: Network) -> torch.Tensor | None:
    """Which tokens of the prompt count, shape (batch, length), for captions padded to a length."""
    if not net.config.get("caption_channels"):
        return None
    kept = torch.arange(net.length) < net.length * 3 // 4
    return kept.long().expand(net.batch, -1).contiguous()


def pooled(net: Network) -> torch.Tensor | None:
    """The prompt as one vector, shape (batch, width)."""
    width = net.config.get("pooled_projection_dim")
    return net.normal(net.batch, width) if width else None


def labels(net: Network) -> torch.Tensor | None:
    """Class labels in range, shape (batch,), or what the config embeds in their place."""
    config = net.config
    kind = config.get("class_embed_type")
    if kind == "timestep":
        return torch.full((net.batch,), 500.0)
    if kind == "identity":
        return net.normal(net.batch, config.get("time_embedding_dim") or widths(net)[0] * 4)
    if kind in ("projection", "simple_projection"):
        return net.normal(net.batch, config["projection_class_embeddings_input_dim"])
    zero = config.get("norm_type") == "ada_norm_zero"
    classes = config.get("num_class_embeds") or (zero and config.get("num_embeds_ada_norm"))
    if not classes:
        return None
    return torch.randint(0, classes, (net.batch,), generator=net.generator)


def widths(net: Network) -> tuple[int, ...]:
    """The channels of each level of a UNet."""
    return tuple(net.config["block_out_channels"])


def conditions(net: Network) -> dict[str, Any] | None:
    """SDXL's pooled prompt and sizes, or PixArt's resolution and aspect ratio."""
    kind = net.config.get("addition_embed_type")
    if kind == "text_time":
        return text_time(net)
    if kind not in (None, "text"):
        raise InputError(
            f"inputs: no example of 'added_cond_kwargs' follows from addition_embed_type={kind!r}; "
            f"{WAY_OUT}"
        )
    if "use_additional_conditions" not in net.config:
        return None
    if not net.config["use_additional_conditions"]:
        return {"resolution": None, "aspect_ratio": None}
    height, width = (PIXELS * side for side in net.sides)
    return {
        "resolution": torch.tensor([[height, width]] * net.batch).to(net.dtype),
        "aspect_ratio": torch.tensor([[height / width]] * net.batch).to(net.dtype),
    }


def text_time(net: Network) -> dict[str, Any]:
    """`text_embeds` (batch, width) and `time_ids` (batch, 6): original size, crop, target size.

    The refiner has five ids: an aesthetic score for the target size. Its only text encoder gives
    the pooled prompt the width of the prompt, by which its config can be told.
    """
    config = net.config
    total, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    height, width = (PIXELS * side for side in net.sides)
    ids = [height, width, 0, 0, height, width]
    if total - 5 * each == config.get("cross_attention_dim"):
        ids = [height, width, 0, 0, 6]
    return {
        "text_embeds": net.normal(net.batch, total - len(ids) * each),
        "time_ids": torch.tensor([ids] * net.batch).to(net.dtype),
    }


def guidance(net: Network) -> torch.Tensor | None:
    """The guidance scale as an input, shape (batch,)."""
    return torch.full((net.batch,), 3.5) if net.config.get("guidance_embeds") else None


def guidance_embedding(net: Network) -> torch.Tensor | None:
    """The guidance scale embedded outside the network, shape (batch, width)."""
    width = net.config.get("time_cond_proj_dim")
    return net.normal(net.batch, width) if width else None


def image_ids(net: Network) -> torch.Tensor:
    """Row and column of each patch in the last two of the rotary axes, shape (tokens, axes)."""
    rows, columns = (torch.arange(side // 2) for side in net.sides)
    ids = torch.zeros(len(rows), len(columns), axes(net))
    ids[..., 1] += rows[:, None]
    ids[..., 2] += columns[None]
    return ids.flatten(0, 1).to(net.dtype)


def text_ids(net: Network) -> torch.Tensor:
    """Zeros: a prompt has no place in the picture; shape (length, axes)."""
    return torch.zeros(net.length, axes(net), dtype=net.dtype)


def axes(net: Network) -> int:
    """How many rotary axes the network has."""
    return len(net.config.get("axes_dims_rope") or (0, 0, 0))


def no_names(net: Network) -> bool | None:
    """return_dict=False: outputs as a tuple."""
    return False


def picture_shapes(net: Network) -> list[list[tuple[int, int, int]]]:
    """Frames, rows and columns of each picture of each sample."""
    return [[net.grid] for _ in range(net.batch)]


def grid_size(axis: int) -> Callable[[Network], int]:
    """Frames, rows or columns of a latent that is a sequence of tokens."""
    return lambda net: net.grid[axis]


def control(net: Network) -> torch.Tensor:
    """What steers a ControlNet: a picture, or something of the latent's shape."""
    channels = width_of(net, ("conditioning_channels", "ctrl_conditioning_channels"))
    if not channels or net.config.get("use_simplified_condition_embedding"):
        return latent(net)
    return net.normal(net.batch, channels, *(PIXELS * side for side in net.sides))


def control_video(net: Network) -> torch.Tensor | None:
    """A video of a latent's size that steers, shape (batch, channels, frames, height, width)."""
    channels = width_of(net, ("vace_in_channels",))
    return net.normal(net.batch, channels, FRAMES, *net.sides) if channels else None


def control_mask(net: Network) -> torch.Tensor | None:
    """Which pixels of what steers a ControlNet are told: all, as one more channel of it."""
    if not net.config.get("concat_conditioning_mask"):
        return None
    return torch.ones_like(control(net)[:, :1])


def control_kinds(net: Network) -> torch.Tensor:
    """Which kinds of pictures steer: the first, shape (batch, kinds)."""
    kinds = torch.zeros(net.batch, width_of(net, ("num_control_type",)) or 1, dtype=net.dtype)
    kinds[:, 0] = 1
    return kinds


def places(net: Network) -> tuple[torch.Tensor, ...]:
    """Frames, rows and columns of the tokens, each counted from 0."""
    height, width = net.sides
    return torch.arange(FRAMES), torch.arange(height // 2), torch.arange(width // 2)


def rates(net: Network) -> torch.Tensor:
    """Frames a second, shape (batch,)."""
    return torch.full((net.batch,), 16)


def sizes_told(net: Network, count: int) -> torch.Tensor:
    """Sizes in pixels and the like, shape (batch, count)."""
    height, width = (PIXELS * side for side in net.sides)
    told = [height, width, height, width, 0, 0][:count]
    return torch.tensor([told] * net.batch).to(net.dtype)


def border(net: Network) -> torch.Tensor:
    """Which pixels are padding: none, shape (1, 1, height, width)."""
    return torch.zeros(1, 1, *(PIXELS * side for side in net.sides), dtype=net.dtype)


def mask(net: Network) -> torch.Tensor:
    """Everything counts, shape (batch, length)."""
    return torch.ones(net.batch, net.length, dtype=torch.int64)


def indices(net: Network) -> torch.Tensor:
    """Whole numbers that any table has, shape (batch, length)."""
    return torch.arange(net.batch * net.length).reshape(net.batch, -1) % 2


def vector(net: Network) -> torch.Tensor:
    """One vector a sample, shape (batch, width)."""
    return net.normal(net.batch, UNKNOWN)


def sequence(net: Network) -> torch.Tensor:
    """Vectors, shape (batch, length, width)."""
    return net.normal(net.batch, net.length, UNKNOWN)


def pair(net: Network) -> torch.Tensor:
    """Two numbers a sample, such as a size in pixels, shape (batch, 2)."""
    return torch.tensor([[PIXELS * side for side in net.sides]] * net.batch).to(net.dtype)


def rotary(net: Network) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the positions' angles, shape (tokens, width) each."""
    angles = torch.linspace(0, 1, math.prod(net.grid) * UNKNOWN).reshape(-1, UNKNOWN)
    return angles.cos().to(net.dtype), angles.sin().to(net.dtype)


Row = Callable[[Network], Any]  # None: the network takes none, and the argument keeps its default

ROWS: tuple[tuple[str, Row], ...] = (
    *((name, latent) for name in sorted(LATENT_NAMES)),
    *((name, time) for name in sorted(TIMESTEP_NAMES)),
    ("encoder_hidden_states", prompt),
    ("encoder_hidden_states_t5", lambda net: other_prompt(net, "t5")),
    ("encoder_hidden_states_2", lambda net: other_prompt(net, "2")),
    ("encoder_hidden_states_llama3", layered_prompt),
    ("text_embedding_mask_t5", lambda net: torch.ones(net.batch, other_length(net, "t5"))),
    ("encoder_attention_mask", prompt_mask),
    ("pooled_projections", pooled),
    ("class_labels", labels),
    ("added_cond_kwargs", conditions),
    ("timestep_cond", guidance_embedding),
    ("guidance", guidance),
    ("img_ids", image_ids),
    ("txt_ids", text_ids),
    ("img_shapes", picture_shapes),
    ("num_frames", grid_size(0)),
    ("height", grid_size(1)),
    ("width", grid_size(2)),
    ("image_meta_size", lambda net: sizes_told(net, 6)),
    ("added_time_ids", lambda net: sizes_told(net, 3)),
    ("micro_conds", lambda net: sizes_told(net, 5)),
    ("style", lambda net: torch.zeros(net.batch, dtype=torch.int64)),
    ("padding_mask", border),
    ("visual_rope_pos", places),
    ("text_rope_pos", lambda net: torch.arange(net.length)),
    ("chunk_partition", lambda net: [FRAMES]),
    ("control_hidden_states", control_video),
    ("control_type", control_kinds),
    ("control_type_idx", lambda net: [0]),
    ("conditioning_mask", control_mask),
    ("sample_posterior", lambda net: False),
    ("return_dict", no_names),
)

# What a part of a name tells, first match first; for arguments that forward needs, or that a trial
# has missed.
PATTERNS: tuple[tuple[str, Row], ...] = (
    (r"^controlnet_cond$", control),
    (r"mask", mask),
    (r"rotary|rope_emb", rotary),
    (r"time(?!_id)|sigma|(^|_)t$", time),
    (r"fps", rates),
    (r"drop$", lambda net: torch.zeros(net.batch, dtype=torch.bool)),
    (r"size|coords|crop", pair),
    (r"ids?$|_id$|index|indices|tokens?$|tags?$|labels?$", indices),
    (r"pooled|global|proj|vec|style", vector),
    (r"embed|hidden_states|feats|states", sequence),
    (r"sample|noisy|latent|video|image|pixel|control|mel$|xs?$", latent),
    (r"", sequence),
)


def is_time(name: str) -> bool:
    """Whether an argument's name says that it holds timesteps."""
    return name in TIMESTEP_NAMES or guess_row(name) is time


def guess_row(name: str) -> Row:
    """The row of the first pattern that an argument's name matches."""
    return next(row for pattern, row in PATTERNS if re.search(pattern, name))


def guessed(net: Network, name: str, missed: bool = False) -> Any:
    """An example of an argument, by its row, or else by a part of its name and its annotation.

    Where forward has a default and the row knows of nothing, None, unless a trial has `missed` it.
    """
    row = dict(ROWS).get(name)
    argument = net.parameters[name]
    told = "" if argument.annotation is argument.empty else str(argument.annotation)
    if row is not None and (made := row(net)) is not None:
        return listed(made, told)
    if row is not None and not missed and argument.default is not argument.empty:
        return None
    plain = plain_type(told)
    if plain in PLAIN:
        return one_of(net, name, PLAIN[plain])
    return listed(guess_row(name)(net), told)


def one_of(net: Network, name: str, default: Any) -> Any:
    """What the config sets a plain argument to, or the first it offers: `scale` of `scales`."""
    offered = net.config.get(f"{name}s")
    first = offered[0] if isinstance(offered, (list, tuple)) and offered else None
    return net.config.get(name, first if isinstance(first, type(default)) else default)


def plain_type(told: str) -> str:
    """An annotation's type without its brackets, and without that it may be None."""
    plain = re.sub(r"typing\.|torch\.|Optional|Union|None|NoneType|[\[\]| ,]", "", told)
    return plain.removeprefix("<class'").removesuffix("'>")


def listed(made: Any, told: str) -> Any:
    """A batch as a list of its samples, where the annotation asks for a list of tensors."""
    if torch.is_tensor(made) and re.search(r"(?i)\b(list|tuple)\[[^\]]*tensor", told):
        return [each.contiguous() for each in made]
    if torch.is_tensor(made) and plain_type(told) == "list":  # of what is not told: batches
        return [made]
    return made


PLAIN: Mapping[str, Any] = {"bool": False, "int": 1, "float": 1.0, "str": None, "listfloat": [1.0]}
