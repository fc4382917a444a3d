"""Whole pipelines of tiny random parts: does the compiled pipeline give the original's picture?

    python benchmarks/pipelines.py            # all of them
    python benchmarks/pipelines.py SDXL Wan   # some; the others' rows stay

For each: compiled with the preset `exact`, saved, loaded, called with a prompt that it was not
compiled with, and run without torch, from the same seed. PSNR of the pictures against the original
pipeline's, of values in [0, 1]. Writes pipelines.json and .md after every row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pipelines_tiny import PIPELINES

import effuse
from effuse.build import versions
from effuse.metrics import psnr_db

OUT = Path(__file__).resolve().parent / "results"
STEPS, SEED, PROMPT, WATCHED = 8, 5, "a cat", "a dog"
LIBRARIES = ("effuse", "torch", "diffusers", "transformers", "tokenizers", "onnxruntime")
WITHOUT_TORCH = """
import sys
for name in ("torch", "diffusers", "transformers"):
    sys.modules[name] = None
import effuse, numpy
path, prompt, seed, target = sys.argv[1:]
numpy.save(target, effuse.load(path).run(prompt, seed=int(seed)))
"""


def main(names: list[str]) -> None:
    """Measure the pipelines of these names, or all."""
    file = OUT / "pipelines.json"
    rows = json.loads(file.read_text())["rows"] if names and file.is_file() else {}
    for name in names or PIPELINES:
        rows[name] = measured(name)
        print(name, rows[name], flush=True)
        write(rows)


def measured(name: str) -> dict[str, Any]:
    """One row."""
    make, call = PIPELINES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)
    expected = picture(pipe, call)
    start = time.perf_counter()
    compiled = effuse.compile_pipeline(
        pipe, "exact", steps=STEPS, prompts=(WATCHED,), call=call, progress=False
    )
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "pipeline.zip", Path(folder) / "found.npy"
        compiled.save(path)
        loaded = effuse.load(path)
        found = picture(loaded, call)
        free = compiled.manifest["torch_free"]
        row = {
            "compiled": list(compiled.components), "seconds": round(seconds, 1),
            "std": round(float(expected.std()), 3), "psnr": psnr(expected, found),
            "refused": free["refused"], "agreement_db": free.get("agreement_db"),
        }  # fmt: skip
        if free["refused"] is None:
            command = [sys.executable, "-P", "-c", WITHOUT_TORCH]
            subprocess.run([*command, str(path), PROMPT, str(SEED), str(target)], check=True)
            row["psnr_without_torch"] = psnr(expected, np.load(target))
    return row


def psnr(one: np.ndarray[Any, Any], other: np.ndarray[Any, Any]) -> float:
    """PSNR in dB, to a tenth."""
    return round(psnr_db(one, other, peak=1.0), 1)


def picture(pipe: Any, call: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The picture, or the frames, of the prompt."""
    generator = torch.Generator().manual_seed(SEED)
    found = pipe(PROMPT, num_inference_steps=STEPS, generator=generator, output_type="np", **call)
    return np.asarray(found[0])


def write(rows: dict[str, Any]) -> None:
    """The rows as JSON and as a table."""
    setting = {"steps": STEPS, "versions": versions(LIBRARIES)}
    OUT.mkdir(exist_ok=True)
    text = json.dumps({"setting": setting, "rows": rows}, indent=1, ensure_ascii=False)
    (OUT / "pipelines.json").write_text(text + "\n")
    lines = [
        f"# Whole pipelines of tiny random parts, preset `exact`, {STEPS} steps",
        "",
        "PSNR against the original pipeline's picture from the same seed, for a prompt that it was "
        "not compiled with. *Replayed*: the worst agreement of the networks' inputs and the "
        "picture when the recipe is checked while it is built.",
        "",
        "| pipeline | compiled | PSNR | without torch | replayed |",
        "|---|---|--:|--:|--:|",
    ]
    for name, row in rows.items():
        free = row.get("psnr_without_torch")
        without = f"no: {row['refused']}" if free is None else f"{free} dB"
        replayed = "" if free is None else f"{row['agreement_db']} dB"
        names = ", ".join(row["compiled"])
        cells = (name, names, f"{row['psnr']} dB", without, replayed)
        lines.append(f"| {' | '.join(cells)} |")
    (OUT / "pipelines.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
