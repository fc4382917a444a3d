"""The verbs that only look: inspect, passes, presets, doctor."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.markup import escape

from effuse import __version__
from effuse.artifact import MANIFEST, PIPELINE, Opened, is_pipeline
from effuse.cli_text import count_text, out, shape_text, table, versions
from effuse.errors import ArtifactError, ConfigError, MissingExtra, require
from effuse.plan import spec_from_json

RATES = ("const", "schedule", "prompt", "step")
WHEN = {
    "const": "never",
    "schedule": "from a list known at build time",
    "prompt": "once a picture",
    "step": "every step",
}
FLAGS = {
    "avx2": "8-bit products, the slow way",
    "avx_vnni": "8-bit products, 256 bits wide",
    "avx512_vnni": "8-bit products, 512 bits wide",
    "amx_int8": "8-bit products in tiles",
    "amx_bf16": "bfloat16 products in tiles",
}
CPUINFO = Path("/proc/cpuinfo")
PLANNED_BACKENDS = ("tensorrt",)
ELSEWHERE = {"triton": "simulated"}  # by PyTorch's operations, where there is no kernel
PLANNED_PASSES = ("cache", "skip", "smooth", "low_rank", "split_shortcut")
SELECTIONS = {  # the options that every pass has
    "include": "patterns over module paths: only there",
    "exclude": "patterns over module paths: not there",
}


def is_artifact(target: str) -> bool:
    """Whether `target` is a folder or zip that compile wrote."""
    path = Path(target)
    folder = any((path / name).is_file() for name in (MANIFEST, PIPELINE))
    return folder or (path.is_file() and path.suffix != ".json")


def look(target: str, settings: Mapping[str, Any], roles: Mapping[str, str], as_json: bool) -> None:
    """Print the rates and inputs of a network or artifact, as tables or as one JSON document."""
    if is_pipeline(target):
        from effuse.cli_pipeline import look as look_pipeline

        look_pipeline(target, as_json)
        return
    if not is_artifact(target):
        data = network_figures(target, settings, roles)
    elif settings or roles:
        raise ConfigError(f"{target}: compiled already; --set and --role are for networks")
    else:
        data = artifact_figures(target)
    if as_json:
        print(json.dumps(data))
        return
    console = out()
    show_rates(console, data)
    show_inputs(console, data)


def network_figures(
    target: str, settings: Mapping[str, Any], roles: Mapping[str, str]
) -> dict[str, Any]:
    """The figures of a network, captured without its weights."""
    from effuse.cli_build import check_folder
    from effuse.inspect_model import inspect_network, resolve

    if Path(target).is_dir():
        check_folder(target)
    return inspect_network(resolve(target, settings), roles=roles or None).to_json()


def artifact_figures(target: str) -> dict[str, Any]:
    """The figures of an artifact, from its manifest, as `Inspection.to_json` gives a network's.

    Raises:
        ArtifactError: the artifact is damaged or does not describe a program.
    """
    manifest = Opened(target).manifest
    try:
        spec = spec_from_json(manifest["program"])
        rates = {rate: dict(manifest["rates"][rate]) for rate in RATES}
        parameters = manifest["model"]["parameters"]
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{target}: {MANIFEST} does not describe a program: {error}") from None
    used = sum(cost["parameters"] for cost in rates.values())
    return {
        "rates": rates,
        "inputs": [
            {"label": i.label, "role": i.role.value, "shape": list(i.shape), "dtype": i.dtype}
            for i in spec.inputs
        ],
        "parameters": parameters,
        "leaves_step_program": 1 - rates["step"]["parameters"] / max(used, 1),
    }


def show_figures(target: str) -> None:
    """Print an artifact's report as one JSON document."""
    from effuse.report import Report

    print(json.dumps(Report(Opened(target).manifest).data()))


def show_rates(console: Console, data: Mapping[str, Any]) -> None:
    """What changes how often, and the share that leaves the step program."""
    columns = ("parameters", "share", "FLOPs a run")
    rows = table("rate", "changes", *columns, right=columns)
    used = sum(cost["parameters"] for cost in data["rates"].values())
    for rate in RATES:
        cost = data["rates"][rate]
        share = f"{cost['parameters'] / max(used, 1):.1%}"
        figures = (count_text(cost["parameters"]), share, count_text(cost["flops"]))
        rows.add_row(rate, WHEN[rate], *figures)
    console.print(rows)
    share = f"[bold]{data['leaves_step_program']:.1%}[/]"
    console.print(
        f"\n{share} of the {count_text(data['parameters'])} weights leave the step program\n"
    )


def show_inputs(console: Console, data: Mapping[str, Any]) -> None:
    """The inputs with their roles."""
    rows = table("input", "role", "shape", "dtype")
    for item in data["inputs"]:
        shape = shape_text(item["shape"])
        rows.add_row(escape(item["label"]), item["role"], shape, item["dtype"])
    console.print(rows)
    console.print(
        "a role that is wrong? give it: --role NAME=latent|timestep|prompt|static", style="dim"
    )


