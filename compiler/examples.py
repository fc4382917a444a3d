"""Example inputs of a network, from its config and the names of forward's arguments.

`ROWS` says, for each argument name of the field, how a tensor for it follows from the config; no
network's class is looked at. What cannot be read there (does it take one timestep or a vector,
numbers or indices?) is found by trying the network on fake tensors, which costs no arithmetic.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils import _pytree as pytree

from effuse.errors import InputError
from effuse.roles import LATENT_NAMES, TIMESTEP_NAMES

SIZE = 32  # latent pixels a side, where the config has no sample_size
TOKEN_SIZE = 128  # the same for networks on packed tokens: 1024 pixels, their pipelines' default
FRAMES = 8
PIXELS = 8  # image pixels a latent pixel, for the sizes that SDXL is told
WAY_OUT = "pass example inputs yourself: inputs={...}, by the names of forward's arguments"

# Prompt lengths as the pipelines make them: the first key that is set in the config or an argument.
LENGTHS = (
    ("txt_ids", 512),
    ("joint_attention_dim", 333),
    ("use_additional_conditions", 120),
    ("caption_channels", 300),
)
LENGTH = 77  # CLIP's
# Where configs keep the width of the prompt's embedding, most specific first.
WIDTHS = ("caption_channels", "joint_attention_dim", "encoder_hid_dim", "cross_attention_dim")


@dataclass(frozen=True)
class Network:
    """What the rows are told about a network: its config, its arguments, and the sizes wanted."""

    config: Mapping[str, Any]
    arguments: frozenset[str]
    entry: nn.Module | None  # the first layer with a weight
    batch: int
    size: int | None
    dtype: torch.dtype
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def normal(self, *shape: int) -> torch.Tensor:
        """Seeded noise in the network's dtype."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    @property
    def tokens(self) -> bool:
        """Whether the latent is a sequence of packed 2×2 patches with positions in `img_ids`."""
        return "img_ids" in self.arguments

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width in latent pixels."""
        default = TOKEN_SIZE if self.tokens else SIZE
        found = self.size or self.config.get("sample_size") or default
        return (found, found) if isinstance(found, int) else (int(found[-2]), int(found[-1]))

    @property
    def length(self) -> int:
        """How many tokens a prompt has."""
        known = (n for key, n in LENGTHS if self.config.get(key) or key in self.arguments)
        return next(known, LENGTH)


def derive_inputs(
    model: nn.Module,
    *,
    batch: int = 2,
    timestep: torch.Tensor | None = None,
    size: int | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Example inputs for `model.forward`, in the order of its arguments.

    `size` is the latent's height and width (default: the config's sample_size, else 32; 128 for
    networks on packed tokens). The timestep has shape () where the network takes a scalar, else
    (batch,). They are on `device`, by default the network's: a network on the meta device gets
    tensors on the meta device.

    Raises:
        InputError: an argument cannot be derived; give `inputs={...}` instead.
    """
    network = describe(model, batch, size)
    own = next((each.device for each in model.parameters()), torch.device("cpu"))
    known = dict(ROWS)
    found: dict[str, Any] = {}
    for name, argument in inspect.signature(model.forward).parameters.items():
        if argument.kind in (argument.VAR_KEYWORD, argument.VAR_POSITIONAL):
            continue
        value = known[name](network) if name in known else None
        if value is None and argument.default is argument.empty:
            raise InputError(f"inputs: no example of {name!r} follows from the config; {WAY_OUT}")
        if value is not None:
            found[name] = value
    chosen = settle(model, network, found, timestep)
    return pytree.tree_map_only(torch.Tensor, lambda each: each.to(device or own), chosen)  # type: ignore[no-any-return]


def describe(model: nn.Module, batch: int, size: int | None) -> Network:
    """What the rows need to know of a network."""
    config = getattr(model, "config", None)
    floats = (each.dtype for each in model.parameters() if each.is_floating_point())
    weighted = (m for m in model.modules() if m._parameters.get("weight") is not None)
    settled = ("use_additional_conditions",)  # a network may replace a None in its config
    values = dict(config) if isinstance(config, Mapping) else {}
    values |= {key: getattr(model, key) for key in settled if key in values and hasattr(model, key)}
    return Network(
        config=values,
        arguments=frozenset(inspect.signature(model.forward).parameters),
        entry=next(weighted, None),
        batch=batch,
        size=size,
        dtype=next(floats, torch.float32),
    )


