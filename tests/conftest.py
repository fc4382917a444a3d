"""For all tests: the garbage collector does not walk over what stays alive anyway."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on CPU tensors; read at import


@pytest.fixture(scope="module", autouse=True)
def settled() -> Iterator[None]:
    """Set aside what is alive: imported modules, and the networks of the files before this one."""
    gc.collect()
    gc.freeze()
    yield


@pytest.fixture(scope="session", autouse=True)
def thawed() -> Iterator[None]:
    """Bindings of C++ complain at exit about what is never collected."""
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def tiny() -> Any:
    """The builders of tiny pipelines."""
    from hand_made import tiny_pipelines

    return tiny_pipelines()