def show_passes() -> None:
    """Every pass with its options, from the dataclasses themselves."""
    from effuse.cli_build import kind_text
    from effuse.passes import ORDER

    console = out()
    for kind in ORDER:
        first = (inspect.getdoc(kind) or "").splitlines()[0]
        console.print(f"[bold]{kind.name}[/] ({kind_text(kind)})  {escape(first)}")
        rows = table("  option", "type", "default", "meaning")
        for name, type_name, default, meaning in options(kind):
            rows.add_row(f"  {name}", escape(type_name), escape(default), escape(meaning))
        console.print(rows)
        console.print()
    console.print(
        "in this order, whatever order they are given in; canonicalize always runs", style="dim"
    )


def options(kind: type) -> Iterator[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each option of a pass."""
    meanings = {**SELECTIONS, **documented(inspect.getdoc(kind) or "")}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        type_name = getattr(hints[field.name], "__name__", "")
        if not type_name or hasattr(hints[field.name], "__args__"):
            type_name = str(hints[field.name]).removeprefix("typing.")
        default = (
            json.dumps(field.default) if isinstance(field.default, str) else str(field.default)
        )
        yield field.name, type_name, default, meanings.get(field.name, "")


def documented(text: str) -> dict[str, str]:
    """Argument -> its meaning, from the Args section of a docstring."""
    section = text.partition("Args:\n")[2].partition("\n\n")[0]
    entries = re.split(r"\n?^    (?=\w+: )", section, flags=re.MULTILINE)[1:]
    pairs = (entry.partition(": ") for entry in entries)
    return {name: " ".join(meaning.split()) for name, _, meaning in pairs}


def show_presets() -> None:
    """Every preset with its passes."""
    from effuse.cli_build import options_text
    from effuse.passes import PRESETS

    rows = table("preset", "kind", "passes")
    for name, passes in PRESETS.items():
        kind = "exact" if all(each.exact for each in passes) else "lossy"
        words = "; ".join(f"{each.name} ({options_text(each)})" for each in passes)
        rows.add_row(name, kind, escape(words.replace(" (-)", "")) or "none: only canonicalize")
    console = out()
    console.print(rows)
    console.print("use one: effuse compile unet/ -c w8a8 -o unet.effuse", style="dim")


def show_doctor() -> None:
    """What this machine and this version can do."""
    console = out()
    rows = table("library", "version")
    for name, version in {"effuse": __version__, **versions()}.items():
        rows.add_row(name, version)
    console.print(rows)
    show_processor(console)
    show_backends(console)
    show_missing(console)


def show_processor(console: Console) -> None:
    """The processor, and which of the instructions that matter it has."""
    name, flags = processor()
    rows = table(f"{name}, {os.cpu_count()} cores", "", "")
    for flag, meaning in FLAGS.items():
        rows.add_row(f"  {flag}", "yes" if flag in flags else "no", meaning)
    console.print()
    console.print(rows)
    if not flags:
        console.print("  the system does not tell the processor's flags", style="dim")


def processor() -> tuple[str, frozenset[str]]:
    """The processor's name and flags, as /proc/cpuinfo tells them."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "processor unknown", frozenset()
    facts = {key.strip(): text.strip() for key, _, text in (line.partition(":") for line in lines)}
    flags = facts.get("flags") or facts.get("Features") or ""
    return facts.get("model name", "processor unknown"), frozenset(flags.split())


def show_backends(console: Console) -> None:
    """Each back end, available or why not; each effuse op, native or simulated in each."""
    try:
        require("torch")
        from effuse.config import BACKENDS
        from effuse.kernels.table import TABLE
    except MissingExtra as error:
        console.print(f"\nback ends that compile: {escape(str(error))}")
        return
    names = [name for name in BACKENDS if name != "auto"]
    rows = table("back end", "")
    for name in names:
        reason = importlib.import_module(f"effuse.backends.{name}").available()
        rows.add_row(f"  {name}", "available" if reason is None else escape(reason))
    console.print()
    console.print(rows)
    ops = table("effuse op", *names, "as")
    for op in TABLE:
        cells = [op.implementations.get(name) or ELSEWHERE.get(name, "–") for name in names]
        ops.add_row(f"  {op.name}", *cells, escape(op.remark))
    console.print()
    console.print(ops)


def show_missing(console: Console) -> None:
    """What is designed, but not in this version."""
    try:
        require("torch")
    except MissingExtra:
        return
    from effuse.config import BACKENDS
    from effuse.passes import BY_NAME

    backends = [name for name in PLANNED_BACKENDS if name not in BACKENDS]
    passes = [name for name in PLANNED_PASSES if name not in BY_NAME]
    console.print("\n[bold]not in this version[/]")
    console.print(f"  back ends: {', '.join(backends) or 'none'}")
    console.print(f"  passes: {', '.join(passes) or 'none'}")
