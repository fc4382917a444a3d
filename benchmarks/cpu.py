"""Compare CPU runtimes on one network: latency, error, size, memory and build time.

Every row runs in a process of its own on the same inputs with as many threads; the rows take turns.
Ratios are to ONNX Runtime in float32. Peers that are not installed, or fail, say why in the table:

    pip install -c constraints.txt -r benchmarks/requirements.txt

Writes cpu-NETWORK.json and .md for each network. Let nothing else run meanwhile.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from cpu_job import Job, Row, write_inputs
from cpu_networks import NETWORKS, TAEF2, Data, Network, Plain
from cpu_peers import BASELINE, OURS, all_rows
from cpu_run import Runner
from cpu_show import COLUMNS, cells, figures, markdown, remarks, typical
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from effuse.config import resolve
from effuse.errors import ConfigError, nearest
from effuse.evaluate import CPUINFO, processor

VERSIONS = ("torch", "onnxruntime", "onnx", "openvino", "nncf", "torchao", "diffusers", "effuse")
FLAGS = ("avx2", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
PRESETS = ("exact", "w8a8")
DEFAULT = ("unet-36m", "dit-s2", "emoji-unet", "emoji-dit")
TABLE_WIDTH = 160


def main(argv: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 1 if the baseline or one of ours failed."""
    parser = make_parser()
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        networks = [known(name) for name in arguments.network or DEFAULT]
        rows = chosen(all_rows([*PRESETS, *map(checked, arguments.config)]), arguments.only)
    except (ConfigError, ValueError, re.error) as error:
        parser.error(str(error))
    if arguments.rounds < 1 or arguments.threads < 1 or arguments.seconds <= 0:
        parser.error("--rounds and --threads take 1 or more, --seconds more than 0")
    if arguments.taef2:
        os.environ[TAEF2] = str(arguments.taef2.resolve())
    if arguments.list:
        show_list(console)
        return 0
    if arguments.dry_run:
        show_plan(console, networks, rows, arguments)
        return 0
    arguments.out.mkdir(parents=True, exist_ok=True)
    return max(int(run(name, rows, arguments, console)) for name in networks)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--network", action="append", metavar="NAME",
        help=f"may be repeated; default: {', '.join(DEFAULT)}; --list shows all")  # fmt: skip
    add("--config", action="append", default=[], metavar="CONFIG",
        help="another effuse row: a preset, or a TOML file's path; may be repeated")  # fmt: skip
    add("--only", default="", metavar="REGEX", help=f"rows with such names, and {BASELINE}")
    add("--rounds", type=int, default=9, help="turns of each row (default: 9)")
    add("--seconds", type=float, default=1.0, help="how long a turn takes at least (default: 1)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="default: all processors")
    add("--timeout", type=float, default=1800, help="seconds that a row may take to build")
    add("--taef2", type=Path, metavar="FOLDER", help=f"TAEF2's weights; default: ${TAEF2}")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder to write into")
    add("--keep", type=Path, metavar="FOLDER", help="keep the rows' files and logs there")
    add("--list", action="store_true", help="print networks and rows, and stop")
    add("--dry-run", action="store_true", help="print what would run, and stop")
    return parser


def known(name: str) -> str:
    """The name of a network.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in NETWORKS:
        raise ValueError(f"--network: {name!r} is unknown{nearest(name, NETWORKS)}")
    return name


def checked(config: str) -> str:
    """A configuration of effuse that can be read, its path absolute.

    Raises:
        ConfigError: it cannot.
    """
    resolve(config)
    return str(Path(config).resolve()) if config.endswith(".toml") else config


def chosen(rows: Sequence[Row], pattern: str) -> list[Row]:
    """The rows whose names match, and the baseline.

    Raises:
        ValueError: no row matches, or two have one name.
    """
    names = [row.name for row in rows]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--config: two rows are called {min(twice)!r}")
    if not any(re.search(pattern, name) for name in names):
        raise ValueError(f"--only: no row's name matches {pattern!r} (rows: {', '.join(names)})")
    return [row for row in rows if row.name == BASELINE or re.search(pattern, row.name)]


# ---- what there is -------------------------------------------------------------------------------


def show_list(console: Console) -> None:
    """Networks and rows."""
    shown = Table("network", "what it is")
    for name, network in NETWORKS.items():
        shown.add_row(name, network.summary)
    console.print(shown)
    console.print("rows: " + ", ".join(row.name for row in all_rows(PRESETS)), highlight=False)


def show_plan(
    console: Console, networks: Sequence[str], rows: Sequence[Row], arguments: Any
) -> None:
    """What would run."""
    for name in networks:
        console.print(f"[bold]{name}[/]: {escape(NETWORKS[name].summary)}", highlight=False)
    for row in rows:
        needed = {module.split(".")[0] for module in (*row.imports, *row.runtime)}
        lacking = sorted(m for m in needed if importlib.util.find_spec(m) is None)
        state = f"will fail: {', '.join(lacking)} not installed" if lacking else "ready"
        console.print(f"  {row.name}: {state}", markup=False, highlight=False)
    console.print(
        f"{arguments.rounds} rounds of {arguments.seconds:g} s, {arguments.threads} threads; "
        f"would write {', '.join(f'cpu-{name}.json and .md' for name in networks)} "
        f"into {arguments.out}",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


# ---- one network ---------------------------------------------------------------------------------


def run(name: str, rows: Sequence[Row], arguments: Any, console: Console) -> bool:
    """Measure the rows on one network, write the results; whether one that counts failed."""
    start, network = time.perf_counter(), NETWORKS[name]
    with tempfile.TemporaryDirectory(prefix="effuse-") as temporary:
        folder = Path(temporary if arguments.keep is None else arguments.keep / name).resolve()
        console.print(f"{name}: inputs and eager's outputs", highlight=False)
        try:
            data, expected = prepare(network, folder, arguments.threads)
        except FileNotFoundError as error:
            console.print(f"{name} failed: {error}", markup=False, highlight=False)
            return True
        runners = [
            Runner(row, make_job(row, name, folder, data, arguments), arguments.timeout)
            for row in rows
            if network.transformer or not row.transformers
        ]
        try:
            measure(runners, expected, arguments, console, name)
        finally:
            for runner in runners:
                runner.close()
    report = {**facts(name, data, arguments), "rows": results(runners)}
    report["seconds"] = round(time.perf_counter() - start, 1)
    write(report, arguments.out / f"cpu-{name}", console)
    return any(r.failed for r in runners if r.row.name.startswith((OURS, BASELINE)))


def prepare(network: Network, folder: Path, threads: int) -> tuple[Data, np.ndarray]:
    """Write the inputs; the outputs of the network itself, (inputs, …)."""
    import torch

    torch.set_num_threads(threads)
    module = network.make()
    data = network.data(module)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("calibration", "judged"):
        arrays = [{k: v.numpy() for k, v in each.items()} for each in getattr(data, name)]
        write_inputs(folder / f"{name}.npz", arrays)
    plain = Plain(module, list(data.judged[0])).eval()
    with torch.no_grad():
        expected = np.stack([plain(*each.values()).numpy() for each in data.judged])
    return data, expected


def make_job(row: Row, name: str, shared: Path, data: Data, arguments: Any) -> Job:
    """What the row's processes are told; its folder is made."""
    folder = shared / re.sub(r"\W+", "-", row.name)
    folder.mkdir(parents=True, exist_ok=True)
    return Job(
        row=row.name, network=name, threads=arguments.threads, shared=str(shared),
        folder=str(folder), timesteps=data.timesteps,
        config=row.config,
    )  # fmt: skip


def measure(
    runners: Sequence[Runner], expected: np.ndarray, arguments: Any, console: Console, name: str
) -> None:
    """Build and load all rows, then time them in turns, every other round backwards."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task(name, total=len(runners) * (1 + arguments.rounds))

        def begin(what: str, runner: Runner) -> None:
            progress.update(task, description=f"{name}: {what} {runner.row.name}")

        for runner in runners:
            begin("build", runner)
            runner.prepare(expected)
            if runner.failed:
                failure = f"{runner.row.name} failed: {runner.result['error']}"
                console.print(failure, markup=False, highlight=False)
            progress.advance(task)
        for turn in range(arguments.rounds):
            for runner in runners[:: 1 if turn % 2 == 0 else -1]:
                begin(f"round {turn + 1},", runner)
                runner.turn(arguments.seconds)
                progress.advance(task)


def results(runners: Sequence[Runner]) -> list[dict[str, Any]]:
    """Every row's figures; ratios are to the baseline, if it ran."""
    base = next((typical(r.rounds) for r in runners if r.row.name == BASELINE and not r.failed),
                None)  # fmt: skip
    return [r.result if r.failed else r.result | figures(r.rounds, base) for r in runners]


def facts(name: str, data: Data, arguments: Any) -> dict[str, Any]:
    """What the results hold for: date, machine, versions, setting."""
    network = NETWORKS[name]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "flags": flags()},
        "versions": {"python": sys.version.split()[0], **{n: version(n) for n in VERSIONS}},
        "setting": {
            "network": name, "summary": network.summary, "threads": arguments.threads,
            "rounds": arguments.rounds, "seconds": arguments.seconds,
            "calibration": len(data.calibration), "judged": len(data.judged),
            "timesteps": data.timesteps,
        },
        "notes": list(network.notes),
    }  # fmt: skip


def flags() -> str:
    """Which of the instructions that matter here the processor has."""
    have = CPUINFO.read_text(encoding="utf-8").split() if CPUINFO.exists() else []
    return " ".join(name for name in FLAGS if name in have) or "instructions unknown"


def version(name: str) -> str | None:
    """A distribution's version; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def write(report: dict[str, Any], stem: Path, console: Console) -> None:
    """The JSON and the table; printed, too."""
    text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
    stem.with_suffix(".json").write_text(text, encoding="utf-8")
    stem.with_suffix(".md").write_text(markdown(report), encoding="utf-8")
    shown = Table(*COLUMNS, title=report["setting"]["summary"])
    for row in report["rows"]:
        shown.add_row(*map(escape, cells(row)))
    Console(width=max(console.width, TABLE_WIDTH)).print(shown)
    for remark in remarks(report):
        console.print(f"- {remark}", markup=False, highlight=False)
    console.print(f"{stem}.json, .md; {report['seconds']:.0f} s", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
