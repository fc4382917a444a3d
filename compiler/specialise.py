"""Open sizes replaced by numbers: a symbolic Program becomes a static one, and several static ones
one set of graphs over one weight store.

A size is read from the recorded shapes: the person's word for it stands in the inputs' described
shapes, torch's symbol in those of the placeholders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from sympy import Ne
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from effuse.buckets import label_of, renamed, sizes_text
from effuse.derived import equalities
from effuse.errors import CaptureError
from effuse.graph import (
    INHERITED,
    calls,
    clone,
    drop_unused_inputs,
    eliminate,
    emit_weight,
    fake_mode,
    inputs,
    set_outputs,
    substitute,
    unused_name,
    value_of,
)
from effuse.plan import Dim, Slot
from effuse.program import Part, Program, output_values, prune_weights
from effuse.rates import random
from effuse.weights import WeightStore, copied

Numbers = Mapping[str, int]  # a torch symbol's value
FOLD_LIMIT = 1 << 18  # elements of a stored value
SEARCHED = 257  # sizes that are tried to find a multiple


def specialise(program: Program, sizes: Mapping[str, int]) -> Program:
    """The program with every open size a number; types derived again, sizes folded.

    Its examples are the program's, cut or repeated to the new sizes.

    Raises:
        CaptureError: the captured path is not right for these sizes.
    """
    numbers = symbol_numbers(program, sizes)
    check_guards(program, numbers, sizes)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    parts = tuple(replace(p, graph=static_graph(p.graph, numbers, mode)) for p in program.parts)
    described = tuple(
        replace(item, shape=_described(item.name, item.shape, parts, sizes))
        for item in program.inputs
    )
    examples = {
        item.name: resized(program.examples[item.name], item.shape)
        for item in described
        if item.name in program.examples
    }
    slots = tuple(_static_slot(slot, parts) for slot in program.plan.slots)
    return replace(
        program,
        inputs=described,
        parts=parts,
        plan=replace(program.plan, slots=slots),
        bounds={},
        steps={},
        shapes=(),
        examples=examples,
        expected=None,
        weights=copied(program.weights),
    )


def resized(tensor: torch.Tensor, shape: Sequence[Dim]) -> torch.Tensor:
    """The tensor cut, or repeated from its beginning, to a shape."""
    for axis, size in enumerate(shape):
        if size != tensor.shape[axis] and isinstance(size, int):
            tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor.contiguous()


def symbol_numbers(program: Program, sizes: Mapping[str, int]) -> dict[str, int]:
    """The value of each of torch's symbols, from the values of the sizes that people name.

    Raises:
        CaptureError: a size has to be a multiple of something that it is not.
    """
    wanted = {item.name: item.shape for item in program.inputs}
    found: dict[str, int] = {}
    for node in (node for part in program.parts for node in inputs(part.graph)):
        for word, size in zip(wanted.get(str(node.target), ()), value_of(node).shape, strict=False):
            if isinstance(word, str) and isinstance(size, torch.SymInt) and word in sizes:
                symbol, factor = proportional(size)
                if sizes[word] % factor:
                    raise CaptureError(
                        f"shapes: {word} is {sizes[word]}, and the network takes multiples of "
                        f"{factor} only"
                    )
                found[symbol] = sizes[word] // factor
    for symbol, size in equalities(program.parts[-1].graph):
        free = {each: found.get(str(each)) for each in size.free_symbols}
        if str(symbol) not in found and None not in free.values():
            found[str(symbol)] = int(size.subs(free))
    return found


def proportional(size: torch.SymInt) -> tuple[str, int]:
    """The symbol s and the factor k of an input's size k · s."""
    expression = size.node.expr
    (symbol,) = expression.free_symbols
    return str(symbol), int(expression.subs({symbol: 1}))


