"""Quality against size and time of pruned networks, with and without recovery.

    python benchmarks/prune.py                              # both networks, two hours on two cores
    python benchmarks/prune.py --network dit --only "20 %"  # rows by name; others stay
    python benchmarks/prune.py --only "20 %, 2" --recovery 2000 --trajectories 8 --samples 512
    python benchmarks/prune.py --list                   # or --dry-run: what would run

Each row prunes the residual branches of a trained example network by one criterion and one budget,
perhaps trains what is left, and compares the pictures of a whole run with the network's own.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from cache_bench import NETWORKS, Bench
from cache_measure import Subject, measure, psnrs, seconds
from prune_samples import Samples
from prune_show import markdown, plot
from rich.console import Console

from effuse.build import versions
from effuse.passes import Distill, Hoist, Pass, Prune
from effuse.tape import Trace

RESULTS = Path(__file__).resolve().parent / "results"
CONSOLE = Console()
SHARES = (0.10, 0.20, 0.35, 0.50)
BY = ("loss", "latent", "magnitude", "random")
HAND = "hand-picked"
RATES = {"unet": 1e-4, "dit": 5e-4}  # the best of three or four each, by the loss kept aside

# As BK-SDM does it: the second of two pairs in each stage, the middle, at last whole stages; and in
# a transformer, whose blocks are alike, every other one from the middle outwards.
PICKED = {
    "unet": (
        "down_blocks.*.1.*", "up_blocks.*.1.*", "mid_block.*", "down_blocks.2.*", "up_blocks.0.*",
    ),
    "dit": tuple(f"transformer_blocks.{n}.*" for n in (5, 7, 3, 9, 1, 10, 4, 8)),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One configuration."""

    by: str
    share: float
    steps: int  # of recovery

    @property
    def name(self) -> str:
        """`loss, 20 %, 200 updates`."""
        recovered = f", {self.steps} updates" if self.steps else ""
        return f"{self.by}, {100 * self.share:.0f} %{recovered}"


def rows(steps: int) -> list[Row]:
    """Every criterion at every budget, without recovery and with it."""
    return [Row(by, share, more) for share in SHARES for by in (*BY, HAND) for more in (0, steps)]


def passes(row: Row, network: str, folder: Path) -> tuple[Pass, ...]:
    """The row's passes; scores are measured once for all budgets of a criterion."""
    recovery = (Distill(steps=row.steps, rate=RATES[network]),) if row.steps else ()
    return (prune(row, network, folder), *recovery, Hoist())


def prune(row: Row, network: str, folder: Path) -> Prune:
    """The row's pass; what is picked by hand is the least list of patterns that saves enough."""
    if row.by != HAND:
        return Prune(parameters=row.share, by=row.by, resume=str(folder / "scores"))  # type: ignore[arg-type]
    count = max(1, round(len(PICKED[network]) * row.share / max(SHARES)))
    return Prune(parameters=row.share, by="magnitude", include=PICKED[network][:count])


