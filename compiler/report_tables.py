"""A manifest as tables."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.buckets import sizes_text
from effuse.report_plan import variant_steps
from effuse.report_text import (
    Table,
    counted,
    decibels,
    gigaflops,
    listed,
    megabytes,
    quantity,
    to_decibels,
    without_empty,
)

if TYPE_CHECKING:
    pass

Manifest = Mapping[str, Any]
Pixels = np.ndarray[Any, Any]


RATES = ("const", "schedule", "prompt", "step")
WHEN = {"const": "never", "schedule": "per schedule", "prompt": "per prompt", "step": "every step"}
SEVERAL = 4  # places that are counted and no longer named


def headline(manifest: Manifest) -> str:
    """The network's class."""
    return str(manifest.get("model", {}).get("class", "network"))


def facts(manifest: Manifest, seconds: Mapping[str, float]) -> list[str]:
    """What the build is, in a few lines."""
    model, parity = manifest.get("model", {}), manifest.get("parity", {})
    weights = f", {megabytes(model['weight_bytes'])} MB" if "weight_bytes" in model else ""
    target = f" for {manifest['target']}" if manifest.get("target") else ""
    lines = [
        f"{quantity(model.get('parameters', 0))} parameters, {model.get('dtype', '?')}{weights}, "
        "as captured",
        f"back end {manifest.get('backend', '?')}{target}, effuse {manifest.get('effuse', '?')}",
    ]
    if manifest.get("fallback"):
        lines.append(f"fell back from the faster back end: {manifest['fallback']}")
    if parity.get("sqnr_db") is not None:
        agrees = f"agrees with reference {to_decibels(parity['sqnr_db'])} on the examples"
        lowered = "as it was lowered, and before any kernel has run, it "
        lines.append(f"{lowered if manifest.get('absent') else ''}{agrees}")
    if manifest.get("absent"):
        lines.append(f"not run here: {manifest['absent']}")
    if kernels := manifest.get("kernels"):
        lines.append(kernels_line(kernels))
    if seconds:
        phases = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
        lines.append(f"compiled in {sum(seconds.values()):.1f} s ({phases})")
    return lines


def tables(manifest: Manifest) -> list[Table]:
    """Inputs, programs, passes, and what runs natively."""
    return [
        inputs_table(manifest),
        programs_table(manifest),
        buckets_table(manifest),
        passes_table(manifest),
        native_table(manifest),
        kernels_table(manifest),
        lowering_table(manifest),
    ]


def inputs_table(manifest: Manifest) -> Table:
    """Every input with its role."""
    rows = [
        (".".join(item["path"]), item["role"], shape_text(item["shape"]), item["dtype"])
        for item in manifest["program"].get("inputs", ())
    ]
    return Table("Inputs", ("input", "role", "shape", "dtype"), rows)


def shape_text(shape: Sequence[Any]) -> str:
    """`32 × 3 × 32 × 32`, or `scalar`."""
    return " × ".join(str(size) for size in shape) or "scalar"


def programs_table(manifest: Manifest) -> Table:
    """Every program in the order of rates."""
    parts, when = manifest.get("parts", {}).items(), variant_steps(manifest)
    rows = [
        (
            name,
            when.get(name) or WHEN.get(part["rate"], part["rate"]),
            f"{part['nodes']:,}",
            quantity(part["parameters"]),
            megabytes(part["weight_bytes"]),
            gigaflops(part["flops"]),
        )
        for name, part in sorted(parts, key=lambda item: RATES.index(item[1]["rate"]))
    ]
    return Table("Programs", ("program", "runs", "nodes", "parameters", "MB", "GFLOPs"), rows)


def buckets_table(manifest: Manifest) -> Table:
    """The sizes that have a program of their own, and what a step of the default variant costs."""
    default = manifest["program"].get("plan", {}).get("default", "")
    rows = [
        (
            sizes_text(each["sizes"]),
            gigaflops(each["flops"].get(default, 0)),
            decibels(each["parity"]["sqnr_db"]),
        )
        for each in manifest.get("buckets", ())
    ]
    return Table("Sizes", ("size", "GFLOPs a step", "dB to reference"), rows)


def passes_table(manifest: Manifest) -> Table:
    """What each pass did, and why it left things alone."""
    ratio = "SQNR of a full step, dB" if variant_steps(manifest) else "SQNR, dB"
    columns = ("pass", "options", "numbers", "did", "left alone", ratio)
    rows = [pass_row(record) for record in manifest.get("passes", ())]
    return without_empty(Table("Passes", columns, rows))


def pass_row(record: Mapping[str, Any]) -> tuple[str, ...]:
    """One pass; reasons of several rules carry the rule's name."""
    reasons = record.get("reasons", {})
    several = len(reasons) > 1
    why = {
        f"{rule}: {reason}" if several else reason: count
        for rule, counts in reasons.items()
        for reason, count in together(counts).items()
    }
    did = [counted(record.get("rewrites", {})).replace("\n", ", "), *record.get("notes", ())]
    return (
        record["name"],
        listed(record.get("options", {})),
        "exact" if record.get("exact") else "lossy",
        "\n".join(filter(None, did)) or "nothing",
        counted(why) or "–",
        decibels(record.get("sqnr_db")),
    )


def together(counts: Mapping[str, int]) -> Counter[str]:
    """Reasons `place: why` without the place, where several places share one why."""
    shared = Counter(reason.partition(": ")[2] for reason in counts)
    found: Counter[str] = Counter()
    for reason, count in counts.items():
        why = reason.partition(": ")[2]
        found[why if why and shared[why] >= SEVERAL else reason] += count
    return found


