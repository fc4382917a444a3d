"""Child processes of the CPU benchmark: one a row, asked for one thing at a time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cpu_job import Job, Row

from effuse.metrics import sqnr_db

CHILD = Path(__file__).resolve().parent / "cpu_child.py"
COLORS = re.compile(r"\x1b\[[\d;]*m")
PLACES = re.compile(r"(?<![\w./])(?:/[\w.+-]+){2,}/([\w.+-]+)")  # absolute paths
LONGEST = 300  # characters of an error in the table


class RowError(Exception):
    """A row failed; the text is its result."""


@dataclass
class Process:
    """A child that answers JSON lines."""

    job: Job
    timeout: float
    process: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        with self.job.place("log.txt").open("a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(CHILD), json.dumps(self.job.data())],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment(self.job),
            )  # fmt: skip

    def ask(self, what: str, **more: Any) -> dict[str, Any]:
        """Its answer.

        Raises:
            RowError: what failed in it, or that it died or took too long.
        """
        late = threading.Event()
        timer = threading.Timer(self.timeout, lambda: (late.set(), self.process.kill()))
        timer.start()
        try:
            line = self._exchange(json.dumps({"do": what, **more}))
        finally:
            timer.cancel()
        if late.is_set():
            raise RowError(f"{what}: no answer within {self.timeout:g} s")
        if not line:
            raise RowError(f"{what}: the process ended with status {self.process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise RowError(clean(reply["error"]))
        return reply

    def _exchange(self, request: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(request, file=self.process.stdin, flush=True)
        except BrokenPipeError:  # it is gone; reading says so, too
            return ""
        return self.process.stdout.readline()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.communicate()


def environment(job: Job) -> dict[str, str]:
    """The child's: threads for every library, caches of its own, no network."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    threads = str(job.threads)
    return kept | {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TORCHINDUCTOR_CACHE_DIR": str(job.place("inductor")),  # a build starts from nothing
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "0",
        "HF_HUB_OFFLINE": "1",
    }


def clean(error: str) -> str:
    """An error without colours and the machine's folders, and not too long."""
    short = PLACES.sub(r"\1", COLORS.sub("", error))
    return short if len(short) <= LONGEST else short[: LONGEST - 1] + "…"


@dataclass
class Runner:
    """A row on its way: built, loaded, timed; or failed."""

    row: Row
    job: Job
    timeout: float
    result: dict[str, Any] = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    process: Process | None = None

    @property
    def failed(self) -> bool:
        """Whether it has failed."""
        return "error" in self.result

    def prepare(self, expected: np.ndarray) -> None:
        """Build in one process, load in another, compare with `expected`."""
        self.result = {"name": self.row.name}
        try:
            built = self._build()
            self.process = Process(self.job, self.timeout)
            loaded = self.process.ask("load")
            outputs = self.outputs(expected.shape)
        except RowError as error:
            self.fail(error)
            return
        files = disk(self.job)
        remark = "; ".join(text for text in (built["remark"], loaded["remark"]) if text)
        self.result |= {
            "sqnr_db": sqnr_db(expected, outputs),
            "bytes": files or loaded["size"] or 0, "on_disk": bool(files),
            "build_s": built["seconds"], "load_s": loaded["seconds"],
            "build_peak_bytes": built["peak"], "remark": remark,
        }  # fmt: skip

    def _build(self) -> dict[str, Any]:
        if self.row.build is None:
            return {"seconds": 0.0, "remark": "", "peak": 0}
        builder = Process(self.job, self.timeout)
        try:
            return builder.ask("build")
        finally:
            builder.close()

    def outputs(self, shape: tuple[int, ...]) -> np.ndarray:
        """What the row gave for the inputs, as eager's, (inputs, …)."""
        with np.load(self.job.place("outputs.npz")) as file:
            found = np.stack([file[str(n)] for n in range(len(file))])
        if found.shape != shape:
            raise RowError(f"outputs of shape {found.shape[1:]}, eager's are {shape[1:]}")
        return found

    def turn(self, seconds: float) -> None:
        """One round, if it has not failed."""
        if self.process is None or self.failed:
            return
        try:
            reply = self.process.ask("round", seconds=seconds)
        except RowError as error:
            self.fail(error)
            return
        self.rounds.append(reply["times"])
        self.result["peak_bytes"] = reply["peak"]

    def fail(self, error: RowError) -> None:
        """Keep why, let the process go."""
        self.result = {"name": self.row.name, "error": str(error)}
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.close()


def disk(job: Job) -> int:
    """Bytes of the files that the row runs from."""
    own = {"outputs.npz", "log.txt"}
    found = (p for p in Path(job.folder).rglob("*") if p.is_file() and p.name not in own)
    return sum(p.stat().st_size for p in found if "inductor" not in p.parts)
