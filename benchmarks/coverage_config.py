"""A small configuration of any network of diffusers, found by shrinking its own defaults.

Small values that many networks share are tried first (coverage_small.py). Then a
setting is halved, alone or with others, and stays so if the network is smaller, can still be
built (on the meta device) and still runs on inputs derived from it (on fake tensors). Counts of
layers, known by the number of modules that they make, go first, which makes the rest cheap.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from coverage_small import small_settings
from torch import nn

from effuse.errors import InputError
from effuse.examples import derive_inputs
from effuse.method import as_network

ENOUGH = 3_000_000  # parameters and buffers: no smaller network is looked for
MOST = 40_000_000  # of what is still run on real numbers
COUNTS = r"layers|depth|num_blocks|blocks_per|n_layer|repeats|num_.*blocks"  # names of counts
LAYERS = 2  # of each kind, so that there is a repetition
SIDES = (16, 64, None)  # of the latent, the first that the network takes; None: its own
DECODED_SIDES = (4, 8, 32, None)  # the same where a picture of many more pixels is made of it
KINDS = {"unets": "UNet", "transformers": "transformer", "controlnets": "ControlNet",
         "adapter": "ControlNet", "autoencoders": "autoencoder",
         "vq_model": "autoencoder"}  # fmt: skip
OTHER = "other"
PAIR = {"decode": "autoencoder", "encode": "encoder"}  # methods by which an autoencoder is known
UNBUILT = "cannot be built"
SHRUNK_TRIALS = 12  # of inputs, where those of a wider network are known to be found
Config = dict[str, Any]


def classes() -> dict[str, str]:
    """Every network class that the installed diffusers exports, with its kind."""
    import diffusers
    from diffusers import ModelMixin

    structure: Mapping[str, Iterable[str]] = diffusers.models._import_structure
    found = {}
    for module, names in structure.items():
        for name in names:
            kind = getattr(diffusers, name, None)
            if isinstance(kind, type) and issubclass(kind, ModelMixin) and kind is not ModelMixin:
                own = KINDS.get(module.split(".")[0], OTHER)
                found[name] = own if computes(kind) else OTHER
    return dict(sorted(found.items()))


def networks() -> dict[str, str]:
    """What is tried, with its kind: each class, or of an autoencoder both methods of the pair."""
    import diffusers

    found = {}
    for name, kind in classes().items():
        paired = all(callable(getattr(getattr(diffusers, name), method, None)) for method in PAIR)
        found |= (
            {f"{name}.{method}": own for method, own in PAIR.items()} if paired else {name: kind}
        )
    return found


def entered(model: nn.Module, method: str) -> nn.Module:
    """The network, or its method as one."""
    return as_network(getattr(model, method)) if method else model


def computes(kind: type[nn.Module]) -> bool:
    """Whether forward uses the network at all: some classes hold parts for others, no more."""
    forward = inspect.unwrap(kind.forward)
    return any(each.argval == "self" for each in dis.get_instructions(forward))


@dataclass
class Search:
    """Shrinks the configuration of one class."""

    kind: type[nn.Module]
    base: Config
    method: str = ""
    seconds: float = 15.0  # of computing
    trials: int = 50

    def __post_init__(self) -> None:
        self.deadline = time.process_time() + self.seconds
        self.side: int | None = None
        self.failed: dict[str, str] = {}
        defaults = inspect.signature(self.kind.__init__).parameters.values()
        self.defaults = {each.name: each.default for each in defaults
                         if each.default is not each.empty}  # fmt: skip

    def value(self, config: Config, name: str) -> Any:
        """What a setting is."""
        return config.get(name, self.defaults.get(name))

    @property
    def names(self) -> list[str]:
        """The settings that are numbers, or made of numbers."""
        values = {**self.defaults, **self.base}
        return [name for name, each in values.items() if halved(each) or floored(each)]

    def build(self, config: Config) -> nn.Module | None:
        """The network on the meta device, or None."""
        try:
            with torch.device("meta"):
                return construct(self.kind, config).to("meta").eval()
        except Exception:
            return None

    def reason(self, config: Config, side: int | None) -> str | None:
        """Why the network does not run on the inputs that are derived for it, or None."""
        try:
            with torch.device("meta"):
                model = construct(self.kind, config).to("meta").eval()
        except Exception as error:
            return f"{UNBUILT}: {type(error).__name__}: {str(error)[:200]}"
        try:
            derive_inputs(entered(model, self.method), size=side, trials=self.trials)
        except InputError as error:
            return str(error)
        return None

    def runs(self, config: Config) -> bool:
        """Whether the network is built and runs."""
        return self.reason(config, self.side) is None

    def find(self) -> Config:
        """The smallest configuration that was found in time; else `failed` says where it ends."""
        sides = DECODED_SIDES if self.method == "decode" else SIDES
        self.side = sides[0]
        config = self.guess()
        if self.weight(config) < MOST and self.works(config):
            return self.narrower(config)
        config = self.fewer_layers(dict(self.base))
        reasons: dict[int | None, str | None] = {}
        for side in sides:
            reasons[side] = self.reason(config, side)
            if reasons[side] is None:
                self.side = side
                self.trials = SHRUNK_TRIALS
                return self.mended(self.narrower(config))
        first = str(reasons[sides[0]])
        self.failed = {"built": first} if first.startswith(UNBUILT) else {"inputs": first}
        return config

    def guess(self) -> Config:
        """Few layers, and small values by their names."""
        return self.fewer_layers({**small_settings(self.defaults), **self.base})

    def mended(self, config: Config) -> Config:
        """Without a setting for which the network fails on real numbers, if there is one."""
        if self.works(config):
            return config
        for name in reversed(config):
            rest = {key: value for key, value in config.items() if key != name} | (
                {name: self.base[name]} if name in self.base else {}
            )
            if self.weight(rest) < MOST and self.works(rest):
                return rest
        return config

    def works(self, config: Config) -> bool:
        """Whether the network runs on real numbers: a table's end shows on these alone."""
        try:
            model = entered(construct(self.kind, config).eval(), self.method)
            with torch.no_grad():
                model(**derive_inputs(model, size=self.side, trials=self.trials))
        except Exception:
            return False
        return True

    def fewer_layers(self, config: Config) -> Config:
        """Two of what makes layers by its name and is not told; at once, else one by one."""
        values = {name: floored(self.value(config, name)) for name in self.names
                  if re.search(COUNTS, name) and name not in self.base}  # fmt: skip
        fewer = {name: value for name, value in values.items() if value is not None}
        if self.build(config | fewer) is not None:
            return config | fewer
        for name, value in fewer.items():
            changed = config | {name: value}
            config = changed if self.build(changed) is not None else config
        return config

    def narrower(self, config: Config) -> Config:
        """Settings that make weights -> halved as often as the network runs."""
        weight, before = self.weight(config), float("inf")
        while before > weight > ENOUGH and time.process_time() < self.deadline:
            before = weight
            for names in self.groups(config, weight):
                while weight > ENOUGH and time.process_time() < self.deadline:
                    changed = self.half(config, names)
                    lighter = self.weight(changed)
                    if not lighter < weight or not self.runs(changed):
                        break
                    if lighter < MOST and not self.works(changed):
                        break
                    config, weight = changed, lighter
        return config

    def half(self, config: Config, names: Iterable[str]) -> Config:
        """The configuration with some settings halved."""
        values = {name: halved(self.value(config, name)) for name in names}
        return config | {name: value for name, value in values.items() if value is not None}

    def groups(self, config: Config, weight: float) -> list[tuple[str, ...]]:
        """Settings to halve together: all that make weights, each alone, each two.

        What cannot be built with one of them halved may be with two.
        """
        widths = [name for name in self.names if not re.search(COUNTS, name)]
        gains = {name: weight - self.weight(self.half(config, [name])) for name in widths}
        heavy = sorted((name for name, gain in gains.items() if gain),
                       key=lambda name: -abs(gains[name]))  # fmt: skip
        twos = dict.fromkeys(tuple(sorted((one, other))) for one, other in
                             itertools.product(heavy[:5], widths) if one != other)  # fmt: skip
        return [tuple(heavy), tuple(widths), *((name,) for name in heavy), *twos]

    def weight(self, config: Config) -> float:
        """Elements of parameters and buffers; infinite where the network cannot be built."""
        model = self.build(config)
        if model is None:
            return float("inf")
        tensors = itertools.chain(model.parameters(), model.buffers())
        return sum(each.numel() for each in tensors)


