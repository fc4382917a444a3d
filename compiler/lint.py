"""Rules that a target's documentation states, checked on any ONNX file without the target.

Nothing of the target need be installed. A rule is a row of data (`effuse.lint_rules.Rule`); the
rows are in `lint_rules_common`, `_tensorrt`, `_trt_ops`, `_onnxruntime` and `_openvino`; the checks
that they share in `lint_rules_qdq` and `lint_rules_ops`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from effuse.errors import ConfigError, nearest
from effuse.lint_files import read
from effuse.lint_onnx import Model, Version
from effuse.lint_rules import Rule, Severity
from effuse.lint_rules_common import COMMON
from effuse.lint_rules_onnxruntime import ONNXRUNTIME
from effuse.lint_rules_openvino import OPENVINO
from effuse.lint_rules_tensorrt import TENSORRT
from effuse.lint_rules_trt_ops import TENSORRT_OPS

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

    AnyModel = str | os.PathLike[str] | onnx.ModelProto | ir.Model

RULES: tuple[Rule, ...] = (*COMMON, *TENSORRT, *TENSORRT_OPS, *ONNXRUNTIME, *OPENVINO)
NEWEST: dict[str, tuple[str, Version]] = {  # target -> whose rules, the version taken for granted
    "tensorrt-10": ("tensorrt", (10, 16)),
    "tensorrt-11": ("tensorrt", (11, 5)),
    "onnxruntime": ("onnxruntime", (1, 31)),
    "openvino": ("openvino", (2026, 4)),
}
TARGETS = tuple(NEWEST)
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")


@dataclass(frozen=True)
class Finding:
    """One place where a model breaks a rule.

    Args:
        rule: the rule's id.
        severity: `error`, `warning` or `info`.
        node: the node's name; empty for nodes without one, and for the whole model.
        op: its operator, with the domain if that is not ONNX's.
        place: where it is in the file: its number in its graph, and which graph.
        found: what is wrong there.
        remedy: what to do.
        source: where the rule is documented.
    """

    rule: str
    severity: Severity
    node: str
    op: str
    place: str
    found: str
    remedy: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def lint(model: AnyModel, target: str, version: str | None = None) -> tuple[Finding, ...]:
    """What of a target's rules a model breaks, errors first.

    External data are not loaded, but for scales and zero points that are stored there.

    Args:
        model: the path of an ONNX file, or the model itself; it is not changed.
        target: one of `TARGETS`.
        version: of the target, e.g. "10.9"; None: the newest whose documentation the rules are of.

    Raises:
        ConfigError: the target or its version is unknown.
        ArtifactError: the file is missing, damaged, or no ONNX model.
    """
    family, number = resolve(target, version)
    indexed = read(model, number)
    rules = [rule for rule in RULES if rule.applies(family, number)]
    found = (finding for rule in rules for finding in check(rule, indexed))
    return tuple(sorted(found, key=lambda each: SEVERITIES.index(each.severity)))


def check(rule: Rule, model: Model) -> Iterator[Finding]:
    """The places where a model breaks one rule."""
    for node, found in rule.check(model):
        name, op, place = describe(model, node)
        yield Finding(rule.id, rule.severity, name, op, place, found, rule.remedy, rule.source)


def describe(model: Model, node: ir.Node | None) -> tuple[str, str, str]:
    """A node's name, operator and place."""
    if node is None:
        return "", "", "the model"
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return node.name or "", op, model.places.get(node, "")


def resolve(target: str, version: str | None = None) -> tuple[str, Version]:
    """Whose rules a target has, and of which version.

    Raises:
        ConfigError: the target is unknown, or the version is none of it.
    """
    if target not in NEWEST:
        raise ConfigError(f"target: {target!r} is not one that is linted{nearest(target, TARGETS)}")
    family, number = NEWEST[target]
    if version is None:
        return family, number
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        raise ConfigError(f"version: expected numbers and dots, such as 10.9; got {version!r}")
    asked = tuple(int(part) for part in version.split("."))
    line = target.partition("-")[2]
    if line and asked[0] != int(line):
        raise ConfigError(f"version: {version} is not one of {target}; give {line}.something")
    return family, asked


def rules_of(target: str, version: str | None = None) -> tuple[Rule, ...]:
    """The rules that a target has in a version.

    Raises:
        ConfigError: the target or its version is unknown.
    """
    family, number = resolve(target, version)
    return tuple(rule for rule in RULES if rule.applies(family, number))
