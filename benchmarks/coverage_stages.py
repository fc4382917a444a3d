"""What becomes of one network of diffusers, stage by stage, with the reason where one fails."""

from __future__ import annotations

import importlib
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from coverage_config import construct, entered
from coverage_given import inputs_of
from torch import nn
from torch.utils import _pytree as pytree

from effuse.build import calibrate_for, capture_program
from effuse.calibrate import drive
from effuse.config import Config
from effuse.errors import InputError, PassError
from effuse.examples import derive_inputs
from effuse.parity import check_parity
from effuse.pass_manager import run_passes
from effuse.passes import Cache, Canonicalize, Hoist, Pass, Quantize
from effuse.program import Program
from effuse.verify import compare, exact_bound

STAGES = ("built", "inputs", "captured", "exact", "hoisted", "onnx", "w8a8", "cached")
EACH_STEP = ("cached",)  # of what is called in every step, which an autoencoder is not
TIMES = (1000.0, 750.0, 500.0, 250.0)
GIVEN = "effuse derives none: those of coverage_inputs.json are taken"
SPREAD = 0.05  # of what replaces parameters that are zero at the start of training


@dataclass
class Subject:
    """A network on its way through the stages."""

    kind: type[nn.Module]
    config: Mapping[str, Any]
    side: int | None
    method: str = ""
    told: Mapping[str, Any] = field(default_factory=dict)  # inputs, where effuse derives none
    found: dict[str, Any] = field(default_factory=dict)

    def built(self) -> None:
        """Random weights, none of them zero: a branch that is zero at the start would hide."""
        torch.manual_seed(0)
        model = construct(self.kind, dict(self.config)).float().eval()
        self.model = entered(model, self.method)
        with torch.no_grad():
            for each in self.model.parameters():
                if not each.any():
                    each.normal_(0, SPREAD)
                if not each.isfinite().all():  # made by torch.empty
                    each.normal_(0, SPREAD)
        self.found["parameters"] = sum(each.numel() for each in self.model.parameters())

    def inputs(self) -> str | None:
        """Example inputs, with the last but one timestep of four."""
        if self.told:
            self.times = torch.tensor(TIMES)
            self.given = inputs_of(self.told, TIMES[2])
            return GIVEN
        first = derive_inputs(self.model, size=self.side)
        packed = any(torch.is_tensor(v) and v.numel() and v.max() == 0.5 and v.dim() < 2
                     for v in first.values())  # fmt: skip
        self.times = torch.tensor([t / 1000 if packed else t for t in TIMES])
        middle = self.times[2]
        self.given = derive_inputs(self.model, size=self.side, timestep=middle)
        with torch.no_grad():
            outputs = pytree.tree_leaves(self.model(**self.given))
        if not any(map(torch.is_tensor, outputs)):
            raise InputError("forward gives no tensor: this holds parts for other networks")
        return None

    def captured(self) -> None:
        """One flat graph."""
        config = Config(backend="reference")
        self.program = capture_program(self.model, self.given, self.times, config)
        self.found["nodes"] = len(self.program.parts[0].graph.nodes)
        fixed = [item.label for item in self.program.inputs if item.role == "static"]
        self.found["static"] = fixed

    def exact(self) -> None:
        """The graph agrees with eager to the dtype's rounding."""
        self.program = run_passes(self.program, (Canonicalize(),))
        self.found["error"] = error_of(self.program)

    def hoisted(self) -> None:
        """What does not change every step, in programs of its own."""
        self.program = run_passes(self.program, (Hoist(),))
        error_of(self.program)
        self.found["parts"] = [part.name for part in self.program.parts]

    def onnx(self) -> None:
        """Every part in ONNX Runtime agrees with reference."""
        backend = importlib.import_module("effuse.backends.onnx")
        with tempfile.TemporaryDirectory(prefix="effuse-") as folder:
            backend.build(self.program, Path(folder))
            session = backend.load_session(self.program.spec(), Path(folder))
            self.found["onnx_db"] = check_parity(self.program, session, "onnx")["sqnr_db"]

    def w8a8(self) -> None:
        """Weights and activations in 8 bits, ranges from a trajectory of four steps."""
        lossy = self.rewritten(Quantize("w8a8"))
        layers = [layer for layer in lossy.layers if not layer.reason]
        if not layers:
            reasons = sorted({layer.reason for layer in lossy.layers})
            raise PassError(f"no layer was quantized: {'; '.join(reasons)[:200]}")
        self.found["w8a8_layers"] = f"{len(layers)}/{len(lossy.layers)}"
        self.found["w8a8_db"] = lossy.records[-1].sqnr_db

    def cached(self) -> None:
        """Two variants, of which the smaller reads what the other kept."""
        lossy = self.rewritten(Cache(interval=2, warmup=1))
        if len(lossy.variants) < 2:
            raise PassError(f"no cut: {'; '.join(lossy.records[-1].notes)}")
        self.found["variants"] = [part.name for part in lossy.variants]

    def rewritten(self, each: Pass) -> Program:
        """The program after a pass that may calibrate."""
        config = Config(passes=(each,), backend="reference")
        return run_passes(
            self.program, (each,), lambda now: calibrate_for(config, now, None),
            drive=lambda now, watch: drive(now, None, watch),
        )  # fmt: skip


def error_of(program: Program) -> float:
    """The error against eager (relative).

    Raises:
        PassError: it is above the dtype's rounding.
    """
    measured = compare(program)
    error = float("inf") if measured is None else measured[0]
    bound = exact_bound(getattr(torch, program.model["dtype"]))
    if not error <= bound:
        raise PassError(f"off by {error:.1e} (bound {bound:.1e})")
    return error


NEEDS: Mapping[str, str] = {"built": "", "inputs": "built", "captured": "inputs",
                            "exact": "captured", "hoisted": "exact", "onnx": "hoisted",
                            "w8a8": "hoisted", "cached": "hoisted"}  # fmt: skip


def run_stages(
    subject: Subject, tell: Callable[[Mapping[str, Any]], None], stages: tuple[str, ...] = STAGES
) -> dict[str, Any]:
    """Every stage whose need was met; what there is is told after each.

    A stage is True, or the reason of its failure; after `inputs` as well, where some are told.
    """
    done: dict[str, Any] = {}
    begun = time.process_time()
    for stage in stages:
        if NEEDS[stage] and done.get(NEEDS[stage]) not in (True, GIVEN):
            continue
        try:
            done[stage] = getattr(subject, stage)() or True
        except Exception as error:
            done[stage] = reason_of(error)
        tell({"stages": dict(done), **subject.found, "seconds": time.process_time() - begun})
    return done


def reason_of(error: Exception) -> str:
    """The first line of an error, and its kind."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    text = re.sub(r'[^\s"]*site-packages/', "", text)  # where a machine keeps its libraries
    return f"{type(error).__name__}: {text}"[:600]
