"""The parity benchmark's tables, from its results; the short one stands in the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parity_rows import LABELS, NOT_RUN, ONNX, OPENVINO, TENSORRT

Result = Mapping[str, Any]

COLUMNS = (
    "preset", "back end", "reference, dB", "original, dB", "speed", "MB", "layers", "arithmetic",
    "",
)  # fmt: skip
START, END = "<!-- parity -->", "<!-- /parity -->"
SHORT = (ONNX, OPENVINO, TENSORRT)
SHORT_PRESETS = ("exact", "w8a8")
TITLES = {ONNX: "ONNX Runtime", OPENVINO: "OpenVINO", TENSORRT: "TensorRT's ONNX"}
CEILING_DB = 200.0


def markdown(document: Mapping[str, Any]) -> str:
    """A table for each network."""
    setting = document["setting"]
    lines = [
        "# Parity: every back end against reference",
        "",
        f"{setting['steps']} steps of a trajectory that no calibration saw, {threads(setting)}, "
        f"median of {setting['rounds']} rounds. dB: SQNR at the worst step, against the reference "
        "back end in the same preset, and against the network itself, all on the inputs of the "
        "network's own trajectory. Speed: the time of exact in ONNX Runtime over the cell's own, "
        "in turns. Layers: in few bits, of all that could be. Tiny networks have random weights.",
        *(f"Not run: {name}, {reason}." for name, reason in NOT_RUN.items()),
    ]
    for network in dict.fromkeys(cell["network"] for cell in document["cells"]):
        lines += ["", f"## {network}", "", *table(document["cells"], network)]
    return "\n".join(lines) + "\n"


def threads(setting: Mapping[str, Any]) -> str:
    """`2 threads`."""
    return f"{setting['threads'] or 'all'} threads"


def table(cells: Sequence[Result], network: str) -> list[str]:
    """A network's lines."""
    head = ["| " + " | ".join(COLUMNS) + " |", "|---|---|--:|--:|--:|--:|--:|---|---|"]
    return head + [line(cell) for cell in cells if cell["network"] == network]


def line(cell: Result) -> str:
    """A cell's line, by COLUMNS."""
    backend = LABELS.get(cell["backend"], cell["backend"])
    if "reason" in cell:
        reason = cell["reason"].replace("|", "\\|")
        return f"| {cell['preset']} | {backend} | | | | | | | {reason} |"
    layers = cell["layers"]
    quantized = f"{layers['all'] - layers['in float']} of {layers['all']}" if layers["all"] else ""
    figures = (db(cell["reference_db"]), db(cell["original_db"]), speed(cell),
               f"{cell['megabytes']:.2f}", quantized, arithmetic(cell["native"]),
               cell.get("remark", ""))  # fmt: skip
    return f"| {cell['preset']} | {backend} | {' | '.join(figures)} |"


def db(value: float | None) -> str:
    """Decibels; nothing where there are none."""
    if value is None:
        return ""
    return "equal" if value >= CEILING_DB else f"{value:.1f}"


def speed(cell: Result) -> str:
    """`1.93×`; nothing where nothing was timed."""
    return "" if cell["speedup"] is None else f"{cell['speedup']:.2f}×"


def arithmetic(native: Mapping[str, str]) -> str:
    """Whether effuse's operators run natively; those that are simulated, by name."""
    simulated = sorted(name for name, kind in native.items() if kind != "native")
    if not native:
        return "float"
    return f"simulated: {', '.join(simulated)}" if simulated else "native"


# ---- the README ----------------------------------------------------------------------------------


def short(cells: Sequence[Result]) -> str:
    """Network × back end: agreement with reference, and speed, of exact and w8a8."""
    known = {(cell["network"], cell["preset"], cell["backend"]): cell for cell in cells}
    columns = [(backend, preset) for backend in SHORT for preset in SHORT_PRESETS]
    heads = [f"{TITLES[backend]}, {preset}" for backend, preset in columns]
    lines = [f"| network | {' | '.join(heads)} |", "|---" + "|--:" * len(columns) + "|"]
    for network in dict.fromkeys(cell["network"] for cell in cells):
        found = [brief(known.get((network, preset, backend))) for backend, preset in columns]
        lines.append(f"| {network} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def brief(cell: Result | None) -> str:
    """`47 dB, 1.93×`; a dash where there is nothing."""
    if cell is None or "reason" in cell:
        return "–"
    found = cell["reference_db"]
    agreed = "" if found is None else "equal" if found >= CEILING_DB else f"{found:.0f} dB"
    return ", ".join(filter(None, (agreed, speed(cell)))) or "–"


def refreshed(text: str, table: str) -> str | None:
    """A README with this table between its markers; None where it has not both of them."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    return f"{before}{start}\n{table}{end}{after}" if start and end else None


def refresh(path: Path, table: str) -> bool:
    """Write the table into a README; whether it has the markers."""
    found = refreshed(path.read_text(encoding="utf-8"), table)
    if found is not None:
        path.write_text(found, encoding="utf-8")
    return found is not None
