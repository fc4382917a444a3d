"""Capture: any `nn.Module` with example inputs becomes a Program of one flat FX graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from effuse.arguments import digest
from effuse.capture_checks import (
    check_model,
    check_random,
    check_signature,
    check_timesteps,
    explain,
    is_fixed,
)
from effuse.capture_data import DataDetached
from effuse.capture_derived import checked_steps, derived_sizes
from effuse.capture_flex import by_place, flex_dense
from effuse.capture_inline import inline_modes
from effuse.capture_inputs import (
    Leaf,
    copied,
    dtype_name,
    dynamic_shapes,
    flatten_inputs,
    on_meta,
    symbolic_axes,
)
from effuse.capture_layout import laid_out
from effuse.capture_objects import opened
from effuse.capture_outputs import expected_outputs, output_names, user_outputs
from effuse.capture_routing import Routing, check_routing
from effuse.capture_unwrap import by_name, uncompiled, unwrapped
from effuse.capture_values import OPEN, Record, recorded, replayed
from effuse.errors import CaptureError
from effuse.graph import eliminate, set_outputs
from effuse.plan import ROLE_DEPENDS, Dim, Input, Role
from effuse.program import Part, Program
from effuse.rates import dependences
from effuse.roles import infer_roles

CHANGING = (Role.LATENT, Role.TIMESTEP)  # from step to step
WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)


def capture(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    roles: Mapping[str, str | Role] | None = None,
    dynamic: Mapping[str, tuple[int, int]] | None = None,
    timesteps: tuple[float, ...] | None = None,
) -> Program:
    """Capture `model.forward(**inputs)` as a Program with one part, `full`.

    The graph replays eager bit-exactly. `dynamic` leaves sizes open by name, with bounds:
    `{"batch": (1, 8), "height": (32, 128), "width": (32, 128)}`.

    Raises:
        CaptureError: the network is in train mode, holds NaN, draws random numbers, changes its own
            buffers, or has control flow that depends on data; the message says where in the user's
            source.
        InputError: `inputs` do not fit forward's signature, or the timestep is not of `timesteps`.
    """
    model = unwrapped(model)
    check_model(model)
    with uncompiled(model), by_name(model), opened(inputs):
        return captured(model, inputs, roles, dynamic, timesteps)


def captured(
    model: nn.Module,
    inputs: Mapping[str, Any],
    roles: Mapping[str, str | Role] | None,
    dynamic: Mapping[str, tuple[int, int]] | None,
    timesteps: tuple[float, ...] | None,
) -> Program:
    """The Program of a network that is no wrapper, with nothing compiled in it."""
    parameters = check_signature(model, inputs)
    inputs = copied(inputs)  # forward may write into them, and the caller afterwards
    leaves, constants = flatten_inputs(inputs)
    found = infer_roles({leaf.label: leaf.tensor.dim() for leaf in leaves}, roles)
    check_timesteps(leaves, found, timesteps)
    leaves = laid_out(model, inputs, leaves, found, dynamic or {})
    shapes = dynamic_shapes(inputs, leaves, found, dynamic or {})
    exported, fixed = traced(model, inputs, shapes, found)
    found |= fixed
    graph, weights, names = unlift(exported, [leaf.path for leaf in leaves])
    check_random(graph)
    symbols = symbol_names(leaves, names, graph, found, dynamic or {})
    steps = checked_steps(exported, graph, symbols, dynamic or {})
    expected, result = expected_outputs(model, inputs, exported)
    described = described_inputs(dict(zip(names, leaves, strict=True)), found, graph, symbols)
    part = whole(graph, described)
    bare = on_meta(inputs)
    return Program(
        inputs=described,
        parameters=parameters,
        constants=constants,
        result=result,
        outputs=part.outputs,
        parts=(part,),
        weights=weights,
        timesteps=timesteps,
        bounds=dict(dynamic or {}),
        steps=steps,
        examples={} if bare else {n: v.tensor for n, v in zip(names, leaves, strict=True)},
        expected=None if bare else expected,
        model=describe(model),
    )


def whole(graph: fx.Graph, described: Iterable[Input]) -> Part:
    """The network as the one part of a program, at the rate of steps."""
    sources = {item.name: ROLE_DEPENDS[item.role] for item in described}
    depends = dependences(graph, sources)[graph.output_node()]
    outputs = output_names(len(graph.output_node().args[0]))  # type: ignore[arg-type]
    return Part("full", depends | ROLE_DEPENDS[Role.LATENT], graph, outputs)


def described_inputs(
    leaves: Mapping[str, Leaf], roles: Mapping[str, Role], graph: fx.Graph,
    symbols: Mapping[str, str],
) -> tuple[Input, ...]:  # fmt: skip
    """What the Session has to know of the inputs, by the graph's names for them."""
    words = {**derived_sizes(graph, symbols), **symbols}
    return tuple(
        described_input(leaf, name, roles[leaf.label], sizes(graph, name, words))
        for name, leaf in leaves.items()
    )


