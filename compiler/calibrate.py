"""Calibration: one pass over the user's sampling, statistics kept and activations thrown away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from effuse.errors import CalibrationError
from effuse.plan import Rate, Role
from effuse.program import Part, Program
from effuse.statistics import Calibration, Probes, Statistics
from effuse.watch import Watch

LAYERS = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
PROBES = 4  # whole input sets kept for measuring layers, spread over the run

Feed = Callable[[Any], None] | Iterable[Mapping[str, Any]] | None
Progress = Callable[[str, int, int], None]


class Recorder(Watch):
    """Keeps ranges of the values that `wanted` picks, and probes of every part."""

    def __init__(self, program: Program, wanted: Callable[[Part, fx.Node], bool], groups: int):
        self.statistics = Statistics(groups)
        self.calls = 0
        self.probes = {part.name: Probes(PROBES) for part in program.parts}
        self._names = {
            (part.name, node.name)
            for part in program.parts
            for node in part.graph.nodes
            if wanted(part, node)
        }
        self._times = program.timesteps

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """Count the call, and find its group of timesteps."""
        self._group = self._group_of(index)
        self.calls += 1

    def enter(self, part: Part, values: Mapping[str, torch.Tensor]) -> None:
        """Keep the part's inputs now and then."""
        self.probes[part.name].add({name: values[name] for name in part.inputs})

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Widen the value's range."""
        if (part.name, node.name) not in self._names or not torch.is_tensor(value):
            return
        try:
            self.statistics.add((part.name, node.name), self._group, value)
        except ValueError:
            raise CalibrationError(
                f"calibration: {node.name} became NaN or infinite at call {self.calls}; check the "
                "weights, the scheduler and the prompts that calibration runs with"
            ) from None

    def _group_of(self, index: int | None) -> int:
        if index is None or not self._times:
            return self.calls % self.statistics.groups
        return index * self.statistics.groups // len(self._times)

    def finish(self) -> Calibration:
        """The calibration."""
        probes = {name: each.chosen() for name, each in self.probes.items()}
        return Calibration(self.statistics, probes, self.calls)


def calibrate(
    program: Program,
    feed: Feed,
    wanted: Callable[[Part, fx.Node], bool],
    *,
    groups: int = 10,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Run `feed` through the program in `reference`, as its plan says; return what was seen.

    Raises:
        CalibrationError: nothing was run, or a value was not finite.
    """
    recorder = Recorder(program, wanted, groups)
    drive(program, feed, recorder, seed=seed, progress=progress)
    return recorder.finish()


def drive(
    program: Program,
    feed: Feed,
    watch: Watch,
    *,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> None:
    """Run `feed` through the program in `reference`, as its plan says, under the eyes of `watch`.

    `feed` is run(model), or an iterable of input mappings, or None: then trajectories are sampled
    from noise over the schedule, with the example inputs as prompts.

    Raises:
        CalibrationError: nothing was run.
    """
    from effuse.backends.reference import session  # the oracle runs the calibration

    calls = 0

    def begin(values: Mapping[str, torch.Tensor], index: int | None) -> None:
        nonlocal calls
        calls += 1
        watch.begin(values, index)
        progress("calibrate", calls, max(len(program.timesteps or ()), calls))

    model = session(program, observe=watch.observe, begin=begin, enter=watch.enter)
    if callable(feed):
        feed(model)
    else:
        for inputs in trajectory(program, seed) if feed is None else feed:
            model(**inputs)
    if not calls:
        raise CalibrationError(
            "calibration yielded nothing: the network was not called once; hand a run(model) "
            "that samples with the model it is given, or a non-empty iterable of inputs"
        )


def trajectory(program: Program, seed: int) -> Iterable[Mapping[str, Any]]:
    """Inputs along the schedule: noise shrinking linearly towards the example latent.

    It stands in where no sampler is at hand; a real run(model) gives better ranges.
    """
    generator = torch.Generator().manual_seed(seed)
    noises = {
        item.name: torch.randn(program.examples[item.name].shape, generator=generator)
        for item in program.inputs
        if item.role is Role.LATENT and program.examples[item.name].is_floating_point()
    }
    times = program.timesteps or (None,) * 10
    for index, time in enumerate(times):
        share = 1 - index / len(times)
        flat = {}
        for item in program.inputs:
            value = program.examples[item.name]
            if item.name in noises:
                mixed = share * noises[item.name] + (1 - share) * value.float()
                value = mixed.to(value.dtype)
            elif item.role is Role.TIMESTEP and time is not None:
                value = torch.full_like(value, time)
            flat[item.path] = value
        yield nested(flat)


def nested(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Values by path -> arguments of a call, with mappings for the nested ones."""
    result: dict[str, Any] = {}
    for path, value in flat.items():
        place = result
        for key in path[:-1]:
            place = place.setdefault(key, {})
        place[path[-1]] = value
    return result


def step_values(part: Part, node: fx.Node) -> bool:
    """Every floating value of the step program."""
    value = node.meta.get("val")
    return (
        part.rate is Rate.STEP
        and isinstance(value, torch.Tensor)
        and value.is_floating_point()
        and node.op in ("call_function", "placeholder")
    )


def layer_values(part: Part, node: fx.Node) -> bool:
    """Every floating value of the step program that a layer reads or gives."""
    near = (node, *node.users)
    return step_values(part, node) and any(each.target in LAYERS for each in near)
