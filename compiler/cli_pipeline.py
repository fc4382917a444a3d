"""The verb run on a pipeline's artifact: a picture from a prompt, without torch."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from rich.markup import escape

from effuse import api, artifact
from effuse.cli_sample import write_grid
from effuse.cli_text import check_place, out, size_text
from effuse.devices import CPU
from effuse.errors import ConfigError


def run_pipeline(
    path: str, output: Path, prompt: str | None, negative: str | None, guidance: float | None,
    seed: int, cpu: bool,
) -> bool:  # fmt: skip
    """Sample one picture, and write it as PNG; False if the artifact is no pipeline's.

    Raises:
        ConfigError: a prompt for an artifact that takes none.
        InputError: the pipeline has no run without torch, and why.
    """
    if not artifact.is_pipeline(path):
        if prompt is not None or negative is not None:
            raise ConfigError(
                f"--prompt: {path} is no pipeline's artifact; give its inputs as --inputs FILE, or "
                "compile the whole pipeline: effuse.compile_pipeline"
            )
        return False
    check_place(output)
    console = out()
    pipeline = api.load(path, providers=(CPU,) if cpu else ())
    start = time.perf_counter()
    found = pipeline.run(prompt or "", negative, seed=seed, guidance=guidance)  # type: ignore[attr-defined]
    seconds = time.perf_counter() - start
    pictures = found.reshape(-1, *found.shape[-3:])  # of a video: every frame
    write_grid(np.moveaxis(pictures, -1, 1) * 2 - 1, output, console)
    console.print(
        f"[bold]wrote[/] {escape(str(output))} ({size_text(output.stat().st_size)}, "
        f"{len(pictures)} pictures, {seconds:.1f} s)"
    )
    return True
