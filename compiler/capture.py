"""Capture: any `nn.Module` with example inputs becomes a Program of one flat FX graph."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from effuse.errors import CaptureError, InputError, nearest
from effuse.graph import calls, eliminate, set_outputs, source_line
from effuse.plan import ROLE_DEPENDS, STEP_INPUT, Dim, Input, Role
from effuse.program import Part, Program
from effuse.rates import dependences, random
from effuse.roles import infer_roles

WEIGHT_KINDS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
SYMBOLS = ("batch", "height", "width", "frames", "length")


@dataclass(frozen=True)
class Leaf:
    """A tensor found in the arguments of forward."""

    path: tuple[str, ...]
    tensor: torch.Tensor

    @property
    def label(self) -> str:
        """The dotted path."""
        return ".".join(self.path)


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
    check_model(model)
    parameters = check_signature(model, inputs)
    inputs = copied(inputs)  # forward may write into them, and the caller afterwards
    leaves, constants = flatten_inputs(inputs)
    found = infer_roles({leaf.label: leaf.tensor.dim() for leaf in leaves}, roles)
    check_timesteps(leaves, found, timesteps)
    shapes = dynamic_shapes(inputs, leaves, found, dynamic or {})
    exported = export(model, inputs, shapes)
    graph, weights, names = unlift(exported, [leaf.path for leaf in leaves])
    check_random(graph)
    symbols = symbol_names(leaves, names, graph, found, dynamic or {})
    check_ranges(exported, symbols, dynamic or {})
    expected, result = expected_outputs(model, inputs, exported)
    described = tuple(
        Input(
            name, found[leaf.label], sizes(graph, name, symbols), dtype_name(leaf.tensor), leaf.path
        )
        for leaf, name in zip(leaves, names, strict=True)
    )
    sources = {item.name: ROLE_DEPENDS[item.role] for item in described}
    depends = dependences(graph, sources)[graph.output_node()]
    outputs = output_names(len(graph.output_node().args[0]))  # type: ignore[arg-type]
    on_meta = any(leaf.tensor.is_meta for leaf in leaves)
    return Program(
        inputs=described,
        parameters=parameters,
        constants=constants,
        result=result,
        outputs=outputs,
        parts=(Part("full", depends | ROLE_DEPENDS[Role.LATENT], graph, outputs),),
        weights=weights,
        timesteps=timesteps,
        bounds=dict(dynamic or {}),
        examples={} if on_meta else {n: v.tensor for n, v in zip(names, leaves, strict=True)},
        expected=None if on_meta else expected,
        model=describe(model),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The class, size and (for diffusers) config of a network, as JSON-able data."""
    config = dict(getattr(model, "config", None) or {})
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


