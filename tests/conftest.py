"""For all tests: the garbage collector does not walk over what stays alive anyway."""

from __future__ import annotations

import copy
import functools
import gc
import os
from collections.abc import Iterator

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


@pytest.fixture(scope="session")
def operators_once() -> Iterator[None]:
    """PyTorch's exporter to ONNX collects its operators for every file; here once."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    collect = functools.cache(ONNXRegistry.from_torchlib)

    def copied(**options: int) -> ONNXRegistry:
        found = copy.copy(collect(**options))
        found.functions = {target: list(forms) for target, forms in found.functions.items()}
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield
