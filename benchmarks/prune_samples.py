"""Hundreds of pictures from a pruned network, against the network's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from cache_bench import Bench
from rich.progress import track

from effuse.evaluate import to_pixels

OWN, OTHER = 10_000, 20_000  # noise of the pictures, and of the set that they are measured from


class Samples:
    """The exact network's pictures of all prompts in turn: from the same noise, and from other."""

    def __init__(self, bench: Bench, exact: Any, count: int) -> None:
        self.bench, self.count = bench, count
        self.same, self.other = self.pictures(exact, OWN), self.pictures(exact, OTHER)

    def pictures(self, model: Any, seed: int) -> Any:
        """`count` pictures, (count, 32, 32, 3), in batches as large as the network was built."""
        bench, size = self.bench, self.bench.arguments.prompts
        every = [*bench.prompts, *bench.others]
        setattr(bench.pipe, bench.place, model)
        found = []
        for start in track(range(0, self.count, size), "pictures", transient=True):
            bench.set_solver("ddim", bench.arguments.steps)
            prompts = [every[(start + each) % len(every)] for each in range(size)]
            found.append(to_pixels(bench.pipe.latents(prompts, seed + start).numpy()))
        return np.concatenate(found)[: self.count]

    def distances(self, model: Any) -> dict[str, float]:
        """See features.distances."""
        from features import distances

        return distances(self.pictures(model, OWN), self.same, self.other)
