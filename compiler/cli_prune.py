"""inspect --prune: what of a network the pass Prune could leave out, without its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.markup import escape

from effuse.cli_text import count_text, out, table
from effuse.errors import ConfigError

COLUMNS = ("candidate", "kind", "count", "parameters", "FLOPs", "without it")


def look(target: str, settings: Mapping[str, Any], roles: Mapping[str, str], as_json: bool) -> None:
    """Print a network's candidates as a table or as one JSON document.

    Raises:
        ConfigError: it is an artifact, which is compiled already.
    """
    from effuse.cli_tables import is_artifact

    if is_artifact(target):
        raise ConfigError(f"{target}: compiled already; --prune is for networks")
    data = figures(target, settings, roles)
    if as_json:
        print(json.dumps(data))
    else:
        show(out(), data)


def figures(target: str, settings: Mapping[str, Any], roles: Mapping[str, str]) -> dict[str, Any]:
    """The candidates of a network, captured without its weights; heads, units and channels by site.

    Parameters and FLOPs are of all `count` of a row together.
    """
    from effuse.capture import capture
    from effuse.cli_build import check_folder
    from effuse.examples import derive_inputs
    from effuse.inspect_model import resolve
    from effuse.log import Log
    from effuse.pass_manager import run_passes
    from effuse.passes import Canonicalize, Prune
    from effuse.passes.prune_candidates import Kind, find_candidates
    from effuse.stream import on_meta

    if Path(target).is_dir():
        check_folder(target)
    model, log = resolve(target, settings), Log()
    inputs = on_meta(derive_inputs(model, batch=1))
    program = run_passes(capture(model, inputs, roles=roles or None), (Canonicalize(),))
    candidates = find_candidates(program, get_args(Kind), log)
    rows = merged(candidates)
    rejected = {kind: dict(sorted(found.items())) for kind, found in sorted(log.reasons.items())}
    total = sum(parameter.numel() for parameter in model.parameters())
    return {
        "candidates": rows,
        "rejected": rejected,
        "parameters": total,
        "forwards": sweeps(program, candidates, Prune.groups),
    }


def sweeps(program: Any, candidates: Sequence[Any], groups: int) -> dict[str, float]:
    """For each kind the forward passes that its losses on one input take, in all."""
    from effuse.passes.prune_cost import forwards

    part = program.part(program.plan.default)
    kinds = dict.fromkeys(each.kind for each in candidates)
    measured = [each for each in candidates if each.kind == "head" or each.atom < groups]
    return {kind: round(forwards(part, [each for each in measured if each.kind == kind]), 1)
            for kind in kinds}  # fmt: skip


def merged(candidates: Sequence[Any]) -> list[dict[str, Any]]:
    """One row for each span, block or site."""
    rows: dict[Any, dict[str, Any]] = {}
    for number, each in enumerate(candidates):
        key = number if each.site is None else (each.site.kind, each.site.name, id(each.site))
        name = each.site.name if each.site else each.name
        named = {"name": name, "kind": each.kind, "action": each.action}
        row = rows.setdefault(key, {**named, "count": 0, "parameters": 0, "flops": 0})
        row["count"] += 1
        row["parameters"] += each.parameters
        row["flops"] += each.flops
    return list(rows.values())


def show(console: Console, data: Mapping[str, Any]) -> None:
    """The candidates, and how many places are none."""
    rows = table(*COLUMNS, right=COLUMNS[2:5])
    for each in data["candidates"]:
        figures = (str(each["count"]), count_text(each["parameters"]), count_text(each["flops"]))
        rows.add_row(escape(each["name"]), each["kind"], *figures, each["action"])
    console.print(rows)
    others = sum(len(reasons) for reasons in data["rejected"].values())
    console.print(
        f"\nof {count_text(data['parameters'])} weights; {others} places are no candidates, for "
        "reasons that --json tells"
    )
    counts = ", ".join(f"{count:.0f} ({kind})" for kind, count in data["forwards"].items())
    console.print(f"forward passes that a sweep by loss takes for each input: {counts}")
