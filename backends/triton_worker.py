"""Compiles kernels for a named GPU, in a process of its own: `python -m` this module.

One JSON document on standard input: a folder, and by key kernels, each with its GPU's compute
capability. One line of JSON on standard output for each: what became of it. The GPU need not be
there. A process of its own, because the compiler may abort, and because it must not be in
interpreter mode.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effuse.backends.triton_kernels import ALIGNMENT, CONSTANT, Kernel, kernel_from_json
from effuse.kernels.launch import FP_FUSION

WARP = 32
INSTRUCTIONS = {"wgmma": r"wgmma\.mma_async", "mma": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma"}
SCRATCH = 2  # pointers that Triton adds behind a kernel's own parameters; unused ones are null
PTX_TYPES = {"i32": "u32", "i64": "u64", "fp32": "f32", "i8": "u8", "i1": "u8"}
USAGE = re.compile(r"(REG|STACK):(\d+)")


def main() -> int:
    """Compile what standard input asks for."""
    job = json.load(sys.stdin)
    for key, asked in job["kernels"].items():
        kernel = kernel_from_json(asked["kernel"])
        try:
            told = build(kernel, asked["capability"], Path(job["folder"]), key)
        except Exception as error:
            told = {"error": f"{type(error).__name__}: {last_line(error)}"}
        print(json.dumps({"key": key, **told}), flush=True)
    return 0


def build(kernel: Kernel, capability: int, folder: Path, key: str) -> dict[str, Any]:
    """Write `<key>.cubin`; what it needs, and what it multiplies matrices with."""
    made = compile_kernel(kernel, capability)
    path = folder / f"{key}.cubin"
    path.write_bytes(made.asm["cubin"])
    if made.metadata.global_scratch_size:
        raise ValueError("it asks for scratch memory, which launches do not bring")
    text = made.asm["ptx"]
    check_parameters(kernel, text)
    return {
        "entry": made.metadata.name,
        "shared": made.metadata.shared,
        "threads": WARP * made.metadata.num_warps,
        **resources(path),
        "products": {
            word: len(re.findall(pattern, text)) for word, pattern in INSTRUCTIONS.items()
        },
    }


def compile_kernel(kernel: Kernel, capability: int) -> Any:
    """The kernel compiled for a GPU."""
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    places = [name for name, _ in kernel.signature]
    source = ASTSource(
        fn=function,
        signature=dict(kernel.signature),
        constexprs=dict(kernel.constants),
        attrs={(places.index(name),): [["tt.divisibility", ALIGNMENT]] for name in kernel.aligned},
    )
    options = {
        "num_warps": kernel.warps, "num_stages": kernel.stages, "enable_fp_fusion": FP_FUSION,
    }  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", capability, WARP), options=options)


def resources(path: Path) -> dict[str, int]:
    """Registers and bytes of stack (to which registers are spilled) of each thread."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run(
        [str(tool), "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found: Mapping[str, str] = dict(USAGE.findall(text))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"])}


def check_parameters(kernel: Kernel, ptx: str) -> None:
    """See that what was compiled takes what a launch will hand over.

    Raises:
        ValueError: it takes something else.
    """
    entry = re.search(r"\.visible \.entry \w+\((.*?)\)", ptx, re.DOTALL)
    found = re.findall(r"\.param \.(\w+)", entry.group(1) if entry else "")
    own = [kind for _, kind in kernel.signature if kind != CONSTANT]
    expected = [ptx_type(kind) for kind in own] + ["u64"] * SCRATCH
    if found != expected:
        raise ValueError(f"its parameters are {found}, where a launch hands over {expected}")


def ptx_type(kind: str) -> str:
    """How PTX declares a parameter of one of Triton's types."""
    return "u64" if kind.startswith("*") else PTX_TYPES[kind]


def last_line(error: Exception) -> str:
    """The end of a compiler's message, where it says what is wrong."""
    lines = str(error).strip().splitlines() or ["no message"]
    return lines[-1]


if __name__ == "__main__":
    sys.exit(main())
