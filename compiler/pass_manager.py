"""Runs passes in the legal order, verifies after every one, and keeps a record of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from effuse.dump import dump
from effuse.errors import PassError, VerifyError
from effuse.log import Log
from effuse.passes.base import Pass, Purpose, Work
from effuse.plan import to_json
from effuse.program import Program, Record
from effuse.statistics import Calibration
from effuse.verify import check_variants, compare, exact_bound, verify
from effuse.watch import Watch

Progress = Callable[[str, int, int], None]


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    calibrate: Callable[[Program], Calibration] | None = None,
    *,
    drive: Callable[[Program, Watch], None] | None = None,
    fuel: int | None = None,
    dump_to: Path | None = None,
    progress: Progress = lambda what, done, total: None,
    purpose: Purpose | None = None,
) -> Program:
    """Run `passes` one after another, each one verified.

    `fuel` stops rewriting after so many rewrites; `dump_to` gets the text of the graphs after each
    pass. `calibrate` is called by the first pass that needs statistics, and again by a later one
    if any pass has rewritten something since; `drive` samples with a program under the eyes of a
    pass. `purpose` is what the program is built for, for passes that measure.

    Raises:
        PassError: a pass does not apply to this program.
        VerifyError: a pass left the program wrong.
    """
    done: list[str] = []
    captured = program
    verify(program)
    _dump(program, dump_to, 0, "capture")
    calibration: Calibration | None = None
    seen = 0  # records of the program that was calibrated
    for number, each in enumerate(passes, start=1):
        progress(each.name, number - 1, len(passes))
        stale = calibration is None or any(new.rewrites for new in program.records[seen:])
        if each.calibrates and calibrate is not None and stale:
            calibration, seen = calibrate(program), len(program.records)
        log = Log(fuel)
        work = Work(log, calibration, drive, progress, captured, purpose or Purpose())
        program = run_pass(program, each, work, done)
        fuel = log.fuel
        done.append(each.name)
        _dump(program, dump_to, number, each.name)
    progress("verified", len(passes), len(passes))
    return program


def run_pass(program: Program, each: Pass, work: Work, before: list[str]) -> Program:
    """One pass: requires, run, ensures, verify, and the record."""
    if reason := each.requires(program):
        raise PassError(f"{each.name}: {reason}")
    out_of_fuel = work.log.fuel == 0
    with torch.no_grad():
        result = each.run(program, work)
    done = [*before, each.name]
    starved = work.log.fuel == 0 or out_of_fuel
    if (failed := each.ensures(result)) and not starved:
        raise VerifyError(f"{each.name} does not hold what it promises: {failed}")
    verify(result, done)
    if problem := check_variants(result):
        raise VerifyError(f"{each.name}: {problem}")
    measured = compare(result)
    error, ratio = measured or (None, None)
    if each.exact and error is not None and not _lossy_before(program):
        bound = exact_bound(getattr(torch, result.model["dtype"]))
        if error > bound:
            wrong = VerifyError(
                f"{each.name} is exact, but moved the output by {error:.1e} relative to eager "
                f"(bound {bound:.1e}); run `effuse bisect` to find the rewrite"
            )
            wrong.add_note(f"after the passes: {', '.join(done)}")
            raise wrong
    return replace(result, records=(*result.records, record(each, work.log, error, ratio)))


def _lossy_before(program: Program) -> bool:
    return any(not record.exact for record in program.records)


def record(each: Pass, log: Log, error: float | None, ratio: float | None) -> Record:
    """The record of a pass that has run."""
    return Record(
        name=each.name,
        options=to_json(each.options()),
        exact=each.exact,
        rewrites=dict(sorted(log.rewrites.items())),
        reasons={rule: dict(sorted(found.items())) for rule, found in sorted(log.reasons.items())},
        notes=tuple(log.notes),
        error=None if error is None else float(f"{error:.3g}"),
        sqnr_db=None if ratio is None else round(ratio, 2),
        data=log.data,
    )


def _dump(program: Program, folder: Path | None, number: int, name: str) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"# {part.name}\n{dump(part.graph)}" for part in program.parts)
    (folder / f"{number:02d}-{name}.txt").write_text(text)


def fuel_from_environment() -> int | None:
    """EFFUSE_FUEL, for hunting a bad rewrite by hand."""
    value = os.environ.get("EFFUSE_FUEL")
    return int(value) if value else None


def bisect(good: Callable[[int], bool], rewrites: int) -> int | None:
    """The number of the first rewrite that makes `good(fuel)` false, or None if none does.

    `good(n)` compiles with n units of fuel and says whether the result is still right.
    """
    if good(rewrites):
        return None
    low, high = 0, rewrites  # good(low), not good(high)
    if not good(0):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return high
