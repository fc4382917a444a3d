"""Resident memory of one artifact in a process of its own: `memory.py ARTIFACT INPUTS.npz STEPS`.

Prints JSON in bytes: how much the process grew by loading the artifact and running STEPS steps,
at the end (`resident`) and at most (`peak`). Linux only; imports what a device has, no torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

import effuse
from effuse import ort as ort  # onnxruntime is loaded before the first reading

STATUS = Path("/proc/self/status")
FIELDS = {"resident": "VmRSS", "peak": "VmHWM"}


def reading() -> dict[str, int]:
    """What the process holds now and has held at most, in bytes."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return {name: int(lines[field].split()[0]) * 1024 for name, field in FIELDS.items()}


def growth(artifact: str, inputs: str, steps: int) -> dict[str, int]:
    """Load, run, and tell by how much the process grew."""
    given = dict(np.load(inputs))
    before = reading()
    model = effuse.load(artifact)
    for time in (model.session.spec.timesteps or ())[:steps]:
        model(**{**given, "timestep": np.full_like(given["timestep"], time)})
    after = reading()
    return {name: after[name] - before[name] for name in FIELDS}


if __name__ == "__main__":
    print(json.dumps(growth(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
