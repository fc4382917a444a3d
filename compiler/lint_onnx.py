"""An ONNX model as the linter's rules see it: typed, indexed, its external data left on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effuse.errors import ArtifactError, require

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

QUANTIZE, DEQUANTIZE = "QuantizeLinear", "DequantizeLinear"
ONNX_DOMAINS = ("", "ai.onnx")
LAYOUT = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomUniform")
SMALL = 1 << 20  # elements; scales and zero points are read, larger tensors stay on disk

Version = tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """A model and the version of what it is linted for.

    Args:
        root: the model, with the types and shapes that ONNX infers.
        version: of the target.
        path: the file it is from, or None.
        proto: what the file holds, or None; keeps what `root` cannot, such as duplicates.
    """

    root: ir.Model
    version: Version
    path: Path | None = None
    proto: onnx.ModelProto | None = field(default=None, repr=False)

    @cached_property
    def nodes(self) -> tuple[ir.Node, ...]:
        """Every node, those of subgraphs and local functions too, in order."""
        functions = (each for made in self.root.functions.values() for each in made.all_nodes())
        return (*self.root.graph.all_nodes(), *functions)

    @cached_property
    def places(self) -> dict[ir.Node, str]:
        """Where each node is: `node 3`, `node 0 in loop_body`; the numbers are its graph's."""
        found = {node: f"node {number}" for number, node in enumerate(self.root.graph)}
        graphs = [each for each in self.root.graphs() if each is not self.root.graph]
        bodies = [(each.name or "a subgraph", tuple(each)) for each in graphs]
        bodies += [(each.name, tuple(each)) for each in self.root.functions.values()]
        for name, nodes in bodies:
            found |= {node: f"node {number} in {name}" for number, node in enumerate(nodes)}
        return found

    @cached_property
    def quantizers(self) -> tuple[ir.Node, ...]:
        """The QuantizeLinear and DequantizeLinear nodes of ONNX itself."""
        pair = (QUANTIZE, DEQUANTIZE)
        return tuple(n for n in self.nodes if is_onnx(n) and n.op_type in pair)

    @cached_property
    def initializers(self) -> tuple[ir.Value, ...]:
        """The initializers of all graphs."""
        return tuple(v for graph in self.root.graphs() for v in graph.initializers.values())

    @cached_property
    def constants(self) -> frozenset[ir.Value]:
        """The values that are known when an engine is built."""
        known = set(self.initializers)
        for node in self.nodes:
            if folds(node) and all(each in known for each in node.inputs if each is not None):
                known.update(node.outputs)
        return frozenset(known)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        return self.root.opset_imports.get("", 0)

    def is_constant(self, value: ir.Value | None) -> bool:
        """Whether a value is known when an engine is built; an absent one is."""
        return value is None or value in self.constants


def folds(node: ir.Node) -> bool:
    """Whether a node's outputs are constant when its inputs are."""
    random = node.op_type.startswith(RANDOM)
    inner = any(attribute.type.name in ("GRAPH", "GRAPHS") for attribute in attributes(node))
    return not random and not inner and (bool(node.inputs) or node.op_type == "Constant")


def attributes(node: ir.Node) -> Iterator[ir.Attr]:
    """The attributes of a node that are values, not references to a function's."""
    return (each for each in node.attributes.values() if not each.is_ref())


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value: text as str, lists as tuples."""
    given = node.attributes.get(name)
    if given is None or given.is_ref():
        return default
    return tuple(given.value) if isinstance(given.value, (list, tuple)) else given.value


def is_onnx(node: ir.Node) -> bool:
    """Whether a node's operator is ONNX's own."""
    return node.domain in ONNX_DOMAINS


def operators(*names: str) -> Callable[[Model], Iterator[ir.Node]]:
    """What finds the nodes of some of ONNX's operators."""
    return lambda model: (n for n in model.nodes if is_onnx(n) and n.op_type in names)


def given(node: ir.Node, index: int) -> ir.Value | None:
    """An input of a node, or None where it has none."""
    return node.inputs[index] if index < len(node.inputs) else None


def dtype(value: ir.Value | None) -> str:
    """A value's type as ONNX names it (`FLOAT16`), or nothing where that is not known."""
    known = None if value is None else value.dtype
    if known is None and value is not None and (tensor := constant(value)) is not None:
        known = tensor.dtype
    return "" if known is None else known.name


def shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """A value's shape, None for a size that is open, or None where the rank is not known."""
    if value is None:
        return None
    tensor = constant(value)
    known = value.shape if tensor is None else tensor.shape
    if known is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in known)


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant, unread."""
    found: ir.TensorProtocol | None = require("onnx_ir").convenience.get_const_tensor(value)
    return found


def array(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """A small constant's elements; None for others.

    Raises:
        ArtifactError: its external data cannot be read.
    """
    tensor = None if value is None else constant(value)
    if tensor is None or tensor.size > SMALL or tensor.dtype.name == "STRING":
        return None
    try:
        return np.asarray(tensor.numpy())
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{tensor.name}: its external data cannot be read: {error}") from error


def elements(value: ir.Value | None) -> int | None:
    """How many elements a value has, where that is known."""
    sizes = shape(value)
    if sizes is None or any(size is None for size in sizes):
        return None
    return int(np.prod([size for size in sizes if size is not None], dtype=np.int64))


def readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    """The nodes that compute with a value, and as which input: layout is looked through."""
    for node, index in value.uses():
        if is_onnx(node) and node.op_type in LAYOUT and index == 0:
            yield from readers(node.outputs[0])
        else:
            yield node, index


def axis_of(node: ir.Node) -> int | None:
    """The axis of a Q or DQ that has one scale for each channel or block; None: one in all."""
    scale = given(node, 1)
    several = scale is not None and elements(scale) not in (1, None)
    return int(attribute(node, "axis", 1)) if several else None


def quantized_type(node: ir.Node) -> str:
    """The type that a Q writes or a DQ reads."""
    return dtype(node.inputs[0] if node.op_type == DEQUANTIZE else node.outputs[0])
