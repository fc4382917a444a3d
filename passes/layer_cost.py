"""How long a layer takes in a format: measured on this machine, or predicted from a cost model.

Measured: the layer alone as Quantize writes it, with its quantizing and dequantizing, lowered by
the ONNX back end and run in turns with the layer's other formats; the median of several runs.
Predicted: operations over throughput plus bytes over bandwidth.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import fx

from effuse.arrays import NumpyArrays
from effuse.cost import node_flops
from effuse.errors import BackendError, require
from effuse.graph import inputs, outputs, set_outputs, value_of
from effuse.kernels.formats import parse
from effuse.ort import CONFIG
from effuse.passes.lone_layer import FLOAT, Lone
from effuse.program import Part, Program
from effuse.runtime import Session

Progress = Callable[[str, int, int], None]
Run = Callable[[], Any]

WARM_UP = 2  # runs before those that count
LEAST_RUNS, MOST_RUNS = 5, 40
SECONDS = 0.04  # spent on one layer in one format, between those numbers of runs
SWEEPS = 2  # over all layers; the better median counts, as something else may run meanwhile

# The cost model's machine, two cores with AVX512-VNNI: its ratios matter, not its milliseconds.
FLOAT_OPS = 2.2e8  # operations a millisecond in float32
INTEGER_OPS = 6.5e8  # with 8-bit products
BANDWIDTH = 2.0e7  # bytes a millisecond
CHANGED = 8.0e6  # values a millisecond that are quantized or dequantized


def measurable() -> str | None:
    """Why layers cannot be timed here, or None."""
    try:
        reason: str | None = back_end().available()
    except ImportError as error:
        return str(error)
    return reason


def back_end(name: str = "onnx") -> ModuleType:
    """A back end, found as a build finds it: a pass does not stand on back ends."""
    return importlib.import_module(f"effuse.backends.{name}")


def signature(lone: Lone) -> Hashable:
    """What the time of a lone layer depends on: its ops with their shapes, types and options."""
    return (lone.format, *(row(node) for node in lone.part.graph.nodes if node.op != "output"))


def row(node: fx.Node) -> Hashable:
    """What the time of a node depends on."""
    value = value_of(node)
    target = str(node.target) if node.op == "call_function" else node.op
    plain = fx.map_arg(node.args, lambda _: None)
    return target, str(plain), str(getattr(value, "dtype", "")), _shape(node)


def _shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value, open sizes as they were at capture."""
    sizes = getattr(value_of(node), "shape", ())
    return tuple(size if isinstance(size, int) else size.node.hint for size in sizes)


def measure(lones: Iterable[Lone], progress: Progress) -> dict[Hashable, float | str]:
    """By signature the milliseconds of each layer, or why it has no form in ONNX."""
    distinct = {signature(lone): lone for lone in lones}
    batches: defaultdict[Hashable, list[Hashable]] = defaultdict(list)
    for key, lone in distinct.items():
        batches[lone.format, *_kind(lone)].append(key)
    runs: dict[Hashable, Run] = {}
    failed: dict[Hashable, float | str] = {}
    for number, keys in enumerate(batches.values()):
        progress("build single layers", number, len(batches))
        try:
            runs |= dict(zip(keys, _lowered([distinct[key] for key in keys]), strict=True))
        except BackendError as error:
            failed |= dict.fromkeys(keys, str(error))
    progress("build single layers", len(batches), len(batches))
    return failed | _timed(distinct, runs, progress)


def _kind(lone: Lone) -> tuple[str, int]:
    """The op that gives the output, and the output's rank: what is lowered alike fails alike."""
    (result,) = outputs(lone.part.graph)
    return str(result.target), len(_shape(result))


def _timed(
    lones: Mapping[Hashable, Lone], runs: Mapping[Hashable, Run], progress: Progress
) -> dict[Hashable, float | str]:
    """Milliseconds by signature; formats of one layer run in turns, as a machine's pace changes."""
    rivals: defaultdict[Hashable, list[Hashable]] = defaultdict(list)
    for key in runs:
        graph = lones[key].part.graph
        rivals[tuple(map(_shape, (*inputs(graph), *outputs(graph))))].append(key)
    found: dict[Hashable, float] = {}
    for number, keys in enumerate(SWEEPS * list(rivals.values())):
        progress("time single layers", number, SWEEPS * len(rivals))
        for key, time_taken in zip(keys, in_turns([runs[key] for key in keys]), strict=True):
            found[key] = min(time_taken, found.get(key, time_taken))
    progress("time single layers", SWEEPS * len(rivals), SWEEPS * len(rivals))
    return dict(found)


