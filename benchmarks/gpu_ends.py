"""The section of gpu.py that runs networks end to end: FLUX blocks, some of FLUX, a UNet.

effuse compiles each network for the GPU that is here, by the passes and the back end that
`effuse.compile` runs. It is captured without values and not calibrated: the formats find their
ranges at run time, the branches' factors are of the weights alone. What comes out is compared with
eager bfloat16 on the GPU, in dB. Both ways of running it are timed:

    effuse            its own static plan: cubins, an arena, one CUDA graph
    effuse, Inductor  torch.compile around effuse's operations

Compilation of the peers is bounded; a peer that takes longer falls back or is left out, and its row
says so. Memory is what a row alone needs: its weights, and the most that its calls allocate.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_blocks import Double, Flux, Inputs, Network, Single, flux_inputs, parameters, randomized
from gpu_blocks import roles as all_change
from gpu_peers import quantize_by_torchao
from gpu_time import Bench, Call, Figures, OutOfTime, bounded, captured, ratio, reason
from gpu_unet import Unet, unet_inputs
from torch import Tensor, fx, nn

from effuse.backends import triton
from effuse.backends.triton_cuda import present
from effuse.backends.triton_lower import lower
from effuse.backends.triton_run import PartRun
from effuse.capture import capture
from effuse.graph import clone, move
from effuse.kernels.launch import run_jit
from effuse.metrics import sqnr_db
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, LowRank, Quantize
from effuse.passes.base import Pass
from effuse.program import Program

EAGER, COMPILED = "eager bf16", "torch.compile bf16"
LEAST_COMPILE, MOST_COMPILE = 5.0, 75.0  # seconds that torch.compile may take
RANKED = "w4a8, rank 32"  # not of convolutions
NO_FLOOR = -99.0  # dB: no layer stays in float for its error
CPU = torch.device("cpu")


def _blind(format: str) -> Quantize:
    return Quantize(format, min_sqnr_db=NO_FLOOR, edges=True)


FORMATS: Mapping[str, tuple[Pass, ...]] = {
    "w8a8": (_blind("int8/channel:int8/token/dynamic"),),
    "fp8": (_blind("fp8"),),
    RANKED: (LowRank(32, "w4a8", rounds=1, inputs=False, edges=True), _blind("w4a8")),
}


def networks() -> tuple[Network, ...]:
    """What is run, the most telling first."""
    names = {each: parameters(each) for each in (Double, Single, Flux)}
    return (
        Network("FLUX double block", "512 + 4096 tokens", Double,
                partial(flux_inputs, names[Double])),
        Network("FLUX single block", "4608 tokens", Single, partial(flux_inputs, names[Single])),
        Network("FLUX, 1/8 of its depth", "2 double, 5 single blocks", Flux,
                partial(flux_inputs, names[Flux])),
        Network("SDXL UNet, 17 of 70 transformer blocks", "2 x 4 x 128 x 128", Unet, unet_inputs,
                convolutions=True, autotune=False),
    )  # fmt: skip


# ---- effuse --------------------------------------------------------------------------------------


def program_of(
    make: Callable[[], nn.Module], weights: Mapping[str, Tensor], inputs: Inputs,
    passes: Sequence[Pass], device: torch.device = CPU,
) -> Program:  # fmt: skip
    """A network's program after the passes, captured without running it.

    Args:
        make: builds the network, on the default device, in float32.
        weights: by name, on `device`, in the type that it runs in.
        inputs: of which only shapes and types count.
        device: that the passes compute on.
    """
    with torch.device("meta"):
        ghost = make().to(next(iter(weights.values())).dtype).eval()
    empty = {name: value.to("meta") for name, value in inputs.items()}
    program = capture(ghost, empty, roles=all_change(inputs))
    for part in program.parts:
        move(part.graph, device)
    program = replace(program, weights={name: weights[name] for name in program.weights})
    with device:
        return run_passes(program, (Canonicalize(), *passes), None)


def floats_kept(module: nn.Module, passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """The passes with the convolutions left in float: their int8 kernel takes calibrated ranges."""
    names = [n for n, each in module.named_modules() if isinstance(each, nn.Conv2d)]
    kept = tuple((name, "float") for name in names)
    return tuple(replace(p, layers=kept) if isinstance(p, Quantize) and kept else p for p in passes)


def opened(program: Program, folder: Path, target: str | None) -> tuple[Call, int]:
    """A loaded session as a function of the inputs, and the bytes of its weights."""
    triton.build(program, folder, target=target)
    session: Any = triton.load_session(program.spec(), folder)
    return session, (folder / "weights.safetensors").stat().st_size


def by_jit(program: Program, device: torch.device) -> tuple[Call, int]:
    """The lowered program with kernels that Triton compiles at the first call."""
    lowered = lower(program).program
    weights = {name: tensor.to(device) for name, tensor in lowered.weights.items()}
    (part,) = lowered.parts
    run = PartRun(part.graph, weights, device, run_jit, graphs=device.type == "cuda")
    size = sum(each.numel() * each.element_size() for each in weights.values())
    return lambda **inputs: run(inputs), size


def inductor(program: Program, device: torch.device) -> nn.Module:
    """The lowered program as a module, for torch.compile."""
    lowered = lower(program).program
    (part,) = lowered.parts
    graph, _ = clone(part.graph)
    move(graph, device)
    root = {name: lowered.weights[name].to(device) for name in lowered.weights}
    return fx.GraphModule(root, graph)


# ---- rows ----------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """One way to run a network.

    Args:
        call: runs a step.
        bytes: of its weights.
        build_s: seconds until the first call was done.
        told: remarks.
        replays: whether `call` replays a CUDA graph.
    """

    call: Call
    bytes: int
    build_s: float = 0.0
    told: list[str] = field(default_factory=list)
    replays: bool = False


class Subject:
    """A network on the GPU, and the ways to run it."""

    def __init__(self, network: Network, bench: Bench, dtype: Any = torch.bfloat16) -> None:
        self.network, self.bench = network, bench
        self.device = device = bench.device
        torch.manual_seed(0)
        with device:
            self.module = randomized(network.make()).to(dtype)
        if network.convolutions:
            self.module = self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.inputs = network.inputs()
        self.here = {name: value.to(device) for name, value in self.inputs.items()}
        self.weights = {name: each.detach().contiguous()
                        for name, each in self.module.state_dict().items()}  # fmt: skip
        with torch.no_grad():
            self.expected = first(self.module(**self.here))

    @property
    def bytes(self) -> int:
        """Of the weights in bfloat16."""
        return sum(each.numel() * each.element_size() for each in self.weights.values())

    def eager(self) -> Candidate:
        """The module as it is."""
        return Candidate(lambda: self.module(**self.here), self.bytes)

    def compiled(
        self, module: nn.Module | None = None, size: int = 0, autotune: bool = True
    ) -> Candidate:
        """torch.compile with max-autotune, or without it where that takes too long.

        Raises:
            OutOfTime: it takes too long without it, too.
        """
        chosen, told = module or self.module, "without max-autotune"
        if autotune and self.network.autotune:
            try:
                with bounded(self.limit):
                    call = self._compiled(chosen, mode="max-autotune-no-cudagraphs")
                return Candidate(call, size or self.bytes, told=["max-autotune"])
            except OutOfTime as error:
                torch._dynamo.reset()
                told = f"without max-autotune, which took {error}"
        with bounded(self.limit):
            call = self._compiled(chosen)
        return Candidate(call, size or self.bytes, told=[told])

    @property
    def limit(self) -> float:
        """Seconds that a compilation may take."""
        return max(LEAST_COMPILE, min(MOST_COMPILE, self.bench.left / 3))

    def _compiled(self, module: nn.Module, **options: Any) -> Call:
        compiled = torch.compile(module, fullgraph=True, **options)
        with torch.no_grad():
            compiled(**self.here)
        return lambda: compiled(**self.here)

    def torchao(self) -> Candidate:
        """torchao's fp8 layers under torch.compile.

        Raises:
            ImportError: torchao is not installed.
        """
        with self.device:
            other = self.network.make().to(torch.bfloat16).eval()
        other.load_state_dict(self.module.state_dict())
        quantize_by_torchao(other, "torchao fp8")
        return self.compiled(other, self.bytes // 2)

    def program(self, passes: Sequence[Pass]) -> Program:
        """The network after the passes, which compute on the GPU, or else on the CPU.

        Raises:
            OutOfTime: they take too long there.
        """
        chosen, make = floats_kept(self.module, passes), self.network.make
        try:
            with bounded(self.limit):
                return program_of(make, self.weights, self.inputs, chosen, self.device)
        except Exception as error:  # passes are made for the CPU, where they take longer
            self.bench.notes.append(f"{self.network.name}: passes ran on the CPU: {reason(error)}")
        weights = {name: each.cpu() for name, each in self.weights.items()}
        with bounded(self.limit):
            return program_of(make, weights, self.inputs, chosen)

    def effuse(self, program: Program, folder: Path) -> Candidate:
        """effuse's own plan, from cubins; from Triton's JIT where they do not run, told so."""
        told = []
        try:
            run, size = opened(program, folder, present())
            run(**self.here)
        except Exception as error:  # the kernels are worth timing all the same
            told.append(f"kernels by Triton's JIT, since cubins failed: {reason(error)}")
            run, size = by_jit(program, self.device)
        return Candidate(lambda: run(**self.here), size, told=told, replays=True)

    def inductor(self, program: Program) -> Candidate:
        """torch.compile around effuse's operations."""
        module = inductor(program, self.device)
        size = sum(each.numel() * each.element_size() for each in module.buffers())
        return self.compiled(module, size, autotune=False)


