"""Run a step of what full_size.py has compiled, beside the network itself: seconds, memory, SQNR.

The network is diffusers' own, in float32, its weights read from their files as each module is
called and forgotten behind it: no machine of this size holds them. The artifact is run by
effuse.load; the first call computes what is the same in every step, the second one is a step. Each
is a process of its own. With random weights 4 bits cost what they cost on white noise, which is
more than trained networks lose: SQNR here says that the artifact computes the right network.

    python benchmarks/full_size_step.py examples/configs/flux-dev.json --size 32 --work /big
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from full_size import inputs_of, peak, schedule_of, tell
from torch import nn
from torch.utils import _pytree as pytree

import effuse
from effuse.inspect_model import resolve
from effuse.metrics import sqnr_db
from effuse.stream import computed
from effuse.weights import open_folder

SIDES = ("eager", "artifact")


def lent(network: nn.Module, weights: Mapping[str, torch.Tensor]) -> nn.Module:
    """A network on the meta device whose modules have their weights while they are called."""
    tables = computed(network)
    for path, module in network.named_modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = tables.get(f"{path}.{name}".lstrip("."), buffer)
        if own := {name: f"{path}.{name}".lstrip(".") for name in module._parameters}:
            empty = dict(module._parameters)

            def fill(module: nn.Module, _: Any, own: dict[str, str] = own) -> None:
                for name, full in own.items():
                    if module._parameters[name] is not None:
                        module._parameters[name] = nn.Parameter(weights[full], False)

            def drop(module: nn.Module, *_: Any, empty: dict[str, Any] = empty) -> None:
                module._parameters.update(empty)

            module.register_forward_pre_hook(fill)
            module.register_forward_hook(drop)
    return network


def run(arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One side, in this process: its output is written down."""
    network = resolve(str(work / "network"))
    inputs = inputs_of(network, arguments)
    inputs["timestep"] = schedule_of(inputs)[:1].to(inputs["timestep"].dtype)
    inputs = pytree.tree_map_only(torch.Tensor, float32, inputs)
    base, start = peak(), time.perf_counter()
    if arguments.child == "eager":
        ready = lent(network.eval(), open_folder(work / "network", torch.float32))
    else:
        ready = effuse.load(work / "out")
    seconds = {"load": time.perf_counter() - start}
    for name in ("first", "second")[: 1 + (arguments.child == "artifact")]:
        start = time.perf_counter()
        with torch.no_grad():
            found = ready(**inputs)
        seconds[name] = time.perf_counter() - start
    np.save(work / f"{arguments.child}.npy", torch.as_tensor(found[0]).float().numpy())
    return {"seconds": seconds, "base_bytes": base, "peak_bytes": peak()}


def float32(tensor: torch.Tensor) -> torch.Tensor:
    """As the streamed build reads weights."""
    return tensor.float() if tensor.is_floating_point() else tensor


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("network", type=Path, help="a JSON file of examples/configs")
    add("--batch", type=int, default=1, help="as full_size.py was told (default: 1)")
    add("--size", type=int, help="as full_size.py was told")
    add("--input", action="append", metavar="NAME=2x3", help="as full_size.py was told")
    add("--work", type=Path, required=True, help="the folder that full_size.py was told")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the result")
    add("--label", default="", help="what else to say of the machine, such as: busy")
    add("--child", choices=SIDES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run both sides and compare."""
    arguments = parsed()
    work = arguments.work / arguments.network.stem
    if arguments.child:
        (work / f"{arguments.child}.json").write_text(json.dumps(run(arguments, work)))
        return 0
    found: dict[str, Any] = {}
    for side in SIDES:
        subprocess.run([sys.executable, *sys.argv, "--child", side], check=True)
        found[side] = json.loads((work / f"{side}.json").read_text())
    wanted, came = (np.load(work / f"{side}.npy") for side in SIDES)
    found |= {"sqnr_db": sqnr_db(wanted, came), "shape": list(came.shape),
              "std": [float(wanted.std()), float(came.std())]}  # fmt: skip
    return tell(found, arguments, "step")


if __name__ == "__main__":
    sys.exit(main())
