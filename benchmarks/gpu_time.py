"""How gpu.py times: CUDA events around graph replays, a cold cache, turns with the baseline.

A candidate is a function without arguments. It is called once (which compiles it), captured as a
CUDA graph, so that what the CPU does between launches is in nobody's time, and replayed in turns
with the others: each round goes through all of them, every other round backwards. Before each
replay more memory than the L2 cache holds is written. Its time is the median of a turn, and of the
rounds' medians. Ratios are taken round by round, so that a GPU that slows down does so for both.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from effuse.backends.triton_kernels import specialize
from effuse.kernels.launch import FP_FUSION, INTERPRETED, Launch

Call = Callable[[], Any]
Make = Callable[[], Call]
Figures = dict[str, Any]
Clock = Callable[[Call, int], list[float]]

L2_TIMES = 4  # what is written between two runs, in caches' sizes
LEAST_FLUSH = 128 << 20
SLOWER = 1.5  # than the slowest case so far: what a case may turn out to be
COMPILERS = 16  # kernels that are compiled at a time


class OutOfTime(BaseException):
    """What was asked for takes longer than it may; passes by `except Exception` on its way out."""


# ---- clocks --------------------------------------------------------------------------------------


class CudaClock:
    """Milliseconds of single runs by CUDA events, each on a cold L2 cache."""

    def __init__(self) -> None:
        cache = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)
        size = max(L2_TIMES * cache, LEAST_FLUSH)
        self._dirt = torch.empty(size, dtype=torch.uint8, device="cuda")

    def __call__(self, call: Call, times: int) -> list[float]:
        """`times` runs."""
        pairs = [(_event(), _event()) for _ in range(times)]
        for start, end in pairs:
            self._dirt.zero_()  # the CPU gets ahead of the GPU meanwhile
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in pairs]


class WarmClock:
    """Milliseconds of whole steps by CUDA events, one right after the other, as in sampling."""

    def __call__(self, call: Call, times: int) -> list[float]:
        """The mean of `times` runs: what the CPU does ahead of the GPU is hidden, as in use."""
        start, end = _event(), _event()
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / times]


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)


def cpu_clock(call: Call, times: int) -> list[float]:
    """Milliseconds of single runs on the CPU, for tests of the benchmark itself."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - start))
    return found


# ---- graphs and kernels --------------------------------------------------------------------------


def captured(call: Call) -> Call:
    """A function that replays what `call` launches, in one go."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        kept = call()

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def precompile(launches: Iterable[Launch]) -> str | None:
    """Compile kernels in threads, before they are first called; why that failed, or None.

    Where it fails, each kernel is compiled by its first call, one after the other.
    """
    if INTERPRETED or not torch.cuda.is_available():
        return None
    try:
        from triton.runtime._async_compile import AsyncCompileMode

        with ThreadPoolExecutor(COMPILERS) as pool, AsyncCompileMode(pool, ignore_errors=True):
            for launch in {specialize(each): each for each in launches}.values():
                _compile(launch)
    except Exception as error:  # private parts of Triton: they save time, and nothing else
        return f"{type(error).__name__}: {error}"
    return None


def _compile(launch: Launch) -> None:
    from triton.runtime.jit import MockTensor

    args = {name: MockTensor(value.dtype) if isinstance(value, torch.Tensor) else value
            for name, value in launch.args.items()}  # fmt: skip
    launch.kernel.warmup(
        grid=launch.grid, **args, **launch.constants, num_warps=launch.warps,
        num_stages=launch.stages, enable_fp_fusion=FP_FUSION,
    )  # fmt: skip


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Break off what runs inside after so many seconds. In the main thread only.

    Raises:
        OutOfTime: it was broken off.
    """

    def stop(*_: Any) -> None:
        raise OutOfTime(f"more than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- turns ---------------------------------------------------------------------------------------


@dataclass
class Bench:
    """Where and how candidates are timed.

    Args:
        device: of the tensors.
        clock: what times one candidate.
        end: when to stop, on time.perf_counter's clock.
        rounds: of turns.
        times: runs of a turn.
        graphs: whether candidates are captured as CUDA graphs.
        notes: what went otherwise than planned.
    """

    device: torch.device
    clock: Clock = cpu_clock
    end: float = float("inf")
    rounds: int = 3
    times: int = 10
    graphs: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.perf_counter()

    def within(self, cases: Iterable[Any], section: str) -> Iterator[Any]:
        """The cases, as long as there is time for one as slow as the slowest before it."""
        todo, slowest = list(cases), 0.0
        for number, case in enumerate(todo):
            before = self.left
            if before < SLOWER * slowest:
                names = ", ".join(str(getattr(each, "name", each)) for each in todo[number:])
                self.notes.append(f"{section}: no time was left for {names}")
                return
            yield case
            slowest = max(slowest, before - self.left)

    def compile(self, launches: Iterable[Launch]) -> None:
        """Compile kernels before they are called, many at a time."""
        if problem := precompile(launches):
            self.notes.append(f"kernels are compiled one after the other: {problem}")

    def ready(self, make: Make) -> Call:
        """A candidate, compiled and captured."""
        call = make()
        with torch.no_grad():
            call()
        if not self.graphs:
            return call
        torch.cuda.synchronize()
        return captured(call)

    def measure(self, makes: Mapping[str, Make]) -> dict[str, Figures]:
        """Each candidate's milliseconds, by round and as their median; or why it did not run."""
        found: dict[str, Figures] = {}
        calls: dict[str, Call] = {}
        for name, make in makes.items():
            try:
                calls[name] = self.ready(make)
            except Exception as error:  # the others are worth having; the table says what failed
                found[name] = {"error": reason(error)}
        with torch.no_grad():
            rounds = turns(calls, self.clock, self.rounds, self.times)
        for name, times in rounds.items():
            found[name] = {"ms": statistics.median(times), "ms_rounds": times}
        return {name: found[name] for name in makes}


def turns(
    calls: Mapping[str, Call], clock: Clock, rounds: int, times: int
) -> dict[str, list[float]]:
    """The median milliseconds of every round's turn of each candidate."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        names = list(calls) if number % 2 == 0 else list(reversed(calls))
        for name in names:
            found[name].append(statistics.median(clock(calls[name], times)))
    return found


def ratio(one: Figures, other: Figures) -> float | None:
    """How many times as long `one` takes as `other`: the median over the rounds."""
    if "ms" not in one or "ms" not in other:
        return None
    pairs = zip(one["ms_rounds"], other["ms_rounds"], strict=True)
    return statistics.median(slow / fast for slow, fast in pairs)


def reason(error: BaseException) -> str:
    """An exception as a line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
