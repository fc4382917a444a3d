"""Every exception that effuse raises on purpose, and the two helpers that phrase them."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class EffuseError(Exception):
    """Base of every error that effuse raises on purpose."""


class MissingExtra(EffuseError, ImportError):
    """A library of an optional extra is not installed."""


class ConfigError(EffuseError, ValueError):
    """The configuration names something unknown or asks for something impossible."""


class CaptureError(EffuseError):
    """The network could not be captured as a graph."""


class PassError(EffuseError):
    """A pass could not do what it was asked to do."""


class VerifyError(EffuseError):
    """A graph does not hold what its stage promises; a defect of the pass before."""


class CalibrationError(EffuseError, ValueError):
    """Calibration data are missing, empty or not finite."""


class BackendError(EffuseError):
    """A back end cannot build or run the program."""


class ArtifactError(EffuseError):
    """A saved artifact is damaged, unsafe, or of a version that this effuse does not read."""


class InputError(EffuseError, ValueError):
    """A call of a compiled network does not fit what it was compiled for."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """End of an error message: the nearest of `choices`, and all of them."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{hint} (known: {', '.join(names) or 'none'})"


def require(module: str, extra: str = "compiler") -> ModuleType:
    """Import `module`, or say which command installs it.

    Raises:
        MissingExtra: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtra(
            f"this needs {error.name!r}, which is not installed; run: pip install 'effuse[{extra}]'"
        ) from error
