"""`effuse.distill`: train a program, or a compiled network, to give what its teacher gives.

The module is not called `distill`, as a function of that name would hide it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from effuse import artifact
from effuse.api import Compiled
from effuse.calibrate import nested
from effuse.capture import capture
from effuse.distill_course import Entry, Quality, Trained, course, notes
from effuse.distill_network import Network
from effuse.distill_source import Data, pair_of, schedule_times, source_of
from effuse.distill_train import Progress, Recipe, retrained, train
from effuse.errors import ConfigError, InputError
from effuse.graph import record
from effuse.plan import Input, Role, to_json
from effuse.program import Part, Program, Record, run_parts
from effuse.progress import phases
from effuse.serial import graph_from_json
from effuse.verify import compare

Teacher = nn.Module | Program | Compiled


@dataclass(frozen=True)
class Distilled:
    """What `distill` gives: the student with trained weights, and how it came about.

    `before` and `after` are loss and SQNR (dB, of the outputs against the teacher's) on calls that
    are kept aside; `history` holds one entry an update; `warning` says why the training stopped
    early or was for nothing, and is empty otherwise. `features` are what was matched, beside the
    outputs.
    """

    student: Program | Compiled
    history: tuple[Entry, ...]
    before: Quality
    after: Quality
    features: tuple[str, ...]
    warning: str


def distill(
    student: Program | Compiled,
    teacher: Teacher,
    data: Data = None,
    *,
    steps: int = 500,
    rate: float = 1e-4,
    batch: int = 1,
    ema: float = 0.999,
    weights: Mapping[str, float] | None = None,
    seed: int = 0,
    resume: str | Path | None = None,
    device: str | torch.device | None = None,
    schedule: Any = None,
    progress: bool = True,
) -> Distilled:
    """Train `student` to give what `teacher` gives, as after pruning.

    The loss is that of the task, where the data have targets, plus the outputs' squared difference,
    plus the relative squared differences of what self-attentions give in both (METHODS 3.1, 3.4).

    Args:
        student: a Program, or what effuse.compile made for the back end "reference".
        teacher: the network that the student was made from: a module in eval mode, a Program, or
            a compiled network for "reference".
        data: an iterable of input mappings, or of pairs (input mapping, target of the first
            output); run(model), which samples with the model it is handed (the teacher); None: the
            teacher's own trajectories from noise over the schedule, with its example prompts.
            What is given or recorded is held in memory.
        steps: updates.
        rate: AdamW's, at its highest; it warms up, then falls as a cosine.
        batch: calls of the network in an update; a call is as large as the network was captured.
        ema: decay of the weights' moving average, which is given back.
        weights: of the loss's parts `task` (100), `output` (100), `features` (1).
        seed: of noise and order.
        resume: a folder for the state; a training that was killed goes on there, to the bit.
        device: where to train; None: where the weights are.
        schedule: a diffusers scheduler, or timesteps, for the trajectories; None: the student's.
        progress: whether to show a bar when standard error is a terminal.

    Returns:
        the student of the same kind with trained weights, and the history.

    Raises:
        ConfigError: an option is out of range, or the student cannot be trained.
        InputError: the teacher takes or gives something else than the student, or data do not fit.
        CalibrationError: there are no data, or the first loss is not finite.
    """
    recipe = Recipe(steps, rate, batch, ema, dict(weights or {}), seed=seed)
    data = data if callable(data) or data is None else list(data)
    mine = as_program(student, "student")
    theirs = teacher_program(teacher, mine, data)
    check_inputs(mine, theirs)
    place = device_of(device)
    taught = Network(theirs, place)
    source = source_of(data, taught, schedule_times(mine, theirs, schedule), schedule, seed)
    example = source.probes()[0].values
    networks = (Network(typed(mine, example), place), Network(typed(theirs, example), place))
    with shown(progress) as show:
        found = train(*networks, source, recipe, str(resume or ""), show)
    return Distilled(
        with_weights(student, mine, found, recipe), found.history, found.before, found.after,
        found.matched.names, found.warning,
    )  # fmt: skip


def device_of(device: str | torch.device | None) -> torch.device | None:
    """The device of that name.

    Raises:
        ConfigError: it is not here.
    """
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(
            f"device: expected 'cpu' or a device that is here, came {str(device)!r} ({reason})"
        ) from error


@contextmanager
def shown(progress: bool) -> Iterator[Progress]:
    """A bar with the loss and the time that is left."""
    with phases(progress) as show:
        bars = show.bars
        task = None if bars is None else bars.add_task("distill", total=None)

        def tell(done: int, total: int, loss: float) -> None:
            if bars is not None and task is not None:
                bars.update(task, description=f"loss {loss:.3g}", completed=done, total=total)

        yield tell


# ---- programs ------------------------------------------------------------------------------------


def as_program(network: Any, name: str) -> Program:
    """The program of a student or teacher.

    Raises:
        ConfigError: it is neither a Program nor compiled for reference.
    """
    if isinstance(network, Program):
        return network
    if not isinstance(network, Compiled):
        raise ConfigError(
            f"{name}: expected a Program, or a network that effuse.compile made, came "
            f"{type(network).__name__}; compile it with backend='reference' first"
        )
    if (backend := network.manifest["backend"]) != "reference":
        raise ConfigError(
            f"{name}: expected one compiled for 'reference', came one for {backend!r}, whose "
            "weights cannot be trained; compile with backend='reference', distill, and compile "
            "again, or put the pass Distill behind Prune"
        )
    return opened(network)


def opened(compiled: Compiled) -> Program:
    """The program in the artifact of a network compiled for reference."""
    spec = compiled.session.spec
    graphs = json.loads((compiled.folder / "graphs.json").read_text(encoding="utf-8"))
    parts = tuple(
        Part(part.name, part.depends, graph_from_json(graphs[part.name]), part.outputs)
        for part in spec.parts
    )
    return Program(
        spec.inputs, spec.parameters, spec.constants, spec.result, spec.outputs, parts,
        load_file(compiled.folder / "weights.safetensors"), spec.plan, spec.timesteps,
        spec.bounds, spec.steps, model=compiled.manifest["model"], adapters=spec.adapters,
        max_rank=spec.max_rank,
    )  # fmt: skip


def teacher_program(teacher: Teacher, student: Program, data: Data) -> Program:
    """The teacher's program; a module is captured with the student's examples, or given inputs.

    Raises:
        InputError: it does not take them.
    """
    if not isinstance(teacher, nn.Module):
        return as_program(teacher, "teacher")
    inputs = example_inputs(student, data)
    roles = {item.label: item.role for item in student.inputs}
    return capture(teacher, inputs, roles=roles)


def example_inputs(student: Program, data: Data) -> dict[str, Any]:
    """Arguments to capture a teacher with: the student's, the first of the data, or of its sizes.

    Raises:
        InputError: an input's value is part of the student, and not known.
    """
    if known := student.examples:
        return nested({i.path: known[i.name] for i in student.inputs}) | dict(student.constants)
    if data and not callable(data):
        return dict(pair_of(next(iter(data)))[0])
    return nested({i.path: sized(i) for i in student.inputs}) | dict(student.constants)


def sized(item: Input) -> Tensor:
    """Numbers as many as an input takes, 2 where a size is left open.

    Raises:
        InputError: it is static.
    """
    if item.role is Role.STATIC:
        raise InputError(
            f"teacher: {item.label} is static, and an artifact does not hold its value; hand the "
            "teacher as a Program, from effuse.capture"
        )
    sizes = [size if isinstance(size, int) else 2 for size in item.shape]
    dtype: torch.dtype = getattr(torch, item.dtype)
    return torch.rand(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


def check_inputs(student: Program, teacher: Program) -> None:
    """Refuse a teacher that takes other inputs.

    Raises:
        InputError: with both.
    """
    mine, theirs = ({each.label: each for each in program.inputs} for program in (student, teacher))
    fits = mine.keys() == theirs.keys() and all(_fits(mine[n], theirs[n]) for n in mine)
    if not fits:
        told = [", ".join(f"{label} {_type(each)}" for label, each in found.items())
                for found in (mine, theirs)]  # fmt: skip
        raise InputError(
            f"teacher: takes {told[1]}, the student {told[0]}; hand the network that the student "
            "was made from, with inputs of the same shapes"
        )


def _fits(one: Input, other: Input) -> bool:
    """Whether there are values for both; a size that is left open is none that differs."""
    sizes = zip(one.shape, other.shape, strict=False)
    same = all(a == b for a, b in sizes if isinstance(a, int) and isinstance(b, int))
    return one.dtype == other.dtype and len(one.shape) == len(other.shape) and same


def _type(item: Input) -> str:
    sizes = ", ".join(str(size) for size in item.shape)
    return f"{item.dtype}[{sizes}]"


def typed(program: Program, values: Mapping[str, Tensor]) -> Program:
    """The program with recorded values, which a graph from a file has not; for calls like this."""
    part = program.part(program.plan.default)
    if all("val" in node.meta for node in part.graph.nodes if node.op != "output"):
        return program
    with torch.no_grad():
        env = run_parts(program, values)
    record(part.graph, program.weights, {name: env[name] for name in part.inputs})
    return program


# ---- the result ----------------------------------------------------------------------------------


def with_weights(
    student: Program | Compiled, program: Program, found: Trained, recipe: Recipe
) -> Program | Compiled:
    """The student with trained weights and a record of the training."""
    changed = retrained(program, found)
    told = training_record(changed, found, recipe)
    if isinstance(student, Program):
        return replace(changed, records=(*changed.records, told))
    return rebuilt(student, changed.weights, told, found)


def training_record(program: Program, found: Trained, recipe: Recipe) -> Record:
    """The training as the report tells it."""
    error, ratio = compare(program) or (None, None)
    return Record(
        name="distill",
        options=to_json({name: each for name, each in asdict(recipe).items()}),
        exact=False,
        rewrites={"train": len(found.weights)},
        reasons={},
        notes=tuple(notes(found)),
        error=None if error is None else float(f"{error:.3g}"),
        sqnr_db=None if ratio is None else round(ratio, 2),
        data=course(found),
    )


def rebuilt(
    compiled: Compiled, weights: Mapping[str, Tensor], told: Record, found: Trained
) -> Compiled:
    """The artifact with other weights, in a temporary folder."""
    holder = tempfile.TemporaryDirectory(prefix="effuse-")
    folder = Path(holder.name)
    for path in compiled.folder.iterdir():
        shutil.copyfile(path, folder / path.name)
    save_file(dict(weights), folder / "weights.safetensors")
    manifest = {
        **compiled.manifest,
        "passes": [*compiled.manifest["passes"], told.to_json()],
        "distilled": {"history": [asdict(each) for each in found.history]},
    }
    complete = artifact.finish(folder, manifest)
    return Compiled(None, complete, folder, compiled.seconds, holder)