def first(result: Any) -> Tensor:
    """The first tensor of a result."""
    return result[0] if isinstance(result, (tuple, list)) else result


def ends(bench: Bench, chosen: Sequence[Network], formats: Any = FORMATS) -> list[Figures]:
    """Every network by all candidates, as rows."""
    rows: list[Figures] = []
    for network in bench.within(chosen, "blocks"):
        rows += network_rows(bench, Subject(network, bench), formats)
        torch._dynamo.reset()
        _emptied(bench.device)
    return rows


def network_rows(bench: Bench, subject: Subject, formats: Mapping[str, Any]) -> list[Figures]:
    """One network: candidates are made and looked at one by one, then timed in turns."""
    ready: dict[str, Candidate] = {}
    rows: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="effuse-") as name, torch.no_grad():
        for label, make in makers(subject, formats, Path(name)):
            if bench.left < 0:
                rows[label] = {"error": "no time was left"}
                continue
            try:
                ready[label], rows[label] = prepared(bench, subject, make)
            except (Exception, OutOfTime) as error:  # the others are worth having
                rows[label] = {"error": reason(error)}
        found = bench.measure({n: partial(_call, each) for n, each in ready.items()})
    told = {"network": subject.network.name, "summary": subject.network.summary}
    for label, each in found.items():
        rows[label] |= each | versus(each, found)
    return [{"name": f"{subject.network.name}: {label}", "by": label, **told, **row}
            for label, row in rows.items()]  # fmt: skip


