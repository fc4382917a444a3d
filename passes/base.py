"""What a pass is: a frozen dataclass whose fields are its options, with one method."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from effuse.log import Log
from effuse.program import Program
from effuse.statistics import RANGES_ONLY, Calibration, Needs
from effuse.watch import Watch


@dataclass(frozen=True)
class Purpose:
    """What a program is compiled for: a back end and its target, and a schedule as it was given."""

    backend: str = "onnx"
    target: str | None = None
    schedule: Any = None


@dataclass
class Work:
    """What a pass is handed beside the program: its log, and calibration if it asked for it.

    `drive(program, watch)` samples with a program as calibration does; `original` is the program as
    it was captured.
    """

    log: Log = field(default_factory=Log)
    calibration: Calibration | None = None
    drive: Callable[[Program, Watch], None] | None = None
    progress: Callable[[str, int, int], None] = lambda what, done, total: None
    original: Program | None = None
    purpose: Purpose = field(default_factory=Purpose)


@dataclass(frozen=True)
class Pass:
    """A rewrite of a Program. `include` and `exclude` are patterns over module paths."""

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """What calibration has to keep for the pass, beside ranges."""
        return RANGES_ONLY

    include: tuple[str, ...] = field(default=(), kw_only=True)
    exclude: tuple[str, ...] = field(default=(), kw_only=True)

    def requires(self, program: Program) -> str | None:
        """Why the pass cannot run on this program, or None."""
        return None

    def run(self, program: Program, work: Work) -> Program:
        """The rewritten program."""
        raise AssertionError(f"{type(self).__name__} defines no run")

    def ensures(self, program: Program) -> str | None:
        """What the result fails to hold, or None."""
        return None

    def options(self) -> dict[str, Any]:
        """The options that an artifact records: all but where the build machine keeps things."""
        kept = [each for each in fields(self) if each.metadata.get("recorded", True)]
        return {each.name: asdict(self)[each.name] for each in kept}

    def unwanted(self, path: str) -> str | None:
        """Why the person does not want the pass at this module path, or None."""
        if self.include and not any(fnmatch.fnmatch(path, pattern) for pattern in self.include):
            return "not among include"
        if any(fnmatch.fnmatch(path, pattern) for pattern in self.exclude):
            return "among exclude"
        return None
