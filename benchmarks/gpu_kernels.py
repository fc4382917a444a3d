"""The sections of gpu.py that time single kernels; each gives rows for the JSON.

A row has `ms`, its rounds, and what follows from them: TFLOP/s and their share of the ceiling that
was measured for the same numbers, or GB/s and their share of a copy's; `over_bf16`, how many times
as fast as cuBLAS in bfloat16. Bytes are the fewest that can be moved: each operand once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import gpu_peers as peers
import torch
from gpu_args import (
    Work,
    flat,
    given_of,
    launches,
    linear,
    normal,
    ours,
    quantize,
    random_linear,
    weight_of,
)
from gpu_rows import (
    BRANCH_FORMATS,
    BRANCHED,
    BY_FORMAT,
    CEILINGS,
    COPY_BYTES,
    FORMATS,
    JUDGED,
    LAYERS,
    RANKS,
    ROWS,
    TOGETHER,
    Format,
    Layer,
)
from gpu_time import Bench, Call, Figures, Make, ratio
from torch import Tensor
from torch.nn import functional as F

from effuse.kernels.launch import run_native

Rows = list[dict[str, Any]]
Ceilings = Mapping[str, float]  # TFLOP/s by kind of numbers; GB/s of the copy
BASE = "cuBLAS bf16"
FLOOR = "least"  # what an event, a graph and a kernel take that has nothing to do


# ---- ceilings ------------------------------------------------------------------------------------


def ceilings(bench: Bench, sizes: Any = CEILINGS, copied: int = COPY_BYTES) -> Rows:
    """The rates of this GPU's own libraries: what ours are shares of."""
    rows: Rows = []
    for m, n, k in bench.within(sizes, "ceilings"):
        size: Any = (m, n, k, bench.device)
        found = bench.measure({
            "bf16": partial(peers.bf16, *size),
            "fp8": partial(peers.fp8, *size, rowwise=False),
            "fp8 slow": partial(peers.fp8, *size, rowwise=False, fast=False),
            "fp8 rowwise": partial(peers.fp8, *size),
            "int8": partial(peers.int8, *size),
        })  # fmt: skip
        for kind, each in found.items():
            rows.append({"name": f"{kind} {m}x{n}x{k}", "kind": kind, "m": m, **each,
                         **rate(each, 2 * m * n * k)})  # fmt: skip
    found = bench.measure({"copy": partial(copy, copied, bench.device)})["copy"]
    moved = {"gbs": 2 * copied / found["ms"] / 1e6} if "ms" in found else {}
    rows.append({"name": f"copy {copied >> 20} MiB", "kind": "copy", **found, **moved})
    least = bench.measure({"least": partial(copy, 1, bench.device)})["least"]
    return [*rows, {"name": "a copy of one byte: no time is shorter", "kind": FLOOR, **least}]


def copy(size: int, device: Any) -> Call:
    """A copy from device memory to device memory."""
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def rate(figures: Figures, flops: float) -> Figures:
    """TFLOP/s."""
    return {"tflops": flops / figures["ms"] / 1e9} if "ms" in figures else {}


def best(rows: Rows) -> dict[str, float]:
    """The ceilings: the best rate that was measured for each kind of numbers."""
    found: dict[str, float] = {}
    for row in rows:
        kind = row["kind"].split()[0]  # fp8 in all its ways
        found[kind] = max(found.get(kind, 0.0), row.get("tflops", row.get("gbs", 0.0)))
    return {kind: value for kind, value in found.items() if value}


# ---- linear layers -------------------------------------------------------------------------------


def kernels(
    bench: Bench, known: Ceilings, layers: Iterable[Layer] = LAYERS, rows: Iterable[int] = ROWS,
    torchao: bool = True,
) -> Rows:  # fmt: skip
    """Every linear layer at every number of rows, by all of ours and all peers."""
    cases = [(m, layer) for m in rows for layer in layers]
    makes = [partial(works_of, m, layer, "cpu") for m, layer in cases]
    bench.compile(launches(makes))
    found: Rows = []
    for m, layer in bench.within(cases, "kernels"):
        found += linear_rows(bench, known, m, layer, torchao and m == JUDGED)
    return found


def works_of(m: int, layer: Layer, device: Any) -> Iterator[Work]:
    """All kernels of ours for a layer."""
    for format in FORMATS:
        yield random_linear(format, m, layer.columns, layer.depth, device)
        if format.name in TOGETHER:
            yield quantize(normal(device, m, layer.depth), format.given)


