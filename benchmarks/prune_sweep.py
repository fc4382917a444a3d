"""What it takes to score every residual branch of SD1.5's full UNet (860 M, random weights).

    python benchmarks/prune_sweep.py                # a 64×64 latent; --size 32 for a quarter of it
    python benchmarks/prune_sweep.py --add          # goes on where it was stopped
    python benchmarks/prune_sweep.py --list         # or --dry-run: branches and forwards, no run

The predicted time comes first. Each branch's loss and seconds are kept as soon as it is finished;
seconds are from the branch before to this one, so their sum is the sweep's. Memory is what the
kernel counted at most (VmHWM). The losses of random weights mean nothing; their cost does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from full_size import drawn, peak
from rich.console import Console
from torch import Tensor, nn

from effuse.build import versions
from effuse.capture import capture
from effuse.evaluate import machine
from effuse.examples import derive_inputs
from effuse.inspect_model import resolve
from effuse.log import Log
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize
from effuse.passes.base import Work
from effuse.passes.prune_candidates import Candidate, find_candidates
from effuse.passes.prune_cost import forwards, graph_flops
from effuse.passes.prune_scores import losses
from effuse.passes.resume import Store
from effuse.program import Program
from effuse.stream import on_meta

ROOT = Path(__file__).resolve().parent
NETWORK = ROOT.parent / "examples" / "configs" / "sd15.json"
TINY = {
    "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"], "attention_head_dim": 2,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "cross_attention_dim": 8,
}  # fmt: skip
KEPT = Path(tempfile.gettempdir()) / "effuse-prune-sweep"
MOST = 8 * 2**30  # bytes that a sweep may hold
CONSOLE = Console(soft_wrap=True)


def network(size: int, smoke: bool) -> nn.Module:
    """The UNet on the meta device, as configured or tiny."""
    return resolve(str(NETWORK), {"sample_size": size, **(TINY if smoke else {})})


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same with random weights, one tensor at a time."""
    random = torch.Generator().manual_seed(seed)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, each in model.named_parameters():
            each.copy_(drawn(name, tuple(each.shape), random))
    return model


def spans(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Program, list[Candidate]]:
    """The captured network and its branches, in the order that a sweep comes to them."""
    program = run_passes(capture(model, inputs), (Canonicalize(),))
    order = [node.name for node in program.part(program.plan.default).graph.nodes]
    every = find_candidates(program, ("span",), Log())
    return program, sorted(every, key=lambda each: order.index(join_of(each)))


def join_of(candidate: Candidate) -> str:
    """The sum where the branch comes in."""
    assert candidate.block is not None
    return candidate.block.joins[0].node


class Timed(Store):
    """Keeps with every unit how long it took; the units come in the order that they are asked."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(folder)
        self.names, self.keys = names, list[str]()
        self._since = time.perf_counter()

    def read(self, key: str) -> dict[str, Tensor] | None:
        """A finished unit, or None."""
        self.keys.append(key)
        self._since = time.perf_counter()
        return super().read(key)

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a unit, and say so."""
        now = time.perf_counter()
        super().write(key, {**tensors, "seconds": torch.tensor(now - self._since)})
        row = self.rows()[self.keys.index(key)]
        CONSOLE.print(f"{row['name']}: {row['seconds']:.2f} s, {peak() / 2**30:.2f} GiB",
                      highlight=False)  # fmt: skip
        self._since = time.perf_counter()

    def rows(self) -> list[dict[str, Any]]:
        """What is finished, a line for each unit."""
        found = []
        for number, key in enumerate(self.keys):
            kept = super().read(key) or {}
            found.append({"name": self.names[number % len(self.names)]}
                         | {name: float(each) for name, each in kept.items()})  # fmt: skip
        return found


def sweep(options: argparse.Namespace) -> int:
    """Build, predict, score; write what there is, whether it was interrupted or not."""
    begun = time.perf_counter()
    model = filled(network(options.size, options.smoke))
    weights = sum(each.numel() for each in model.parameters())
    program, every = spans(model, derive_inputs(model, batch=1))
    CONSOLE.print(f"{weights / 1e6:.0f} M weights, captured in {time.perf_counter() - begun:.0f} s")
    folder = options.kept / f"{options.size}-{weights}"
    for file in [] if options.add else folder.glob("*.safetensors"):
        file.unlink()
    store = Timed(folder, [each.name for each in every])
    told: list[str] = []

    def progress(what: str, done: int, total: int) -> None:
        if "forwards of" in what:
            told.append(what)
            CONSOLE.print(what, highlight=False)

    done = False
    try:
        with torch.no_grad():
            losses(program, every, probes(program, options.calls), Work(progress=progress), store)
        done = True
    except KeyboardInterrupt:
        CONSOLE.print("stopped; --add goes on from here")
    write(options, program, every, store.rows(), told)
    return 0 if done else 130


