"""Artifacts: a folder or a zip with a manifest, hashes and the built programs (imports no torch).

    manifest.json   versions, config, roles, plan, figures
    SHA256SUMS      of every other file; `sha256sum -c SHA256SUMS` checks it too
    *.onnx, weights.safetensors, graphs.txt.gz …  what the back end wrote

A pipeline's has pipeline.json in the manifest's place, and a folder for each of its components.

Written under a temporary name beside the target and renamed; checked when loaded; no pickle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from effuse.errors import ArtifactError

FORMAT = 1
MANIFEST, PIPELINE, SUMS = "manifest.json", "pipeline.json", "SHA256SUMS"
EPOCH = (1980, 1, 1, 0, 0, 0)  # a zip's earliest date: equal content, equal bytes
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # no folders, no hidden files
SAFE_PATH = re.compile(rf"({SAFE_NAME.pattern}/)?{SAFE_NAME.pattern}")  # in a pipeline's: one
# What zipfile raises on bytes that are not as written: also an unknown method, or encryption.
DAMAGED = (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, ValueError)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def members(folder: Path) -> list[str]:
    """The files of an artifact, by their paths in it."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path.relative_to(folder).as_posix() for path in files)


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size (bytes) and SHA-256 of every file in the folder, manifest and sums excepted."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
        for name in members(folder)
        if name not in (MANIFEST, PIPELINE, SUMS)
    }


def finish(folder: Path, manifest: Mapping[str, Any], name: str = MANIFEST) -> dict[str, Any]:
    """Complete a folder of built files to an artifact: manifest with `files`, and the sums."""
    complete = {**manifest, "files": describe_files(folder)}
    text = json.dumps(complete, indent=1, sort_keys=True) + "\n"
    (folder / name).write_text(text, encoding="utf-8")
    names = [each for each in members(folder) if each != SUMS]
    lines = [f"{sha256(folder / each)}  {each}\n" for each in names]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    return complete


def save(folder: Path, target: str | os.PathLike[str]) -> Path:
    """Copy a finished folder to `target`: a zip if the name ends so, else a folder.

    An artifact that is there already is replaced; anything else there is left alone.

    Raises:
        ArtifactError: the target cannot be written, or is something else than an artifact.
    """
    goal = Path(target)
    check_target(goal)
    try:
        with _staging(goal) as staged:
            if goal.suffix == ".zip":
                _zip(folder, staged)
            else:
                _copy(folder, staged)
            _swap(staged, goal)
    except OSError as error:
        raise ArtifactError(
            f"{goal}: cannot write the artifact ({error.strerror or error}); choose another path "
            "or free some space; nothing was left behind"
        ) from error
    return goal


def check_target(goal: Path) -> None:
    """Refuse a place that an artifact cannot be written to; good to know before compiling.

    Raises:
        ArtifactError: its folder is missing or may not be written, or something else is there.
    """
    if not goal.parent.is_dir():
        raise ArtifactError(
            f"{goal}: the folder {str(goal.parent)!r} does not exist; create it first"
        )
    if not os.access(goal.parent, os.W_OK):
        raise ArtifactError(f"{goal}: no permission to write into {str(goal.parent)!r}")
    if goal.exists() and not is_artifact(goal):
        kind = "folder" if goal.is_dir() else "file"
        raise ArtifactError(f"{goal}: a {kind} that is no artifact is there; choose another path")


def is_artifact(path: Path) -> bool:
    """Whether what is there may be replaced: an artifact by its names, or an empty folder."""
    if path.is_dir():
        names = {each.name for each in path.iterdir()}
        return not names or _known(names)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return _known(set(archive.namelist()))
    return False


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether a pipeline's artifact is there."""
    place = Path(path)
    if place.is_dir() or not zipfile.is_zipfile(place):
        return (place / PIPELINE).is_file()
    with zipfile.ZipFile(place) as archive:
        return PIPELINE in archive.namelist()


def _known(names: set[str]) -> bool:
    return SUMS in names and bool({MANIFEST, PIPELINE} & names)


@contextlib.contextmanager
def _staging(goal: Path) -> Iterator[Path]:
    """A path inside a temporary folder beside the goal, removed whatever happens."""
    holder = Path(tempfile.mkdtemp(prefix=f".{goal.name}.", dir=goal.parent))
    try:
        yield holder / "new"
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def _swap(staged: Path, goal: Path) -> None:
    old = staged.with_name("old")
    if goal.exists():
        goal.rename(old)
    try:
        staged.rename(goal)
    except BaseException:  # Ctrl-C too: what was there comes back
        if old.exists():
            old.rename(goal)
        raise


def _copy(folder: Path, target: Path) -> None:
    """With the permissions of new files: those of a temporary folder shut everybody else out."""
    target.mkdir()
    for name in members(folder):
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / name, target / name)


