"""Every network class that the installed diffusers exports × stage: does it compile, is it right?

    python benchmarks/coverage.py                  # every class; minutes on two cores
    python benchmarks/coverage.py --only "Flux|SD3"  # classes by name; others stay
    python benchmarks/coverage.py --add            # goes on where it was stopped
    python benchmarks/coverage.py --list           # name the classes, run none
    python benchmarks/coverage.py --search         # look for small configurations again

A class is built small, with random weights: its configuration is its own defaults shrunk
(coverage_config.py), kept in coverage_configs.json for the version of diffusers; its inputs are
those that effuse derives. Each class runs in a process of its own, so that a crash is a row. Writes
coverage.json and .md after every class, with the reason of every miss.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from coverage_config import Search, networks
from coverage_show import markdown
from coverage_stages import EACH_STEP, STAGES, Subject, reason_of, run_stages
from rich.console import Console

from effuse.build import versions
from effuse.evaluate import machine

ROOT = Path(__file__).resolve().parent
CONFIGS = ROOT / "coverage_configs.json"
LIBRARIES = ("effuse", "torch", "onnxruntime", "diffusers")
ORDER = ("UNet", "transformer", "ControlNet", "autoencoder", "encoder", "other")
COMPUTING = 150  # seconds of one class at most
MEMORY = 3 << 30  # bytes of one class at most: one that could not be shrunk is a row
CONSOLE = Console()


def main(given: Sequence[str] | None = None) -> int:
    """Read the arguments and run; 0 whatever the classes do, since a miss is a row."""
    options = parsed(given)
    warnings.simplefilter("ignore")
    known = networks()
    chosen = sorted((name for name in known if re.search(options.only, name)),
                    key=lambda name: (ORDER.index(known[name]), name))  # fmt: skip
    if options.list:
        CONSOLE.print("\n".join(f"{known[name]:12} {name}" for name in chosen), highlight=False)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    document = opened(options)
    document["classes"] = known
    if options.add:
        chosen = [name for name in chosen if name not in document["rows"]]
    torch.set_num_threads(1)
    study(chosen, document, options)
    return 0


def parsed(given: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", default="", metavar="REGEX", help="classes with such names")
    add("--add", action="store_true", help="keep the classes that an earlier run has finished")
    add("--list", action="store_true", help="name the classes, run none")
    add("--search", action="store_true", help="look for small configurations again")
    add("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}")
    add("--jobs", type=int, default=2, help="classes at a time (default: 2)")
    add("--out", type=Path, default=ROOT / "results", help="folder of the results")
    options = parser.parse_args(given)
    options.stages = tuple(options.stages.split(","))
    if unknown := set(options.stages) - set(STAGES):
        parser.error(f"--stages: {', '.join(sorted(unknown))} is none of {', '.join(STAGES)}")
    return options


def study(chosen: Sequence[str], document: dict[str, Any], options: argparse.Namespace) -> None:
    """Run the classes, some at a time, writing what there is after each."""
    todo, running = list(chosen), {}
    while todo or running:
        while todo and len(running) < options.jobs:
            name = todo.pop(0)
            running[start(name, options)] = name
        process, status = os.wait()
        name = running.pop(process)
        row = collected(name, status, options)
        document["rows"][name] = row
        left = len(todo) + len(running)
        CONSOLE.print(f"{name}: {told(row)} ({left} left)", markup=False, highlight=False)
        write(document, options)


def start(name: str, options: argparse.Namespace) -> int:
    """A child process for one class; forked, so that the libraries are loaded once."""
    process = os.fork()
    if process:
        return process
    resource.setrlimit(resource.RLIMIT_CPU, (COMPUTING, COMPUTING + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    status = 1
    try:
        one(name, options)
        status = 0
    except Exception as error:
        partial(name, options).write_text(json.dumps({"stages": {"built": reason_of(error)}}))
        status = 0
    finally:
        os._exit(status)


def one(name: str, options: argparse.Namespace) -> None:
    """Find the class's configuration, if it is not known, and take it through the stages."""
    import diffusers

    place = partial(name, options)
    place.write_text("{}", encoding="utf-8")
    home, _, method = name.partition(".")
    kind = getattr(diffusers, home)
    known = {} if options.search else saved().get(name)
    given = told_inputs().get(name, {})
    if given:
        known = {"config": Search(kind, hints().get(home, {}), method).guess(), "side": None}
    elif not known:
        search = Search(kind, hints().get(home, {}), method)
        known = {"config": search.find(), "side": search.side}
        place.write_text(json.dumps({"found": known, "stages": search.failed}), encoding="utf-8")
        if search.failed:
            return

    def tell(row: Mapping[str, Any]) -> None:
        place.write_text(json.dumps({"found": known, **row}), encoding="utf-8")

    stages = tuple(s for s in options.stages if not (method and s in EACH_STEP))
    run_stages(Subject(kind, known["config"], known["side"], method, given), tell, stages)


