"""The verb lint: what of a target's documented rules ONNX files break."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from effuse.cli_options import Json
from effuse.cli_text import complain, out, table
from effuse.errors import EffuseError

if TYPE_CHECKING:
    from effuse.lint import Finding
    from effuse.lint_rules import Rule

SHOWN = 8  # places of one rule in one file
COLOURS = {"error": "red", "warning": "yellow", "info": "dim"}
BAD_INPUT = 2

Linted = tuple[str, "tuple[Finding, ...]"]


def lint(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL…", help="ONNX files, or artifacts.")
    ] = None,
    target: Annotated[
        str, typer.Option(help="tensorrt-10, tensorrt-11, onnxruntime or openvino.")
    ] = "onnxruntime",
    version: Annotated[
        str | None, typer.Option(metavar="NUMBER", help="Of the target; the newest if left out.")
    ] = None,
    rules: Annotated[bool, typer.Option("--rules", help="List the rules instead.")] = False,
    as_json: Json = False,
) -> None:
    """Check ONNX files against a target's documented rules.

    Any ONNX file, of any size; nothing of the target need be installed. The exit code is 1 if a
    rule of severity error is broken, and 2 if a file cannot be read.

    \b
    Examples:
      effuse lint --target tensorrt-10 --version 10.9 model.onnx
      effuse lint --target onnxruntime unet.effuse --json
      effuse lint --rules --target tensorrt-11
    """
    if rules == bool(models):
        raise typer.BadParameter("give files to check, or --rules")
    try:
        if rules:
            show_rules(target, version, as_json)
            return
        found = [each for path in models or () for each in linted(path, target, version)]
    except EffuseError as error:
        complain(error)
        raise typer.Exit(BAD_INPUT) from None
    if as_json:
        print(json.dumps({name: [each.to_json() for each in made] for name, made in found}))
    else:
        show_findings(out(), found, target)
    if any(finding.severity == "error" for _, made in found for finding in made):
        raise typer.Exit(1)


def linted(path: str, target: str, version: str | None) -> Iterator[Linted]:
    """The name and the findings of each ONNX file that a path stands for."""
    from effuse import lint as linter
    from effuse.lint_files import opened

    with opened(Path(path)) as files:
        several = len({file.parent for file in files}) > 1  # of a pipeline
        for file in files:
            inner = f"{file.parent.name}/{file.name}" if several else file.name
            name = path if file == Path(path) else f"{path}: {inner}"
            yield name, linter.lint(file, target, version)


def show_findings(console: Console, found: Sequence[Linted], target: str) -> None:
    """For each file a table of places; then what to do about each rule, and its source."""
    for name, made in found:
        counts: Counter[str] = Counter(each.severity for each in made)
        words = ", ".join(f"{counts[each]} {each}" for each in COLOURS if counts[each])
        console.print(f"[bold]{escape(name)}[/] for {target}: {words or 'clean'}")
        if made:
            show_places(console, made)
    remedies = {each.rule: each for _, made in found for each in made}
    if remedies:
        rows = table("rule", "what to do", "source")
        for finding in remedies.values():
            rows.add_row(finding.rule, escape(finding.remedy), escape(finding.source))
        console.print()
        console.print(rows)


def show_places(console: Console, made: Sequence[Finding]) -> None:
    """The places of one file, the first of each rule."""
    rows = table("rule", "severity", "node", "found")
    seen: Counter[str] = Counter()
    for each in made:
        seen[each.rule] += 1
        if seen[each.rule] <= SHOWN:
            severity = f"[{COLOURS[each.severity]}]{each.severity}[/]"
            rows.add_row(each.rule, severity, escape(node_text(each)), escape(each.found))
    console.print(rows)
    for rule, count in seen.items():
        if count > SHOWN:
            console.print(f"  {rule}: {count - SHOWN} more; --json has all", style="dim")


def node_text(finding: Finding) -> str:
    """`MatMul 'name' (node 3)`, or `the model`."""
    if not finding.op:
        return finding.place
    name = f" {finding.node!r}" if finding.node else ""
    return f"{finding.op}{name} ({finding.place})"


def show_rules(target: str, version: str | None, as_json: bool) -> None:
    """Print the rules of a target: what holds, in which versions, and where that is written."""
    from effuse import lint as linter

    rules = linter.rules_of(target, version)
    fields = ("id", "severity", "rule", "since", "until", "remedy", "source")
    if as_json:
        print(json.dumps([{name: getattr(each, name) for name in fields} for each in rules]))
        return
    rows = table("rule", "severity", "what must hold", "versions", "source")
    for each in rules:
        words = (each.id, each.severity, each.rule, span(each), each.source)
        rows.add_row(*map(escape, words))
    console = out()
    console.print(rows)
    console.print(f"{len(rules)} rules", style="dim")


def span(rule: Rule) -> str:
    """The versions that have a rule: `from 10.6 until 10.11`, `all`."""
    ends = (("from", rule.since), ("until", rule.until))
    words = [f"{word} {'.'.join(map(str, version))}" for word, version in ends if version]
    return " ".join(words) or "all"
