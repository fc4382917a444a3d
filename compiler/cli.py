"""The console script `effuse`: signals and missing libraries here, the verbs in `cli_app`."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn

from effuse.errors import MissingExtra, require

SIGNALLED = 128  # a shell's exit code of a process that a signal ended, plus the signal


def main() -> None:
    """Run the command line; exits with 0, 1 (an error), 2 (wrong usage), 130 or 143 (a signal)."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        for library in ("typer", "rich"):
            require(library)
        from effuse.cli_app import app

        app()
    except MissingExtra as error:
        sys.exit(f"effuse: {error}")
    except Ended as end:
        print("interrupted", file=sys.stderr)
        sys.exit(end.code)


class Ended(SystemExit):
    """A signal asked the process to end; its code is the one that a shell would report."""


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """End by an exception, so that temporary files are removed on the way out.

    Not by KeyboardInterrupt: where that passes through `exec` of a string, as library code runs at
    any time, CPython remembers it and ends by the signal although the exception was caught.
    """
    raise Ended(SIGNALLED + number)


if __name__ == "__main__":
    main()
