"""Classifier-free guidance on fewer rows: which run, and what the others give (imports no torch).

A pipeline with guidance calls the network on one batch of two halves, the same latents in both:
unconditional rows and conditional ones. Where the halves agree (Adaptive Guidance), or where one
can be told from the other (LinearAG), the unconditional row need not run (METHODS 2.9). What tells
is the network's raw output, never the guided sum. A call whose latent is not two equal halves is no
such call and runs as it is; so does guidance as two calls, since neither knows of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effuse.arrays import Arrays
from effuse.plan import Guide, ProgramSpec, Role

NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Guided:
    """What guidance knows of a trajectory's n pictures after a step."""

    step: int
    crossed: Any = None  # (n,) int64: the step at which each reached the threshold, or NEVER
    told: Any = None  # (n, …): ε_c of that step
    free: Any = None  # (n, …): ε_∅ of that step, or its estimate


@dataclass(frozen=True)
class Call:
    """One call of the network, and which of its rows run."""

    latent: tuple[int, ...]  # its shape
    pictures: int = 0  # n, of 2n rows; 0: the call is no two halves
    rows: tuple[int, ...] | None = None  # None: all

    def sources(self) -> list[int]:
        """For each row of the call the one among `rows` that gives it: itself, or its twin."""
        places = {row: place for place, row in enumerate(self.rows or range(2 * self.pictures))}
        count = 2 * self.pictures
        return [places.get(row, places.get((row + self.pictures) % count, 0))
                for row in range(count)]  # fmt: skip


class Guidance:
    """Leaves rows of guided calls out, as the plan says, and completes the outputs."""

    def __init__(self, spec: ProgramSpec, arrays: Arrays) -> None:
        guide = spec.plan.guidance
        self._guide = guide
        self._arrays = arrays
        self._outputs = spec.outputs
        self._latent = next((item.name for item in spec.inputs if item.role is Role.LATENT), "")
        batch = guide.batch if guide else ""
        self._rowed = [i.name for i in spec.inputs if i.shape and i.shape[0] == batch]
        self._least, self._unit = spec.bounds.get(batch, (1, 0))[0], spec.steps.get(batch, 1)
        self.rows: Counter[str] = Counter()  # "requested" by the calls, and "evaluated"

    def begin(self, guided: Guided | None, index: int, values: Mapping[str, Any]) -> Call:
        """The call at step `index`, after what is known of its trajectory."""
        if self._guide is None:
            return Call(())
        latent = values[self._latent]
        call = Call(tuple(latent.shape), halves(latent, self._arrays))
        if call.pictures:
            out = left_out(self._guide, guided, index, call.pictures)
            call = Call(call.latent, call.pictures, self._running(out))
        self.rows["requested"] += len(latent)
        self.rows["evaluated"] += len(latent) if call.rows is None else len(call.rows)
        return call

    def taken(self, call: Call, values: Mapping[str, Any]) -> dict[str, Any]:
        """The inputs' values on the rows that run."""
        if call.rows is None:
            return dict(values)
        some = {name: values[name][list(call.rows)] for name in self._rowed}
        return {**values, **some}

    def end(
        self, guided: Guided | None, index: int, call: Call, found: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Guided | None]:
        """The outputs for all rows of the call, and what is known after it."""
        outputs = {name: found[name] for name in self._outputs}
        if self._guide is None or not call.pictures:
            return outputs, None
        free, told = places(self._guide, call.pictures)
        if call.rows is not None:
            outputs = {name: value[call.sources()] for name, value in outputs.items()}
        noise = outputs[self._outputs[0]][:, : call.latent[1]]
        if self._guide.threshold is not None:
            cosine = cosines(self._arrays.floats(noise[told]), self._arrays.floats(noise[free]))
            before = guided.crossed if guided else np.full(call.pictures, NEVER)
            counts = (cosine >= self._guide.threshold) & (index >= self._guide.start - 1)
            now = np.where(counts, index, NEVER)
            return outputs, Guided(index, np.minimum(before, now))
        if call.rows is not None and guided is not None:
            noise[free] = estimate(self._guide, index, noise[told], guided)
        kept = self._arrays.keep(noise[told]), self._arrays.keep(noise[free])
        return outputs, Guided(index, None, *kept)

    def _running(self, out: Sequence[bool]) -> tuple[int, ...] | None:
        """The rows that run when those pictures' unconditional rows do not; None: all of them."""
        if self._guide is None or not any(out):
            return None
        free, _ = places(self._guide, len(out))
        unused = {row for row, each in zip(range(free.start, free.stop), out, strict=True) if each}
        rows = tuple(row for row in range(2 * len(out)) if row not in unused)
        legal = len(rows) >= self._least and (len(rows) - self._least) % self._unit == 0
        return rows if legal else None


def halves(latent: Any, arrays: Arrays) -> int:
    """How many pictures the two halves of a batch hold; 0 if it is no two equal halves."""
    count = len(latent) // 2
    two = len(latent) == 2 * count and count and arrays.same(latent[:count], latent[count:])
    return count if two else 0


def places(guide: Guide, pictures: int) -> tuple[slice, slice]:
    """Where the unconditional and the conditional rows of a call are."""
    first, second = slice(0, pictures), slice(pictures, 2 * pictures)
    return (second, first) if guide.conditional_first else (first, second)


def left_out(guide: Guide, guided: Guided | None, index: int, pictures: int) -> list[bool]:
    """For each picture whether its unconditional row is left out at step `index`."""
    if guided is None:
        return [False] * pictures
    if guide.threshold is not None:
        return [bool(each) for each in guided.crossed < index]
    known = guided.step == index - 1 and 0 <= index - guide.start < len(guide.affine)
    return [known] * pictures


def cosines(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """(n,): cos of each two rows in float64, at most 1; 0 where one of them is zero."""
    a, b = (rows.reshape(len(rows), -1).astype(np.float64) for rows in (one, other))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found = np.einsum("ij,ij->i", a, b) / np.maximum(norms, np.finfo(float).tiny)
    return np.asarray(np.minimum(found, 1.0))


def estimate(guide: Guide, index: int, told: Any, before: Guided) -> Any:
    """ε̂_∅ of step `index` from its ε_c and the step before, in their dtype."""
    a, b, c, d = guide.affine[index - guide.start]
    return a * told + b * before.told + c * before.free + d
