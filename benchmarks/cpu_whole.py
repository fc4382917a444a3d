"""Compare whole runs of CPU runtimes: what reusing features between steps adds to 8 bits.

The rows of cpu.py that are named here, each in a process of its own, run DDIM over the network's
schedule in turns. Writes whole-NETWORK.json and .md. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cpu import facts, make_job, prepare
from cpu_networks import NETWORKS, Plain
from cpu_peers import BASELINE, all_rows
from cpu_run import RowError, Runner
from cpu_torch import in_torch
from cpu_trajectory import sample

from effuse.evaluate import picture_db

PEER = "OpenVINO + NNCF int8"
CONFIGS = ("exact", "w8a8", "w8a8-cache")
WAYS = ("", ", OpenVINO", ", OpenVINO bf16")
OURS = tuple(f"effuse {name}{way}" for name in CONFIGS for way in WAYS)
ROWS = (BASELINE, PEER, f"{PEER}, f32", *OURS)
FITTING = (
    "unet-36m-50",
    "tiny",
)  # networks without guidance whose output is of the sample's shape


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 1 if a row failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", choices=FITTING, default=FITTING[0])
    add("--rounds", type=int, default=5, help="runs of each row (default: 5)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="default: all processors")
    add("--timeout", type=float, default=1800, help="seconds that a row may take to build")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.threads < 1:
        parser.error("--rounds and --threads take 1 or more")
    arguments.seconds = 0.0  # rounds are whole runs
    with tempfile.TemporaryDirectory(prefix="effuse-") as folder:
        report = measure(arguments, Path(folder))
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = arguments.out / f"whole-{arguments.network}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n",
                                         encoding="utf-8")  # fmt: skip
    stem.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    print(markdown(report))
    return int(any("error" in row for row in report["rows"]))


def measure(arguments: Any, folder: Path) -> dict[str, Any]:
    """Build and load the rows, sample with each in turns."""
    name = arguments.network
    data, expected = prepare(NETWORKS[name], folder, arguments.threads)
    rows = [row for row in all_rows(CONFIGS) if row.name in ROWS]
    runners = [Runner(row, make_job(row, name, folder, data, arguments), arguments.timeout)
               for row in rows]  # fmt: skip
    try:
        for runner in runners:
            print(f"{name}: {runner.row.name}", flush=True)
            runner.prepare(expected)
        for turn in range(arguments.rounds):
            for runner in runners[:: 1 if turn % 2 == 0 else -1]:
                sampled(runner)
    finally:
        for runner in runners:
            runner.close()
    report = facts(name, data, arguments)
    truth = exact_picture(name, runners[0].job)
    report["rows"] = [result(runner, truth) for runner in runners]
    return report


def sampled(runner: Runner) -> None:
    """One run of a row, if it has not failed."""
    if runner.process is None or runner.failed:
        return
    try:
        runner.rounds.append([runner.process.ask("sample")["seconds"]])
    except RowError as error:
        runner.fail(error)


def exact_picture(name: str, job: Any) -> np.ndarray:
    """What the network itself draws."""
    inputs = job.judged[0]
    plain = Plain(NETWORKS[name].make(), list(inputs)).eval()
    return sample(in_torch(plain, plain.names), inputs, job.timesteps)[0]


def result(runner: Runner, truth: np.ndarray) -> dict[str, Any]:
    """A row's figures."""
    if runner.failed:
        return runner.result
    seconds = [each[0] for each in runner.rounds]
    picture = np.load(runner.job.place("picture.npy"))
    return {
        "name": runner.row.name, "s": statistics.median(seconds), "s_rounds": seconds,
        "psnr_db": picture_db(truth, picture), "sqnr_db": runner.result["sqnr_db"],
    }  # fmt: skip


def markdown(report: dict[str, Any]) -> str:
    """The table."""
    peer = next((row for row in report["rows"] if row["name"] == PEER and "s" in row), None)
    setting = report["setting"]
    lines = [f"## {setting['summary']}: whole runs of {len(setting['timesteps'])} steps", "",
             f"| configuration | s a run | × {PEER} | PSNR to eager's picture, dB |",
             "|---|---:|---:|---:|"]  # fmt: skip
    for row in report["rows"]:
        if "error" in row:
            lines.append(f"| {row['name']} | failed: {row['error']} | | |")
            continue
        ratio = "" if peer is None else f"{times_as_fast(row, peer):.2f}×"
        lines.append(f"| {row['name']} | {row['s']:.2f} | {ratio} | {row['psnr_db']:.1f} |")
    used = report["machine"]
    lines += [
        "",
        f"- {report['date']}; {used['processor']}, {setting['threads']} threads; "
        f"{setting['rounds']} runs in turns",
        *(f"- {each}" for each in report["notes"]),
    ]
    return "\n".join([*lines, ""])


def times_as_fast(row: dict[str, Any], peer: dict[str, Any]) -> float:
    """The median over the rounds."""
    return statistics.median(
        slow / fast for slow, fast in zip(peer["s_rounds"], row["s_rounds"], strict=True)
    )


if __name__ == "__main__":
    sys.exit(main())
