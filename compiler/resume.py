"""Builds that were interrupted go on: a folder keeps what is finished, and a journal says what.

    X.part/journal     a line for each finished tensor: its key, place, size and SHA-256
    X.part/artifact/   the artifact in the making, weights written one tensor at a time
    X.part/<pass>/     finished pieces of a pass that takes long

A tensor's key is a hash of all that decides its bytes. What the journal names is read again before
it is trusted: a process that was killed, or a machine that lost power, leaves no half of a tensor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib
import importlib.metadata
import os
import shutil
import weakref
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import IO, Any

from effuse import artifact
from effuse.errors import ArtifactError, ConfigError

JOURNAL, ARTIFACT = "journal", "artifact"
DECIDING = ("effuse", "torch", "numpy", "onnx", "onnxscript")  # libraries that may change a byte


class Journal:
    """The finished tensors of files that are being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._salt = salt()
        self._known = self._read()

    def __len__(self) -> int:
        return len(self._known)

    def holds(self, file: IO[bytes], key: str, offset: int, size: int) -> bool:
        """Whether the tensor of that key lies in the file at that place, whole."""
        expected = self._known.get((Path(file.name).name, key, offset, size))
        if expected is None:
            return False
        file.seek(offset)
        return hashlib.sha256(file.read(size)).hexdigest() == expected

    def note(self, file: IO[bytes], key: str, offset: int, data: Any) -> None:
        """The tensor of that key has been written."""
        place = (Path(file.name).name, key, offset, len(data))
        self._known[place] = hashlib.sha256(data).hexdigest()
        if not self.path.exists():
            self.path.write_text(self._salt + "\n", encoding="utf-8")
        with self.path.open("a", encoding="utf-8") as journal:
            journal.write(" ".join(map(str, (*place, self._known[place]))) + "\n")

    def _read(self) -> dict[tuple[str, str, int, int], str]:
        """What was noted; nothing of another version of the compiler."""
        if not self.path.is_file():
            return {}
        text = self.path.read_text(encoding="utf-8", errors="replace")
        first, *lines = text[: text.rfind("\n") + 1].splitlines() or [""]
        if first != self._salt:
            self.path.unlink()
            return {}
        if not text.endswith("\n"):  # killed while it wrote a line
            self.path.write_text("\n".join((first, *lines, "")), encoding="utf-8")
        found = {}
        for words in map(str.split, lines):
            if len(words) == 5 and words[2].isdecimal() and words[3].isdecimal():
                found[words[0], words[1], int(words[2]), int(words[3])] = words[4]
        return found


@cache
def salt() -> str:
    """What of the compiler itself decides an artifact's bytes: its source, and libraries."""
    hash = hashlib.sha256()
    home = Path(__file__).parent
    for folder in (home, *(home.parent / name for name in ("passes", "backends", "kernels"))):
        for path in sorted(folder.glob("*.py")):
            hash.update(path.name.encode() + path.read_bytes())
    for name in DECIDING:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            hash.update(f"{name} {importlib.metadata.version(name)}".encode())
    return hash.hexdigest()


class Workspace:
    """The folder that keeps what is finished of a build, for this build alone.

    Raises:
        ConfigError: it cannot be made, holds something else, or another build is at work in it.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.folder = place / ARTIFACT
        if place.exists() and not (place.is_dir() and _own(place)):
            raise ConfigError(
                f"resume: {place} is there and was not written by an interrupted build; name "
                "another folder, or remove it"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (place / "lock").open("w")
            _take(self._lock)
        except BlockingIOError as error:
            raise ConfigError(f"resume: another build is at work in {place}") from error
        except OSError as error:
            raise ConfigError(
                f"resume: {place} cannot be written ({error.strerror or error}); name another"
            ) from error
        self.journal = Journal(place / JOURNAL)
        for path in self.folder.iterdir():  # but weights, files are written in no time
            if path.suffix != ".safetensors":
                path.unlink()

    def settings(self, config: Any) -> Any:
        """The config, its passes that can go on where they stopped told where to keep pieces."""
        passes = [
            dataclasses.replace(each, resume=str(self.place / each.name))
            if getattr(each, "resume", None) == ""
            else each
            for each in config.passes
        ]
        return config.model_copy(update={"passes": tuple(passes)})

    @property
    def name(self) -> str:
        """Where the artifact is built."""
        return str(self.folder)

    def cleanup(self) -> None:
        """Let go of the folder; what is finished stays."""
        self._lock.close()

    def deliver(self, goal: Path) -> Path:
        """Write the finished artifact to `goal`, moved if it can be; where its files are now.

        Nothing is left to go on with.

        Raises:
            ArtifactError: it cannot be written there.
        """
        artifact.check_target(goal)
        if self.place in self.folder.parents and goal.suffix != ".zip" and self._moved(goal):
            self.folder = goal
            self._remove()
            return goal
        artifact.save(self.folder, goal)
        weakref.finalize(self, shutil.rmtree, self.place, ignore_errors=True)  # still in use
        return self.folder

    def _moved(self, goal: Path) -> bool:
        old = self.place / "old"
        try:
            if goal.exists():
                goal.rename(old)
            self.folder.rename(goal)
        except OSError as error:
            if old.exists() and not goal.exists():
                old.rename(goal)
            if error.errno != errno.EXDEV:
                raise ArtifactError(f"{goal}: cannot be written: {error.strerror}") from error
            return False
        return True

    def _remove(self) -> None:
        self.cleanup()
        shutil.rmtree(self.place, ignore_errors=True)

    def watching(self, program: Any, config: Any) -> Any:
        """Note here what is finished of the program; the config with passes that do so too."""
        program.weights.journal = self.journal
        return self.settings(config)


def workspace(place: str | os.PathLike[str] | None, stream: bool) -> Workspace | None:
    """The folder of a build that may be interrupted; None where none is asked for.

    Raises:
        ConfigError: the build is not streamed, or the folder does not do.
    """
    if place is None:
        return None
    if not stream:
        raise ConfigError("resume: goes with stream=True; a build in memory starts anew")
    return Workspace(Path(place))


def _take(file: IO[Any]) -> None:
    """Lock a file for this process alone, where the system has such locks."""
    with contextlib.suppress(ModuleNotFoundError):  # Windows
        fcntl = importlib.import_module("fcntl")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _own(place: Path) -> bool:
    names = {path.name for path in place.iterdir()}
    return not names or ARTIFACT in names


def part_of(goal: Path) -> Path:
    """Where a build to `goal` keeps what is finished: beside it, with `.part` behind its name."""
    return goal.with_name(goal.name + ".part")


def finished(place: Path) -> int:
    """How many tensors an interrupted build has left there."""
    return len(Journal(place / JOURNAL))


@contextlib.contextmanager
def room_for(path: Path, needed: int) -> Iterator[None]:
    """Refuse to begin where a file of `needed` bytes does not fit; tell of a disk that gets full.

    Raises:
        ArtifactError: there is too little room, or a write failed.
    """
    held = path.stat().st_blocks * 512 if path.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if needed - held > free:
        raise ArtifactError(
            f"{path}: {needed / 1e9:.2f} GB are needed, of which {held / 1e9:.2f} GB are written, "
            f"and {free / 1e9:.2f} GB are free; make room, or name a folder with more"
        )
    try:
        yield
    except OSError as error:
        held = path.stat().st_size if path.exists() else 0
        raise ArtifactError(
            f"{path}: cannot be written ({error.strerror or error}): {needed} bytes are needed, "
            f"{min(held, needed)} of them are written; make room, or name a folder with more"
        ) from error
