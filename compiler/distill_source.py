"""The calls that a training is given: a pool of the user's, or trajectories of the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from effuse.arguments import bind, check_shapes, check_static, spread_timesteps
from effuse.build import timesteps_of
from effuse.calibrate import drive
from effuse.distill_data import Call, Listener, Pool, Source, Trajectories, sampler
from effuse.distill_network import Network
from effuse.errors import InputError
from effuse.plan import Role
from effuse.program import Program

Data = Callable[[Any], None] | Iterable[Any] | None

STEPS = 20  # of a trajectory, where the network was captured without a schedule


def source_of(
    data: Data, teacher: Network, times: Sequence[float], schedule: Any, seed: int
) -> Source:
    """The calls to train on.

    Raises:
        CalibrationError: there are none.
        InputError: one does not fit the network, or there are no examples to sample with.
    """
    program = teacher.program
    if callable(data):
        listener = Listener()
        drive(program, data, listener, seed=seed)
        return Pool(listener.calls, seed)
    if data is not None:
        return Pool([call_of(program, each) for each in data], seed)
    if not program.examples:
        raise InputError(
            "data: trajectories are sampled with the teacher's example inputs, and an artifact "
            "holds none; hand the teacher as a module or a Program, or data=…"
        )
    return Trajectories(teacher, times, sampler(schedule, times), seed)


def schedule_times(student: Program, teacher: Program, schedule: Any) -> Sequence[float]:
    """The timesteps to sample over: the schedule's, the programs', or evenly spaced ones."""
    given = timesteps_of(schedule)
    if given is not None:
        return [float(time) for time in given]
    if known := student.timesteps or teacher.timesteps:
        return known
    inputs = [each for each in teacher.inputs if each.role is Role.TIMESTEP]
    examples = [teacher.examples[each.name] for each in inputs if each.name in teacher.examples]
    flow = bool(examples) and examples[0].is_floating_point() and bool((examples[0] <= 1).all())
    even = torch.linspace(1, 1 / STEPS, STEPS) if flow else torch.linspace(999, 0, STEPS).round()
    return [float(time) for time in even]


def call_of(program: Program, given: Any) -> Call:
    """Inputs as a person gives them, with or without a target, as the program takes them.

    Raises:
        InputError: they do not fit.
    """
    from effuse.backends.reference import TorchArrays

    inputs, target = pair_of(given)
    spec, arrays = program.spec(), TorchArrays()
    found = bind(spec, (), dict(inputs))
    values = {item.name: arrays.take(found[item.name], item) for item in spec.inputs}
    values |= spread_timesteps(spec, values)
    check_shapes(spec, values)
    check_static(spec, values)
    return Call(values, None if target is None else torch.as_tensor(target))


def pair_of(given: Any) -> tuple[Mapping[str, Any], Any]:
    """Inputs and target of one item of the data."""
    inputs, target = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if not isinstance(inputs, Mapping):
        raise InputError(
            f"data: expected input mappings, or pairs (input mapping, target), came "
            f"{type(given).__name__}"
        )
    return inputs, target
