"""The ONNX back end: one model per program and variant, weights stored once beside them.

Every file loads in plain onnxruntime: standard ops, opset 21. The weights of all models are
external data inside one safetensors file, whose raw bytes are what ONNX wants.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from effuse.backends.onnx_complex import check_outputs
from effuse.backends.onnx_exporter import to_onnx
from effuse.backends.onnx_half import halve
from effuse.backends.onnx_integer import NATIVE, STORED, unsupported
from effuse.backends.onnx_ops import TRANSLATIONS, prepare
from effuse.devices import CPU, device_of, missing
from effuse.errors import BackendError, require
from effuse.graph import clone, evaluate, inputs, value_of
from effuse.onnx_store import INLINE_BYTES, KEY, Store
from effuse.ort import open_session
from effuse.plan import Adapter, ProgramSpec, factor_axes
from effuse.program import Part, Program, used_weights
from effuse.runtime import Session
from effuse.weights import FileWeights, copied, journal_of, stand_in

NARROW = ("FLOAT16", "BFLOAT16", "INT8", "UINT8", "INT4", "UINT4")


def absent(target: str | None) -> str | None:
    """Why what was built for `target` does not run here, or None."""
    return missing(device_of(target))


def available() -> str | None:
    """Why this back end cannot be used here, or None."""
    for module in ("onnx", "onnx_ir", "onnxscript", "onnxruntime"):
        try:
            require(module)
        except ImportError as error:
            return str(error)
    return None


class PartModule(nn.Module):
    """A part as a module, for the exporter: positional inputs, weights as buffers.

    Those in `swappable` are inputs too, behind the part's own.
    """

    def __init__(
        self, part: Part, weights: Mapping[str, torch.Tensor], swappable: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self._part = part
        self._inputs = (*part.inputs, *swappable)
        stored = sorted(used_weights(part) - set(swappable))
        self.names = {name: self.attribute(name) for name in stored}
        for name, attribute in self.names.items():
            self.register_buffer(attribute, stand_in(weights, name))
        self.weights = weights

    @staticmethod
    def attribute(name: str) -> str:
        """What a weight is called here, and in the model."""
        return name.replace(".", "__")

    def forward(self, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The part's outputs."""
        weights = {name: getattr(self, attribute) for name, attribute in self.names.items()}
        given = dict(zip(self._inputs, values, strict=True))
        return evaluate(self._part.graph, {**given, **weights}, given)


