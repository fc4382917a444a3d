"""What AutoBits predicts and what comes true, for three budgets on a trained network.

The budgets lie between what the network can reach, which a first compilation finds out: a size, the
milliseconds of a step, and an SQNR. Each is compiled to ONNX with calibration by the pipeline's own
sampling. Predicted figures are sums over layers measured alone; measured ones are of the whole, in
turns with the float artifact where it is time. Pictures are compared with the exact artifact's.

Writes auto-bits-NETWORK.json and .md. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache import CONSOLE, TABLE_WIDTH, bars, version
from cache_bench import NETWORKS, Bench
from cache_measure import psnrs
from rich.console import Console
from rich.table import Table

from effuse.evaluate import machine
from effuse.passes import AutoBits, Hoist

FIGURES = re.compile(r"(?P<db>[\d.]+|inf) dB, (?P<mb>[\d.]+) MB(?:, (?P<ms>[\d.]+) ms)?")
IN_TURNS = re.compile(r"float in turns with it: ([\d.]+)")
VERSIONS = ("torch", "onnxruntime", "scipy", "diffusers", "effuse")
COLUMNS = {
    "budget": "budget", "layers": "layers", "predicted_db": "SQNR dB, predicted",
    "measured_db": "measured", "predicted_mb": "MB, predicted", "measured_mb": "measured",
    "predicted_ms": "ms, predicted", "measured_ms": "measured", "float_ms": "float in turns",
    "psnr_db": "PSNR dB", "seconds": "compiled in s",
}  # fmt: skip


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments and run."""
    arguments = parsed(given)
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = measured(arguments)
    used = machine()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {key: used[key] for key in ("processor", "cores")},
        "versions": {"python": sys.version.split()[0], **{n: version(n) for n in VERSIONS}},
        "setting": {name: getattr(arguments, name) for name in ("network", "steps", "prompts")},
        "rows": rows,
    }
    path = arguments.out / f"auto-bits-{arguments.network}"
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(facts), encoding="utf-8")
    show(rows)
    CONSOLE.print(f"{path}.json, .md", highlight=False)
    return 0


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=tuple(NETWORKS), default="unet", help="default: unet")
    add("--steps", type=int, default=20, help="DDIM steps of a run (default: 20)")
    add("--prompts", type=int, default=4, help="pictures of a run (default: 4)")
    add("--sqnr-db", type=float, default=35.0, help="the third budget (default: 35)")
    add("--threads", type=int, default=0, help="default: all processors")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    arguments = parser.parse_args(given)
    for name, least in (("steps", 2), ("prompts", 1), ("threads", 0)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name}: at least {least}")
    return arguments


def measured(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row without a budget, then one for each of the three."""
    with tempfile.TemporaryDirectory() as folder, bars(arguments.network) as progress:
        bench = Bench(arguments.network, arguments, Path(folder))
        progress.start(5)
        progress.say("exact")
        sample = bench.sampler("ddim", arguments.steps)
        truth = sample(bench.compile("exact", (Hoist(),))[0], lambda *_: None)
        progress.done()
        rows: list[dict[str, Any]] = []
        budgets: list[dict[str, float]] = [{}]
        while budgets:
            budget = budgets.pop(0)
            name = ", ".join(f"{key}={value:g}" for key, value in budget.items()) or "none"
            progress.say(f"AutoBits, budget {name}")
            compiled, seconds = bench.compile(f"row{len(rows)}", (Hoist(), AutoBits(**budget)))
            notes = [note for each in compiled.manifest["passes"] for note in each["notes"]]
            found = sample(compiled, lambda *_: None)
            rows.append({
                "budget": name, **row(notes), "seconds": round(seconds, 1),
                "psnr_db": round(psnrs(truth, found)["psnr_db"], 1), "notes": notes,
            })  # fmt: skip
            if not budget:
                budgets = chosen(notes, arguments.sqnr_db)
            progress.done()
    return rows


def chosen(notes: Sequence[str], sqnr_db: float) -> list[dict[str, float]]:
    """Three budgets within reach: between the least and float, and an SQNR."""
    whole = figures(notes, "predicted, all in float")
    size = figures(notes, "predicted, least size")["mb"]
    quick = figures(notes, "predicted, least time")["ms"]
    return [
        {"size_mb": round(size + (whole["mb"] - size) / 4, 2)},
        {"milliseconds": round((quick + whole["ms"]) / 2, 2)},
        {"sqnr_db": sqnr_db},
    ]


def row(notes: Sequence[str]) -> dict[str, Any]:
    """Predicted and measured figures of a compilation."""
    found: dict[str, Any] = {"layers": titled(notes, "predicted, as chosen").split("; ")[-1]}
    for kind in ("predicted", "measured"):
        values = figures(notes, f"{kind}, as chosen")
        found |= {f"{kind}_{unit}": value for unit, value in values.items()}
    turns = IN_TURNS.search(titled(notes, "measured, as chosen"))
    return found | {"float_ms": float(turns[1]) if turns else None}


def titled(notes: Sequence[str], title: str) -> str:
    """The note that begins with a title."""
    return next(note for note in notes if note.startswith(f"{title}: "))


def figures(notes: Sequence[str], title: str) -> dict[str, float]:
    """dB, MB and ms of the note that begins with a title."""
    found = FIGURES.search(titled(notes, title))
    assert found is not None
    return {unit: float(value) for unit, value in found.groupdict().items() if value is not None}


def text(value: Any) -> str:
    """A cell."""
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def markdown(facts: dict[str, Any]) -> str:
    """The table, with what it was measured on."""
    lines = [" | ".join(COLUMNS.values()), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(text(each.get(key)) for key in COLUMNS) for each in facts["rows"]]
    used, setting = facts["machine"], facts["setting"]
    return "\n".join([
        f"# AutoBits on the {setting['network']}", "", *(f"| {line} |" for line in lines), "",
        f"{facts['date']}; {used['processor']}, {used['cores']} cores; {setting['steps']} DDIM "
        f"steps of {setting['prompts']} prompts.",
        "; ".join(f"{name} {number}" for name, number in facts["versions"].items()), "",
    ])  # fmt: skip


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table in the terminal."""
    table = Table(*COLUMNS.values())
    for each in rows:
        table.add_row(*(text(each.get(key)) for key in COLUMNS))
    Console(width=max(CONSOLE.width, TABLE_WIDTH)).print(table)


if __name__ == "__main__":
    raise SystemExit(main())