def in_turns(runs: Sequence[Run], seconds: float = SECONDS) -> list[float]:
    """The median milliseconds of each, all run in turns for about `seconds` each."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(WARM_UP):
        for run in runs:
            run()
    end = time.perf_counter() + seconds * len(runs)
    while len(taken[0]) < LEAST_RUNS or (len(taken[0]) < MOST_RUNS and time.perf_counter() < end):
        for run, times in zip(runs, taken, strict=True):
            start = time.perf_counter()
            run()
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in taken]


def _lowered(lones: Sequence[Lone]) -> list[Run]:
    """The layers as runs: exported side by side, because exporting takes long, and then split."""
    part, weights = _side_by_side(lones)
    onnx = require("onnx")
    model = require("onnx_ir").to_proto(back_end().export_part(part, weights))
    split = onnx.utils.Extractor(model)
    runs = []
    for number, lone in enumerate(lones):
        given = [f"l{number}_{name}" for name in lone.part.inputs]
        runs.append(_session(split.extract_model(given, [f"y{number}"]), lone))
    return runs


def _side_by_side(lones: Sequence[Lone]) -> tuple[Part, dict[str, torch.Tensor]]:
    """One part of several layers that have nothing to do with each other."""
    graph, results = fx.Graph(), []
    weights: dict[str, torch.Tensor] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for number, lone in enumerate(lones):
        for node in inputs(lone.part.graph):
            copies[node] = graph.placeholder(f"l{number}_{node.target}")
            copies[node].meta = dict(node.meta)
    for number, lone in enumerate(lones):
        for node in lone.part.graph.nodes:
            if node.op in ("get_attr", "call_function"):
                copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "get_attr":
                copies[node].target = f"l{number}.{node.target}"
        results.append(copies[outputs(lone.part.graph)[0]])
        weights |= {f"l{number}.{name}": each for name, each in lone.weights.items()}
    set_outputs(graph, results)
    names = tuple(f"y{number}" for number in range(len(lones)))
    return Part("layers", lones[0].part.depends, graph, names), weights


def _session(model: Any, lone: Lone) -> Run:
    """A run of an ONNX model on noise of the layer's shapes, with an artifact's options."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    for key, value in CONFIG.items():
        options.add_session_config_entry(key, value)
    model = model.SerializeToString()
    session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    samples = [_sample(node) for node in inputs(lone.part.graph)]
    feed = {item.name: each for item, each in zip(session.get_inputs(), samples, strict=True)}
    return partial(session.run, None, feed)


def _sample(node: fx.Node) -> np.ndarray[Any, Any]:
    value = value_of(node)
    generator = torch.Generator().manual_seed(0)
    return as_numpy(torch.randn(_shape(node), generator=generator).to(value.dtype))


def as_numpy(value: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor for ONNX Runtime.

    Raises:
        BackendError: numpy has no such type.
    """
    if value.dtype is torch.bfloat16:
        raise BackendError("onnx: bfloat16 inputs cannot be handed over by numpy")
    return np.asarray(value)


def step_run(
    program: Program, part: Part, values: Mapping[str, torch.Tensor], folder: Path,
    backend: str = "onnx", target: str | None = None,
) -> Run:  # fmt: skip
    """A run of a whole part, built into `folder` by a back end for a target, on `values`.

    Raises:
        BackendError: the part, or one of the values, has no form there.
    """
    alone = replace(program, parts=(part,))
    folder.mkdir()
    found = back_end(backend)
    found.build(alone, folder, target=target)
    session = found.load_session(alone.spec(), folder)
    host = isinstance(session.arrays, NumpyArrays)
    given = {name: as_numpy(values[name]) if host else values[name] for name in part.inputs}
    return partial(_finished, session, part.name, given)


def _finished(session: Session, part: str, given: Mapping[str, Any]) -> None:
    """A run that has ended: a GPU's has not when its call returns."""
    session.run(part, given)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def predict(site: fx.Node, format: str, stored: int) -> float:
    """Milliseconds of a layer whose weights take `stored` bytes, by the cost model."""
    weight: Any = site.args[1]
    moved = prod(_shape(site)) + sum(prod(_shape(node)) for node in site.all_input_nodes[:1])
    integer, changed = False, 0
    if format != FLOAT:
        known = parse(format)
        convolves = site.target is not torch.ops.aten.linear.default
        integer = (known.conv_activation if convolves else known.activation) is not None
        changed = moved if integer else prod(_shape(weight))
    throughput = INTEGER_OPS if integer else FLOAT_OPS
    return node_flops(site) / throughput + (stored + 4 * moved) / BANDWIDTH + changed / CHANGED
