"""The layouts of LoRA files as tables: from a tensor's name to a layer of the network and a role.

    peft         unet.<path>.lora_A.weight, .lora_B.weight; also transformer., base_model.model.
    diffusers    unet.<path>.lora.down.weight, .lora.up.weight; ….processor.to_q_lora.down.weight
    kohya        lora_unet_<path with _ for .>.lora_down.weight, .lora_up.weight, .alpha
    cloneofsimo  unet:<i>:down, unet:<i>:up, by the order of modules in the diffusers of 2022-23

Sources: peft's and diffusers' savers, kohya-ss/sd-scripts, cloneofsimo/lora (`lora.py`).
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from effuse.errors import InputError

LEFT_OUT = re.compile(
    r"(base_model\.model\.)?(text_encoder(_\d+)?[.:]|text_model\.|lora_te\d*_|bundle_emb\.)|<.+>$"
)

OTHER_METHODS = {  # by what a name holds; none of them is a product of two factors alone
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector)"),
    "LoHa": re.compile(r"\.hada_"),
    "LoKr": re.compile(r"\.lokr_"),
    "a convolution of three factors": re.compile(r"\.lora_mid\b"),
    "OFT": re.compile(r"\.oft_"),
    "a trained bias": re.compile(r"\.(lora(_\w+)?(\.up|\.down)?(\.\w+)?\.bias|diff_b)$"),
    "a full difference": re.compile(r"\.diff$"),
}

LAYOUTS = (  # the first that fits a whole name
    ("cloneofsimo", re.compile(r"(?P<name>unet:\d+):(?P<role>up|down)")),
    (
        "kohya",
        re.compile(
            r"(?P<name>lora_(?:unet|transformer)_[^.]+)\."
            r"(?:(?P<role>lora_[AB]|lora_(?:down|up))\.weight|(?P<alpha>alpha))"
        ),
    ),
    ("diffusers", re.compile(r"(?P<name>.+\.processor\.\w+_lora)\.(?P<role>down|up)\.weight")),
    ("diffusers", re.compile(r"(?P<name>.+)\.lora\.(?P<role>down|up)\.weight")),
    ("peft", re.compile(r"(?P<name>.+)\.(?P<role>lora_[AB]|lora_(?:down|up))(\.[^.]+)?\.weight")),
    ("peft", re.compile(r"(?P<name>.+)\.(?P<alpha>alpha)")),
)
ROLES = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}

PREFIXES = ("base_model.model.", "unet.", "transformer.", "diffusion_model.")
FLAT_PREFIX = re.compile(r"lora_(unet|transformer)_")
PROCESSOR = re.compile(r"(?P<head>.+)\.processor\.(?P<leaf>\w+)_lora")

# cloneofsimo's search runs down the classes that the metadata names, in order of registration
TARGETS = {"CrossAttention": "attn", "Attention": "attn", "GEGLU": "ff"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LEAVES = (
    *(f"attn1.{leaf}" for leaf in ATTENTION),
    "ff.net.0.proj",  # today's diffusers registers it last
    *(f"attn2.{leaf}" for leaf in ATTENTION),
)
BLOCKS = ("down_blocks", "up_blocks", "mid_block")
NUMBERED = re.compile(
    r"(?P<block>down_blocks|up_blocks|mid_block)\.(?:(?P<number>\d+)\.)?"
    r"attentions\.(?P<attention>\d+)\.transformer_blocks\.(?P<transformer>\d+)\.(?P<leaf>.+)"
)

# the names of the original Stable Diffusion code, which kohya's files for SDXL keep
SGM_BLOCK = re.compile(r"(?P<side>input|output)_blocks_(?P<number>\d+)_(?P<part>\d)_(?P<rest>.+)")
SGM_MIDDLE = re.compile(r"middle_block_(?P<part>[012])_(?P<rest>.+)")
SGM_MIDDLE_PARTS = ("resnets_0", "attentions_0", "resnets_1")
SGM_WHOLE = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
SGM_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
SGM_SCALERS = {"op": "downsamplers_0_conv", "conv": "upsamplers_0_conv"}
SGM_LAYERS = 3  # of a block: two of the network's own and the one that changes the resolution


@dataclass(frozen=True)
class Layer:
    """A layer of the compiled network that can take a LoRA.

    Args:
        path: the module's path, as "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q".
        shape: its weight's: (out, in) of a linear, (out, in, kh, kw) of a convolution.
    """

    path: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """What a tensor's name says: the layout, the layer's name in it, and up, down or alpha."""

    layout: str
    name: str
    role: str


def parse(key: str) -> Part | None:
    """What the name of a tensor says, or None where no layout knows it."""
    for layout, pattern in LAYOUTS:
        if found := pattern.fullmatch(key):
            groups = found.groupdict()
            role = groups.get("role") or "alpha"
            return Part(layout, found["name"], ROLES.get(role, role))
    return None


def other_method(key: str) -> str | None:
    """The method, other than a LoRA of two factors, that a tensor's name belongs to."""
    return next((name for name, sign in OTHER_METHODS.items() if sign.search(key)), None)