def build(
    program: Program, folder: Path, progress: Any = lambda what, done, total: None,
    target: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `<part>.onnx` for every part, and `weights.safetensors`, into `folder`.

    Raises:
        BackendError: an op of the program has no ONNX form.
    """
    if reason := available():
        raise BackendError(reason)
    check_outputs(program, "onnx")
    store = Store()
    models = {}
    for number, part in enumerate(program.parts):
        progress("export to ONNX", number, len(program.parts))
        models[part.name] = export_part(part, program.weights, program.adapters, target)
        store.take(models[part.name])
    adapters = require("onnx_ir.tensor_adapters")
    for name in {each for slot in program.adapters for each in (slot.rows, slot.columns) if each}:
        store.add(name, adapters.TorchTensor(program.weights[name], name=name))
    store.write(folder / "weights.safetensors", journal_of(program.weights), progress)
    for name, model in models.items():
        store.save(model, folder / f"{name}.onnx")
    progress("export to ONNX", len(program.parts), len(program.parts))
    return {}


def export_part(
    part: Part, weights: Mapping[str, torch.Tensor], adapters: Sequence[Adapter] = (),
    target: str | None = None,
) -> Any:  # fmt: skip
    """One part as an onnx_ir model, stripped of everything that names the build machine.

    The adapters' factors are initializers that a run may override, of any rank.
    """
    graph, _ = clone(part.graph)
    own = copied(weights)
    prepare(graph, own, contrib=device_of(target).contrib)
    if missing := unsupported(graph):
        raise BackendError(
            f"onnx: ONNX Runtime computes nothing with {missing} (in the part {part.name!r}); the "
            f"nearest formats that it has are {', '.join(NATIVE + STORED)}; or study this one with "
            "backend='reference'"
        )
    if device_of(target).half:
        halve(graph, own, factor_axes(adapters))
    lowered = Part(part.name, part.depends, graph, part.outputs)
    model, ranks = to_model(lowered, own, adapters)
    make_overridable(model, {name: own[name] for name in ranks}, ranks)
    strip(model)
    return model


def to_model(
    part: Part, weights: Mapping[str, torch.Tensor], adapters: Sequence[Adapter] = (),
    translations: Mapping[Any, Any] = TRANSLATIONS, reader: str = "onnx",
) -> tuple[Any, dict[str, dict[int, Any]]]:  # fmt: skip
    """A lowered part as an onnx_ir model, whose last inputs are the adapters' factors.

    With them their axes of open size.
    """
    places, ranks = inputs(part.graph), _rank_axes(part, adapters)
    module = PartModule(part, weights, tuple(ranks)).eval()
    dynamic = (*(open_axes(node) for node in places), *ranks.values())
    examples = [example(node) for node in places]
    examples += [_of_rank(weights[name], axes) for name, axes in ranks.items()]
    return exported(part, module, examples, dynamic, tuple(ranks), translations, reader), ranks


def exported(
    part: Part, module: nn.Module, examples: Sequence[torch.Tensor],
    dynamic: Sequence[dict[int, Any]], swappable: Sequence[str] = (),
    translations: Mapping[Any, Any] = TRANSLATIONS, reader: str = "onnx",
) -> Any:  # fmt: skip
    """The module of a part as an onnx_ir model, its ops written as `translations` say.

    Raises:
        BackendError: an op of it has no ONNX form.
    """
    if any(each.is_complex() for each in examples):
        raise BackendError(
            f"{reader}: the part {part.name!r} takes complex numbers; give the network pairs of "
            "real ones (torch.view_as_real), or compile with backend='onnx'"
        )
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(
                module,
                tuple(examples),
                dynamic_shapes={"values": tuple(dynamic)} if any(dynamic) else None,
                strict=False,
            )
            model = to_onnx(exported, [*part.inputs, *swappable], part.outputs, translations)
            defer(model, module)
            optimize(model)
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise BackendError(
                f"{reader}: the part {part.name!r} has no ONNX form: {reason}"
            ) from error
    return model


def defer(model: Any, module: nn.Module) -> None:
    """Let weights that stay in files be read when they are written."""
    if not (isinstance(module, PartModule) and isinstance(module.weights, FileWeights)):
        return
    for name, attribute in module.names.items():
        value = model.graph.initializers.get(attribute)
        if value is not None and not isinstance(module.weights.held(name), torch.Tensor):
            value.const_value = lazy_tensor(value.const_value, module.weights, name)


def lazy_tensor(like: Any, weights: FileWeights, name: str) -> Any:
    """A weight as an ir tensor of the dtype and shape of `like`, read whenever it is asked for."""
    adapters = require("onnx_ir.tensor_adapters")

    def read() -> Any:
        return adapters.TorchTensor(weights[name].contiguous(), name=like.name)

    key = {KEY: weights.key(name)}
    lazy = require("onnx_ir").LazyTensor
    return lazy(read, like.dtype, like.shape, name=like.name, metadata_props=key)


def optimize(model: Any) -> None:
    """The exporter's optimizer, but that weights of few bits stay so: it computes small ones."""

    def choose(node: Any) -> bool | None:
        return False if widens(node) else None

    require("onnxscript.optimizer").optimize_ir(model, should_fold=choose)


def widens(node: Any) -> bool:
    """Whether a node makes float32 of stored numbers of fewer bits."""
    if node.op_type not in ("Cast", "CastLike", "DequantizeLinear"):
        return False
    stored = node.inputs[0].const_value
    return stored is not None and stored.dtype.name in NARROW


def _rank_axes(part: Part, adapters: Sequence[Adapter]) -> dict[str, dict[int, Any]]:
    """The swappable weights of a part, each with its axis of open size; U has its D's rank."""
    used = used_weights(part)
    axes = {name: each for name, each in factor_axes(adapters).items() if name in used}
    downs = dict.fromkeys(down for _, down in axes.values())
    sizes = {down: torch.export.Dim(f"rank_{number}") for number, down in enumerate(downs)}
    return {name: {axis: sizes[down]} for name, (axis, down) in axes.items()}


def _of_rank(factor: torch.Tensor, axes: Mapping[int, Any], rank: int = 2) -> torch.Tensor:
    """Zeros in the factor's place; the exporter takes a size of 1 for fixed."""
    shape = [rank if axis in axes else size for axis, size in enumerate(factor.shape)]
    return torch.zeros(shape, dtype=factor.dtype)


def make_overridable(
    model: Any, defaults: Mapping[str, torch.Tensor], axes: Mapping[str, Mapping[int, Any]]
) -> None:
    """Let these inputs of a model have defaults: initializers that a run may override.

    `axes` names the open sizes, which the exporter numbers.
    """
    adapters = require("onnx_ir.tensor_adapters")
    for value in model.graph.inputs:
        if value.name in defaults:
            stored = defaults[value.name].contiguous()
            value.const_value = adapters.TorchTensor(stored, name=value.name)
            for axis, size in axes[value.name].items():
                value.shape[axis] = size.__name__
            model.graph.register_initializer(value)


def open_axes(node: fx.Node) -> dict[int, Any]:
    """The axes of open size of an input, for torch.export."""
    shape = value_of(node).shape
    return {a: torch.export.Dim.AUTO for a, size in enumerate(shape) if not isinstance(size, int)}


def example(node: fx.Node) -> torch.Tensor:
    """Zeros in an input's place."""
    value = value_of(node)
    shape = [size if isinstance(size, int) else size.node.hint for size in value.shape]
    return torch.zeros(shape, dtype=value.dtype)


def strip(model: Any, kept: Collection[str] = ()) -> None:
    """Drop inferable types, and metadata: stack traces name the build machine's folders.

    Small initializers get short names, but those in `kept`.
    """
    model.producer_name, model.producer_version = "effuse", None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for function in model.functions.values():
        for node in function:
            node.metadata_props.clear()
    outputs, places = set(model.graph.outputs), set(model.graph.inputs)
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
        if (
            value.const_value.nbytes < INLINE_BYTES
            and value not in outputs | places
            and (value.name not in kept)
        ):
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
    """A Session over the built files, on the CPU whatever they were built for."""
    return open_session(spec, folder, providers=[CPU])


rehearse = load_session
