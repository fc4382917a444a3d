"""What a rule of the linter is: a row of data with a check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from effuse.lint_onnx import Model, Version

if TYPE_CHECKING:
    import onnx_ir as ir

Severity = Literal["error", "warning", "info"]
Found = tuple["ir.Node | None", str]
Check = Callable[[Model], Iterable[Found]]


@dataclass(frozen=True)
class Rule:
    """One documented rule of a target.

    Args:
        id: a word or two.
        targets: whose rule it is: `tensorrt`, `onnxruntime`, `openvino`.
        severity: `error` where the target refuses the model or computes something else,
            `warning` where it costs speed or accuracy, `info` where it is good to know.
        rule: what must hold.
        source: title and section of the documentation, with its address.
        check: yields the nodes that break the rule (None: the whole model), and what was found.
        remedy: what to do.
        since: the target's first version that has the rule; None: all up to `until`.
        until: the first version without it.
    """

    id: str
    targets: tuple[str, ...]
    severity: Severity
    rule: str
    source: str
    check: Check
    remedy: str
    since: Version | None = None
    until: Version | None = None

    def applies(self, family: str, version: Version) -> bool:
        """Whether the rule is one of a target in a version."""
        old = self.since is None or version >= self.since
        return family in self.targets and old and (self.until is None or version < self.until)
