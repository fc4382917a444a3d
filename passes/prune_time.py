"""How much less time a step takes without each candidate, measured on the machine that builds.

The network as a whole is built and run, with and without, in turns: what a branch costs depends on
what stands around it. What is built alike is measured once. Of heads, hidden units and channels one
alone is lost in the noise: all but one of a site go, and each has its share of what that saves.
"""

from __future__ import annotations

import os
import platform
import tempfile
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from effuse.devices import DEVICES
from effuse.dump import dump
from effuse.errors import BackendError, PassError
from effuse.passes.base import Purpose, Work
from effuse.passes.layer_cost import Run, back_end, in_turns, row, step_run
from effuse.passes.prune_candidates import Candidate, live
from effuse.passes.prune_surgery import pruned
from effuse.passes.resume import Store, key_of
from effuse.program import Part, Program

SECONDS = 0.6  # of running, with and without alike, for each structure
ARM = ("aarch64", "arm64")


def check_here(purpose: Purpose) -> None:
    """See that what the build is for runs on this machine.

    Raises:
        PassError: it does not.
    """
    if reason := elsewhere(purpose):
        raise PassError(
            f"prune: milliseconds=… measures a step on the machine that builds, by the back end "
            f"that the build is for: {reason}; build on that machine, or give a budget by flops=…"
        )


def elsewhere(purpose: Purpose) -> str | None:
    """Why what is built does not run here, or None."""
    module, target = back_end(purpose.backend), purpose.target
    found: str | None = module.available() or module.absent(target)
    device = DEVICES.get(target or "")
    if found is None and device is not None:
        if not device.is_cpu:
            return f"target={target!r}, and a build runs on the CPU alone"
        if ("arm" in device.name) != (platform.machine().lower() in ARM):
            return f"target={target!r}, and this is {platform.machine()}"
    return found


@dataclass(frozen=True)
class Savings:
    """Microseconds of a step, and of them what goes with each candidate alone."""

    step: int
    each: tuple[int, ...]


def measure(
    program: Program, candidates: Sequence[Candidate], work: Work, store: Store | None = None
) -> Savings:
    """Time the network without each structure among the candidates; a `store` keeps the times.

    Raises:
        PassError: the back end cannot build the network.
    """
    part = program.part(program.plan.default)
    kinds = structures(part, candidates)
    groups = {kind: removal(candidates, kinds, kind) for kind in dict.fromkeys(kinds)}
    base = key(part, work.purpose) if store else ""
    with tempfile.TemporaryDirectory(prefix="effuse-") as folder:
        clock = Clock(program, work, store, base, Path(folder))
        step = clock.step(len(groups))
        shares: dict[Hashable, float] = {}
        for number, (kind, gone) in enumerate(groups.items()):
            shares[kind] = clock.share(gone, kind) / len(gone)
            work.progress("prune: times", number + 1, len(groups))
    return Savings(step, tuple(round(step * shares[kind]) for kind in kinds))


def key(part: Part, purpose: Purpose) -> str:
    """What decides a time, beside what is left out: the network, what runs it, and the machine."""
    here = (platform.platform(), platform.processor(), os.cpu_count(), torch.get_num_threads())
    return key_of("prune: times", dump(part.graph), purpose.backend, purpose.target, here)


def structures(part: Part, candidates: Sequence[Candidate]) -> list[Hashable]:
    """What the time of each candidate depends on: equal for those that are built alike."""
    nodes = {node.name: row(node) for node in part.graph.nodes if node.op != "output"}
    known: dict[int, Hashable] = {}
    found: list[Hashable] = []
    for each in candidates:
        if each.site is not None:
            labels = each.site.labels
            if id(each.site) not in known:
                known[id(each.site)] = tuple((nodes[name], axis) for name, axis in labels)
            sizes = tuple(atoms.count(each.atom) for atoms in labels.values())
            found.append((each.kind, known[id(each.site)], sizes))
        elif each.block is not None:
            alive = live(part.graph, each.block)
            found.append((each.kind, tuple(nodes[name] for name in nodes if name not in alive)))
    return found


def removal(
    candidates: Sequence[Candidate], kinds: Sequence[Hashable], kind: Hashable
) -> list[Candidate]:
    """What to leave out for the time of a structure: the first that has it, or all but one of it.

    Of one site only, at the end of which something stays.
    """
    alike = [each for each, other in zip(candidates, kinds, strict=True) if other == kind]
    first = alike[0]
    if first.site is None:
        return [first]
    same = [each for each in alike if each.site is first.site]
    return same[: max(1, min(len(same), first.site.count - 1))]


@dataclass
class Clock:
    """Builds and times the network as it is, and without some candidates, in a `folder`."""

    program: Program
    work: Work
    store: Store | None
    key: str
    folder: Path

    def step(self, count: int) -> int:
        """Microseconds of a step; says how long `count` structures will take."""

        def found() -> float:
            begun = time.perf_counter()
            taken = in_turns([self.base], SECONDS)[0]
            seconds = count * (time.perf_counter() - begun + SECONDS)
            about = f"prune: times of {count} structures: about {seconds:.0f} s"
            self.work.progress(about, 1, 1)
            return taken

        return round(1e3 * self._kept("step", found))

    @cached_property
    def base(self) -> Run:
        """The network as it is, built when something is timed."""
        return self.run(self.program, self.folder / "whole")

    def share(self, gone: Sequence[Candidate], kind: Hashable) -> float:
        """The share of a step's time that goes with them, at least 0."""
        return self._kept(repr(kind), lambda: max(0.0, self.less(pruned(self.program, gone))))

    def less(self, other: Program, seconds: float = SECONDS) -> float:
        """The share of a step's time that `other` does without, both timed in turns."""
        with tempfile.TemporaryDirectory(dir=self.folder) as place:
            runs = [self.base, self.run(other, Path(place) / "less")]
            whole, rest = in_turns(runs, seconds)
        return 1 - rest / whole

    def _kept(self, name: str, found: Callable[[], float]) -> float:
        """A figure of an earlier build that was interrupted, or a new one, kept for a later."""
        place = key_of(self.key, name)
        known = self.store.read(place) if self.store else None
        if known is not None:
            return known["time"].item()
        value = found()
        if self.store:
            self.store.write(place, {"time": torch.tensor(value, dtype=torch.float64)})
        return value

    def run(self, program: Program, folder: Path) -> Run:
        """The default variant, built and ready."""
        part = program.part(program.plan.default)
        purpose = self.work.purpose
        values = self.program.examples
        try:
            return step_run(program, part, values, folder, purpose.backend, purpose.target)
        except BackendError as error:
            raise PassError(
                f"prune: milliseconds=…: the network does not build for {purpose.backend}: "
                f"{error}; give a budget by flops=…"
            ) from error


def measured_share(program: Program, less: Program, work: Work) -> float:
    """The share of a step's time that `less` does without, both timed in turns."""
    with tempfile.TemporaryDirectory(prefix="effuse-") as folder:
        return Clock(program, work, None, "", Path(folder)).less(less, 2 * SECONDS)
