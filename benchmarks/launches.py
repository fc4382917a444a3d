"""What fusion saves on a GPU, counted without one: kernels launched and bytes moved in a step.

    python benchmarks/launches.py            # FLUX.1-dev's configuration, about five minutes
    python benchmarks/launches.py --smoke    # a narrow network: does everything run?

A network of equal blocks costs a + b · (double blocks) + c · (single blocks): three shallow
networks of full width give a, b and c, a fourth checks them, and the result is the configuration's
own depth. Weights are random; nothing is measured, and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from effuse import build
from effuse.backends.triton_build import calls_of
from effuse.backends.triton_figures import part_figures, traffic
from effuse.backends.triton_lower import STAGES, lower
from effuse.capture import capture
from effuse.examples import derive_inputs
from effuse.graph import move
from effuse.inspect_model import resolve
from effuse.pass_manager import run_passes
from effuse.passes import Canonicalize, Hoist, LowRank, Pass, Quantize
from effuse.program import Program
from effuse.stream import on_meta

HERE = Path(__file__).parent
CONFIG = HERE.parent / "examples" / "configs" / "flux-dev.json"
DEPTH = (19, 38)  # double and single blocks of FLUX.1-dev
SAMPLES = ((1, 1), (2, 1), (1, 2))
CHECK = (2, 2)
SIDE, TOKENS, PROMPT = 64, 4096, 512  # a picture of 1024 x 1024: 64 x 64 tokens of 2 x 2 latents
SMOKE = {"num_attention_heads": 2, "joint_attention_dim": 64, "pooled_projection_dim": 32}
BY_TOKEN = "int8/channel:int8/token/dynamic"

FORMATS: dict[str, tuple[Pass, ...]] = {
    "bf16": (),
    "w8a8 by token": (Quantize(BY_TOKEN),),
    "fp8": (Quantize("fp8"),),
    "w4a8 + rank 32": (LowRank(rank=32, rounds=1, format="w4a8", inputs=False), Quantize("w4a8")),
}
UNFUSED = STAGES[:2]  # low-bit layers by our kernels, and everything else an operation of its own


def network(doubles: int, singles: int, smoke: bool) -> Program:
    """FLUX of that depth, captured without arithmetic, with random weights in bf16."""
    settings: dict[str, Any] = {"num_layers": doubles, "num_single_layers": singles}
    model = resolve(str(CONFIG), {**settings, **(SMOKE if smoke else {})}).to(torch.bfloat16)
    inputs = derive_inputs(model, device=torch.device("cpu"))
    inputs = {**inputs, **sized(inputs, 64 if smoke else TOKENS, 32 if smoke else PROMPT)}
    program = capture(model, on_meta(inputs))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: random_like(value, generator) if value.is_floating_point() else torch.zeros_like(
            value, device="cpu"
        )
        for name, value in program.weights.items()
    }  # fmt: skip
    for part in program.parts:
        move(part.graph, torch.device("cpu"))
    return replace(program, weights=weights)


def random_like(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Numbers in the shape and type of a tensor without values."""
    return 0.02 * torch.randn(value.shape, generator=generator, dtype=value.dtype)


def sized(inputs: dict[str, Any], tokens: int, prompt: int) -> dict[str, torch.Tensor]:
    """The inputs for a batch of one, with that many tokens of picture and prompt."""
    lengths = {"hidden_states": tokens, "img_ids": tokens, "encoder_hidden_states": prompt,
               "txt_ids": prompt}  # fmt: skip
    found = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            rows = value if name.endswith("_ids") else value[:1]
            found[name] = rows
            if name in lengths:
                axis = rows.dim() - 2
                shape = [*rows.shape[:axis], lengths[name], rows.shape[-1]]
                found[name] = torch.zeros(shape, dtype=rows.dtype)
    return found


