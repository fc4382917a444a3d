"""Calibration: one pass over the user's sampling, statistics kept and activations thrown away."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import fx

from effuse.draw import Bottleneck, Counts, normal_counts, uniform_counts
from effuse.errors import CalibrationError
from effuse.plan import STEP_INPUT, Plan, Rate, Role
from effuse.program import Part, Program
from effuse.statistics import RANGES_ONLY, Calibration, Needs, Probes, Statistics
from effuse.step_groups import group_of
from effuse.watch import Watch

aten = torch.ops.aten

LAYERS = {  # the layers, and the axis of their channels, from the end
    aten.linear.default: -1, aten.conv2d.default: -3, aten.conv3d.default: -4,
    aten.conv_transpose1d.default: -2, aten.conv_transpose2d.input: -3,
    aten.conv_transpose3d.input: -4,
}  # fmt: skip
PROBES = 4  # whole input sets kept for measuring layers, spread over the run

Feed = Callable[[Any], None] | Iterable[Mapping[str, Any]] | None
Progress = Callable[[str, int, int], None]


class Recorder(Watch):
    """Keeps statistics of the values that `wanted` picks, and probes of every part.

    With `counts` it takes so many calls at each step of the schedule and no others; what runs once
    a picture is always taken.
    """

    def __init__(
        self,
        program: Program,
        wanted: Callable[[Part, fx.Node], bool],
        groups: int,
        needs: Needs = RANGES_ONLY,
        counts: Counts | None = None,
    ):
        self.statistics = Statistics(groups, needs=needs)
        self.calls = 0
        self.probes = {part.name: Probes(PROBES) for part in program.parts}
        self._axes = {
            (part.name, node.name): channel_axis(node)
            for part in program.parts
            for node in part.graph.nodes
            if wanted(part, node)
        }
        self._times = program.timesteps
        self._counts = counts
        self._taken: Counter[int] = Counter()

    def begin(self, values: Mapping[str, torch.Tensor], index: int | None) -> None:
        """Count the call, find its group of timesteps, and whether the draw takes it."""
        self._group = self._group_of(index)
        self._step = torch.tensor([index or 0])
        self._takes = self._counts is None or (
            index is not None and self._taken[index] < self._counts[index]
        )
        self.calls += 1
        if self._takes:
            self.statistics.calls += 1
            self._taken[-1 if index is None else index] += 1

    def enter(self, part: Part, values: Mapping[str, torch.Tensor]) -> None:
        """Keep the part's inputs now and then, and the step, which a pass may look things up by."""
        if self._takes or part.rate < Rate.STEP:
            given = {name: values[name] for name in part.inputs}
            self.probes[part.name].add({STEP_INPUT: self._step, **given})

    def observe(self, part: Part, node: fx.Node, value: Any) -> None:
        """Take the value into the statistics."""
        key = (part.name, node.name)
        if key not in self._axes or not torch.is_tensor(value):
            return
        if not self._takes and part.rate is Rate.STEP:
            return
        try:
            self.statistics.add(key, self._group, value, self._axes[key])
        except ValueError:
            raise CalibrationError(
                f"calibration: {node.name} became NaN or infinite at call {self.calls}; check the "
                "weights, the scheduler and the prompts that calibration runs with"
            ) from None

    def _group_of(self, index: int | None) -> int:
        if index is None or not self._times:
            return self.calls % self.statistics.groups
        return group_of(index, len(self._times), self.statistics.groups)

    def finish(self) -> Calibration:
        """The calibration.

        Raises:
            CalibrationError: the draw took none of the calls.
        """
        if self.calls and not self.statistics.calls:
            raise CalibrationError(
                f"calibration recorded nothing: none of its {self.calls} calls was at a step that "
                "the draw takes; hand compile a run that samples over the whole schedule, or set "
                "calibration_steps='all'"
            )
        probes = {name: each.chosen() for name, each in self.probes.items()}
        return Calibration(self.statistics, probes, self.calls)


def channel_axis(node: fx.Node) -> int:
    """Where the channels of an activation are: as beside it, -3 in images, else -1."""
    beside = [LAYERS[each.target] for each in (node, *node.users) if each.target in LAYERS]
    if beside:
        return beside[0]
    value = node.meta.get("val")
    return -3 if isinstance(value, torch.Tensor) and value.dim() == 4 else -1


def needs_of(passes: Iterable[Any]) -> Needs:
    """What any of the passes asks calibration to keep."""
    return reduce(or_, (each.needs for each in passes), RANGES_ONLY)


def calibrate(
    program: Program,
    feed: Feed,
    wanted: Callable[[Part, fx.Node], bool],
    *,
    groups: int = 10,
    needs: Needs = RANGES_ONLY,
    counts: Counts | None = None,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Calibration:
    """Run `feed` through the program in `reference`, as its plan says; return what was seen.

    `counts` says how many calls are recorded at each step of the schedule (None: all calls).

    Raises:
        CalibrationError: nothing was run or recorded, or a value was not finite.
    """
    recorder = Recorder(program, wanted, groups, needs, counts)
    drive(program, feed, recorder, seed=seed, progress=progress)
    return recorder.finish()


def draw_calls(
    program: Program,
    feed: Feed,
    draw: str,
    calls: int | None = None,
    *,
    seed: int = 0,
    progress: Progress = lambda what, done, total: None,
) -> Counts | None:
    """How many calls to record at each step of the schedule; None: all of them.

    `calls` in all; None: as many as the schedule has steps. `density` samples once for it, every
    step by the full variant, so `feed` has to be one that can run again.

    Raises:
        CalibrationError: there is no schedule to draw from, or `density` saw no step of it or
            cannot run `feed` again.
    """
    if draw == "all":
        return None
    steps = len(program.timesteps or ())
    if not steps:
        raise CalibrationError(
            f"calibration_steps: {draw!r} draws steps of the schedule, and none was given; hand "
            "compile(schedule=…) a scheduler or its timesteps, or set calibration_steps='all'"
        )
    calls = steps if calls is None else calls
    if draw == "uniform":
        return uniform_counts(steps, calls)
    if draw == "normal":
        return normal_counts(steps, calls, seed)
    if isinstance(feed, Iterator):
        raise CalibrationError(
            "calibration_steps: 'density' samples twice, and the calibration is an iterator that "
            "runs once; hand compile a list of inputs, or a run(model)"
        )
    full = replace(program, plan=Plan(program.plan.default))
    watch = Bottleneck(program.part(program.plan.default), program, seed)
    drive(full, feed, watch, seed=seed, progress=progress)
    return watch.counts(steps, calls)


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
