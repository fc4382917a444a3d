"""A pipeline's artifact: pipeline.json, and a folder for each of its components.

pipeline.json           what it is made of: components, calls, scheduler, how it is run
SHA256SUMS              of every other file
unet/, vae.decode/ …    artifacts of compiled components
tokenizer/, scheduler/  as save_pretrained writes them; networks that were left alone, too
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from effuse import __version__, artifact
from effuse.build import versions
from effuse.errors import ArtifactError
from effuse.pipeline_calls import PLAIN
from effuse.pipeline_watch import Log, components_of, is_scheduler

LIBRARIES = ("torch", "diffusers", "transformers", "tokenizers", "onnxruntime", "numpy")
PLAIN_SUFFIXES = {".json", ".txt", ".safetensors", ".model"}  # of what save_pretrained writes


def describe(
    pipe: Any, log: Log, components: Mapping[str, Any], arguments: Mapping[str, Any], steps: int
) -> dict[str, Any]:
    """The manifest, but for the files and the way to run it without torch."""
    kind = type(pipe)
    return {
        "format": artifact.FORMAT,
        "effuse": __version__,
        "kind": "pipeline",
        "pipeline": {"class": f"{kind.__module__}.{kind.__qualname__}", "steps": steps,
                     "arguments": plain(arguments), "settings": settings_of(pipe)},
        "components": dict(components),
        "order": [list(key) for key in log.keys],
        "scheduler": scheduler_of(log),
        "versions": versions(LIBRARIES),
    }  # fmt: skip


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that JSON has."""
    kept = (*PLAIN, list, tuple)
    return {name: value for name, value in values.items() if isinstance(value, kept)}


def settings_of(pipe: Any) -> dict[str, Any]:
    """What the pipeline's constructor takes beside components."""
    known = set(pipe.components)
    return {
        name: value
        for name, value in dict(pipe.config).items()
        if not name.startswith("_") and name not in known and isinstance(value, PLAIN)
    }


def scheduler_of(log: Log) -> dict[str, Any] | None:
    """The scheduler's class, settings and timesteps in the watched run."""
    scheduler = log.scheduler
    if scheduler is None:
        return None
    return {
        "class": type(scheduler).__name__,
        "config": {k: v for k, v in dict(scheduler.config).items() if k != "_use_default_values"
                   and not isinstance(v, np.ndarray)},
        "timesteps": [float(time) for time in scheduler.timesteps],
    }  # fmt: skip


def finish(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a folder of components: pipeline.json and the sums."""
    return artifact.finish(folder, json.loads(json.dumps(manifest)), artifact.PIPELINE)


def save_others(folder: Path, manifest: Mapping[str, Any], pipe: Any) -> dict[str, Any]:
    """Write the components that are not compiled; what became of each."""
    compiled = [name for name, told in manifest["components"].items() if told["reason"] is None]
    return {name: save_other(folder, name, each) for name, each in components_of(pipe).items()
            if name not in compiled}  # fmt: skip


def save_other(folder: Path, name: str, component: Any) -> dict[str, Any]:
    """Write a component that is not compiled as its library does; a reason where it cannot be."""
    kind = f"{type(component).__module__}.{type(component).__qualname__}"
    told: dict[str, Any] = {"class": kind, "saved": False}
    if not hasattr(component, "save_pretrained"):
        return {**told, "reason": "it has no save_pretrained"}
    place = folder / name
    try:
        component.save_pretrained(place)
        unsafe = [path.name for path in place.rglob("*")
                  if path.suffix not in PLAIN_SUFFIXES or path.parent != place]  # fmt: skip
    except Exception as error:  # any library's
        shutil.rmtree(place, ignore_errors=True)
        return {**told, "reason": f"{type(error).__name__}: {error}"}
    if unsafe:
        shutil.rmtree(place, ignore_errors=True)
        return {**told, "reason": f"it is written as {', '.join(unsafe)}, which is not kept"}
    return {**told, "saved": True, "network": isinstance(component, nn.Module),
            "scheduler": is_scheduler(component)}  # fmt: skip


def open_other(folder: Path, name: str, told: Mapping[str, Any]) -> Any:
    """A component as its library wrote it.

    Raises:
        ArtifactError: it was not saved, or its class is not of a library that is known.
    """
    import importlib

    home, _, kind = told["class"].rpartition(".")
    library = home.partition(".")[0]
    if not told["saved"]:
        raise ArtifactError(
            f"{name} is not in the artifact ({told['reason']}); hand a pipeline that has it to "
            ".into(pipe)"
        )
    if library not in ("diffusers", "transformers"):
        raise ArtifactError(
            f"{name} is a {told['class']}, and classes of diffusers and transformers only are "
            "opened; hand a pipeline that has it to .into(pipe)"
        )
    return getattr(importlib.import_module(library), kind).from_pretrained(folder / name)