def described_input(leaf: Leaf, name: str, role: Role, shape: tuple[Dim, ...]) -> Input:
    """What the Session has to know of one input."""
    fixed = role is Role.STATIC and not leaf.tensor.is_meta
    known = digest(leaf.tensor) if fixed else ""
    return Input(name, role, shape, dtype_name(leaf.tensor), leaf.path, known)


def describe(model: nn.Module) -> dict[str, Any]:
    """The class, size and (for diffusers) config of a network, as JSON-able data."""
    known: Any = getattr(model, "config", None) or {}
    config = dict(known.to_dict() if hasattr(known, "to_dict") else known)
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "weight_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "dtype": dtype_name(next(model.parameters(), torch.empty(0))),
        "config": {key: value for key, value in config.items() if _is_json(value)},
    }


def _is_json(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_json(item) for item in value)
    return value is None or isinstance(value, (bool, int, float, str))


def traced(
    model: nn.Module, inputs: Mapping[str, Any], shapes: dict[str, Any] | None,
    roles: Mapping[str, Role],
) -> tuple[ExportedProgram, dict[str, Role]]:  # fmt: skip
    """The exported network, and its inputs whose values it reads: they have become static.

    These values are recorded on the examples, where torch.export cannot do without them, and where
    they can be the same at every step. Where they cannot, they may route rows to experts.
    """
    failure = None
    try:
        exported = export(model, inputs, shapes)
        if not unknown_sizes(exported):
            return exported, {}
    except CaptureError as error:
        failure = error
    record = None if shapes is not None else readable(model, inputs, roles)
    values = [] if record is None else record.values
    if failure is None and (not values or OPEN in values):
        return exported, {}
    if failure is not None and (record is None or OPEN in values):
        found = routed(model, inputs, shapes, values, failure)
    elif failure is not None and not values:
        raise failure
    else:
        with replayed(model, values):
            found = export(model, inputs, None)
    return found, {} if record is None else dict.fromkeys(record.labels, Role.STATIC)


def routed(
    model: nn.Module, inputs: Mapping[str, Any], shapes: dict[str, Any] | None, values: list[Any],
    failure: CaptureError,
) -> ExportedProgram:  # fmt: skip
    """The exported network with all rows in the place of those that data choose.

    Raises:
        CaptureError: it does not choose its rows so; `failure`, which is nearer to the point.
    """
    try:
        with Routing(), replayed(model, values) if values else nullcontext():
            exported = export(model, inputs, shapes)
        if not on_meta(inputs):
            check_routing(model, inputs, exported)
    except Exception as error:  # also of the network itself, where it finds no rows
        raise failure from error
    return exported


def unknown_sizes(exported: ExportedProgram) -> bool:
    """Whether a size in the graph follows from a tensor's values: x[mask] has one."""
    return any(free_unbacked_symbols(node.meta.get("val")) for node in exported.graph.nodes
               if isinstance(node.meta.get("val"), torch.Tensor))  # fmt: skip


