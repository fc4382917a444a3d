"""The phases of a compilation where sizes are open: the capture, from an example that leaves them
so, and one static program for each bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from effuse.buckets import Sizes, bounds_of, completed, label_of, sizes_text
from effuse.capture import capture
from effuse.capture_inputs import (
    Leaf,
    copied,
    flatten_inputs,
    named_axes,
    named_sizes,
    replaced,
)
from effuse.capture_layout import laid_out
from effuse.config import Config
from effuse.cost import part_costs, plan_costs
from effuse.errors import BackendError, CaptureError, EffuseError, InputError
from effuse.plan import Role, to_json
from effuse.program import Program
from effuse.roles import infer_roles
from effuse.specialise import apart, folded, resized, specialise, together
from effuse.verify import compare, exact_bound, verify

TRIED = 4  # examples of other sizes, where the first one's path is its own
Bounds = Mapping[str, tuple[int, int]]


# ---- capture -------------------------------------------------------------------------------------


def capture_open(
    network: nn.Module, inputs: Mapping[str, Any], config: Config,
    timesteps: tuple[float, ...] | None, place: Callable[[Any], Any],
) -> tuple[Program, Mapping[str, Any]]:  # fmt: skip
    """The captured network, and the example inputs that it was captured with.

    A network may treat the size that it was made for in a way of its own. Then an example of
    another size, cut or repeated from the given one, is captured instead.

    Args:
        place: brings the inputs to where the network is captured.

    Raises:
        EffuseError: no example gives a graph that is right for all sizes.
    """
    wanted = wanted_sizes(config)
    if not wanted:
        return capture(network, place(inputs), roles=config.roles, timesteps=timesteps), inputs
    leaves, _ = flatten_inputs(dict(inputs))
    roles = infer_roles({leaf.label: leaf.tensor.dim() for leaf in leaves}, config.roles)
    leaves = laid_out(network, inputs, leaves, roles, wanted)
    own = {name: size for name, size in named_sizes(leaves, roles).items() if name in wanted}
    shapes = completed(config.shapes, own) if config.shapes else ()
    bounds = {**(bounds_of((*shapes, own)) if shapes else {}), **config.dynamic}
    failure: EffuseError | None = None
    for sizes in examples_of(own, shapes, bounds):
        given = at_sizes(inputs, leaves, roles, sizes)
        try:
            program = capture(
                network, place(given), roles=config.roles, dynamic=bounds, timesteps=timesteps
            )
            program = replace(program, shapes=shapes)
            return with_expected(program, network, given), given
        except (CaptureError, InputError) as error:
            failure = failure or error
    assert failure is not None
    if shapes and str(failure).startswith("dynamic:"):
        raise type(failure)(str(failure).replace("dynamic:", "shapes:", 1)) from failure
    raise failure


def wanted_sizes(config: Config) -> list[str]:
    """The names of the sizes that are left open, or given in buckets."""
    return list(dict.fromkeys([*config.dynamic, *(n for sizes in config.shapes for n in sizes)]))


def examples_of(own: Sizes, shapes: tuple[Sizes, ...], bounds: Bounds) -> list[dict[str, int]]:
    """The sizes of examples to try, the given one's first; torch takes a size of 1 for fixed."""
    half_more = {name: size * 3 // 2 if size * 3 // 2 <= bounds[name][1] else max(size // 2, 1)
                 for name, size in own.items() if name in bounds and name != "batch"}  # fmt: skip
    others = list(shapes) or [{**own, **half_more}]
    found: list[dict[str, int]] = []
    for sizes in (own, *others):
        raised = {name: max(size, min(2, bounds[name][1])) if shapes and name in bounds else size
                  for name, size in sizes.items()}  # fmt: skip
        if raised not in found:
            found.append(raised)
    return found[:TRIED]


