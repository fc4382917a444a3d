"""What each layer could be: alone in every format, with its bytes and milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from effuse.graph import module_path
from effuse.log import Log
from effuse.passes import layer_cost
from effuse.passes.base import Work
from effuse.passes.bits_solver import Option
from effuse.passes.layer_noise import Noises
from effuse.passes.lone_layer import FLOAT, Lone, lone_layer
from effuse.passes.quantize_sites import SITES
from effuse.plan import Rate
from effuse.program import Part, Program

Group = tuple[fx.Node, ...]
Note = Callable[[str, str], None]


@dataclass
class Choices:
    """The formats that layers can have, float first, in groups that have one format together.

    Args:
        groups: layers of one weight, or of one module path.
        lones: each layer alone in each format.
        anyway: the names of weights that are stored whatever the layers' formats.
        milliseconds: of each layer in each format.
        unmeasured: why the milliseconds are a cost model's; None: they were measured.
    """

    groups: list[Group]
    lones: dict[fx.Node, dict[str, Lone]]
    anyway: AbstractSet[str]
    milliseconds: dict[tuple[fx.Node, str], float] = field(default_factory=dict)
    unmeasured: str | None = None

    def formats(self, group: Group) -> list[str]:
        """The formats that all layers of the group can have."""
        first, *others = (self.lones[site] for site in group)
        return [name for name in first if all(name in other for other in others)]

    def option(self, group: Group, format: str, noises: Noises) -> Option:
        """A group in a format, with all that it costs."""
        return Option(
            format,
            sum(noises.get((site, format), 0.0) for site in group),
            stored((self.lones[site][format] for site in group), self.anyway),
            sum(self.milliseconds[site, format] for site in group),
        )

    def drop(self, group: Group, format: str) -> None:
        """No layer of the group can have the format."""
        for site in group:
            self.lones[site].pop(format, None)

    def low_bit(self) -> dict[fx.Node, list[Lone]]:
        """The layers that can be anything but float, with what they can be."""
        found = {site: [lone for name, lone in each.items() if name != FLOAT]
                 for site, each in self.lones.items()}  # fmt: skip
        return {site: lones for site, lones in found.items() if lones}


def stored(lones: Iterable[Lone], anyway: AbstractSet[str]) -> int:
    """Bytes of the weights that the layers need, each once, but for what is stored `anyway`."""
    found = {name: each.nbytes for lone in lones for name, each in lone.weights.items()}
    return sum(size for name, size in found.items() if name not in anyway)


def together(sites: Sequence[fx.Node]) -> list[Group]:
    """The layers in groups: those that share a weight or a module path have one format."""
    groups: list[tuple[list[fx.Node], set[tuple[str, str]]]] = []
    for site in sites:
        weight: Any = site.args[1]
        nodes, keys = [site], {("weight", str(weight.target)), ("path", module_path(site))}
        for group in [group for group in groups if group[1] & keys]:
            groups.remove(group)
            nodes, keys = [*group[0], *nodes], group[1] | keys
        groups.append((nodes, keys))
    return [tuple(nodes) for nodes, _ in groups]


def shared_weights(program: Program) -> set[str]:
    """The weights that something else reads beside layers of the step's variants."""
    found = set()
    for part in program.parts:
        for node in part.graph.nodes:
            others = any(user.target not in SITES for user in node.users)
            if node.op == "get_attr" and (part.rate < Rate.STEP or others):
                found.add(str(node.target))
    return found


def tabulate(
    program: Program, part: Part, sites: Sequence[fx.Node], formats: Sequence[str], work: Work
) -> Choices:
    """Every layer alone in float and in each of the formats that fit it, with its time."""
    assert work.calibration is not None  # the pass has checked it
    lones: dict[fx.Node, dict[str, Lone]] = {site: {} for site in sites}
    for number, site in enumerate(sites, start=1):
        for name in (FLOAT, *formats):
            found = lone_layer(program, part, site, name, work.calibration)
            if isinstance(found, Lone):
                lones[site][name] = found
            else:
                work.log.reject(f"auto_bits: {name}", found)
        work.progress("single layers", number, len(sites))
    choices = Choices(together(sites), lones, shared_weights(program))
    choices.unmeasured = layer_cost.measurable()
    _time(choices, work)
    return choices


def _time(choices: Choices, work: Work) -> None:
    """Fill in the milliseconds; a format that the back end lacks is dropped."""
    every = [(site, lone) for site, each in choices.lones.items() for lone in each.values()]
    if choices.unmeasured:
        for site, lone in every:
            time = layer_cost.predict(site, lone.format, stored([lone], frozenset()))
            choices.milliseconds[site, lone.format] = time
        return
    found = layer_cost.measure([lone for _, lone in every], work.progress)
    for site, lone in every:
        time_or_reason = found[layer_cost.signature(lone)]
        if isinstance(time_or_reason, float):
            choices.milliseconds[site, lone.format] = time_or_reason
        else:
            work.log.reject(f"auto_bits: {lone.format}", time_or_reason)
            choices.drop((site,), lone.format)


def drop_losers(choices: Choices, timed: bool, log: Log) -> None:
    """A layer is in low bit only where it wins: drop what is no better than float.

    Args:
        choices: what to thin out.
        timed: whether time is the aim; then smaller alone is no gain.
        log: gets the reasons.
    """
    for group in choices.groups:
        real = choices.option(group, FLOAT, {})
        for name in choices.formats(group):
            if name == FLOAT:
                continue
            option = choices.option(group, name, {})
            slower = option.milliseconds >= real.milliseconds
            if slower and (timed or option.bytes >= real.bytes):
                reason = "not faster than float" if timed else "neither faster nor smaller"
                log.reject(f"auto_bits: {name}", reason)
                choices.drop(group, name)


def drop_broken(choices: Choices, noises: Noises, log: Log) -> None:
    """Drop formats in which a layer makes the network's output infinite or NaN."""
    for group in choices.groups:
        for name in choices.formats(group):
            errors = [noises.get((site, name), 0.0) for site in group]
            if not all(error < float("inf") for error in errors):
                log.reject(f"auto_bits: {name}", "the output is not finite")
                choices.drop(group, name)
