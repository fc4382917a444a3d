"""The cells of the parity benchmark, as data: which networks, back ends and presets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from parity_networks import NETWORKS

PRESETS = ("exact", "w8a8", "w8a8-dynamic", "w4a8", "w4a16", "cache", "w8a8-cache")
REFERENCE, ONNX, OPENVINO, TENSORRT = "reference", "onnx", "openvino", "tensorrt"
BACKENDS = (REFERENCE, ONNX, OPENVINO, TENSORRT)
TARGETS = {TENSORRT: "tensorrt-10"}
NOT_RUN = {"triton": "its kernels run in Triton's interpreter here, minutes a step"}
LABELS = {TENSORRT: "tensorrt, its ONNX in ONNX Runtime"}
NOT_TIMED = {TENSORRT: "not timed: run node by node, without optimization, to check numbers"}
SMOKE = ("tiny-sd", "tiny-dit")
SMOKE_PRESETS = ("exact", "w8a8")


@dataclass(frozen=True)
class Cell:
    """A network in a preset on a back end."""

    network: str
    preset: str
    backend: str

    @property
    def name(self) -> str:
        """`emoji-unet w8a8 onnx`."""
        return f"{self.network} {self.preset} {self.backend}"


def cells(pattern: str = "", smoke: bool = False) -> list[Cell]:
    """The cells that are asked for, by network and preset; each back end's in `BACKENDS`' order.

    What others are compared with is added: the reference of their preset, and the baseline.
    """
    networks = SMOKE if smoke else tuple(NETWORKS)
    presets = SMOKE_PRESETS if smoke else PRESETS
    every = [Cell(n, p, b) for n in networks for p in presets for b in BACKENDS]
    wanted = [cell for cell in every if re.search(pattern, cell.name)]
    kept = needed(wanted)
    return [cell for cell in every if cell in kept]


def needed(wanted: Sequence[Cell]) -> set[Cell]:
    """These cells, and those that they are compared with."""
    found = {*wanted, *(baseline(each.network) for each in wanted)}
    return found | {Cell(each.network, each.preset, REFERENCE) for each in found}


def baseline(network: str) -> Cell:
    """The cell whose time others are compared with."""
    return Cell(network, PRESETS[0], ONNX)
