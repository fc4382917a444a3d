"""What capture refuses, in terms of the user's source, and why."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sympy
import torch
from sympy import Ne
from torch import fx, nn
from torch.export import ExportedProgram

from effuse.capture_inputs import Leaf
from effuse.errors import CaptureError, InputError, nearest
from effuse.graph import calls, fake_mode, source_line
from effuse.plan import Role
from effuse.rates import random

# where no user's code lies: the capturing machinery, and what is generated at run time (sympy's
# "<string>"), but for what was typed at a prompt
_MACHINERY = tuple(
    f"{Path(file).parent}{os.sep}" for file in (torch.__file__, sympy.__file__, __file__)
)
_GENERATED = re.compile(r"<(?!stdin|ipython)")

PACKED = (torch.ScriptObject, nn.Module)  # what torch's own quantized layers keep weights in


def check_model(model: nn.Module) -> None:
    """Refuse what would compile to nonsense: train mode, NaN or infinite weights."""
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}; put the call into the "
            "forward of a module that holds the network"
        )
    check_floats(model)
    modes = () if "eval" in vars(model) else model.named_modules()  # what was exported has none
    training = next((name or "the model" for name, m in modes if m.training), None)
    if training is not None:
        raise CaptureError(
            f"{training} is in train mode, and dropout would be captured; call .eval()"
        )
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        # a buffer may hold -inf on purpose: attention masks do
        damaged = not tensor.isfinite().all() if name in parameters else tensor.isnan().any()
        if damaged:
            raise CaptureError(
                f"the weight {name!r} holds NaN or infinite values; load the weights again, or "
                "find out where the training diverged"
            )


def check_floats(model: nn.Module) -> None:
    """Refuse what holds no Python forward, or weights that are packed already."""
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"{where} is a ScriptModule, which torch.export cannot read; compile the module "
                "that it was scripted or traced from"
            )
        own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        packed = any(torch.is_tensor(t) and (t.is_quantized or hasattr(t, "quant_state")
                     or hasattr(t, "SCB")) for t in own)  # fmt: skip
        if packed or isinstance(getattr(module, "_packed_params", None), PACKED):
            raise CaptureError(
                f"{where} is quantized already ({type(module).__name__}); load the network in "
                "floating point, and quantize it with passes=[Quantize(…)]"
            )


def check_signature(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of forward's parameters; refuse inputs that it does not have or still needs."""
    signature = inspect.signature(model.forward)
    kinds = [each.kind for each in signature.parameters.values()]
    names = tuple(
        name for name, each in signature.parameters.items() if each.kind is not each.VAR_KEYWORD
    )
    for name in inputs:
        if name not in names and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise InputError(f"inputs: forward has no argument {name!r}{nearest(name, names)}")
    missing = [
        name
        for name, each in signature.parameters.items()
        if each.default is each.empty
        and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
        and name not in inputs
    ]
    if missing:
        raise InputError(f"inputs: forward needs {', '.join(missing)}; add an example of each")
    return names


def check_timesteps(
    leaves: list[Leaf], roles: Mapping[str, Role], timesteps: tuple[float, ...] | None
) -> None:
    """Refuse an example timestep that the schedule does not have."""
    for leaf in leaves:
        if timesteps is None or roles[leaf.label] is not Role.TIMESTEP or leaf.tensor.is_meta:
            continue
        for time in map(float, leaf.tensor.flatten().tolist()):
            if time not in timesteps:
                close = min(timesteps, key=lambda known: abs(known - time))
                raise InputError(
                    f"{leaf.label}: {time:g} is not one of the {len(timesteps)} timesteps of the "
                    f"schedule (nearest: {close:g}); give an example with one of them"
                )


def check_random(graph: fx.Graph) -> None:
    """Refuse random numbers drawn in forward: no two calls of such a network agree."""
    drawn = next((node for node in calls(graph) if random(node)), None)
    if drawn is not None:
        raise CaptureError(
            f"forward draws random numbers ({drawn.target}) at {source_line(drawn)}\n"
            "  way out: make the noise an input of forward; dropout needs .eval()"
        )


def check_ranges(
    exported: ExportedProgram, symbols: Mapping[str, str], dynamic: Mapping[str, tuple[int, int]]
) -> None:
    """Refuse a size whose graph holds for a part of its bounds only: forward branches on it."""
    for symbol, found in exported.range_constraints.items():
        word = symbols.get(str(symbol))
        if word is None:
            continue
        low, high = dynamic[word]
        if found.lower > max(low, 2) or found.upper < high:
            raise CaptureError(
                f"dynamic: the network takes another path outside {word!r} from {found.lower} to "
                f"{found.upper}; ask for that, and compile another artifact for the rest"
            )


def is_fixed(size: int | torch.SymInt) -> bool:
    """Whether a size is a number, a symbol that the network has forced to one value included."""
    return str(size).isdigit()


def size_steps(
    graph: fx.Graph, symbols: Mapping[str, str], dynamic: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """For each open size, the step between the values that the captured path is right for.

    A network that halves a picture twice takes multiples of 4: torch.export records that as a
    condition, which the Session then holds callers to.

    Raises:
        CaptureError: the lower bound is none of those values, or they are not evenly spread.
    """
    environment = fake_mode(graph).shape_env
    steps = {}
    for symbol, word in symbols.items():
        low, high = dynamic[word]
        guards = [] if environment is None else [guard.expr for guard in environment.guards]
        own = [
            g for g in guards if {str(s) for s in g.free_symbols} == {symbol} and g.func is not Ne
        ]
        good = [size for size in range(low, high + 1) if all(holds(guard, size) for guard in own)]
        step = good[1] - good[0] if len(good) > 1 else 1
        if not good or good != list(range(low, good[-1] + 1, step)):
            few = ", ".join(str(size) for size in good[:8])
            even = step > 1 and all(size % step == 0 for size in good)
            what = f", multiples of {step}" if even and len(good) > 2 else ""
            raise CaptureError(
                f"dynamic: of {word!r} from {low} to {high}, the network takes this path only for "
                f"{few or 'none'}…{what}; begin with one of these, and keep to an even step"
            )
        steps[word] = step
    return {word: step for word, step in steps.items() if step > 1}


def holds(guard: Any, size: int) -> bool:
    """Whether a condition on one symbol is true at a size."""
    (symbol,) = guard.free_symbols
    return bool(guard.subs(symbol, size))


def _foreign(file: str) -> bool:
    """Whether a frame's file is not the user's."""
    return file.startswith(_MACHINERY) or _GENERATED.match(file) is not None


def explain(error: Exception) -> str:
    """Where the capture failed in the user's source, and the way out."""
    text = str(error)
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append((code.co_filename, str(trace.tb_lineno), code.co_name))
        trace = trace.tb_next
    mine = [frame for frame in frames if not _foreign(frame[0])]
    where = 'File "{}", line {}, in {}'.format(*mine[-1]) if mine else "an unknown line"
    data = any(word in text for word in ("data-dependent", "Could not guard", "Eq(u", "unbacked"))
    remedy = (
        "a branch there depends on the data of a tensor: compute both sides and choose with "
        "torch.where, or take the decision outside the network"
        if data
        else "run the network in eager mode with these inputs; if that works, simplify the line"
    )
    first = next((line.strip() for line in text.splitlines() if line.strip()), "no message")
    return f"capture failed at {where}: {type(error).__name__}: {first[:300]}\n  way out: {remedy}"
