"""How closely a back end computes what `reference` does, and how closely it has to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from effuse.devices import BRAIN, HALF, device_of
from effuse.errors import BackendError
from effuse.graph import calls
from effuse.kernels.table import BY_TARGET
from effuse.metrics import sqnr_db
from effuse.plan import Input, Role
from effuse.program import Part, Program, run_parts, run_program, same_step
from effuse.runtime import Session
from effuse.verify import relative_error

NUDGE = 1e-6  # relative: a few float32 roundings, as kernels differ from each other
EXACT_DB = {"float32": 90.0, "float64": 90.0, "float16": 45.0, "bfloat16": 27.0}  # by rounding
DRAWS = 8
TIE_MARGIN_DB = 3.0  # two such runs of one network differ by up to this much in their distance
UNCHECKED: Mapping[str, Any] = {"error": None, "sqnr_db": None}


def worst_parity(found: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The one that is farthest from reference."""
    known = [each for each in found if each["sqnr_db"] is not None]
    return min(known, key=lambda each: each["sqnr_db"], default=UNCHECKED)


def narrow_floats(backend: str, target: str) -> str:
    """The floats that a back end computes in for a target, where they are not the program's."""
    if target.endswith(HALF) or (backend == "onnx" and device_of(target).half):
        return "float16"
    return "bfloat16" if target.endswith(BRAIN) else ""


def check_parity(
    program: Program, session: Session, backend: str, narrow: str = ""
) -> Mapping[str, Any]:
    """Error (relative) and SQNR (dB) of a back end's outputs against reference on the examples.

    `narrow` names the floats that it computes in, if not the program's. Every variant is checked,
    on slots that hold the same step's values; the worst one counts.

    Raises:
        BackendError: the back end computes something else.
    """
    if not program.examples:
        return UNCHECKED
    with torch.no_grad():
        values = same_step(program, program.examples)
        parts = program.variants
        found = [_parity(program, session, each, values, backend, narrow) for each in parts]
    error, ratio = max(error for error, _ in found), min(ratio for _, ratio in found)
    return {"error": float(f"{error:.2g}"), "sqnr_db": round(ratio, 1)}


def _parity(
    program: Program, session: Session, part: Part, values: Mapping[str, Any], backend: str,
    narrow: str,
) -> tuple[float, float]:  # fmt: skip
    """Relative error and SQNR (dB) of one variant, fed as it is in reference."""
    env = run_parts(program, values, variant=part.name)
    expected = [env[name] for name in program.outputs]
    given = {name: session.arrays.take(env[name], _described(name, env[name]))
             for name in part.inputs}  # fmt: skip
    found = session.run(part.name, given)
    outputs = [torch.as_tensor(found[name]) for name in program.outputs]
    ratio = worst_db(expected, outputs)
    bound = parity_bound_db(program, part, values, expected, ratio)
    bound = min(bound, EXACT_DB.get(narrow, bound))
    if ratio < bound:
        raise BackendError(
            f"{backend} agrees with reference to {ratio:.1f} dB only in {part.name}, and "
            f"{bound:.0f} dB are needed; this is a defect of the lowering: please report it with "
            "`effuse dump`"
        )
    return relative_error(outputs, expected), ratio


def _described(name: str, value: torch.Tensor) -> Input:
    dtype = str(value.dtype).removeprefix("torch.")
    return Input(name, Role.LATENT, tuple(value.shape), dtype, (name,))


def parity_bound_db(
    program: Program, part: Part, values: Mapping[str, Any], expected: Sequence[torch.Tensor],
    reached: float = math.inf,
) -> float:  # fmt: skip
    """How close a back end must be to reference in a variant, in dB.

    An exact program: to the dtype's rounding. A quantized one rounds at ties: a difference in the
    last bits moves a value by a whole step, and the steps add up on their way through the network.
    How much is measured: reference against itself, every value moved as another kernel's rounding
    would move it. One such run is a draw from a wide distribution (5 dB on a small UNet), so what
    is not `reached` (dB) is drawn again, and the least of the draws counts.
    """
    exact = EXACT_DB.get(program.model["dtype"], 30.0)
    if not any(calls(each.graph, *BY_TARGET) for each in program.parts):
        return exact
    bound = exact
    for seed in range(DRAWS):
        moved = run_program(program, values, nudging(seed), variant=part.name)
        bound = min(bound, worst_db(expected, moved) - TIE_MARGIN_DB)
        if reached >= bound:
            break
    return bound


def nudging(seed: int) -> Callable[[Part, fx.Node, Any], Any]:
    """A hook of `run_program` that moves every float by about a rounding."""
    generator = torch.Generator().manual_seed(seed)

    def nudge(_: Part, node: fx.Node, value: Any) -> Any:
        if not torch.is_tensor(value) or not value.is_floating_point():
            return None
        if getattr(node.target, "namespace", "") == "effuse":
            return None  # steps times a scale: every kernel gives the same
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float32)
        return value * (1 + NUDGE * noise).to(value.dtype)

    return nudge


def worst_db(expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> float:
    """The least SQNR (dB) over the outputs."""
    pairs = zip(expected, found, strict=True)
    return min(sqnr_db(one.float().numpy(), other.float().numpy()) for one, other in pairs)
