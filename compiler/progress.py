"""Progress bars on long work: one line a phase, on standard error, none without a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining


@dataclass
class Phases:
    """Shows how far each phase is, and remembers how long each took (seconds)."""

    bars: Progress | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    _tasks: dict[str, TaskID] = field(default_factory=dict)

    def __call__(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of the phase `what`."""
        if self.bars is None:
            return
        if what not in self._tasks:
            self._tasks[what] = self.bars.add_task(what, total=total)
        self.bars.update(self._tasks[what], completed=done, total=total)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase, less the phases inside it, and show that it runs."""
        start, inner = time.perf_counter(), sum(self.seconds.values())
        self(name, 0, 1)
        yield
        self(name, 1, 1)
        inner = sum(self.seconds.values()) - inner
        spent = time.perf_counter() - start - inner
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


@contextmanager
def phases(show: bool) -> Iterator[Phases]:
    """Bars on the terminal when `show` is set and there is one."""
    console = Console(stderr=True)
    if not (show and console.is_terminal):
        yield Phases()
        return
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        Elapsed(),
        Remaining(),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        yield Phases(bars)
