"""What open sizes cost: ms a step of symbolic, bucket and static artifacts at the same sizes.

    python benchmarks/dynamic.py             # the emoji UNet, exact and w8a8, two sizes
    python benchmarks/dynamic.py --tiny      # the UNet of tests/dynamic_networks.py instead, exact
    python benchmarks/dynamic.py --smoke     # one size, three turns, nothing written

`symbolic` is one artifact with `dynamic=`, `bucket` one with `shapes=`, `static` one compiled for
each size alone. They take turns on one thread, so that a machine that gets busy does so for all;
medians are told, with disk, the time to compile, and the agreement with eager at each size.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import effuse
from effuse.examples import derive_inputs
from effuse.inspect_model import load_folder
from effuse.metrics import sqnr_db

HERE = Path(__file__).resolve().parent
NETWORK = HERE.parent / "examples" / "models" / "emoji-unet"
OUTPUT = HERE / "results" / "dynamic.json"
PRESETS = ("exact", "w8a8")
SIZES = (
    {"batch": 2, "height": 32, "width": 32},
    {"batch": 1, "height": 48, "width": 32},
)
BOUNDS = {"batch": (1, 4), "height": (16, 64), "width": (16, 64)}
TIMES = tuple(float(time) for time in range(980, -1, -98))
TURNS, WARMUP = 21, 3

Sizes = Mapping[str, int]


def main() -> None:
    """Compile, measure in turns, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="one size, three turns")
    parser.add_argument("--tiny", action="store_true", help="the UNet of the tests, exact")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    sizes, turns = (SIZES[:1], 3) if options.smoke else (SIZES, TURNS)
    presets = PRESETS[:1] if options.smoke or options.tiny else PRESETS
    network = tiny() if options.tiny else load_folder(NETWORK)
    rows = [row for preset in presets for row in measured(network, preset, sizes, turns)]
    for row in rows:
        print(json.dumps(row))
    if not options.smoke:
        machine = {"cores": os.cpu_count(), "processor": platform.machine(), "threads": 1,
                   "load": os.getloadavg()[0]}  # fmt: skip
        name = "tests/dynamic_networks.py UNet" if options.tiny else NETWORK.name
        data = {"machine": machine, "network": name, "turns": turns, "rows": rows}
        options.output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def tiny() -> nn.Module:
    """The UNet that the tests are made with."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    networks = importlib.import_module("dynamic_networks")
    network: nn.Module = networks.build(networks.UNet)
    return network


def measured(
    network: nn.Module, preset: str, sizes: Sequence[Sizes], turns: int
) -> list[dict[str, Any]]:
    """A row for each kind of artifact and size."""
    built = artifacts(network, preset, sizes)
    rows = []
    for each in sizes:
        inputs = inputs_at(network, each, seed=1)
        with torch.no_grad():
            expected = first(network(**inputs))
        models = {kind: find(each) for kind, find in built.items()}
        times = in_turns({kind: model for kind, (model, _) in models.items()}, inputs, turns)
        for kind, (model, seconds) in models.items():
            found = first(model(**inputs))
            rows.append({
                "preset": preset, "kind": kind, **each,
                "ms": round(statistics.median(times[kind]) * 1e3, 2),
                "least_ms": round(min(times[kind]) * 1e3, 2),
                "db": round(sqnr_db(expected, found), 1),
                "mb": round(model.size / 1e6, 2), "compile_s": round(seconds, 1),
            })  # fmt: skip
    return rows


def first(output: Any) -> Any:
    """The prediction as a numpy array."""
    return (output if torch.is_tensor(output) else output[0]).numpy()


def artifacts(
    network: nn.Module, preset: str, sizes: Sequence[Sizes]
) -> dict[str, Callable[[Sizes], tuple[effuse.Compiled, float]]]:
    """For each kind, the artifact that serves a size, with the seconds that it took to compile."""
    symbolic = compiled(network, sizes[0], passes=preset, dynamic=BOUNDS)
    bucket = compiled(network, sizes[0], passes=preset, shapes=sizes)
    static = {id(each): compiled(network, each, passes=preset) for each in sizes}
    return {
        "symbolic": lambda _: symbolic,
        "bucket": lambda _: bucket,
        "static": lambda each: static[id(each)],
    }


def compiled(network: nn.Module, sizes: Sizes, **options: Any) -> tuple[effuse.Compiled, float]:
    """The artifact on one thread, and the seconds that it took to compile."""
    start = time.perf_counter()
    config = effuse.Config(**options)
    made = effuse.compile(
        network, config, inputs=inputs_at(network, sizes), schedule=TIMES, progress=False
    )
    seconds = time.perf_counter() - start
    loaded = effuse.load(made.folder, threads=1)
    loaded._keep = made  # the folder lives as long as what was compiled
    return loaded, seconds


def inputs_at(network: nn.Module, sizes: Sizes, seed: int = 0) -> dict[str, Any]:
    """Inputs of the network at these sizes."""
    generator = torch.Generator().manual_seed(seed)
    if hasattr(network, "config"):
        given = derive_inputs(network, batch=sizes["batch"], timestep=torch.tensor(TIMES[3]))
    else:  # not of diffusers
        prompt = torch.randn(sizes["batch"], 8, 32, generator=generator)
        given = {"sample": torch.zeros(1, 4), "timestep": torch.tensor(TIMES[3]),
                 "encoder_hidden_states": prompt}  # fmt: skip
    shape = (sizes["batch"], given["sample"].shape[1], sizes["height"], sizes["width"])
    return {**given, "sample": torch.randn(shape, generator=generator)}


def in_turns(
    models: Mapping[str, effuse.Compiled], inputs: Mapping[str, Any], turns: int
) -> dict[str, list[float]]:
    """Seconds of a step of each, one after the other, again and again."""
    found: dict[str, list[float]] = {kind: [] for kind in models}
    for turn in range(-WARMUP, turns):
        for kind, model in models.items():
            start = time.perf_counter()
            model(**inputs)
            seconds = time.perf_counter() - start
            if turn >= 0:
                found[kind].append(seconds)
    return found


if __name__ == "__main__":
    main()
