"""The Session: runs a compiled program as the network it replaces. Imports no torch.

A part is a pure function of named values, so the rule of execution is one sentence: a part runs
again only when one of its inputs has changed. Values of the schedule come from tables inside the
graphs (by step index) or from the schedule part; values of the prompt are kept while the prompt is
the same; the step program runs every time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from effuse.arguments import bind, check_shapes, check_static, spread_timesteps
from effuse.arrays import Arrays, NumpyArrays
from effuse.decision import decide
from effuse.errors import InputError
from effuse.guidance import Guidance
from effuse.plan import FORECAST_INPUT, STEP_INPUT, PartSpec, PlanStep, ProgramSpec, Rate, Role
from effuse.trajectory import Trajectories, read

Run = Callable[[Mapping[str, Any]], Sequence[Any]]

KEPT_RESULTS = 4  # per part: guidance as two calls alternates between two prompts


class Output(Mapping[str, Any]):
    """The outputs by name, by attribute and by position, as diffusers' ModelOutput gives them."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)

    def __getitem__(self, key: Any) -> Any:
        return self._values[key] if isinstance(key, str) else tuple(self._values.values())[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self._values:
            raise AttributeError(name)
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass
class _Memory:
    """The last few results of one part, each with copies of the inputs that gave it."""

    entries: OrderedDict[int, tuple[dict[str, Any], Sequence[Any]]] = field(
        default_factory=OrderedDict
    )
    runs: int = 0


class Session:
    """A compiled program, called like the network it replaces.

    Args:
        spec: what the program takes, gives and runs, and when.
        runs: for each part, the function that runs it.
        arrays: the back end's kind of array.
    """

    def __init__(
        self, spec: ProgramSpec, runs: Mapping[str, Run], arrays: Arrays | None = None
    ) -> None:
        self.spec = spec
        self._runs = runs
        self.arrays = arrays or NumpyArrays()
        self.trajectories = Trajectories(spec, self.arrays)
        self.guidance = Guidance(spec, self.arrays)
        self.steps: Counter[str] = Counter()  # how often each variant has run
        self._memory = {part.name: _Memory() for part in spec.parts if part.rate < Rate.STEP}
        self._swapped: dict[str, Any] = {}

    @property
    def runs(self) -> dict[str, int]:
        """How often each part below the step's rate has really run so far."""
        return {name: memory.runs for name, memory in self._memory.items()}

    @property
    def rows(self) -> Counter[str]:
        """Rows `requested` and rows `evaluated` so far, where the plan leaves guidance's out."""
        return self.guidance.rows

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run one step; takes and returns what the network's forward does.

        Raises:
            InputError: an input is missing, unknown, of the wrong shape or dtype, or a timestep
                that the schedule does not have.
        """
        given = bind(self.spec, args, kwargs)
        values = {i.name: self.arrays.take(given[i.name], i) for i in self.spec.inputs}
        values |= spread_timesteps(self.spec, values)
        check_shapes(self.spec, values)
        check_static(self.spec, values)
        found = self.step(values)
        like = next(given[item.name] for item in self.spec.inputs if item.role is Role.LATENT)
        results = [self.arrays.give(found[name], like) for name in self.spec.outputs]
        if "return_dict" in self.spec.parameters[: len(args)]:
            return_dict = args[self.spec.parameters.index("return_dict")]
        return self._result(results, return_dict)

    def step(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run one step on the back end's own arrays, by the inputs' names; the outputs by name."""
        index, plan = self.step_index(values), self.spec.plan
        if index is None or not (plan.slots or plan.guidance):
            found = self.run(plan.at(index).variant, self._environment(index, values))
        else:
            found = self._continue(index, values)
        return {name: found[name] for name in self.spec.outputs}

    def run(self, variant: str, env: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of one variant, by name."""
        part = self.spec.part(variant)
        self.steps[variant] += 1
        found = self._runs[variant]({name: env[name] for name in part.inputs} | self._swapped)
        return dict(zip(part.outputs, found, strict=True))

    def reset(self) -> None:
        """Forget what is kept between steps: the next call runs the full variant."""
        self.trajectories.clear()

    def swap(self, weights: Mapping[str, Any]) -> None:
        """Run with these values of swappable weights, the back end's own arrays; others as stored.

        What was computed before is forgotten.
        """
        self._swapped = dict(weights)
        for memory in self._memory.values():
            memory.entries.clear()
        self.reset()

    def under(self, spec: ProgramSpec, suffix: str, steps: Counter[str]) -> Session:
        """The same parts for a spec that names them without `suffix`; it counts into `steps`."""
        runs = {part.name: self._runs[f"{part.name}{suffix}"] for part in spec.parts}
        found = Session(spec, runs, self.arrays)
        found.steps = steps
        return found

    def _environment(self, index: int | None, values: Mapping[str, Any]) -> dict[str, Any]:
        """What a variant may read: the inputs, the step's number, values of the slower parts."""
        env = dict(values)
        env[STEP_INPUT] = self.arrays.array(np.array([index or 0], dtype=np.int64))
        for part in self.spec.parts:
            if part.rate < Rate.STEP:
                env.update(zip(part.outputs, self._recall(part, env), strict=True))
        return env

    def _continue(self, index: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """The step as planned if the slots hold what the plan says, else the default variant."""
        plan = self.spec.plan
        trajectory = self.trajectories.follow(index, values)
        guided = trajectory.guided
        call = self.guidance.begin(guided, index, values)
        trajectory = trajectory.on(call.rows)
        env = self._environment(index, self.guidance.taken(call, values))
        entry = plan.at(index)
        past = read(trajectory, plan, entry)
        if past is None:  # a plan that decides need not wait for a step that fills
            entry, past = PlanStep(plan.default, entry.reads if plan.decision else ()), {}
        if FORECAST_INPUT in past:
            past[FORECAST_INPUT] = self.arrays.array(past[FORECAST_INPUT])
        found = self.run(entry.variant, {**env, **past})
        fills, memory = entry.fills, None
        if plan.decision is not None:
            full = partial(self.run, plan.default, env)
            found, fills, memory = decide(
                plan, entry, trajectory.memory, past, found, full, self.arrays
            )
        outputs, guided = self.guidance.end(guided, index, call, found)
        trajectory = replace(trajectory, guided=guided, memory=memory)
        self.trajectories.keep(trajectory, fills, found)
        return {name: self.arrays.keep(value) for name, value in outputs.items()}  # maybe a slot's

    def step_index(self, values: Mapping[str, Any]) -> int | None:
        """Which step of the schedule a timestep is; None when there is no schedule.

        Raises:
            InputError: the schedule has no such timestep, or the batch holds several.
        """
        times = [values[item.name] for item in self.spec.inputs if item.role is Role.TIMESTEP]
        if self.spec.timesteps is None or not times:
            return None
        found = {float(time) for time in times[0].reshape(-1)}
        if len(found) != 1:
            raise InputError(
                "timestep: this program was compiled for a schedule, one timestep for the whole "
                f"batch, got {len(found)} different ones; compile with schedule=None for that"
            )
        time = found.pop()
        if time in self.spec.timesteps:
            return self.spec.timesteps.index(time)
        close = min(self.spec.timesteps, key=lambda known: abs(known - time))
        raise InputError(
            f"timestep: {time:g} is not one of the {len(self.spec.timesteps)} timesteps that this "
            f"program was compiled for (nearest: {close:g}); set the scheduler to the same steps, "
            "or compile with schedule=None"
        )

    def _recall(self, part: PartSpec, env: Mapping[str, Any]) -> Sequence[Any]:
        """The part's outputs, from memory where its inputs are the same as in an earlier run."""
        memory = self._memory[part.name]
        needed = {name: env[name] for name in part.inputs}
        for key, (known, result) in memory.entries.items():
            if all(self.arrays.same(known[name], needed[name]) for name in needed):
                memory.entries.move_to_end(key)
                return result
        result = self._runs[part.name](needed | self._swapped)
        memory.entries[memory.runs] = (
            {name: self.arrays.keep(value) for name, value in needed.items()},
            result,
        )
        memory.runs += 1
        while len(memory.entries) > KEPT_RESULTS:
            memory.entries.popitem(last=False)
        return result

    def _result(self, flat: list[Any], return_dict: bool) -> Any:
        if "return_dict" not in self.spec.parameters:
            return _unflatten(self.spec.result, flat)
        fields = named_fields(self.spec.result)
        found = {name: _unflatten(shape, flat) for name, shape in fields.items()}
        return Output(found) if return_dict else tuple(found.values())


def named_fields(result: Any) -> dict[str, Any]:
    """What the network returns by name, each as it is nested: by the names that it was captured
    with, else `sample`, `output_1`, …
    """
    if isinstance(result, Mapping) and "dict" in result:
        return {name: result["dict"][name] for name in result["order"]}
    shapes = [result] if isinstance(result, int) else result["tuple"]
    return {f"output_{index}" if index else "sample": each for index, each in enumerate(shapes)}


def first_of(result: Any) -> Any:
    """The first tensor of what a network returns."""
    while not hasattr(result, "shape"):
        result = next(iter(result.values() if isinstance(result, Mapping) else result))
    return result


def _unflatten(shape: Any, flat: Sequence[Any]) -> Any:
    if isinstance(shape, int):
        return flat[shape]
    if "value" in shape:
        return shape["value"]
    if "dict" in shape:
        return {key: _unflatten(shape["dict"][key], flat) for key in shape["order"]}
    return tuple(_unflatten(item, flat) for item in shape["tuple"])
