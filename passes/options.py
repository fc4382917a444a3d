"""Checks of a pass's options, with the option, what was expected, and what came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from effuse.errors import ConfigError, nearest


def check_choice(owner: str, name: str, value: str, known: Iterable[str]) -> None:
    """Raise ConfigError for an option that is none of the known ones."""
    if value not in known:
        raise ConfigError(f"{owner}: {name}={value!r} is unknown{nearest(str(value), known)}")


def check_sequence(owner: str, name: str, value: Any, what: str) -> None:
    """Raise ConfigError for an option that is no sequence, or a string."""
    if not isinstance(value, (tuple, list)):
        raise ConfigError(f"{owner}: {name}={value!r}: expected a sequence of {what}")


def check_whole(owner: str, name: str, value: int, low: int, high: int | None = None) -> None:
    """Raise ConfigError for a number that is not whole or out of its range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        most = "" if high is None else f" and at most {high}"
        raise ConfigError(
            f"{owner}: {name}={value!r}: expected a whole number, at least {low}{most}"
        )