def native_table(manifest: Manifest) -> Table:
    """Which ops of effuse the back end has, and which it only imitates."""
    rows = sorted(manifest.get("native", {}).items())
    return Table("Low-bit operations", ("operation", "arithmetic"), rows)


def kernels_line(kernels: Mapping[str, Any]) -> str:
    """How many kernels there are, and the most that one asks of the GPU."""
    most, count = kernels["most"], kernels["distinct"]
    return (
        f"{count} kernel{'' if count == 1 else 's'} compiled for {kernels['target']}: at most "
        f"{most['registers']} registers and {most['spills']} spilled bytes a thread, "
        f"{most['shared'] / 1024:.0f} KiB of shared memory"
    )


def kernels_table(manifest: Manifest) -> Table:
    """What each part launches and moves on the GPU, against one kernel for each operation."""
    kernels = manifest.get("kernels", {})
    columns = (
        "program", "launches", "unfused", "MB moved", "MB unfused", "arena, MB", "by PyTorch's ops"
    )  # fmt: skip
    rows = [
        (
            name,
            str(part["launches"]),
            str(kernels["before"][name]["launches"]),
            megabytes(part["bytes"]),
            megabytes(kernels["before"][name]["bytes"]),
            megabytes(part["arena"]),
            counted(part["fallback"]) or "–",
        )
        for name, part in kernels.get("parts", {}).items()
    ]
    return Table("Kernels (counted, not measured)", columns, rows)


def lowering_table(manifest: Manifest) -> Table:
    """What each rule of the lowering to kernels did, and why it left sites alone."""
    done: Counter[str] = Counter()
    left: dict[str, Counter[str]] = {}
    for part in manifest.get("kernels", {}).get("parts", {}).values():
        done.update(part["rules"])
        for rule, reasons in part["reasons"].items():
            left.setdefault(rule, Counter()).update(reasons)
    rows = [
        (rule, str(done[rule] or "–"), counted(left.get(rule, {})) or "–")
        for rule in sorted({*done, *left})
    ]
    return Table("Lowering to kernels", ("rule", "sites", "left alone"), rows)


def kept_table(manifest: Manifest) -> Table:
    """The layers left in float, by reason."""
    kept: dict[str, list[Mapping[str, Any]]] = {}
    for layer in manifest.get("layers", ()):
        if layer.get("reason"):
            kept.setdefault(layer["reason"].partition(":")[0], []).append(layer)
    rows = [
        (reason, str(len(layers)), quantity(sum(layer["parameters"] for layer in layers)))
        for reason, layers in sorted(kept.items(), key=lambda item: -len(item[1]))
    ]
    return Table("Layers left in float", ("reason", "layers", "parameters"), rows)


def worst_first(manifest: Manifest) -> list[Mapping[str, Any]]:
    """The layers by SQNR; those that were not measured come last."""
    last = math.inf
    measured = (layer.get("sqnr_db") for layer in manifest.get("layers", ()))
    pairs = zip(measured, manifest.get("layers", ()), strict=True)
    ordered = sorted(pairs, key=lambda pair: last if pair[0] is None else pair[0])
    return [layer for _, layer in ordered]


def layers_table(manifest: Manifest) -> Table:
    """Every layer, worst first."""
    rows = [
        (
            layer["name"],
            layer["op"],
            layer["format"],
            quantity(layer["parameters"]),
            decibels(layer.get("sqnr_db")),
            layer.get("reason", ""),
        )
        for layer in worst_first(manifest)
    ]
    columns = ("layer", "op", "format", "parameters", "SQNR, dB", "why not")
    return without_empty(Table("All layers, worst first", columns, rows))


def layers_line(manifest: Manifest) -> str:
    """How many layers changed, and how good they are."""
    layers = manifest.get("layers", ())
    if not layers:
        return ""
    formats = Counter(layer["format"] for layer in layers)
    counts = ", ".join(f"{count} in {name}" for name, count in formats.most_common())
    ratios = [each["sqnr_db"] for each in layers if each.get("sqnr_db") is not None]
    quality = (
        f" Their own outputs keep {min(ratios):.1f} dB at worst, {statistics.median(ratios):.1f} "
        "dB in the middle (SQNR on calibration's probes, before the choice)."
        if ratios
        else ""
    )
    return f"{len(layers)} layers: {counts}.{quality}"


def rate_bars(manifest: Manifest) -> list[dict[str, Any]]:
    """Shares of the rates in parameters and in operations."""
    rates = manifest.get("rates", {})
    bars = [
        rate_bar(rates, "parameters", "parameters", quantity),
        rate_bar(rates, "flops", "GFLOPs", gigaflops),
    ]
    return [bar for bar in bars if bar["shares"]]


def rate_bar(
    rates: Mapping[str, Mapping[str, int]], key: str, label: str, text: Callable[[float], str]
) -> dict[str, Any]:
    """One bar: the rates' figures as text and in percent."""
    values = {rate: rates.get(rate, {}).get(key, 0) for rate in RATES}
    whole = sum(values.values())
    shares = [
        {"rate": rate, "percent": 100 * value / whole, "text": text(value)}
        for rate, value in values.items()
        if value
    ]
    return {"label": label, "shares": shares, "whole": text(whole)}


def details_tables(manifest: Manifest) -> list[Table]:
    """Versions and files."""
    files = [
        (name, f"{entry['bytes']:,}", entry["sha256"])
        for name, entry in manifest.get("files", {}).items()
    ]
    versions = [(name, str(version)) for name, version in manifest.get("versions", {}).items()]
    return [
        Table("Files", ("file", "bytes", "SHA-256"), files),
        Table("Versions", ("built with", "version"), versions),
    ]