def construct(kind: type[nn.Module], config: Config) -> nn.Module:
    """The network; with parts of another where it has none of its own: "from_…": {"class": …}.

    "calls" names methods without arguments to call then, such as enable_tiling.
    """
    settings = made(config)
    methods = settings.pop("calls", ())
    lent = {name: settings.pop(name) for name, each in config.items()
            if name.startswith("from_") and isinstance(each, dict)}  # fmt: skip
    network = kind(**settings)
    for name, lender in lent.items():
        network = getattr(kind, name)(network, lender)
    for name in methods:
        getattr(network, name)()
    return network


def made(settings: Config) -> Config:
    """The settings with the networks that they name, each {"class": …, its own settings}, built."""
    import diffusers

    def build(value: Any) -> Any:
        if isinstance(value, dict) and "class" in value:
            own = {name: each for name, each in value.items() if name != "class"}
            return getattr(diffusers, value["class"])(**own)
        return [build(each) for each in value] if isinstance(value, list) else value

    return {name: build(value) for name, value in settings.items()}


def halved(value: Any, least: int = 4) -> Any:
    """Half of a number, or of each in a sequence; None where there is nothing to halve."""
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)) or not value:
        return None
    if isinstance(value, int):
        return value // 2 if value >= 2 * least and value % 2 == 0 else None
    parts = [halved(each, 2) for each in value]
    if any(part is None and each != 1 for part, each in zip(parts, value, strict=True)):
        return None
    if all(part is None for part in parts):
        return None
    return type(value)(each if part is None else part
                       for part, each in zip(parts, value, strict=True))  # fmt: skip


def floored(value: Any) -> Any:
    """At most two of each; None where there are no more."""
    if isinstance(value, bool) or not isinstance(value, (int, list, tuple)) or not value:
        return None
    if isinstance(value, int):
        return LAYERS if value > LAYERS else None
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
        return None
    fewer = type(value)(min(each, LAYERS) for each in value)
    return fewer if fewer != value else None
