"""The figures, the table and the remarks of the CPU benchmark, from what its rows measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from cpu_peers import BASELINE, OURS

Result = Mapping[str, Any]
SQNR_CEILING = 200.0
RIVALS = (
    "ORT quantize_static",
    "OpenVINO + NNCF int8",
    "OpenVINO + NNCF int8, transformer",
)  # what ours are compared with, pairwise
COLUMNS = (
    "configuration", f"× {BASELINE}", "SQNR, dB", "ms", "size, MB",
    "peak RSS, MB", "RSS of the build, MB", "build, s", "",
)  # fmt: skip


def typical(rounds: Sequence[Sequence[float]]) -> list[float]:
    """The median of each round's times."""
    return [statistics.median(times) for times in rounds]


def ratios(base: Sequence[float], own: Sequence[float]) -> list[float]:
    """How many times as fast as the baseline in each round."""
    return [slow / fast for slow, fast in zip(base, own, strict=True)]


def figures(rounds: Sequence[Sequence[float]], base: Sequence[float] | None) -> dict[str, Any]:
    """A row's times: milliseconds, and the ratio to the baseline's typical times, if it ran.

    Ratios are taken round by round, so that a machine that gets busy does so for both.
    """
    own = typical(rounds)
    found: dict[str, Any] = {
        "ms": 1000 * statistics.median(own),
        "ms_rounds": [1000 * each for each in own],
        "calls": [len(times) for times in rounds],
    }
    if base is not None:
        each = ratios(base, own)
        found |= {"ratio": statistics.median(each), "ratio_rounds": each}
    return found


def cells(row: Result) -> tuple[str, ...]:
    """A line of the table, by COLUMNS."""
    if "error" in row:
        return (row["name"], *("",) * (len(COLUMNS) - 2), f"failed: {row['error']}")
    ratio = f"{row['ratio']:.2f}×" if "ratio" in row else ""
    return (
        row["name"],
        ratio,
        decibels(row["sqnr_db"]),
        f"{row['ms']:.2f}",
        f"{row['bytes'] / 1e6:.1f}" + ("" if row["on_disk"] else "*"),
        f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['build_peak_bytes'] / 1e6:.0f}" if row["build_peak_bytes"] else "",
        f"{row['build_s'] + row['load_s']:.1f}",
        row["remark"],
    )


def decibels(value: float) -> str:
    """An SQNR as it is read."""
    if abs(value) >= SQNR_CEILING:
        return "equal" if value > 0 else "not finite"
    return f"{value:.1f}"


def versus(results: Sequence[Result]) -> list[str]:
    """One sentence for each of ours against each 8-bit rival that ran."""
    ran = {row["name"]: row for row in results if "error" not in row}
    ours = [row for name, row in ran.items() if name.startswith(OURS)]
    return [
        f"{mine['name']} against {name}: {paired(mine, ran[name]):.2f}× as fast, "
        f"{mine['sqnr_db'] - ran[name]['sqnr_db']:+.1f} dB, "
        f"{mine['bytes'] / ran[name]['bytes']:.2f}× the size"
        for mine in ours
        for name in RIVALS
        if name in ran
    ]


def paired(mine: Result, other: Result) -> float:
    """The median over the rounds of how many times as fast `mine` is."""
    return statistics.median(ratios(other["ms_rounds"], mine["ms_rounds"]))


def noise(results: Sequence[Result]) -> list[str]:
    """How far the baseline's rounds lie apart."""
    base = next((row for row in results if row["name"] == BASELINE and "ms" in row), None)
    if base is None:
        return []
    low, high = min(base["ms_rounds"]), max(base["ms_rounds"])
    return [f"{BASELINE} took {low:.2f} to {high:.2f} ms by round: the noise of the machine"]


def remarks(report: Mapping[str, Any]) -> list[str]:
    """What has to be known beside the table."""
    used, setting = report["machine"], report["setting"]
    names = (f"{name} {version}" for name, version in report["versions"].items() if version)
    return [
        f"{report['date']}; {used['processor']}, {used['cores']} cores, "
        f"{setting['threads']} threads; {used['flags']}",
        ", ".join(names),
        f"{setting['rounds']} rounds in turns of {setting['seconds']:g} s; "
        f"SQNR over {setting['judged']} inputs, calibration on {setting['calibration']} others",
        *report["notes"],
        *versus(report["rows"]),
        *noise(report["rows"]),
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """A network's results as Markdown."""
    setting = report["setting"]
    lines = [f"## {setting['network']}: {setting['summary']}", "", f"| {' | '.join(COLUMNS)} |"]
    lines += ["|---|" + "---:|" * (len(COLUMNS) - 2) + "---|"]
    for row in report["rows"]:
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells(row))} |")
    return "\n".join([*lines, "", *(f"- {each}" for each in remarks(report)), ""])
