"""Lora: layers of the finished artifact take LoRAs while it runs; exact.

    W x  ->  W x + U (D x),        D (1, in) and U (out, 1) of zeros, or LowRank's branch

U and D are weights that a run may replace by others of any rank (`Compiled.load_lora`), so a LoRA
of rank r is D' = [D; A], U' = [U, s·B]: nothing is quantized again, and without one the numbers are
as before. A layer has its slot in every part that computes it. What Hoist has made a table of is
computed no more, and takes none.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from effuse.errors import ConfigError
from effuse.graph import calls, clone, emit, module_path, substitute, unused_name, value_of
from effuse.log import Log
from effuse.passes.base import Pass, Work
from effuse.passes.branch import emit_down, emit_up, factor_names
from effuse.passes.quantize import QUANTIZED
from effuse.passes.quantize_sites import VOLUME, sites
from effuse.passes.quantize_writer import options_of
from effuse.passes.rounded import weight_name
from effuse.plan import Adapter
from effuse.program import Part, Program
from effuse.weights import WeightStore, copied

aten = torch.ops.aten

RULE = "lora"
BYPASSED = ".start"  # in the name of what StartToken keeps for a layer


@dataclass(frozen=True)
class Lora(Pass):
    """Let layers take LoRAs after compilation: linear layers, and convolutions of 1 x 1.

    Args:
        max_rank: of all LoRAs together that one layer may have loaded.
        convolutions: whether convolutions of other sizes take them too.
    """

    name: ClassVar[str] = "lora"

    max_rank: int = 128
    convolutions: bool = False

    def __post_init__(self) -> None:
        if self.max_rank < 1:
            raise ConfigError(f"max_rank: expected 1 or more, came {self.max_rank!r}")

    def requires(self, program: Program) -> str | None:
        """No slots yet, and layers in float."""
        if program.max_rank:
            return "the program has slots for LoRAs already"
        if any(calls(part.graph, *QUANTIZED) for part in program.parts):
            return "the program is quantized already; slots are written before that"
        return None

    def run(self, program: Program, work: Work) -> Program:
        """Choose the layers by module path, write the branches that are missing, declare all."""
        uses = layer_uses(program, work.log)
        gone = {each.path: each for each in program.adapters}  # by Hoist
        adapters = [
            gone.pop(path) if path in gone else self._adapter(path, each, program.weights)
            for path, each in uses.items()
        ]
        weights = copied(program.weights)
        slots = {
            each.path: _slot(each, weights)
            for each in adapters
            if not each.reason and not each.up and work.log.spend(RULE)
        }
        parts = tuple(written(part, slots, weights) for part in program.parts)
        adapters = [slots.get(each.path) or _with_slot(each) for each in adapters]
        adapters = [
            _with_factors(each, program.factors, uses[each.path][0], weights) for each in adapters
        ]
        declared = (*gone.values(), *unshared(adapters), *others(program, adapters))
        note(declared, work.log)
        return replace(
            program, parts=parts, weights=weights, adapters=declared, max_rank=self.max_rank
        )

    def _adapter(self, path: str, uses: list[fx.Node], weights: Mapping[str, Any]) -> Adapter:
        """The layer at a path, with the factors that it has and why it takes no LoRA."""
        shape = tuple(value_of(uses[0].args[1]).shape)  # type: ignore[arg-type]
        factors = {factor_names(site) for site in uses}
        known = next(iter(factors)) if len(factors) == 1 else None
        reason = self.unwanted(path) or unfit(uses, weights)
        if known is None and reason is None:
            reason = "only some of its uses have a branch" if len(factors) > 1 else self._bare(uses)
        return Adapter(path, shape, *(known or ("", "")), reason=reason or "")

    def _bare(self, uses: list[fx.Node]) -> str | None:
        """Why a layer without a branch gets none, or None."""
        site = uses[0]
        if site.target is aten.linear.default:
            return None
        if site.target is VOLUME:
            return "a three-dimensional convolution"
        if options_of(site)[3] != 1:
            return "a grouped convolution"
        kernel = value_of(site.args[1]).shape[2:]  # type: ignore[arg-type]
        wide = any(size != 1 for size in kernel) and not self.convolutions
        return "a convolution, without convolutions=True" if wide else None


def layer_uses(program: Program, log: Log) -> dict[str, list[fx.Node]]:
    """The layers of all parts by module path, each with its uses."""
    found: dict[str, list[fx.Node]] = defaultdict(list)
    for part in program.parts:
        for site in sites(part, program.weights):
            if path := module_path(site):
                found[path].append(site)
            else:
                log.reject(RULE, "of no module")
    return dict(found)


def unfit(uses: Iterable[fx.Node], weights: Mapping[str, Any]) -> str | None:
    """Why what a layer computes is not W x with the W that a LoRA is made for, or None."""
    names = {weight_name(site) for site in uses}
    if len(names) > 1:
        return "several weights under one module path"
    (name,) = names
    if f"{_whole(name)}{BYPASSED}" in weights:
        return "StartToken leads a token around it"
    return None


def _whole(name: str) -> str:
    """The weight's name before LowRank left a remainder of it."""
    return name.removesuffix(".rest")