def readable(
    model: nn.Module, inputs: Mapping[str, Any], roles: Mapping[str, Role]
) -> Record | None:
    """What forward reads on the examples, with what may be something else at another step open."""
    if on_meta(inputs):
        return None
    changing = [label for label, role in roles.items() if role in CHANGING]
    try:
        return recorded(model, inputs, changing)
    except Exception:  # of the network itself: what export said of it is nearer to the point
        return None


def export(
    model: nn.Module, inputs: Mapping[str, Any], shapes: dict[str, Any] | None
) -> ExportedProgram:
    """torch.export without decompositions; failures are told in terms of the user's source."""
    try:
        with torch.no_grad(), DataDetached(), flex_dense(model):
            exported = torch.export.export(
                model, (), dict(inputs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise CaptureError(explain(error)) from error
    inline_modes(exported.graph_module)
    mutates = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in exported.graph.nodes
    )
    if mutates or by_place(exported.graph):
        exported = exported.run_decompositions({})
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise CaptureError(
                f"forward writes into the buffer {spec.target!r}, so its result would depend on "
                "the calls before; make that an input and an output, or leave the update out"
            )
    return exported


def unlift(
    exported: ExportedProgram, paths: list[tuple[str, ...]]
) -> tuple[fx.Graph, dict[str, torch.Tensor], list[str]]:
    """The exported graph with weights as `get_attr` nodes, tensor inputs and user outputs only."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    stored = {**exported.state_dict, **exported.constants}
    weights: dict[str, torch.Tensor] = {}
    wanted = iter(paths)
    names: list[str] = []
    nodes = list(exported.graph.nodes)
    nodes.sort(key=lambda n: n.op != "placeholder" or kinds[n.name].kind in WEIGHT_KINDS)
    for node in nodes:  # stable: the graph's inputs first, then weights and calls
        if node.op == "output":
            continue
        if node.op != "placeholder":
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            continue
        spec = kinds[node.name]
        if spec.kind in WEIGHT_KINDS:
            weights[str(spec.target)] = stored[str(spec.target)].detach()
            mapping[node] = graph.get_attr(str(spec.target))
        elif isinstance(node.meta["val"], torch.Tensor):
            names.append("_".join(next(wanted)))
            mapping[node] = graph.placeholder(names[-1])
        else:
            continue  # an argument that is no tensor: captured as a constant
        mapping[node].meta.update(node.meta)
    set_outputs(graph, [mapping[node] for node in user_outputs(exported)])
    eliminate(graph)
    return graph, weights, names


def sizes(graph: fx.Graph, name: str, symbols: Mapping[str, str]) -> tuple[Dim, ...]:
    """The shape of an input, symbolic sizes by their names."""
    node = next(n for n in graph.nodes if n.op == "placeholder" and n.target == name)
    return tuple(
        int(size) if is_fixed(size) else symbols.get(str(size), str(size))
        for size in node.meta["val"].shape
    )


def symbol_names(
    leaves: list[Leaf],
    names: list[str],
    graph: fx.Graph,
    roles: Mapping[str, Role],
    dynamic: Mapping[str, Any],
) -> dict[str, str]:
    """torch's symbol (`s45`) -> the person's word for it (`batch`); refuse one that got frozen."""
    places = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
    found: dict[str, str] = {}
    for leaf, name in zip(leaves, names, strict=True):
        for axis, word in symbolic_axes(leaf, roles, leaves, dynamic).items():
            size = places[name].meta["val"].shape[axis]
            if not is_fixed(size):
                found.setdefault(str(size), word)
    for word in dynamic:
        if word not in found.values():
            raise CaptureError(
                f"dynamic: the network fixes {word!r} (a size of its own depends on it); leave "
                f"{word!r} out and compile one artifact for each value"
            )
    return found
