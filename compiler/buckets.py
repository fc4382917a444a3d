"""Buckets: the sizes that an artifact was built for, and the Session that picks among them by the
shapes of a call (imports no torch).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import log
from typing import Any

from effuse.arguments import bind, describe_shape
from effuse.arrays import Arrays
from effuse.errors import ConfigError, InputError, nearest
from effuse.plan import Plan, ProgramSpec, Role, spec_from_json
from effuse.runtime import Session

Sizes = Mapping[str, int]
SHOWN = 8  # sizes that an error lists


def sizes_text(sizes: Sizes) -> str:
    """`batch=2 height=64`."""
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def label_of(sizes: Sizes) -> str:
    """`batch2-height64`, which stands in the names of files."""
    return "-".join(f"{name}{size}" for name, size in sorted(sizes.items()))


def check_asked(
    shapes: Sequence[Sizes], dynamic: Mapping[str, tuple[int, int]], known: Sequence[str]
) -> None:
    """Refuse sizes that no artifact can be built for.

    Raises:
        ConfigError: a name is unknown, a size is no positive number or out of its bounds, or two
            are the same.
    """
    for sizes in shapes:
        if not sizes:
            raise ConfigError(
                'shapes: one names no size; expected e.g. {"height": 64, "width": 64}'
            )
        for name, size in sizes.items():
            if name not in known:
                raise ConfigError(f"shapes: no size is called {name!r}{nearest(name, known)}")
            low, high = dynamic.get(name, (1, size))
            if not low <= size <= high or size < 1:
                wanted = f"{low} to {high} (dynamic=)" if name in dynamic else "at least 1"
                raise ConfigError(f"shapes: {name} is {size}, expected {wanted}")
    check_distinct(shapes)


def check_distinct(shapes: Sequence[Sizes]) -> None:
    """Refuse the same sizes twice.

    Raises:
        ConfigError: they are given twice.
    """
    seen: list[Sizes] = []
    for sizes in shapes:
        if dict(sizes) in seen:
            raise ConfigError(f"shapes: {sizes_text(sizes)} is given twice")
        seen.append(dict(sizes))


def completed(shapes: Sequence[Sizes], own: Sizes) -> tuple[dict[str, int], ...]:
    """Each bucket with all sizes that any of them names, those of the example where it names none.

    Raises:
        ConfigError: the network has no such size, or two buckets are the same.
    """
    named = [name for name in own if any(name in sizes for sizes in shapes)]
    for name in (name for sizes in shapes for name in sizes):
        if name not in own:
            has = ", ".join(own) or "none"
            raise ConfigError(
                f"shapes: no input of the network has the size {name!r}; it has: {has}"
            )
    found = tuple({name: sizes.get(name, own[name]) for name in named} for sizes in shapes)
    check_distinct(found)
    return found


def bounds_of(shapes: Sequence[Sizes]) -> dict[str, tuple[int, int]]:
    """The least and the greatest of each size that differs between them."""
    every = {name: [sizes[name] for sizes in shapes] for name in (shapes[0] if shapes else ())}
    return {name: (min(all_), max(all_)) for name, all_ in every.items() if len(set(all_)) > 1}


def renamed(plan: Plan, label: str) -> Plan:
    """The plan over variants that carry the label of a bucket."""
    steps = tuple(replace(step, variant=f"{step.variant}.{label}") for step in plan.steps)
    return replace(plan, default=f"{plan.default}.{label}", steps=steps)


def spec_apart(spec: ProgramSpec, label: str) -> ProgramSpec:
    """The spec of a bucket with its parts named as its files are."""
    parts = tuple(replace(part, name=f"{part.name}.{label}") for part in spec.parts)
    return replace(spec, parts=parts, plan=renamed(spec.plan, label))


def stored_specs(manifest: Mapping[str, Any]) -> list[ProgramSpec]:
    """The programs that an artifact's files are of: one for each bucket, or the one that it has."""
    buckets = manifest.get("buckets", ())
    if not buckets:
        return [spec_from_json(manifest["program"])]
    return [spec_apart(spec_from_json(each["program"]), label_of(each["sizes"]))
            for each in buckets]  # fmt: skip


