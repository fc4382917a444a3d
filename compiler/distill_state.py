"""A training's state in a folder: tensors as safetensors, the rest as JSON, whole at any moment.

`state.json` names the tensors' file that it belongs to and is renamed into place last, so a process
that is killed while it writes leaves the state before.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from effuse.errors import ConfigError

STATE = "state.json"


@dataclass(frozen=True)
class State:
    """What a training goes on from: `tensors` by name, `data` as JSON."""

    tensors: Mapping[str, Tensor]
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Folder:
    """The folder of one training; `settings` are what has to be the same to go on with it."""

    path: Path
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, path: str, settings: Mapping[str, Any]) -> Folder | None:
        """The folder, made if there is none; None for an empty name.

        Raises:
            ConfigError: it cannot be made.
        """
        if not path:
            return None
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"resume: expected a folder that can be written, came {path!r} "
                f"({error.strerror}); name another, or none"
            ) from error
        return cls(Path(path), settings)

    def read(self) -> State | None:
        """The state that was written last; None where nothing was.

        Raises:
            ConfigError: it is of another training, or damaged.
        """
        try:
            found = json.loads((self.path / STATE).read_text(encoding="utf-8"))
            self._check(found["settings"])
            tensors = load_file(self.path / found["tensors"])
            return State(tensors, found["data"])
        except FileNotFoundError as error:
            if error.filename and Path(error.filename).name == STATE:
                return None
            raise self._damaged(error) from error
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"resume: what is in {str(self.path)!r} is damaged ({error}); delete the folder to "
            "start anew"
        )

    def _check(self, written: Mapping[str, Any]) -> None:
        wanted = json.loads(json.dumps(dict(self.settings)))
        other = [name for name in wanted if written.get(name) != wanted[name]]
        if other:
            told = ", ".join(f"{name} {written.get(name)!r}, not {wanted[name]!r}"
                             for name in other)  # fmt: skip
            raise ConfigError(
                f"resume: {str(self.path)!r} holds another training ({told}); name another folder, "
                "or call with what it was begun with"
            )

    def write(self, state: State) -> None:
        """Keep the state in place of the one before.

        Raises:
            ConfigError: the folder cannot be written to.
        """
        kept = {name: each.detach().cpu().contiguous() for name, each in state.tensors.items()}
        data = {"settings": dict(self.settings), "data": state.data}
        name = f"{hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]}.safetensors"
        self._place(name, lambda path: save_file(kept, path))
        text = json.dumps({**data, "tensors": name})
        self._place(STATE, lambda path: path.write_text(text, encoding="utf-8"))
        for old in self.path.glob("*.safetensors"):
            if old.name != name:
                old.unlink()

    def _place(self, name: str, write: Callable[[Path], Any]) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix=".writing.", dir=self.path) as holder:
                staged = Path(holder) / "file"
                write(staged)
                staged.replace(self.path / name)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"resume: cannot write into {str(self.path)!r} ({error}); free some space and call "
                "again: what was written before is whole"
            ) from error
