"""Passes: one file each; here is the legal order, with its reasons."""

if __name__ != "effuse.passes":
    raise ImportError(f"{__name__!r} is a folder of effuse's checkout; import effuse.passes")

from effuse.passes.auto_bits import AutoBits
from effuse.passes.base import Pass
from effuse.passes.cache import Cache
from effuse.passes.canonicalize import Canonicalize
from effuse.passes.distill import Distill
from effuse.passes.guidance import Guidance
from effuse.passes.hoist import Hoist
from effuse.passes.lora import Lora
from effuse.passes.low_rank import LowRank
from effuse.passes.prune import Prune
from effuse.passes.quantize import Quantize
from effuse.passes.skip import Skip
from effuse.passes.smooth import Smooth
from effuse.passes.split_shortcut import SplitShortcut
from effuse.passes.start_token import StartToken

ORDER: tuple[type[Pass], ...] = (
    Canonicalize,  # first: later rules see one way to write a thing
    Prune,  # on the whole network, before parts, variants and formats are made of its layers
    Distill,  # behind what removes layers, while the rest is one graph with all its weights
    Hoist,  # before anything lossy: tables and prompt values stay exact
    StartToken,  # once it is settled where the prompt's layers are, before there are variants
    Cache,  # before calibration: bits are measured on the trajectory that the plan runs
    Skip,  # after the cache, whose variants it thins out
    SplitShortcut,  # before calibration, which then sees each operand of a concatenation apart
    Smooth,  # once it is settled which layers there are; its scales are for the rounding to come
    LowRank,  # on smooth weights, and before their remainders are quantized
    Lora,  # on layers in float, and LowRank's branches, which take LoRAs as they are
    Quantize,  # last of the rewrites: it measures the network as it will really run
    AutoBits,  # in Quantize's place: it measures, chooses formats, and has Quantize write them
    Guidance,  # behind all that changes the outputs, from which it tells what to leave out
)

BY_NAME = {each.name: each for each in ORDER}

PRESETS: dict[str, tuple[Pass, ...]] = {
    "none": (),
    "exact": (Hoist(),),
    "w8a8": (Hoist(), Quantize("w8a8")),
    "cache": (Hoist(), Cache()),
    "w8a8-cache": (Hoist(), Cache(), Quantize("w8a8")),
    "w4a8": (Hoist(), Quantize("w4a8", rounding="gptq", correct_bias=True)),
    "w4a16": (Hoist(), LowRank(format="w4a16", inputs=False), Quantize("w4a16")),
    "w8a8-dynamic": (Hoist(), Quantize("w8a8", activations="dynamic")),
}

__all__ = [
    "BY_NAME",
    "ORDER",
    "PRESETS",
    "AutoBits",
    "Cache",
    "Canonicalize",
    "Distill",
    "Guidance",
    "Hoist",
    "Lora",
    "LowRank",
    "Pass",
    "Prune",
    "Quantize",
    "Skip",
    "Smooth",
    "SplitShortcut",
    "StartToken",
]