def number_of(size: int | torch.SymInt, numbers: Numbers) -> int:
    """A recorded size as a number; a symbol that nobody names keeps the example's value."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    unnamed = {s for s in expression.free_symbols if str(s) not in numbers}
    if unnamed and not size.node.has_hint():
        raise CaptureError(f"shapes: the size {expression} depends on the data of a tensor")
    if unnamed:
        return int(size.node.hint)
    return int(expression.subs({s: numbers[str(s)] for s in expression.free_symbols}))


def check_guards(program: Program, numbers: Numbers, sizes: Mapping[str, int]) -> None:
    """Refuse sizes for which forward would have branched otherwise than it did at capture.

    A condition that a size differs from one value is torch's own, of no consequence here.

    Raises:
        CaptureError: they are such.
    """
    environment = fake_mode(program.parts[-1].graph).shape_env
    guards = [guard.expr for guard in ([] if environment is None else environment.guards)]
    for guard in guards:
        symbols = {symbol: numbers.get(str(symbol)) for symbol in guard.free_symbols}
        if None in symbols.values() or guard.func is Ne or bool(guard.subs(symbols)):
            continue
        at = sizes_text(sizes)
        alone = [each for each in guards if each.free_symbols == guard.free_symbols]
        if len(symbols) == 1 and (step := multiple(alone)) > 1:
            (own,) = symbols.values()
            names = ", ".join(name for name, size in sizes.items() if size == own)
            raise CaptureError(
                f"shapes: the network takes multiples of {step} only, and {names} is {own} in {at}"
            )
        raise CaptureError(
            f"shapes: the network takes another path at {at}; compile an artifact of its own for "
            "that"
        )


def multiple(guards: Sequence[Any]) -> int:
    """What a size has to be a multiple of to meet all these conditions on it; 1: of nothing."""
    (symbol,) = guards[0].free_symbols
    good = [n for n in range(1, SEARCHED) if all(bool(each.subs(symbol, n)) for each in guards)]
    step = good[1] - good[0] if len(good) > 2 else 1
    return step if all(n % step == 0 for n in good) else 1


def static_graph(graph: fx.Graph, numbers: Numbers, mode: FakeTensorMode) -> fx.Graph:
    """A copy of the graph whose recorded values have known sizes, computed from its inputs'.

    What gave numbers (sizes, and arithmetic with them) is in its users' arguments.
    """
    made = fx.Graph()
    known: dict[fx.Node, Any] = {}

    def argument(value: Any) -> Any:
        return number_of(value, numbers) if isinstance(value, torch.SymInt) else value

    for node in graph.nodes:
        if node.op == "output":
            set_outputs(made, fx.map_arg(node.args[0], known.__getitem__))
        elif node.op != "call_function":
            known[node] = made.node_copy(node)
            known[node].meta["val"] = _known(value_of(node), numbers, mode)
        else:
            given = pytree.tree_map(argument, (node.args, dict(node.kwargs)))
            args, kwargs = fx.map_arg(given, known.__getitem__)
            known[node] = _emitted(made, node, args, kwargs, mode)
    return made


def _known(value: torch.Tensor, numbers: Numbers, mode: FakeTensorMode) -> torch.Tensor:
    """A fake tensor like a recorded one, of known sizes and strides."""
    shape, strides = (tuple(number_of(size, numbers) for size in sizes)
                      for sizes in (value.shape, value.stride()))  # fmt: skip
    with mode:
        return torch.empty_strided(shape, strides, dtype=value.dtype, device=value.device)


def _emitted(graph: fx.Graph, like: fx.Node, args: Any, kwargs: Any, mode: FakeTensorMode) -> Any:
    """The call of a node on other arguments; the number alone, if that is what it gives."""
    target: Any = like.target
    with mode, enable_python_dispatcher(), torch.no_grad():
        value = target(*fx.map_arg(args, value_of), **fx.map_arg(kwargs, value_of))
    if isinstance(value, (bool, int, float)):
        return value
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = value
    node.meta.update({key: like.meta[key] for key in INHERITED if key in like.meta})
    return node


def _described(
    name: str, shape: Sequence[Dim], parts: Sequence[Part], sizes: Mapping[str, int]
) -> tuple[Dim, ...]:
    """An input's shape in numbers, as the parts record it if any reads it."""
    nodes = (node for part in parts for node in inputs(part.graph))
    found = next((tuple(value_of(node).shape) for node in nodes if node.target == name), None)
    return found or tuple(sizes.get(size, size) if isinstance(size, str) else size
                          for size in shape)  # fmt: skip


def _static_slot(slot: Slot, parts: Sequence[Part]) -> Slot:
    filling = next(part for part in parts if slot.name in part.outputs)
    return replace(slot, shape=tuple(value_of(output_values(filling)[slot.name]).shape))


def folded(program: Program) -> Program:
    """What is computed from sizes alone (positions, masks) as stored values; inputs that were read
    for their sizes only are gone.
    """
    weights = copied(program.weights)
    for part in program.parts:
        _fold(part.graph, weights)
        eliminate(part.graph)
        drop_unused_inputs(part.graph)
    return prune_weights(replace(program, weights=weights))


def _fold(graph: fx.Graph, weights: WeightStore) -> None:
    known: dict[fx.Node, torch.Tensor] = {}
    for node in calls(graph):
        value = value_of(node)
        alone = all(source in known for source in node.all_input_nodes)
        if not alone or not isinstance(value, torch.Tensor) or value.numel() > FOLD_LIMIT:
            continue
        if random(node):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad():
            known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    for node, tensor in known.items():
        if any(user not in known for user in node.users):
            name = unused_name(weights, f"folded.{node.name}")
            with graph.inserting_before(node):
                substitute(node, emit_weight(graph, weights, name, tensor.contiguous()))


# ---- many static programs as one -----------------------------------------------------------------


def apart(program: Program, sizes: Mapping[str, int], shared: WeightStore) -> Program:
    """A bucket's program with names of its own for parts, and for weights that are not `shared`."""
    label = label_of(sizes)
    own = {name: f"{name}.{label}" for name in program.weights if name not in shared}
    weights = copied(shared)
    for name, new in own.items():
        weights[new] = program.weights[name]
    parts = []
    for part in program.parts:
        graph, _ = clone(part.graph)
        for node in graph.nodes:
            if node.op == "get_attr":
                node.target = own.get(str(node.target), node.target)
        parts.append(replace(part, name=f"{part.name}.{label}", graph=graph))
    plan = renamed(program.plan, label)
    return replace(program, parts=tuple(parts), weights=weights, plan=plan)


def together(programs: Sequence[Program]) -> Program:
    """The parts of all these programs in one, for a back end to write; it cannot be run."""
    weights = copied(programs[0].weights)
    for each in programs[1:]:
        for name in each.weights:
            if name not in weights:
                weights[name] = each.weights[name]
    parts = [part for each in programs for part in each.parts]
    return programs[0].with_parts(*parts, weights=weights, examples={}, expected=None)
