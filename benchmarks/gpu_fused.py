"""The section of gpu.py on fused norms, activations and quantization, and on convolutions.

Bytes are the fewest that can be moved: each operand and each result once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import gpu_peers as peers
from gpu_args import Work, convolution, group_norm, image, launches, ours, rowwise
from gpu_kernels import Ceilings, Rows, rate, shares
from gpu_rows import CONVS, IMAGES, ROWWISE
from gpu_time import Bench, Make, ratio
from torch import Tensor

from effuse.kernels.launch import as_tuple


def fused(
    bench: Bench, known: Ceilings, rows: Any = ROWWISE, images: Any = IMAGES, convs: Any = CONVS
) -> Rows:
    """Fused operations against PyTorch's own, and int8 convolutions against cuDNN."""
    makes = [
        *(lambda c=case: [rowwise(c, "cpu")] for case in rows),
        *(lambda c=case: group_norm(c, "cpu") for case in images),
        *(lambda c=case: [convolution(c, "cpu")] for case in convs),
    ]
    bench.compile(launches(makes))
    found: Rows = []
    for case in bench.within((*rows, *images, *convs), "fused"):
        if case in convs:
            found += conv_rows(bench, known, case)
        else:
            found += moved_rows(bench, known, case, case in images)
    return found


def moved_rows(bench: Bench, known: Ceilings, case: Any, of_images: bool) -> Rows:
    """A fused operation that moves bytes, and its chain."""
    device = bench.device
    if of_images:
        works = group_norm(case, device)
        x = image(device, case.batch, case.channels, case.side)
        unfused: Make = partial(peers.image_chain, case, x)
    else:
        works, unfused = (rowwise(case, device),), partial(peers.chain, case, device)
    found = bench.measure({"effuse": lambda: ours(*works), "PyTorch, unfused": unfused})
    size = least_bytes(works[-1])
    rows = []
    for name, each in found.items():
        speed = {"gbs": size / each["ms"] / 1e6} if "ms" in each else {}
        share = {"share": speed["gbs"] / known["copy"]} if speed and known.get("copy") else {}
        over = ratio(found["PyTorch, unfused"], each)
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
