"""One row of the CPU benchmark in a process of its own: JSON lines in, JSON lines out.

`cpu_child.py JOB`, with the job as JSON. Requests: {"do": "build"}, {"do": "load"}, {"do": "round",
"seconds": …}, {"do": "sample"}. Each is answered by one line; what failed, by {"error": …}.
Standard output belongs to the answers; what libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from cpu_job import Job, Loaded, Row, first_line
from cpu_peers import all_rows
from cpu_trajectory import sample

STATUS = Path("/proc/self/status")
LEAST = 2  # calls of a round, however slow


class Child:
    """The row's state between requests."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.row: Row = next(r for r in all_rows([job.config]) if r.name == job.row)
        self.inputs = job.judged
        self.loaded: Loaded | None = None
        self.turn = 0

    def module(self) -> Any:
        """The network, with threads set."""
        import torch
        from cpu_networks import NETWORKS, Plain

        torch.set_num_threads(self.job.threads)
        return Plain(NETWORKS[self.job.network].make(), list(self.inputs[0])).eval()

    def build(self) -> dict[str, Any]:
        """Make the row's files."""
        if self.row.build is None:
            raise ValueError(f"{self.row.name} has nothing to build")
        plain = self.module()
        for name in self.row.imports:
            importlib.import_module(name)
        start = time.perf_counter()
        remark = self.row.build(self.job, plain)
        return {"seconds": time.perf_counter() - start, "remark": remark, "peak": peak()}

    def load(self) -> dict[str, Any]:
        """Open them, run once; then all outputs into outputs.npz."""
        plain = self.module() if self.row.build is None else None
        for name in self.row.runtime:
            importlib.import_module(name)
        start = time.perf_counter()
        self.loaded = self.row.load(self.job, plain)
        self.loaded.run(self.inputs[0])
        seconds = time.perf_counter() - start
        found = {str(n): self.loaded.run(each) for n, each in enumerate(self.inputs)}
        np.savez(self.job.place("outputs.npz"), **found)
        size = self.loaded.size
        return {"seconds": seconds, "remark": self.loaded.remark, "size": size, "peak": peak()}

    def round(self, seconds: float) -> dict[str, Any]:
        """Time calls, one input after the other, for that long; the first call is not counted."""
        self.call()
        times: list[float] = []
        while len(times) < LEAST or sum(times) < seconds:
            times.append(self.call())
        return {"times": times, "peak": peak()}

    def sample(self) -> dict[str, Any]:
        """A whole run over the schedule; the picture into picture.npy, seconds in the network."""
        if self.loaded is None or self.job.timesteps is None:
            raise ValueError("a run before load, or without a schedule")
        picture, seconds = sample(self.loaded.run, self.inputs[0], self.job.timesteps)
        np.save(self.job.place("picture.npy"), picture)
        return {"seconds": seconds}

    def call(self) -> float:
        """Seconds of one run."""
        if self.loaded is None:
            raise ValueError("a round before load")
        given = self.inputs[self.turn % len(self.inputs)]
        self.turn += 1
        start = time.perf_counter()
        self.loaded.run(given)
        return time.perf_counter() - start


def peak() -> int:
    """The most that the process has held at once, in bytes; 0 where there is no /proc."""
    if not STATUS.exists():
        return 0
    fields = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def main() -> None:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    data = json.loads(sys.argv[1])
    times = data["timesteps"]
    child = Child(Job(**{**data, "timesteps": None if times is None else tuple(times)}))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(child, request.pop("do"))(**request)
        except Exception as error:  # it is the row's result
            traceback.print_exc()
            reply = {"error": first_line(error)}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