def counted(program: Program, passes: tuple[Pass, ...]) -> dict[str, dict[str, int]]:
    """Launches and bytes of a step: one operation a kernel, low-bit layers only, and all fused."""
    quantized = run_passes(program, (Canonicalize(), Hoist(), *passes), None)
    fused, apart = lower(quantized).program, lower(quantized, UNFUSED).program
    full = fused.part("full").graph
    kernels, distinct = calls_of(full, "sm_90")
    figures = part_figures(full)
    return {
        "unfused": traffic(apart.part("full").graph),
        "fused": {**traffic(full), "ours": len(kernels), "distinct": len(distinct),
                  "arena": figures["arena"], "fallback": sum(figures["fallback"].values())},
        "weights": {"bytes": weight_bytes(fused)},
    }  # fmt: skip


def weight_bytes(program: Program) -> int:
    """Bytes of what the step program reads from the weight store."""
    part = program.part("full")
    names = {str(node.target) for node in part.graph.nodes if node.op == "get_attr"}
    stored = (program.weights[name] for name in names)
    return sum(each.numel() * each.element_size() for each in stored)


def solved(found: dict[tuple[int, int], float], at: tuple[int, int]) -> float:
    """a + b · doubles + c · singles through three samples, at another depth."""
    base = found[1, 1]
    doubles, singles = found[2, 1] - base, found[1, 2] - base
    return base + (at[0] - 1) * doubles + (at[1] - 1) * singles


def extrapolated(samples: dict[tuple[int, int], Any]) -> dict[str, dict[str, Any]]:
    """Every figure at full depth; what does not grow with depth is the sample's."""
    first = samples[1, 1]
    return {
        way: {
            word: figure(way, word, samples) for word in first[way]
        }
        for way in first
    }  # fmt: skip


def figure(way: str, word: str, samples: dict[tuple[int, int], Any]) -> int:
    """One figure at full depth.

    Raises:
        SystemExit: the fourth network does not have what three others foretell.
    """
    found = {depth: sample[way][word] for depth, sample in samples.items()}
    if word in ("distinct", "arena"):
        return int(max(found.values()))
    if solved(found, CHECK) != found[CHECK]:
        raise SystemExit(f"{way} {word}: {found} does not grow evenly with the depth")
    return int(solved(found, DEPTH))


def table(rows: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| format | launches: unfused | fused | ratio | GB moved: unfused | fused | ratio | "
        "weights, GB | arena, MB | kernels of ours | distinct |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        apart, fused = row["unfused"], row["fused"]
        lines.append(
            f"| {name} | {apart['launches']} | {fused['launches']} | "
            f"{apart['launches'] / fused['launches']:.2f} | {apart['bytes'] / 1e9:.1f} | "
            f"{fused['bytes'] / 1e9:.1f} | {apart['bytes'] / fused['bytes']:.2f} | "
            f"{row['weights']['bytes'] / 1e9:.2f} | {fused['arena'] / 1e6:.0f} | "
            f"{fused['ours']} | {fused['distinct']} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Count, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help="a narrow network, nothing written")
    parser.add_argument("--only", help="formats whose name holds this")
    smoke, only = (options := parser.parse_args()).smoke, options.only or ""
    begun = time.time()
    found: dict[str, dict[tuple[int, int], Any]] = {name: {} for name in FORMATS if only in name}
    for depth in (*SAMPLES, CHECK):
        program = network(*depth, smoke)
        for name, samples in found.items():
            samples[depth] = counted(program, FORMATS[name])
            print(f"{depth[0]} double, {depth[1]} single blocks, {name}: {samples[depth]['fused']}",
                  flush=True)  # fmt: skip
    rows = {name: extrapolated(samples) for name, samples in found.items()}
    print(f"\nFLUX.1-dev, {DEPTH[0]} + {DEPTH[1]} blocks, {TOKENS} + {PROMPT} tokens, one step:\n")
    print(table(rows))
    if smoke or only:
        return
    document = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, no GPU: counted, not measured",
        "versions": build.versions(("effuse", "torch", "triton", "diffusers")),
        "seconds": round(time.time() - begun),
        "rows": rows,
    }
    (HERE / "results" / "launches-flux.json").write_text(json.dumps(document, indent=1) + "\n")
    (HERE / "results" / "launches-flux.md").write_text(table(rows) + "\n")


if __name__ == "__main__":
    main()