def at_sizes(
    inputs: Mapping[str, Any], leaves: list[Leaf], roles: Mapping[str, Role], sizes: Sizes
) -> Mapping[str, Any]:
    """The inputs cut, or repeated, to these sizes."""
    found = {}
    for leaf in leaves:
        shape = list(leaf.tensor.shape)
        for axis, name in named_axes(leaf, roles, leaves).items():
            shape[axis] = sizes.get(name, shape[axis])
        if shape != list(leaf.tensor.shape):
            found[leaf.label] = resized(leaf.tensor, shape)
    return replaced(inputs, found) if found else inputs


def with_expected(program: Program, network: nn.Module, inputs: Mapping[str, Any]) -> Program:
    """The program, with eager's outputs at every bucket, which its graph has to give there.

    Raises:
        CaptureError: it does not: forward does something else at these sizes.
    """
    found = []
    for sizes in program.shapes:
        static = specialise(program, sizes)
        if not program.examples:
            continue
        labels = {item.label: static.examples[item.name] for item in static.inputs}
        expected = eager(network, replaced(inputs, labels), sizes)
        check_exact(replace(static, expected=expected), sizes)
        found.append(expected)
    return replace(program, expected_at=tuple(found))


def eager(network: nn.Module, inputs: Mapping[str, Any], sizes: Sizes) -> tuple[torch.Tensor, ...]:
    """What the network gives.

    Raises:
        CaptureError: it does not take the sizes.
    """
    try:
        with torch.no_grad():
            flat = pytree.tree_leaves(network(**copied(inputs)))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"shapes: the network does not take {sizes_text(sizes)}: {reason}"
        ) from error
    return tuple(value for value in flat if isinstance(value, torch.Tensor))


def check_exact(static: Program, sizes: Sizes) -> None:
    """Refuse a graph that is not what the network computes at these sizes.

    Raises:
        CaptureError: it is not, to the dtype's rounding.
    """
    error, _ = compare(static) or (0.0, 0.0)
    if error > exact_bound(getattr(torch, static.model["dtype"])):
        raise CaptureError(
            f"shapes: at {sizes_text(sizes)} the network computes something else than the graph "
            f"that was captured for all sizes (off by {error:.1e}); compile an artifact of its own "
            "for that"
        )


# ---- what is built -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bucket:
    """One set of sizes: its static program, and the same with names of its own for the files."""

    sizes: Sizes
    program: Program
    named: Program

    @property
    def label(self) -> str:
        """What stands in the names of its files."""
        return label_of(self.sizes)

    def to_json(self, parity: Mapping[str, Any]) -> dict[str, Any]:
        """The bucket for the manifest."""
        parts = {part.name: part_costs(part, self.program.weights) for part in self.program.parts}
        return {
            "sizes": dict(self.sizes),
            "program": to_json(self.program.spec()),
            "flops": {name: costs["flops"] for name, costs in parts.items()},
            "plan": plan_costs(self.program).get("flops"),
            "parity": dict(parity),
        }


def buckets_of(program: Program) -> list[Bucket]:
    """The program specialised to each of its buckets, verified; none where none was asked for.

    Raises:
        BackendError: the plan needs a size that a bucket fixes.
        VerifyError: a defect of the specialisation.
    """
    if program.shapes and program.plan.guidance is not None:
        raise BackendError(
            "shapes: Guidance leaves rows of the batch out, and a bucket's batch is fixed; leave "
            'shapes= out and the batch open, dynamic={"batch": (1, 8)}'
        )
    exact = all(record.exact for record in program.records)
    found = []
    for sizes, expected in zip_longest(program.shapes, program.expected_at):
        static = replace(folded(specialise(program, sizes)), expected=expected)
        verify(static, [*(record.name for record in program.records), "specialise"])
        if exact:
            check_exact(static, sizes)
        found.append(Bucket(sizes, static, apart(static, sizes, program.weights)))
    return found


def to_build(program: Program, buckets: list[Bucket]) -> Program:
    """What a back end writes: the program, or the parts of all buckets over one weight store."""
    return together([each.named for each in buckets]) if buckets else program
