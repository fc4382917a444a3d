"""The verb bisect: which rewrite takes the output too far from the original."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from effuse import build
from effuse.cli_build import Request, check_folder, example_inputs, program_text
from effuse.cli_diff import difference, show_rows
from effuse.cli_text import out
from effuse.config import Config
from effuse.errors import VerifyError
from effuse.inspect_model import load_folder
from effuse.pass_manager import bisect, run_passes
from effuse.passes import Canonicalize
from effuse.program import Program
from effuse.progress import phases
from effuse.statistics import Calibration
from effuse.verify import compare

SHOWN = 24  # lines of the difference


@dataclass(frozen=True)
class Trial:
    """The passes run with so many rewrites allowed; no program where verification failed."""

    program: Program | None
    sqnr_db: float | None
    failure: str = ""

    def words(self) -> str:
        """The result in one word or two."""
        return self.failure or f"{self.sqnr_db:.1f} dB"


class Trials:
    """Runs a configuration's passes on one captured network, with more or less fuel."""

    def __init__(self, program: Program, settings: Config) -> None:
        self.program, self.settings = program, settings
        self._done: dict[int | None, Trial] = {}
        self._calibrations: dict[str, Calibration] = {}

    def run(self, fuel: int | None) -> Trial:
        """The result with `fuel` rewrites (None: all of them)."""
        if fuel not in self._done:
            self._done[fuel] = self._run(fuel)
        return self._done[fuel]

    def same(self, fuel: int | None, other: int) -> None:
        """`other` rewrites give what `fuel` gave."""
        self._done[other] = self.run(fuel)

    def _run(self, fuel: int | None) -> Trial:
        passes = (Canonicalize(), *self.settings.passes)
        try:
            result = run_passes(self.program, passes, self._calibrate, fuel=fuel)
        except VerifyError as error:
            return Trial(None, None, f"not verified: {error}")
        measured = compare(result)
        assert measured is not None  # the examples are real tensors
        return Trial(result, measured[1])

    def _calibrate(self, current: Program) -> Calibration:
        """Statistics are kept by the nodes' names, so equal text and names may share them."""
        names = [node.name for part in current.parts for node in part.graph.nodes]
        key = " ".join((program_text(current), *names))
        if key not in self._calibrations:
            self._calibrations[key] = build.calibrate_for(self.settings, current, None)
        return self._calibrations[key]

    def good(self, fuel: int, floor: float) -> bool:
        """Whether the result with `fuel` rewrites is verified, and not under `floor` dB."""
        ratio = self.run(fuel).sqnr_db
        return ratio is not None and ratio >= floor


def hunt(request: Request, floor: float) -> None:
    """Find the first rewrite that takes the result under `floor` dB, and print what it did."""
    check_folder(request.model)
    console, settings = out(), request.settings()
    schedule, network = request.schedule(), load_folder(Path(request.model))
    inputs = example_inputs(request, network, build.timesteps_of(schedule))
    program = build.capture_program(network, inputs, schedule, settings)
    trials = Trials(program, settings)
    total = count_rewrites(trials)
    with phases(True) as show:
        tried: list[int] = []

        def good(fuel: int) -> bool:
            tried.append(fuel)
            show("bisect", len(tried), total.bit_length() + 2)
            return trials.good(fuel, floor)

        found = bisect(good, total)
    if found is None:
        words = trials.run(total).words()
        console.print(f"no rewrite: with all {total} of them the output keeps {words}")
        return
    tell_rewrite(console, trials, found, total, floor)


def count_rewrites(trials: Trials) -> int:
    """How many rewrites the passes make in all, or could before verification failed."""
    result = trials.run(None).program
    if result is not None:
        total = sum(sum(record.rewrites.values()) for record in result.records)
        trials.same(None, total)
        return total
    fuel = 1
    while trials.run(fuel).program is not None:
        fuel *= 2
    return fuel


def tell_rewrite(console: Console, trials: Trials, found: int, total: int, floor: float) -> None:
    """The pass, the rule, its number, the dB before and after, and the lines that changed."""
    after = trials.run(found)
    if found == 0:
        console.print(f"before any rewrite the output is at {after.words()}, under {floor:g} dB")
        return
    before = trials.run(found - 1)
    console.print(f"[bold]rewrite {found} of {total}[/]: {escape(changed_rule(before, after))}")
    console.print(f"  before: {before.words()}")
    console.print(f"  after:  {escape(after.words())}  (asked for: {floor:g} dB)")
    if before.program is None or after.program is None:
        return
    texts = program_text(before.program), program_text(after.program)
    rows = (row for _, hunk in difference(*texts) for row in hunk if row.tag != " ")
    show_rows(console, list(islice(rows, SHOWN)))
    console.print(f"look further with: EFFUSE_FUEL={found} EFFUSE_DUMP=folder effuse compile …")


def changed_rule(before: Trial, after: Trial) -> str:
    """`quantize, rule 'static linear', its 12th`: what the last unit of fuel was spent on."""
    if before.program is None or after.program is None:
        return "verification fails"
    pairs = zip(before.program.records, after.program.records, strict=True)
    for one, other in pairs:
        for rule, count in other.rewrites.items():
            if count > one.rewrites.get(rule, 0):
                return f"{other.name}, rule {rule!r}, its number {count}"
    return "a pass that does not count its rewrites"