def linear_rows(bench: Bench, known: Ceilings, m: int, layer: Layer, torchao: bool) -> Rows:
    """One layer at one number of rows."""
    n, k, device = layer.columns, layer.depth, bench.device
    makes: dict[str, Make] = {
        BASE: partial(peers.bf16, m, n, k, device),
        "torch._scaled_mm fp8": partial(peers.fp8, m, n, k, device),
        "torch._int_mm int8": partial(peers.int8, m, n, k, device),
    }
    kinds = {BASE: "bf16", "torch._scaled_mm fp8": "fp8", "torch._int_mm int8": "int8"}
    for format in FORMATS:
        makes[f"effuse {format.name}"] = lambda f=format: ours(random_linear(f, m, n, k, device))
        kinds[f"effuse {format.name}"] = format.ceiling
    for name in TOGETHER:
        makes[f"quantize + effuse {name}"] = partial(together, BY_FORMAT[name], m, n, k, device)
        kinds[f"quantize + effuse {name}"] = BY_FORMAT[name].ceiling
    if torchao and layer in BRANCHED:
        for name in peers.TORCHAO:
            makes[name] = partial(peers.torchao, name, m, n, k, device)
            kinds[name] = name.split()[1]
    found = bench.measure(makes)
    told, flops = {"network": layer.network, "m": m, "n": n, "k": k}, 2 * m * n * k
    return [
        {"name": f"{layer.name} M={m}: {name}", "by": name, **told, **each,
         **rate(each, flops), **shares(each, found[BASE], kinds[name], known, flops),
         "weight_bytes": int(n * k * bits(name) / 8)}
        for name, each in found.items()
    ]  # fmt: skip


def together(format: Format, m: int, n: int, k: int, device: Any) -> Call:
    """Quantization of bfloat16 rows, then the layer on those codes."""
    native, args = quantize(normal(device, m, k), format.given)
    weight = weight_of(format, n, k, device)

    def run() -> Tensor:
        codes, scale, _ = run_native(native, *args)
        return run_native(*flat(linear(format, (codes, scale), weight)))

    return run


def shares(
    figures: Figures, base: Figures, kind: str, known: Ceilings, flops: float
) -> dict[str, float]:
    """How a row stands to its ceiling and to cuBLAS."""
    found = {}
    if "ms" in figures and known.get(kind):
        found["share"] = flops / figures["ms"] / 1e9 / known[kind]
    if (over := ratio(base, figures)) is not None:
        found["over_bf16"] = over
    return found


def bits(name: str) -> float:
    """Bits of a weight, by the name of what multiplies it."""
    known = {format.name: format.bits for format in FORMATS}
    return known.get(name.split()[-1], 16.0 if name == BASE else 8.0)


# ---- branches ------------------------------------------------------------------------------------


def branches(
    bench: Bench, layers: Iterable[Layer] = BRANCHED, m: int = JUDGED,
    ranks: Iterable[int] = RANKS,
) -> Rows:  # fmt: skip
    """What a branch adds to {quantize, linear}: fused, and as two products and a sum."""
    cases, ranks = [(BY_FORMAT[f], layer) for layer in layers for f in BRANCH_FORMATS], list(ranks)
    makes = [partial(branch_works, f, m, each, r, "cpu") for f, each in cases for r in ranks]
    bench.compile(launches(makes))
    rows: Rows = []
    for format, layer in bench.within(cases, "branches"):
        size: Any = (format, m, layer.columns, layer.depth)
        found = bench.measure({
            "none": partial(branch, *size, 0, True, bench.device),
            **{f"fused {r}": partial(branch, *size, r, True, bench.device) for r in ranks},
            **{f"unfused {r}": partial(branch, *size, r, False, bench.device) for r in ranks},
        })  # fmt: skip
        for name, each in found.items():
            how, _, rank = name.partition(" ")
            over = ratio(each, found["none"])
            rows.append({
                "name": f"{layer.name} M={m} {format.name}: {name}", "layer": layer.name,
                "network": layer.network, "format": format.name, "how": how,
                "rank": int(rank or 0), **each, **({"added": over - 1} if over else {}),
            })  # fmt: skip
    return rows


def branch_works(format: Format, m: int, layer: Layer, rank: int, device: Any) -> list[Work]:
    """The fused kernels of a layer with a branch, for their launches."""
    n, k = layer.columns, layer.depth
    first = quantize(normal(device, m, k), format.given, normal(device, rank, k))
    given, weight = given_of(format, m, k, device), weight_of(format, n, k, device)
    return [first, linear(format, given, weight, normal(device, m, rank), normal(device, n, rank))]


def branch(format: Format, m: int, n: int, k: int, rank: int, fused: bool, device: Any) -> Call:
    """{quantize, linear} with a branch of `rank`, in two kernels or with three more."""
    x, weight = normal(device, m, k), weight_of(format, n, k, device)
    down, up = (normal(device, rank, k), normal(device, n, rank)) if rank else (None, None)

    def run() -> Tensor:
        native, args = quantize(x, format.given, down if fused else None)
        codes, scale, low = run_native(native, *args)
        inside = (low, up) if fused and rank else (None, None)
        y: Tensor = run_native(*flat(linear(format, (codes, scale), weight, *inside)))
        return y if fused or not rank else y + F.linear(F.linear(x, down), up)  # type: ignore[arg-type]

    return run
