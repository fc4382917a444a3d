"""The ONNX back end: one model per program and variant, weights stored once beside them.

Every file loads in plain onnxruntime: standard ops, opset 21. The weights of all models are
external data inside one safetensors file, whose raw bytes are what ONNX wants.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from effuse.backends.onnx_integer import NATIVE, STORED, unsupported
from effuse.backends.onnx_ops import TRANSLATIONS, prepare
from effuse.errors import BackendError, require
from effuse.graph import clone, evaluate, inputs, value_of
from effuse.onnx_store import INLINE_BYTES, Store
from effuse.ort import open_session
from effuse.plan import ProgramSpec
from effuse.program import Part, Program, used_weights
from effuse.runtime import Session

OPSET = 21


def available() -> str | None:
    """Why this back end cannot be used here, or None."""
    for module in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            require(module)
        except ImportError as error:
            return str(error)
    return None


class PartModule(nn.Module):
    """A part as a module, for the exporter: positional inputs, weights as buffers."""

    def __init__(self, part: Part, weights: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._part = part
        self._names = {name: name.replace(".", "__") for name in sorted(used_weights(part))}
        for name, attribute in self._names.items():
            self.register_buffer(attribute, weights[name])

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part's outputs."""
        weights = {name: getattr(self, attribute) for name, attribute in self._names.items()}
        given = dict(zip(self._part.inputs, values, strict=True))
        return evaluate(self._part.graph, weights, given)


def build(program: Program, folder: Path, progress: Any = lambda what, done, total: None) -> None:
    """Write `<part>.onnx` for every part, and `weights.safetensors`, into `folder`.

    Raises:
        BackendError: an op of the program has no ONNX form.
    """
    if reason := available():
        raise BackendError(reason)
    store = Store()
    models = {}
    for number, part in enumerate(program.parts):
        progress("export to ONNX", number, len(program.parts))
        models[part.name] = export_part(part, program.weights)
        store.take(models[part.name])
    store.write(folder / "weights.safetensors")
    for name, model in models.items():
        store.save(model, folder / f"{name}.onnx")
    progress("export to ONNX", len(program.parts), len(program.parts))


def export_part(part: Part, weights: Mapping[str, torch.Tensor]) -> Any:
    """One part as an onnx_ir model, stripped of everything that names the build machine."""
    graph, _ = clone(part.graph)
    own = dict(weights)
    prepare(graph, own)
    if missing := unsupported(graph):
        raise BackendError(
            f"onnx: ONNX Runtime computes nothing with {missing} (in the part {part.name!r}); the "
            f"nearest formats that it has are {', '.join(NATIVE + STORED)}; or study this one with "
            "backend='reference'"
        )
    lowered = Part(part.name, part.depends, graph, part.outputs)
    places = inputs(graph)
    module = PartModule(lowered, own).eval()
    dynamic = tuple(_open_axes(node) for node in places)
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(
                module,
                tuple(_example(node) for node in places),
                dynamic_shapes={"values": dynamic} if any(dynamic) else None,
                strict=False,
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(part.inputs),
                output_names=list(part.outputs),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise BackendError(
                f"onnx: the part {part.name!r} has no ONNX form: {reason}"
            ) from error
    assert program is not None
    strip(program.model)
    return program.model


def _open_axes(node: fx.Node) -> dict[int, Any]:
    shape = value_of(node).shape
    return {a: torch.export.Dim.AUTO for a, size in enumerate(shape) if not isinstance(size, int)}


def _example(node: fx.Node) -> torch.Tensor:
    value = value_of(node)
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return torch.zeros(shape, dtype=value.dtype)


def strip(model: Any) -> None:
    """Drop inferable types, and metadata: stack traces name the build machine's folders."""
    model.producer_name, model.producer_version = "effuse", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for function in model.functions.values():
        for node in function:
            node.metadata_props.clear()
    outputs = set(model.graph.outputs)
    seen: set[str] = set()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:  # a reader infers them, and they are a third of the file
                value.shape, value.type = None, None
                value.name = f"v{len(seen)}"
                seen.add(value.name)
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for value in list(model.graph.initializers.values()):
        if value.const_value.nbytes < INLINE_BYTES and value not in outputs:
            value.name = f"c{len(seen)}"
            seen.add(value.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's remarks about libraries that it does without."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def load_session(spec: ProgramSpec, folder: Path) -> Session:
    """A Session over the built files."""
    return open_session(spec, folder)