def run(
    bench: Bench, base: Subject, row: Row, folder: Path, samples: Samples | None
) -> dict[str, Any]:
    """The figures of a row, or why it has none."""
    begun = time.perf_counter()
    try:
        model, build = bench.compile("row", passes(row, bench.network, folder))
    except Exception as error:  # a budget that the candidates cannot meet is a result
        return {"name": row.name, **vars_of(row), "remark": str(error).splitlines()[0]}
    subject = Subject(SimpleNamespace(name=row.name), model, base.sample)
    ((_, traces, around),) = measure(bench, base, [subject])
    ratios = [one / seconds(each) for one, each in zip(around, traces, strict=True)]
    notes = [note for each in model.manifest["passes"] for note in each["notes"]]
    return {
        "name": row.name,
        **vars_of(row),
        **psnrs(bench.reference, traces[0].pictures),
        **(samples.distances(model) if samples else {}),
        "speedup": sorted(ratios)[len(ratios) // 2],
        "speedup_rounds": ratios,
        "megabytes": model.size / 1e6,
        "removed": removed(notes),
        "build_s": build,
        "trajectories": bench.trajectories,
        "seconds": time.perf_counter() - begun,
        "notes": notes,
        "remark": "",
    }


def vars_of(row: Row) -> dict[str, Any]:
    """The row as data."""
    return {"by": row.by, "share": row.share, "steps": row.steps}


def removed(notes: list[str]) -> dict[str, float]:
    """The shares that went, as the pass tells them: {"parameters": 0.21, "flops": 0.3}."""
    text = " ".join(notes)
    found = re.findall(r"([\d.]+)% of the (parameters|flops)", text)
    return {measure: float(share) / 100 for share, measure in found}


def study(network: str, options: argparse.Namespace) -> None:
    """Run a network's rows, writing what there is after each."""
    wanted = [row for row in rows(options.recovery) if re.search(options.only, row.name)]
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(network, options, Path(place), trajectories=options.trajectories)
        exact, _ = bench.compile("exact", (Hoist(),))
        base = Subject(SimpleNamespace(name="exact"), exact, bench.sampler("ddim", options.steps))
        bench.reference = Trace(exact).sample(base.sample).pictures
        samples = Samples(bench, exact, options.samples) if options.samples else None
        document = opened(network, options, exact.size / 1e6)
        if samples:
            document["samples"] = {"count": samples.count, **samples.distances(exact)}
        for number, row in enumerate(wanted, start=1):
            found = run(bench, base, row, Path(place), samples)
            CONSOLE.print(f"{network} {number}/{len(wanted)} {told(found)}", highlight=False)
            document["rows"] = merged(document["rows"], found)
            write(network, options.out, document)


def told(result: dict[str, Any]) -> str:
    """A row's figures in a line."""
    if result["remark"]:
        return f"{result['name']}: {result['remark']}"
    return (
        f"{result['name']}: {result['psnr_db']:.1f} dB, {result['speedup']:.2f}×, "
        f"{result['megabytes']:.1f} MB, {result['seconds']:.0f} s"
    )


def opened(network: str, options: argparse.Namespace, size: float) -> dict[str, Any]:
    """The document, with the rows of an earlier run over the same steps and prompts."""
    path = options.out / f"prune-{network}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": []}
    same = all(before.get(key) == getattr(options, key) for key in ("steps", "prompts"))
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{options.threads or 'all'} threads",
        "versions": versions(("effuse", "torch", "onnxruntime", "diffusers")),
        "steps": options.steps,
        "prompts": options.prompts,
        "megabytes": size,
        "samples": before.get("samples"),
        "rows": before["rows"] if same else [],
    }


def merged(rows: list[dict[str, Any]], found: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with one more, in the place of an older one of its name."""
    if any(row["name"] == found["name"] for row in rows):
        return [found if row["name"] == found["name"] else row for row in rows]
    return [*rows, found]


def write(network: str, folder: Path, document: dict[str, Any]) -> None:
    """The JSON, the table, the plot."""
    stem = folder / f"prune-{network}"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(network, document), encoding="utf-8")
    plot(stem.with_suffix(".png"), network, document)


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--network", choices=tuple(NETWORKS), help="one of them; both by default")
    parser.add_argument("--only", default="", help="rows whose name this expression finds")
    parser.add_argument("--list", "--dry-run", action="store_true", help="name the rows, run none")
    parser.add_argument("--recovery", type=int, default=200, help="updates of recovery")
    parser.add_argument("--trajectories", type=int, default=1, help="of 8 prompts to recover on")
    parser.add_argument(
        "--samples", type=int, default=0, help="also compare so many pictures by their features"
    )
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="whole runs that are timed")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.list:
        CONSOLE.print("\n".join(row.name for row in rows(options.recovery)))
        return 0
    for network in [options.network] if options.network else NETWORKS:
        study(network, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
