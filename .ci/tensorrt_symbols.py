"""List the classes of TensorRT's Python bindings, their members, and what each member gives.

    python .ci/tensorrt_symbols.py tensorrt_cu13_bindings-11….whl > tests/tensorrt_symbols.json

The bindings are on PyPI, the libraries that they load are not. Importing needs of those only that
they are there: ones of empty functions, made with the C compiler, do. Nothing of TensorRT runs.
"""

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CLASSES = (
    "Builder", "BuilderFlag", "DataType", "Dims", "ExecutionContextAllocationStrategy",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "INetworkDefinition",
    "IOptimizationProfile", "ITimingCache", "Logger", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserRefitter", "Refitter", "Runtime",
    "TensorIOMode", "TensorLocation", "Weights",
)  # fmt: skip
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
ENTRIES = (  # that the bindings look up as they are imported
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
GIVES = re.compile(r"^(?:\d+\. )?\w+\(.*\) -> (?:[\w.]*\.)?(\w+)$", re.MULTILINE)


def main(wheel: Path) -> None:
    """Unpack the wheel beside empty libraries, and list in a process that finds them."""
    major = re.search(r"bindings-(\d+)\.", wheel.name)
    if major is None:
        sys.exit(f"{wheel.name}: no wheel of TensorRT's bindings")
    with tempfile.TemporaryDirectory() as folder:
        for name in LIBRARIES:
            file = f"lib{name}.so.{major[1]}"
            subprocess.run(
                ["cc", "-shared", "-x", "c", "-", f"-Wl,-soname,{file}", "-o", file],
                cwd=folder, check=True, text=True,
                input="".join(f"void {entry}(void) {{}}\n" for entry in ENTRIES),
            )  # fmt: skip
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        environment = {**os.environ, "LD_LIBRARY_PATH": folder, "PYTHONPATH": folder}
        command = [sys.executable, "-P", __file__, "--list"]
        subprocess.run(command, env=environment, check=True)


def show() -> None:
    """Print what the bindings hold."""
    import tensorrt_bindings as trt

    found = {name: members(getattr(trt, name)) for name in CLASSES}
    print(json.dumps({"version": trt.__version__, "classes": found}, indent=1, sort_keys=True))


def members(kind: type) -> dict[str, str]:
    """The public members of a class, each with the class that it gives, if its signature says."""
    return {name: gives(kind, name) for name in dir(kind) if not name.startswith("_")}


def gives(kind: type, name: str) -> str:
    """The class that a method or property gives, or an empty string."""
    member = inspect.getattr_static(kind, name)
    getter = getattr(member, "fget", None)
    found = GIVES.search(getattr(getter or getattr(kind, name), "__doc__", None) or "")
    return found[1] if found else ""


if __name__ == "__main__":
    if sys.argv[1] == "--list":
        show()
    else:
        main(Path(sys.argv[1]))