def latent(net: Network) -> torch.Tensor | None:
    """Noise of shape (batch, channels, height, width), or (batch, tokens, channels)."""
    conv = isinstance(net.entry, nn.modules.conv._ConvNd)
    channels = net.config.get("in_channels") or (net.entry.in_channels if conv else None)  # type: ignore[union-attr]
    if not isinstance(channels, int):
        return None
    height, width = net.sides
    if net.tokens:
        return net.normal(net.batch, (height // 2) * (width // 2), channels)
    axes = len(net.entry.kernel_size) if conv else 2  # type: ignore[union-attr,arg-type]
    return net.normal(net.batch, channels, *(FRAMES, height, width)[-axes:])


def time(net: Network) -> torch.Tensor:
    """The middle of the noise levels: of 0 to 1 on packed tokens, of 0 to 1000 elsewhere."""
    return torch.tensor(0.5 if net.tokens else 500.0)


def prompt(net: Network) -> torch.Tensor | None:
    """An embedded prompt, shape (batch, length, width)."""
    width = next((net.config[key] for key in WIDTHS if net.config.get(key)), None)
    width = width[0] if isinstance(width, (list, tuple)) else width
    return None if width is None else net.normal(net.batch, net.length, width)


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


Row = Callable[[Network], Any]  # None: the network takes none, and the argument keeps its default

ROWS: tuple[tuple[str, Row], ...] = (
    *((name, latent) for name in sorted(LATENT_NAMES)),
    *((name, time) for name in sorted(TIMESTEP_NAMES)),
    ("encoder_hidden_states", prompt),
    ("encoder_attention_mask", prompt_mask),
    ("pooled_projections", pooled),
    ("class_labels", labels),
    ("added_cond_kwargs", conditions),
    ("timestep_cond", guidance_embedding),
    ("guidance", guidance),
    ("img_ids", image_ids),
    ("txt_ids", text_ids),
    ("return_dict", no_names),
)


def settle(
    model: nn.Module, net: Network, inputs: dict[str, Any], timestep: torch.Tensor | None
) -> dict[str, Any]:
    """The inputs with a timestep of the shape and dtype that the network takes, found by trial.

    Raises:
        InputError: the network takes none of them.
    """
    times = [name for name in inputs if name in TIMESTEP_NAMES]
    failure: Exception | None = None
    for shape, dtype in forms(net, timestep):
        given = {name: inputs[name] if timestep is None else timestep for name in times}
        tried = inputs | {name: value.to(dtype).expand(shape) for name, value in given.items()}
        failed = trial(model, tried)
        if failed is None:
            return pytree.tree_map_only(torch.Tensor, lambda each: each.contiguous(), tried)  # type: ignore[no-any-return]
        failure = failure or failed
        if not times:
            break
    shapes = ", ".join(f"{name} {describe_value(value)}" for name, value in inputs.items())
    reason = next((line for line in str(failure).splitlines() if line.strip()), "no message")
    raise InputError(
        f"inputs: the network does not take the examples that follow from its config ({shapes}): "
        f"{type(failure).__name__}: {reason[:300]}; {WAY_OUT}"
    ) from failure


def forms(
    net: Network, timestep: torch.Tensor | None
) -> Iterator[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes and dtypes of a timestep to try, the most usual first."""
    own = () if timestep is None else (timestep.dtype,)
    shapes = ((), (net.batch,)) if timestep is None or not timestep.dim() else (timestep.shape,)
    for dtype in dict.fromkeys((*own, torch.float32, torch.int64)):
        for shape in shapes:
            yield tuple(shape), dtype


def describe_value(value: Any) -> str:
    """The shape of a tensor, anything else as it prints."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key} {describe_value(v)}" for key, v in value.items()) + "}"
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else repr(value)


def trial(model: nn.Module, inputs: Mapping[str, Any]) -> Exception | None:
    """Why forward does not take the inputs, or None; run on fake tensors and a weightless copy."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    try:
        copied = weightless(model, mode).eval()
        with mode, torch.no_grad():
            fakes = pytree.tree_map_only(
                torch.Tensor, lambda each: mode.from_tensor(each).to(device), dict(inputs)
            )
            copied(**fakes)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return None  # not a matter of the inputs: capture tells where
    except Exception as error:
        return error
    return None


def weightless(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """A copy of the network whose parameters and buffers are fake; no value is copied."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(each): mode.from_tensor(each) for each in tensors})
