"""What a pass says while it works: rewrites spent, candidates rejected, notes, data."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Log:
    """The record of one pass in the making; `fuel` is how many rewrites are still allowed.

    `data` takes figures for charts and programs, in JSON's types.
    """

    fuel: int | None = None
    rewrites: Counter[str] = field(default_factory=Counter)
    reasons: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def spend(self, rule: str) -> bool:
        """Take one unit of fuel for a rewrite; False when the tank is empty."""
        if self.fuel is not None:
            if self.fuel <= 0:
                return False
            self.fuel -= 1
        self.rewrites[rule] += 1
        return True

    def reject(self, rule: str, reason: str) -> None:
        """Count a candidate that the rule left alone."""
        self.reasons[rule][reason] += 1

    def note(self, text: str) -> None:
        """Add a sentence for the report."""
        self.notes.append(text)