def locator(layers: Sequence[Layer], order: Sequence[Layer]) -> Callable[[Part], str | None]:
    """A function from a part to the path of its layer, None where the network has no such layer.

    The function raises an InputError for a flat name that stands for two layers.

    Args:
        layers: those of the network.
        order: those that the file numbers, see `numbered`.
    """
    paths = {layer.path for layer in layers}
    flat = defaultdict(list)
    for path in sorted(paths):
        flat[path.replace(".", "_")].append(path)
    number = {f"unet:{i}": layer.path for i, layer in enumerate(order)}
    find: dict[str, Callable[[str], str | None]] = {
        "cloneofsimo": number.get,
        "kohya": lambda name: _unflatten(FLAT_PREFIX.sub("", name, count=1), flat),
    }

    def dotted(name: str) -> str | None:
        return next((word for word in _bare(name) if word in paths), None)

    return lambda part: find.get(part.layout, dotted)(part.name)


def numbered(layers: Sequence[Layer], targets: Sequence[str] = ()) -> tuple[Layer, ...]:
    """The layers that cloneofsimo's files number, in their order: blocks down, up, middle.

    Args:
        layers: those of the network, in any order.
        targets: the classes whose layers were trained, as the file's metadata name them; none for
            all of `TARGETS`.

    Raises:
        InputError: a class whose order is not known here.
    """
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise InputError(
            f"the file numbers the layers inside {', '.join(unknown)}, whose order is not known "
            f"(known: {', '.join(TARGETS)}); convert it with its own trainer to names of layers"
        )
    kinds = tuple({TARGETS[target] for target in targets or TARGETS})
    places = {layer: _place(layer.path) for layer in layers}
    named = {layer: place for layer, place in places.items() if place is not None}
    chosen = [layer for layer, place in named.items() if LEAVES[place[-1]].startswith(kinds)]
    return tuple(sorted(chosen, key=named.__getitem__))


def target_classes(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The classes that a file of cloneofsimo's names in its metadata; none where it names none."""
    try:
        names = json.loads(metadata.get("unet", "[]"))
    except json.JSONDecodeError:
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _place(path: str) -> tuple[int, ...] | None:
    found = NUMBERED.fullmatch(path)
    if found is None or found["leaf"] not in LEAVES:
        return None
    numbers = (int(found[name] or 0) for name in ("number", "attention", "transformer"))
    return (BLOCKS.index(found["block"]), *numbers, LEAVES.index(found["leaf"]))


def _bare(name: str) -> Iterator[str]:
    """The name, and what is left when prefixes go, one by one: a network may own such a word."""
    if found := PROCESSOR.fullmatch(name):
        leaf = {"to_out": "to_out.0"}.get(found["leaf"], found["leaf"])
        name = f"{found['head']}.{leaf}"
    yield name
    while prefix := next((word for word in PREFIXES if name.startswith(word)), ""):
        name = name.removeprefix(prefix)
        yield name


def _unflatten(name: str, flat: Mapping[str, Sequence[str]]) -> str | None:
    paths = flat.get(name) or flat.get(_from_sgm(name)) or (None,)
    if len(paths) > 1:
        raise InputError(
            f"the name {name!r} stands for {len(paths)} layers of the network: "
            f"{', '.join(map(str, paths))}; expected a file with dots in the names of layers"
        )
    return paths[0]


def _from_sgm(name: str) -> str:
    """The flat name in diffusers of a flat name in the original code."""
    if found := SGM_MIDDLE.fullmatch(name):
        part = SGM_MIDDLE_PARTS[int(found["part"])]
        return f"mid_block_{part}_{SGM_RESNET.get(found['rest'], found['rest'])}"
    found = SGM_BLOCK.fullmatch(name)
    if found is None or name in SGM_WHOLE:
        return SGM_WHOLE.get(name, name)
    encoder, rest = found["side"] == "input", found["rest"]
    block, number = divmod(int(found["number"]) - encoder, SGM_LAYERS)
    part = "resnets" if found["part"] == "0" else "attentions"
    inner = SGM_SCALERS.get(rest) or f"{part}_{number}_{SGM_RESNET.get(rest, rest)}"
    return f"{'down' if encoder else 'up'}_blocks_{block}_{inner}"
