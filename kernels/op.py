"""A row of the op table: an effuse op, its reference, its samples, and who runs it how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from effuse.kernels.launch import Native

Sample = tuple[Any, ...]


@dataclass(frozen=True)
class Op:
    """One row.

    Args:
        name: after `effuse::`.
        target: the overload.
        reference: in plain PyTorch; one tensor, or several of which unused ones are empty.
        samples: arguments to try it with.
        implementations: by back end, whether low-bit arithmetic or storage really runs.
        remark: what it becomes.
        native: its Triton kernel.
    """

    name: str
    target: Any
    reference: Callable[..., Any]
    samples: Callable[[torch.Generator], list[Sample]]
    implementations: Mapping[str, Literal["native", "simulated"]] = field(default_factory=dict)
    remark: str = ""
    native: Native | None = None