def probes(program: Program, count: int) -> list[dict[str, Tensor]]:
    """Inputs of several calls, of other noise each."""
    random = torch.Generator().manual_seed(0)
    latent = next(item.name for item in program.inputs if item.role.value == "latent")
    shape = program.examples[latent].shape
    return [{**program.examples, latent: torch.randn(shape, generator=random)}
            for _ in range(count)]  # fmt: skip


def write(
    options: argparse.Namespace, program: Program, every: Sequence[Candidate],
    rows: Sequence[Mapping[str, Any]], told: Sequence[str],
) -> None:  # fmt: skip
    """The JSON and the table."""
    part = program.part(program.plan.default)
    held = {each.name: {"parameters": each.parameters, "flops": each.flops} for each in every}
    finished = [{**row, **held[row["name"]]} for row in rows if "seconds" in row]
    document = {
        "network": "tiny UNet" if options.smoke else "SD1.5's UNet, random weights",
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": versions(("effuse", "torch", "diffusers")),
        "size": options.size,
        "calls": options.calls,
        "predicted": list(told),
        "forwards": forwards(part, every),
        "flops": graph_flops(part.graph),
        "seconds": sum(row["seconds"] for row in finished),
        "peak_bytes": peak(),
        "rows": finished,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / "prune-sweep"
    stem.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(document, len(rows)), encoding="utf-8")
    CONSOLE.print(summary(document, len(rows)), highlight=False)


def summary(document: Mapping[str, Any], count: int) -> str:
    """The whole in a sentence."""
    within = "" if document["peak_bytes"] <= MOST else ", more than 8 GiB"
    return (
        f"{len(document['rows'])} of {count} losses in {document['seconds']:.0f} s, at most "
        f"{document['peak_bytes'] / 2**30:.2f} GiB{within}"
    )


def markdown(document: Mapping[str, Any], count: int) -> str:
    """A line for each branch."""
    size, threads = document["size"], document["machine"]["torch threads"]
    lines = [
        f"# The sweep over {document['network']}",
        "",
        f"Latent {size}×{size}, {document['calls']} input, {threads} threads: "
        f"{summary(document, count)}.",
        *(f"Said before: {each}." for each in document["predicted"]),
        "",
        "| branch | weights, M | GFLOPs | seconds |",
        "|---|--:|--:|--:|",
    ]
    lines += [
        f"| {row['name']} | {row['parameters'] / 1e6:.2f} | {row['flops'] / 1e9:.2f} "
        f"| {row['seconds']:.2f} |"
        for row in document["rows"]
    ]
    return "\n".join(lines) + "\n"


def listed(options: argparse.Namespace) -> int:
    """What would run, without weights."""
    model = network(options.size, options.smoke)
    program, every = spans(model, on_meta(derive_inputs(model, batch=1)))
    count = options.calls * forwards(program.part(program.plan.default), every)
    for each in every:
        CONSOLE.print(f"{each.name}: {each.parameters / 1e6:.2f} M", highlight=False)
    CONSOLE.print(f"{len(every)} branches, about {count:.1f} forwards", highlight=False)
    return 0


def main() -> int:
    """Read the arguments and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", type=int, default=64, help="of the latent")
    parser.add_argument("--calls", type=int, default=1, help="inputs that losses are measured on")
    parser.add_argument("--add", action="store_true", help="keep what an earlier run has finished")
    parser.add_argument("--smoke", action="store_true", help="a tiny network")
    parser.add_argument("--list", "--dry-run", action="store_true", help="name branches, run none")
    parser.add_argument("--kept", type=Path, default=KEPT, help="folder of finished losses")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    options = parser.parse_args()
    if options.list:
        return listed(options)
    return sweep(options)


if __name__ == "__main__":
    sys.exit(main())