def _call(candidate: Candidate) -> Call:
    return candidate.call


def makers(subject: Subject, formats: Mapping[str, Any], folder: Path) -> Any:
    """Candidates by label, in the order in which they are made."""
    yield EAGER, subject.eager
    yield COMPILED, subject.compiled
    for number, (name, passes) in enumerate(formats.items()):
        if subject.network.convolutions and name == RANKED:
            continue
        place = folder / str(number)
        place.mkdir()
        program: list[Program] = []

        def made(passes: Any = passes, program: Any = program) -> Program:
            if not program:
                program.append(subject.program(passes))
            return program[0]

        yield f"effuse {name}", lambda m=made, p=place: subject.effuse(m(), p)
        if number == 0:
            yield f"effuse {name}, Inductor", lambda m=made: subject.inductor(m())
    yield "torchao fp8", subject.torchao


def prepared(
    bench: Bench, subject: Subject, make: Callable[[], Candidate]
) -> tuple[Candidate, Figures]:
    """A candidate, captured as a graph if it is not one, and what is known before it is timed."""
    before, start = _allocated(bench.device), time.perf_counter()
    candidate = make()
    candidate.call()
    candidate.build_s = time.perf_counter() - start
    if bench.device.type == "cuda" and not candidate.replays:
        candidate.call = captured(candidate.call)
    shared = candidate.bytes == subject.bytes  # weights that lie there already
    _reset_peak(bench.device)
    result = candidate.call()
    grown = _peak(bench.device) - before
    db = sqnr_db(_floats(subject.expected), _floats(first(result)))
    return candidate, {
        "build_s": round(candidate.build_s, 1),
        "weight_bytes": candidate.bytes,
        "peak_bytes": max(0, grown) + (candidate.bytes if shared else 0),
        "sqnr_db": round(db, 1),
        "remark": "; ".join(candidate.told),
    }


def _floats(tensor: Tensor) -> Any:
    return tensor.detach().float().cpu().numpy()


def versus(own: Figures, all_: Mapping[str, Figures]) -> Figures:
    """How many times as fast as eager and as torch.compile."""
    found = {}
    for key, base in (("over_eager", EAGER), ("over_compile", COMPILED)):
        if base in all_ and (over := ratio(all_[base], own)) is not None:
            found[key] = over
    return found


def _allocated(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated()) if device.type == "cuda" else 0


def _peak(device: torch.device) -> int:
    return int(torch.cuda.max_memory_allocated()) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _emptied(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