def distance(sizes: Sizes, other: Sizes) -> float:
    """How far two sets of sizes are apart: by factors, added up."""
    return sum(abs(log(sizes[name] / other[name])) for name in other if sizes.get(name, 0) > 0)


class BucketSession(Session):
    """Picks the program of a call's sizes; each is opened when it is first needed.

    Args:
        spec: the program with its sizes open; `spec.shapes` lists those that were built.
        specs: of each of them.
        open_session: the session of the spec whose parts are named as the files are.
    """

    def __init__(
        self,
        spec: ProgramSpec,
        specs: Sequence[ProgramSpec],
        open_session: Callable[[ProgramSpec], Session],
    ) -> None:
        self.spec = spec
        self.steps = Counter()
        labels = map(label_of, spec.shapes)
        self._specs = dict(zip(labels, specs, strict=True))
        self._open = open_session
        self._opened: dict[str, Session] = {}
        self._swapped = {}
        first = self.at(spec.shapes[0])
        self.arrays: Arrays = first.arrays

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Run one step by the program that was built for the arguments' sizes.

        Raises:
            InputError: none was; or as a Session of known sizes.
        """
        sizes = self.sizes_of(bind(self.spec, args, kwargs))
        return self.at(sizes)(*args, return_dict=return_dict, **kwargs)

    def at(self, sizes: Sizes) -> Session:
        """The session of a bucket; opened, and kept.

        Raises:
            InputError: these sizes were not built.
        """
        label = label_of(sizes)
        if label not in self._specs:
            raise self._not_built(sizes)
        if label not in self._opened:
            logical = self._specs[label]
            found = self._open(spec_apart(logical, label)).under(logical, f".{label}", self.steps)
            found.swap(self._swapped)
            self._opened[label] = found
        return self._opened[label]

    def sizes_of(self, values: Mapping[str, Any]) -> dict[str, int]:
        """The named sizes of a call's values, by the inputs' names.

        Raises:
            InputError: a shape does not fit whatever the sizes, or two inputs disagree.
        """
        told: dict[str, tuple[int, str]] = {}
        for item in self.spec.inputs:
            shape = tuple(getattr(values[item.name], "shape", ()))
            if item.role is Role.TIMESTEP:
                continue
            if len(shape) != len(item.shape):
                raise InputError(
                    f"{item.label}: expected shape {describe_shape(item.shape)}, got {shape}"
                )
            for name, size in zip(item.shape, shape, strict=True):
                if isinstance(name, str) and told.setdefault(name, (size, item.label))[0] != size:
                    raise InputError(f"{item.label}: {name} is {size} here, but {told[name][0]} in "
                                     f"{told[name][1]}")  # fmt: skip
        return {name: told[name][0] if name in told else size
                for name, size in self.spec.shapes[0].items()}  # fmt: skip

    def _not_built(self, sizes: Sizes) -> InputError:
        built = sorted(self.spec.shapes, key=lambda each: distance(sizes, each))
        more = f"; and {len(built) - SHOWN} more" if len(built) > SHOWN else ""
        every = "; ".join(map(sizes_text, self.spec.shapes[:SHOWN]))
        return InputError(
            f"the size {sizes_text(sizes)} was not built; built are: {every}{more} (nearest: "
            f"{sizes_text(built[0])}); compile again with it among shapes=[…]"
        )

    def step(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Run one step on the back end's own arrays, by the inputs' names; the outputs by name."""
        return self.at(self.sizes_of(values)).step(values)

    def run(self, variant: str, env: Mapping[str, Any]) -> dict[str, Any]:
        """The outputs of one variant, by name."""
        return self.at(self.sizes_of(env)).run(variant, env)

    def reset(self) -> None:
        """Forget what is kept between steps, at every size."""
        for each in self._opened.values():
            each.reset()

    def swap(self, weights: Mapping[str, Any]) -> None:
        """Run with these values of swappable weights, at every size."""
        self._swapped = dict(weights)
        for each in self._opened.values():
            each.swap(weights)

    @property
    def runs(self) -> dict[str, int]:
        """How often each part below the step's rate has really run so far, at all sizes."""
        found: Counter[str] = Counter()
        for each in self._opened.values():
            found.update(each.runs)
        return dict(found)

    @property
    def rows(self) -> Counter[str]:
        """None: a bucket's batch is known, and no rows of it are left out."""
        return Counter()