def _with_factors(
    adapter: Adapter, factors: Mapping[str, Mapping[int, Tensor]], site: fx.Node,
    weights: WeightStore,
) -> Adapter:  # fmt: skip
    """The adapter with what its weight was multiplied with, stored under names of its own."""
    found = factors.get(_whole(weight_name(site)), {})
    if not found or adapter.reason:
        return adapter
    ends = {axis: f"{adapter.path}.lora.{('rows', 'columns')[axis]}" for axis in found}
    for axis, vector in found.items():
        weights[ends[axis]] = vector.float()
    return replace(adapter, rows=ends.get(0, ""), columns=ends.get(1, ""))


def _with_slot(adapter: Adapter) -> Adapter:
    """The adapter of a layer that has factors, or says why not."""
    said = adapter.up or adapter.reason
    return adapter if said else replace(adapter, reason="out of fuel")


def note(adapters: Sequence[Adapter], log: Log) -> None:
    """Say how many layers take LoRAs, and why others do not."""
    for each in adapters:
        if each.reason:
            log.reject(RULE, each.reason)
    taking = sum(not each.reason for each in adapters)
    log.note(f"{taking} of {len(adapters)} layers take LoRAs")


def _slot(adapter: Adapter, weights: WeightStore) -> Adapter:
    """The adapter with the names of its own factors."""
    down, up = (unused_name(weights, f"{adapter.path}.lora.{end}") for end in ("down", "up"))
    return replace(adapter, down=down, up=up)


def written(part: Part, slots: Mapping[str, Adapter], weights: WeightStore) -> Part:
    """The part with a branch of rank 1, of zeros, beside the layers at those paths."""
    graph, mapping = clone(part.graph)
    for site in sites(part, weights):
        if slot := slots.get(module_path(site)):
            _write(graph, weights, mapping[site], slot)
    return replace(part, graph=graph)


def _write(graph: fx.Graph, weights: WeightStore, site: fx.Node, slot: Adapter) -> None:
    whole = value_of(site.args[1])  # type: ignore[arg-type]
    rows, columns = whole.shape[0], whole[0].numel()
    with graph.inserting_before(site.next):
        zeros = torch.zeros(1, columns, dtype=whole.dtype)
        half = emit_down(graph, weights, site, slot.down, zeros)
        made = emit_up(graph, weights, half, slot.up, torch.zeros(rows, 1, dtype=whole.dtype))
        both = emit(graph, aten.add.Tensor, site, made)
    substitute(site, both)


def others(program: Program, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Branches not declared yet, of layers that take no LoRA: one that does may share their D."""
    known = {each.up for each in adapters}
    found: dict[str, Adapter] = {}
    for part in program.parts:
        for site in sites(part, program.weights):
            names = factor_names(site)
            if names is not None and names[1] not in known:
                shape = tuple(value_of(site.args[1]).shape)  # type: ignore[arg-type]
                reason = "one of several layers under one module path"
                found[names[1]] = Adapter(module_path(site), shape, *names, reason=reason)
    return list(found.values())


def unshared(adapters: list[Adapter]) -> tuple[Adapter, ...]:
    """The adapters; those whose U another layer reads too take no LoRA."""
    readers = Counter(each.up for each in adapters if each.up)
    return tuple(
        replace(each, reason=each.reason or "another layer shares its weight")
        if readers[each.up] > 1 else each
        for each in adapters
    )  # fmt: skip
