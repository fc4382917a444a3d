"""Calls of CUDA's driver, watched by a library in its place: the order, and what is handed over."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from effuse.backends import triton_cuda
from effuse.backends.triton_cuda import Cubins
from effuse.backends.triton_kernels import specialize
from effuse.errors import BackendError
from effuse.kernels.launch import Launch, jit, tl

STREAM = 0xABC


@jit
def scaled(x, y, count, factor, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < count) * factor, mask=place < count)


class Library:
    """The driver's functions as far as `Cubins` calls them; they note what they were given."""

    def __init__(self, failing: str = "") -> None:
        self.calls = []
        self._failing = failing

    def _done(self, name, *told):
        self.calls.append((name, *told))
        return 700 if name == self._failing else 0

    def cuModuleLoadData(self, module, binary):
        module._obj.value = 11
        return self._done("load", binary)

    def cuModuleGetFunction(self, function, module, name):
        function._obj.value = 22
        return self._done("function", module.value, name)

    def cuFuncSetAttribute(self, function, attribute, value):
        return self._done("attribute", function.value, attribute, value)

    def cuLaunchKernel(self, function, *rest):
        *sizes, stream, pointers, extra = rest
        kinds = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_float,
                 ctypes.c_void_p, ctypes.c_void_p)  # fmt: skip
        values = [kind.from_address(at).value for kind, at in zip(kinds, pointers, strict=True)]
        return self._done("launch", function.value, sizes, stream.value, values, extra)

    def cuGetErrorString(self, status, text):
        text._obj.value = b"an illegal memory access was encountered"


def launch():
    x, y = torch.zeros(48), torch.zeros(48)
    args = {"x": x, "y": y, "count": 48, "factor": 2.5}
    return Launch(scaled, (3,), args, {"BLOCK": 16}, warps=2)


@pytest.fixture
def cubins(monkeypatch, tmp_path):
    """(library, artifact's kernels) with one cubin that asks for much shared memory."""

    def opened(failing="", shared=98304):
        library = Library(failing)
        monkeypatch.setattr(triton_cuda, "driver", lambda: library)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM)
        )
        key = specialize(launch()).key("sm_90")
        (tmp_path / f"{key}.cubin").write_bytes(b"\x7fELF and so on")
        told = {"entry": "scaled", "shared": shared, "threads": 64}
        return library, Cubins(tmp_path, {"target": "sm_90", "kernels": {key: told}})

    return opened


def test_a_kernel_is_loaded_once_and_launched_with_its_arguments(cubins):
    library, run = cubins()
    given = launch()
    run(given)
    run(given)
    assert [name for name, *_ in library.calls] == [
        "load", "function", "attribute", "launch", "launch",
    ]  # fmt: skip
    load, function, attribute, first, second = library.calls
    assert load[1].startswith(b"\x7fELF")
    assert function[1:] == (11, b"scaled")
    assert attribute[1:] == (22, 8, 98304)
    x, y = given.args["x"].data_ptr(), given.args["y"].data_ptr()
    assert first == second
    assert first[1:] == (22, [3, 1, 1, 64, 1, 1, 98304], STREAM, [x, y, 48, 2.5, None, None], None)


def test_little_shared_memory_needs_no_leave(cubins):
    library, run = cubins(shared=1024)
    run(launch())
    assert "attribute" not in [name for name, *_ in library.calls]


@pytest.mark.parametrize("failing", ["load", "function", "attribute", "launch"])
def test_what_the_driver_refuses_is_told(cubins, failing):
    _, run = cubins(failing)
    with pytest.raises(BackendError, match="CUDA error 700: an illegal memory access"):
        run(launch())


def test_a_kernel_that_was_not_built(cubins):
    _, run = cubins()
    other = launch()
    other.args["count"] = 47  # no multiple of 16: another specialization
    with pytest.raises(BackendError, match=r"no scaled for these shapes.*compile again"):
        run(other)


def test_no_driver(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(BackendError, match=r"CUDA's driver cannot be loaded: libcuda\.so\.1"):
        triton_cuda.driver()