def dtype_name(tensor: torch.Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def check_model(model: nn.Module) -> None:
    """Refuse what would compile to nonsense: train mode, NaN or infinite weights."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    training = next((name or "the model" for name, m in model.named_modules() if m.training), None)
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


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a copy of every tensor."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), dict(inputs))  # type: ignore[no-any-return]


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


def flatten_inputs(inputs: Mapping[str, Any]) -> tuple[list[Leaf], dict[str, Any]]:
    """The tensors among the arguments with their paths, and the arguments that hold none."""
    leaves: list[Leaf] = []
    constants: dict[str, Any] = {}
    for name, value in inputs.items():
        found = [
            Leaf((name, *map(_key, path)), leaf)
            for path, leaf in pytree.tree_flatten_with_path(value)[0]
            if isinstance(leaf, torch.Tensor)
        ]
        leaves += found
        if not found:
            constants[name] = value
    if not leaves:
        raise InputError("inputs: no tensor among the example inputs; give at least the latent")
    names = [STEP_INPUT, *("_".join(leaf.path) for leaf in leaves)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"inputs: the name {twice!r} stands for two values; rename one of them")
    return leaves, constants


def _key(entry: Any) -> str:
    key = getattr(entry, "key", None)
    return str(entry.idx if key is None else key)


def dynamic_shapes(
    inputs: Mapping[str, Any],
    leaves: list[Leaf],
    roles: Mapping[str, Role],
    dynamic: Mapping[str, tuple[int, int]],
) -> dict[str, Any] | None:
    """torch.export's `dynamic_shapes` for the named sizes."""
    for name in dynamic:
        if name not in SYMBOLS:
            raise InputError(f"dynamic: no size is called {name!r}{nearest(name, SYMBOLS)}")
    if not dynamic:
        return None
    axes = {leaf.label: symbolic_axes(leaf, roles, leaves, dynamic) for leaf in leaves}
    for leaf in leaves:
        for axis, word in axes[leaf.label].items():
            check_example_size(leaf.label, word, leaf.tensor.shape[axis], dynamic[word])

    def dims(name: str, path: Any, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        found = axes[".".join((name, *map(_key, path)))]
        auto = torch.export.Dim.AUTO
        return {axis: auto(min=dynamic[s][0], max=dynamic[s][1]) for axis, s in found.items()}

    return {
        name: pytree.tree_map_with_path(lambda path, leaf, name=name: dims(name, path, leaf), value)
        for name, value in inputs.items()
    }


def check_example_size(label: str, word: str, size: int, bounds: tuple[int, int]) -> None:
    """Refuse an example from which an open size cannot be told: 1, or one out of bounds."""
    low, high = bounds
    if not low <= size <= high:
        raise InputError(f"dynamic: {word!r} is {low} to {high}, but {size} in the example {label}")
    if size == 1 and high > 1:
        raise InputError(
            f"dynamic: {word!r} is 1 in the example {label}, and torch.export takes a size of 1 "
            "for fixed; give an example of at least 2"
        )


def symbolic_axes(
    leaf: Leaf, roles: Mapping[str, Role], leaves: list[Leaf], dynamic: Mapping[str, Any]
) -> dict[int, str]:
    """Axis -> name of the symbolic size, for one tensor of shape (batch, …, height, width)."""
    latent = next(other.tensor for other in leaves if roles[other.label] is Role.LATENT)
    shape, axes = leaf.tensor.shape, {}
    if shape and shape[0] == latent.shape[0]:
        axes[0] = "batch"
    if roles[leaf.label] is Role.LATENT and len(shape) >= 4:
        axes |= {len(shape) - 2: "height", len(shape) - 1: "width"}
        axes |= {2: "frames"} if len(shape) == 5 else {}
    elif roles[leaf.label] is Role.PROMPT and len(shape) == 3:
        axes[1] = "length"
    return {axis: name for axis, name in axes.items() if name in dynamic}


def export(
    model: nn.Module, inputs: Mapping[str, Any], shapes: dict[str, Any] | None
) -> ExportedProgram:
    """torch.export without decompositions; failures are told in terms of the user's source."""
    try:
        with torch.no_grad():
            exported = torch.export.export(
                model, (), dict(inputs), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise CaptureError(explain(error)) from error
    mutates = any(
        isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        for node in exported.graph.nodes
    )
    exported = exported.run_decompositions({}) if mutates else exported
    for spec in exported.graph_signature.output_specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise CaptureError(
                f"forward writes into the buffer {spec.target!r}, so its result would depend on "
                "the calls before; make that an input and an output, or leave the update out"
            )
    return exported


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


def explain(error: Exception) -> str:
    """Where the capture failed in the user's source, and the way out."""
    text = str(error)
    frames = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', text)
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        frames.append((code.co_filename, str(trace.tb_lineno), code.co_name))
        trace = trace.tb_next
    mine = [
        frame for frame in frames if not re.search(r"[/\\](torch|effuse|compiler)[/\\]", frame[0])
    ]
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


def unlift(
    exported: ExportedProgram, paths: list[tuple[str, ...]]
) -> tuple[fx.Graph, dict[str, torch.Tensor], list[str]]:
    """The exported graph with weights as `get_attr` nodes, tensor inputs and user outputs only."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    signature = exported.graph_signature
    kinds = {spec.arg.name: spec for spec in signature.input_specs}
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
    kept = [
        mapping[arg]
        for arg, spec in zip(
            exported.graph.output_node().args[0],
            signature.output_specs,
            strict=True,
        )
        if spec.kind is OutputKind.USER_OUTPUT and isinstance(arg, fx.Node)
    ]
    set_outputs(graph, kept)
    eliminate(graph)
    return graph, weights, names


def sizes(graph: fx.Graph, name: str, symbols: Mapping[str, str]) -> tuple[Dim, ...]:
    """The shape of an input, symbolic sizes by their names."""
    node = next(n for n in graph.nodes if n.op == "placeholder" and n.target == name)
    return tuple(
        int(size) if is_fixed(size) else symbols.get(str(size), str(size))
        for size in node.meta["val"].shape
    )


def is_fixed(size: int | torch.SymInt) -> bool:
    """Whether a size is a number, a symbol that the network has forced to one value included."""
    return str(size).isdigit()


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


def expected_outputs(
    model: nn.Module, inputs: Mapping[str, Any], exported: ExportedProgram
) -> tuple[tuple[torch.Tensor, ...], Any]:
    """Eager's outputs on the example inputs, flat, and how they are nested."""
    spec = exported.call_spec.out_spec
    if spec is None:
        raise CaptureError("the network returns nothing that torch.export understands")
    count = spec.num_leaves
    nested = nest(pytree.tree_unflatten(list(range(count)), spec))
    if any(t.is_meta for t in pytree.tree_leaves(dict(inputs)) if isinstance(t, torch.Tensor)):
        return (), nested
    with torch.no_grad():
        flat = pytree.tree_leaves(model(**copied(inputs)))
    return tuple(value for value in flat if isinstance(value, torch.Tensor)), nested


def nest(value: Any) -> Any:
    """Nested tuples and mappings of indices as JSON: 0, {"tuple": […]}, {"dict": {…}}."""
    if isinstance(value, Mapping):
        return {"dict": {str(key): nest(item) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"tuple": [nest(item) for item in value]}
    return value


def output_names(count: int) -> tuple[str, ...]:
    """`output_0`, `output_1`, …: what graphs call the network's outputs."""
    return tuple(f"output_{index}" for index in range(count))
