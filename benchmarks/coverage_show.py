"""The coverage matrix as Markdown: counts, the table, and the reason of every miss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coverage_stages import STAGES

DENOISERS = ("UNet", "transformer", "ControlNet")
TITLES = {"denoisers": DENOISERS, "autoencoders": ("autoencoder",), "encoders": ("encoder",),
          "others": ("other",)}  # fmt: skip
MARKS = {True: "yes", None: ""}


def markdown(document: Mapping[str, Any]) -> str:
    """The whole page."""
    about = ", ".join(f"{name} {each}" for name, each in document["versions"].items())
    lines = ["# Every network class of diffusers, stage by stage", "",
             f"{document['date']}, {document['machine']['processor']}; {about}.", "",
             "A small network of each class, with random weights, on inputs that effuse derives.",
             "Where it derives none, coverage_inputs.json may tell some: a miss of `inputs` alone.",
             "What is blank was not run; a class that is not listed was not tried.",
             "An autoencoder is taken as two networks, its `decode` and its `encode`.", "",
             *counts(document), ""]  # fmt: skip
    for title, kinds in TITLES.items():
        names = of_kinds(document, kinds)
        lines += [f"## {title.capitalize()}", "", *table(document, names), ""]
    return "\n".join([*lines, "## Misses", "", *misses(document)]) + "\n"


def of_kinds(document: Mapping[str, Any], kinds: tuple[str, ...]) -> list[str]:
    """The classes of some kinds."""
    return [name for name, kind in document["classes"].items() if kind in kinds]


def counts(document: Mapping[str, Any]) -> list[str]:
    """How many classes reach each stage, of how many, and of how many that were tried."""
    lines = [f"| | classes | tried | {' | '.join(STAGES)} |", "|---|" + "--:|" * (len(STAGES) + 2)]
    for title, kinds in TITLES.items():
        names = of_kinds(document, kinds)
        rows = [document["rows"][name] for name in names if name in document["rows"]]
        good = [sum(row["stages"].get(stage) is True for row in rows) for stage in STAGES]
        lines.append(f"| {title} | {len(names)} | {len(rows)} | {' | '.join(map(str, good))} |")
    return lines


def table(document: Mapping[str, Any], names: list[str]) -> list[str]:
    """A line for each class that was tried."""
    lines = [f"| class | parameters | {' | '.join(STAGES)} |", "|---|--:|" + "---|" * len(STAGES)]
    for name in names:
        row = document["rows"].get(name)
        if row is not None:
            marks = " | ".join(MARKS.get(row["stages"].get(stage), "no") for stage in STAGES)
            size = f"{row['parameters']:,}" if "parameters" in row else ""
            lines.append(f"| {name} | {size} | {marks} |")
    return lines


def misses(document: Mapping[str, Any]) -> list[str]:
    """The reason of every stage that failed."""
    return [
        f"- {name}, {stage}: {reason}"
        for name, row in sorted(document["rows"].items())
        for stage, reason in row["stages"].items()
        if reason is not True
    ]
