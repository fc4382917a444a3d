"""The section of gpu.py on fused norms, activations and quantization, and on convolutions.

Bytes are the fewest that can be moved: each operand and each result once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gpu_peers as peers
from gpu_args import Work, convolution, group_norm, image, launches, ours, rowwise, turn
from gpu_kernels import Ceilings, Rows, rate, shares
from gpu_rows import CONVS, IMAGES, ROWWISE, TURNS, Conv, Image, Rowwise, Turn
from gpu_time import Bench, Call, ratio
from torch import Tensor

from effuse.kernels.launch import as_tuple

CASES = (*ROWWISE, *TURNS, *IMAGES, *CONVS)
UNFUSED = "PyTorch, unfused"


def fused(bench: Bench, known: Ceilings, cases: Any = CASES) -> Rows:
    """Fused operations against PyTorch's own, and int8 convolutions against cuDNN."""
    bench.compile(launches([partial(works_of, case, "cpu") for case in cases]))
    found: Rows = []
    for case in bench.within(cases, "fused"):
        make = conv_rows if isinstance(case, Conv) else moved_rows
        found += make(bench, known, case)
    return found


def works_of(case: Any, device: Any) -> tuple[Work, ...]:
    """The kernels of a case."""
    if isinstance(case, Image):
        return group_norm(case, device)
    makes = {Rowwise: rowwise, Turn: turn, Conv: convolution}
    return (makes[type(case)](case, device),)


def unfused_of(case: Any, device: Any) -> Call:
    """What PyTorch runs in its place."""
    if isinstance(case, Image):
        x = image(device, case.batch, case.channels, case.side)
        return peers.image_chain(case, x)
    return peers.turned(case, device) if isinstance(case, Turn) else peers.chain(case, device)


def moved_rows(bench: Bench, known: Ceilings, case: Any) -> Rows:
    """A fused operation that moves bytes, and its chain."""
    works = works_of(case, bench.device)
    found = bench.measure(
        {"effuse": lambda: ours(*works), UNFUSED: partial(unfused_of, case, bench.device)}
    )
    size = least_bytes(works[-1])
    rows = []
    for name, each in found.items():
        speed = {"gbs": size / each["ms"] / 1e6} if "ms" in each else {}
        share = {"share": speed["gbs"] / known["copy"]} if speed and known.get("copy") else {}
        over = ratio(found[UNFUSED], each)
        rows.append({"name": f"{case.name}: {name}", "by": name, "bytes": size, **each, **speed,
                     **share, **({"over_unfused": over} if over else {})})  # fmt: skip
    return rows


def least_bytes(work: Work) -> int:
    """Each operand and each result once."""
    native, args = work
    tensors = [each for each in args if isinstance(each, Tensor)]
    results = as_tuple(native.empty(*args))
    return sum(each.numel() * each.element_size() for each in (*tensors, *results))


def conv_rows(bench: Bench, known: Ceilings, case: Any) -> Rows:
    """A convolution: int8 by ours, bfloat16 by cuDNN."""
    base = "cuDNN bf16"
    found = bench.measure({
        base: partial(peers.conv, case, bench.device),
        "effuse int8": lambda: ours(convolution(case, bench.device)),
    })  # fmt: skip
    side = case.side // case.stride
    flops = 2 * case.batch * side * side * case.outer * case.inner * case.window**2
    return [
        {"name": f"{case.name}: {name}", "by": name, **each, **rate(each, flops),
         **shares(each, found[base], name.split()[-1], known, flops)}
        for name, each in found.items()
    ]  # fmt: skip