def partial(name: str, options: argparse.Namespace) -> Path:
    """Where a child leaves what it knows."""
    return Path(options.out) / f".coverage-{name}.json"


def collected(name: str, status: int, options: argparse.Namespace) -> dict[str, Any]:
    """A class's row, a crash or the end of its time told as what the next stage failed with."""
    place = partial(name, options)
    row: dict[str, Any] = json.loads(place.read_text(encoding="utf-8")) if place.exists() else {}
    place.unlink(missing_ok=True)
    stages = row.setdefault("stages", {})
    if status:
        number = os.waitstatus_to_exitcode(status)
        word = signal.Signals(-number).name if number < 0 else f"exit {number}"
        late = f"took more than {COMPUTING} s" if word == "SIGXCPU" else f"the process died: {word}"
        stages.setdefault(next((each for each in STAGES if each not in stages), STAGES[-1]), late)
    return row


def told(row: Mapping[str, Any]) -> str:
    """A row in a line."""
    stages = row["stages"]
    good = [name for name in STAGES if stages.get(name) is True]
    bad = next((f"; {name}: {stages[name]}" for name in STAGES
                if isinstance(stages.get(name), str)), "")  # fmt: skip
    return f"{' '.join(good)}{bad[:200]}"


def saved() -> dict[str, Any]:
    """The small configurations of the installed diffusers, by class."""
    if not CONFIGS.exists():
        return {}
    found = json.loads(CONFIGS.read_text(encoding="utf-8"))
    return found.get(versions(("diffusers",))["diffusers"], {})  # type: ignore[no-any-return]


def hints() -> dict[str, Any]:
    """Settings that a class has no defaults for, or that do not fit each other."""
    path = ROOT / "coverage_hints.json"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def told_inputs() -> dict[str, Any]:
    """Inputs of classes for which effuse derives none."""
    path = ROOT / "coverage_inputs.json"
    return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def opened(options: argparse.Namespace) -> dict[str, Any]:
    """The document, with the rows of an earlier run of the same versions."""
    fresh = {"date": time.strftime("%Y-%m-%d"), "versions": versions(LIBRARIES),
             "machine": {key: machine()[key] for key in ("processor", "cores")}}  # fmt: skip
    path = options.out / "coverage.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = before.get("versions") == fresh["versions"]
    return {**fresh, "rows": before["rows"] if same else {}}


def write(document: Mapping[str, Any], options: argparse.Namespace) -> None:
    """The rows, the tables, and the configurations that were found."""
    rows = document["rows"]
    text = json.dumps({**document, "rows": dict(sorted(rows.items()))}, indent=1) + "\n"
    (options.out / "coverage.json").write_text(text, encoding="utf-8")
    (options.out / "coverage.md").write_text(markdown(document), encoding="utf-8")
    version = document["versions"]["diffusers"]
    every = json.loads(CONFIGS.read_text(encoding="utf-8")) if CONFIGS.exists() else {}
    good = {name: row["found"] for name, row in rows.items()
            if "found" in row and row["stages"].get("inputs") is True}  # fmt: skip
    every[version] = dict(sorted({**every.get(version, {}), **good}.items()))
    CONFIGS.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