def _zip(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in members(folder):
            info = zipfile.ZipInfo(name, EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            source = (folder / name).open("rb")
            with source, archive.open(info, "w", force_zip64=True) as sink:
                shutil.copyfileobj(source, sink)


class Opened:
    """A checked artifact on disk: its folder and its manifest; a zip gets a temporary folder."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._holder: tempfile.TemporaryDirectory[str] | None = None
        source = Path(path)
        if source.is_file():
            self._holder = tempfile.TemporaryDirectory(prefix="effuse-")
            self.folder = Path(self._holder.name)
            unzip(source, self.folder)
        elif source.is_dir():
            self.folder = source
        else:
            raise ArtifactError(f"{source}: no such artifact")
        self.manifest = check(self.folder, str(source))
        self._source = source

    @property
    def network(self) -> dict[str, Any]:
        """The manifest of one network.

        Raises:
            ArtifactError: it is a pipeline's artifact, with several.
        """
        if self.manifest.get("kind") == "pipeline":
            found = [each["folder"] for told in self.manifest["components"].values()
                     for each in told.get("entries", ())]  # fmt: skip
            names = ", ".join(str(self._source / each) for each in found) or "none"
            unzip = "unpack it and " if self._holder else ""
            raise ArtifactError(
                f"{self._source}: a pipeline's artifact, and this takes a network's; {unzip}name "
                f"one of its parts: {names}"
            )
        return self.manifest


def unzip(source: Path, folder: Path) -> None:
    """Unpack an artifact's zip, refusing names that would leave the folder."""
    if not zipfile.is_zipfile(source):
        raise ArtifactError(
            f"{source}: neither a folder nor a complete zip; copy the artifact again"
        )
    try:
        with zipfile.ZipFile(source) as archive:
            safe = SAFE_PATH if PIPELINE in archive.namelist() else SAFE_NAME
            for info in archive.infolist():
                if problem := _unsafe(info, safe):
                    raise ArtifactError(
                        f"{source}: the zip holds {info.filename!r}, {problem}; it was not written "
                        "by effuse, and nothing was unpacked"
                    )
            archive.extractall(folder)
    except DAMAGED as error:
        raise ArtifactError(f"{source}: the zip is damaged ({error}); copy it again") from error


def _unsafe(info: zipfile.ZipInfo, safe: re.Pattern[str]) -> str | None:
    """Why a member of a zip is not unpacked, or None."""
    if not safe.fullmatch(info.filename):
        return "a path that leaves the artifact"
    if stat.S_ISLNK(info.external_attr >> 16):
        return "a symbolic link"
    return None


def check(folder: Path, name: str) -> dict[str, Any]:
    """The manifest of an artifact whose files are all as they were written.

    Raises:
        ArtifactError: a file is missing or differs, or the artifact is of a newer version.
    """
    kind = PIPELINE if (folder / PIPELINE).is_file() else MANIFEST
    try:
        manifest = json.loads((folder / kind).read_text(encoding="utf-8"))
        version = int(manifest["format"])
    except FileNotFoundError:
        raise ArtifactError(f"{name}: no {MANIFEST} in it, so this is no effuse artifact") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtifactError(f"{name}: {kind} is damaged ({error}); copy it again") from None
    if version > FORMAT:
        raise ArtifactError(
            f"{name}: written by effuse {manifest.get('effuse', '?')} in artifact format "
            f"{version}; this effuse reads up to {FORMAT}; update it: pip install -U effuse"
        )
    sums = _sums(folder, name, kind)
    for file in manifest.get("files", {}):
        if file not in sums:
            raise ArtifactError(f"{name}: {SUMS} does not cover {file}; copy the artifact again")
    for file, digest in sums.items():
        path = folder / file
        if not path.is_file():
            raise ArtifactError(f"{name}: {file} is missing; copy the artifact again")
        if sha256(path) != digest:
            raise ArtifactError(
                f"{name}: {file} is not as it was written (SHA-256 differs): truncated or edited; "
                "copy the artifact again, or compile again"
            )
    return dict(manifest)


def _sums(folder: Path, name: str, kind: str) -> dict[str, str]:
    safe = SAFE_PATH if kind == PIPELINE else SAFE_NAME
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ArtifactError(f"{name}: {SUMS} is missing; copy the artifact again") from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{name}: {SUMS} is damaged ({error}); copy it again") from None
    found = {}
    for line in lines:
        digest, _, file = line.partition("  ")
        if not safe.fullmatch(file):
            raise ArtifactError(f"{name}: {SUMS} names {file!r}, which leaves the artifact")
        found[file] = digest
    if kind not in found:
        raise ArtifactError(f"{name}: {SUMS} does not cover {kind}; copy the artifact again")
    return found
