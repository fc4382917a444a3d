"""What a row of the CPU benchmark is, what its processes are told, and the files of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]
Run = Callable[[Arrays], np.ndarray]


@dataclass(frozen=True)
class Job:
    """What a child process is to do; goes to it as JSON."""

    row: str
    network: str
    threads: int
    shared: str  # folder of the inputs
    folder: str  # of this row's files
    timesteps: tuple[int, ...] | None
    config: str = ""  # of effuse

    def place(self, name: str) -> Path:
        """A file of this row."""
        return Path(self.folder) / name

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def calibration(self) -> list[dict[str, np.ndarray]]:
        """The inputs of calibration."""
        return read_inputs(Path(self.shared) / "calibration.npz")

    @property
    def judged(self) -> list[dict[str, np.ndarray]]:
        """The inputs that are timed and compared."""
        return read_inputs(Path(self.shared) / "judged.npz")


@dataclass(frozen=True)
class Loaded:
    """What is timed; its size (bytes) where it is no file."""

    run: Run
    remark: str = ""
    size: int | None = None


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    load: Callable[[Job, Any], Loaded]  # the module is None where the row has a build
    build: Callable[[Job, Any], str] | None = None  # gives a remark
    imports: tuple[str, ...] = ()  # of `build`, imported before its clock starts
    runtime: tuple[str, ...] = ()  # of `load`, likewise
    config: str = ""
    transformers: bool = False  # for these networks alone


def read_inputs(path: Path) -> list[dict[str, np.ndarray]]:
    """Inputs from the names "number/input"."""
    found: list[dict[str, np.ndarray]] = []
    with np.load(path) as file:
        for key in file:
            number, name = key.split("/")
            found += [{} for _ in range(int(number) + 1 - len(found))]
            found[int(number)][name] = file[key]
    return found


def write_inputs(path: Path, inputs: Sequence[Arrays]) -> None:
    """The reverse of `read_inputs`."""
    named = {f"{n}/{name}": value for n, each in enumerate(inputs) for name, value in each.items()}
    np.savez(path, **named)


def first_line(error: BaseException) -> str:
    """An exception's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
