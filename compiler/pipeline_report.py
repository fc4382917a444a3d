"""What a pipeline's artifact is made of: as data, as tables, as one page (imports no torch)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effuse import artifact
from effuse.errors import ArtifactError
from effuse.report import Overview, Report, write_html
from effuse.report_tables import RATES, WHEN
from effuse.report_text import Table, decibels, gigaflops, megabytes, percent, quantity

Manifest = Mapping[str, Any]


def parts_of(folder: Path, manifest: Manifest) -> dict[str, Manifest]:
    """The manifests of the compiled parts, by their folders.

    Raises:
        ArtifactError: one of them cannot be read.
    """
    found: dict[str, Manifest] = {}
    for name, each in entries_of(manifest):
        file = folder / each["folder"] / artifact.MANIFEST
        kind = manifest["components"][name]["class"].rpartition(".")[2]
        try:
            part = json.loads(file.read_text(encoding="utf-8"))
            found[each["folder"]] = {**part, "model": {**part["model"], "class": kind}}
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{file}: is no manifest of an artifact: {error}") from None
    return found


def in_order(manifest: Manifest) -> dict[str, Manifest]:
    """The networks as the pipeline calls them, those that it does not call last."""
    called = [name for name, _ in manifest["order"]]
    told = manifest["components"]
    return {name: told[name] for name in dict.fromkeys([*called, *sorted(told)])}


def entries_of(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Every compiled part, with the component that it belongs to."""
    for name, told in in_order(manifest).items():
        for each in told.get("entries", ()) if told["reason"] is None else ():
            yield name, each


def figures(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """What it is made of, as JSON's own types."""
    parts = parts_of(folder, manifest)
    told, scheduler = manifest["pipeline"], manifest["scheduler"]
    return {
        "kind": "pipeline",
        "class": told["class"],
        "steps": told["steps"],
        "scheduler": scheduler and {"class": scheduler["class"],
                                    "timesteps": len(scheduler["timesteps"])},
        "bytes": sum(each["bytes"] for each in manifest["files"].values()),
        "torch_free": {"refused": manifest["torch_free"]["refused"],
                       "agreement_db": manifest["torch_free"].get("agreement_db")},
        "components": {name: component_figures(manifest, each, parts)
                       for name, each in in_order(manifest).items()},
        "others": {name: {"class": each["class"], "saved": each["saved"],
                          "bytes": stored(manifest, name)}
                   for name, each in manifest["others"].items()},
    }  # fmt: skip


def component_figures(
    manifest: Manifest, told: Manifest, parts: Mapping[str, Manifest]
) -> dict[str, Any]:
    """Of one network of the pipeline."""
    kept = ("class", "role", "calls", "share", "reason")
    mine = told.get("entries", ()) if told["reason"] is None else ()
    calls = {each["folder"]: each["calls"] for each in mine}
    found = {name: {"calls": count, "bytes": stored(manifest, name), **part_figures(parts[name])}
             for name, count in calls.items()}  # fmt: skip
    return {**{key: told[key] for key in kept}, "parts": found}


def part_figures(manifest: Manifest) -> dict[str, Any]:
    """Of one compiled part: what of it changes how often, and how faithful it is."""
    rates = {rate: manifest["rates"][rate] for rate in RATES}
    used = sum(cost["parameters"] for cost in rates.values())
    return {
        "backend": manifest["backend"],
        "parameters": manifest["model"]["parameters"],
        "rates": rates,
        "leaves_step_program": 1 - rates["step"]["parameters"] / max(used, 1),
        "sqnr_db": manifest["parity"]["sqnr_db"],
    }


def stored(manifest: Manifest, folder: str) -> int:
    """The bytes of a folder of the artifact."""
    files = manifest["files"].items()
    return sum(each["bytes"] for name, each in files if name.startswith(f"{folder}/"))


# As text


def facts(data: Manifest) -> list[str]:
    """What it is, in a few lines."""
    scheduler, free = data["scheduler"], data["torch_free"]
    by = f" of {scheduler['class']}" if scheduler else ""
    agrees = f" (replayed to {decibels(free['agreement_db'])} dB)" if not free["refused"] else ""
    runs = f"yes{agrees}" if free["refused"] is None else f"no, because {free['refused']}"
    return [
        f"{data['class'].rpartition('.')[2]}: {data['steps']} steps{by}, "
        f"{megabytes(data['bytes'])} MB",
        f"runs without torch: {runs}",
    ]


def overview_tables(data: Manifest) -> list[Table]:
    """Components, rates, and what else there is."""
    return [components_table(data), rates_table(data), others_table(data)]


def components_table(data: Manifest) -> Table:
    """Every network: what it is, and what became of it."""
    rows: list[tuple[str, ...]] = []
    for name, each in data["components"].items():
        about = (each["role"] or "–", percent(each["share"]))
        if not each["parts"]:
            rows.append((name, *about, str(each["calls"]), "", "", f"as it is: {each['reason']}"))
        for folder, part in each["parts"].items():
            agrees = decibels(part["sqnr_db"])
            rows.append((folder, *about, str(part["calls"]), quantity(part["parameters"]),
                         megabytes(part["bytes"]), f"{part['backend']}, {agrees}"))  # fmt: skip
    columns = ("part", "role", "time watched", "calls", "parameters", "MB", "compiled, SQNR in dB")
    return Table("Components", columns, rows)


def rates_table(data: Manifest) -> Table:
    """What of each part changes how often."""
    rows = []
    for each in data["components"].values():
        for folder, part in each["parts"].items():
            used = sum(cost["parameters"] for cost in part["rates"].values())
            for rate in RATES:
                cost = part["rates"][rate]
                if cost["parameters"] or cost["flops"]:
                    share = percent(cost["parameters"] / max(used, 1), 1)
                    often = rate == "step" and each["role"] != "denoiser"
                    when = "every call" if often else WHEN[rate]
                    rows.append((folder, when, quantity(cost["parameters"]), share,
                                 gigaflops(cost["flops"])))  # fmt: skip
    columns = ("part", "changes", "parameters", "share", "GFLOPs")
    return Table("Parameters and operations by rate", columns, rows)


def others_table(data: Manifest) -> Table:
    """What is not compiled, and whether it is in the artifact."""
    rows = [
        (name, each["class"], megabytes(each["bytes"]) if each["saved"] else "not saved")
        for name, each in data["others"].items()
    ]
    return Table("Other components", ("component", "class", "MB"), rows)


def reports(folder: Path, manifest: Manifest) -> dict[str, Report]:
    """A report on every compiled part, by its folder."""
    return {name: Report(part) for name, part in parts_of(folder, manifest).items()}


def to_html(folder: Path, manifest: Manifest, path: str | os.PathLike[str]) -> Path:
    """One self-contained page: the pipeline, and a section for each part.

    Raises:
        ArtifactError: the page cannot be written there.
        MissingExtra: jinja2 or matplotlib is not installed.
    """
    data = figures(folder, manifest)
    seen = Overview(data["class"].rpartition(".")[2], facts(data), overview_tables(data))
    return write_html(path, reports(folder, manifest), None, seen)
