"""effuse: a graph-level compiler for diffusion networks.

Importing it loads no heavy library; each name is found when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effuse.api import Compiled, compile, load
    from effuse.config import Config
    from effuse.distillation import distill
    from effuse.errors import EffuseError
    from effuse.pipeline import compile_pipeline
    from effuse.sampler import sample

__version__ = "0.1.0"

_HOMES = {
    "compile": "effuse.api",
    "load": "effuse.api",
    "Compiled": "effuse.api",
    "Config": "effuse.config",
    "EffuseError": "effuse.errors",
    "distill": "effuse.distillation",
    "sample": "effuse.sampler",
    "compile_pipeline": "effuse.pipeline",
}

__all__ = ["Compiled", "Config", "EffuseError", "__version__", "compile", "compile_pipeline",
           "distill", "load", "sample"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'effuse' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
