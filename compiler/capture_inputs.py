"""The arguments of forward: tensors found by path, sizes left open by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from effuse.errors import InputError, nearest
from effuse.plan import STEP_INPUT, Role

SYMBOLS = ("batch", "height", "width", "frames", "length", "tokens")
FRAMES_AXIS = 2  # of a latent (batch, channels, frames, height, width)


@dataclass(frozen=True)
class Leaf:
    """A tensor found in the arguments of forward."""

    path: tuple[str, ...]
    tensor: torch.Tensor
    frames: int = FRAMES_AXIS  # the axis of frames, if it is a latent that has some

    @property
    def label(self) -> str:
        """The dotted path."""
        return ".".join(self.path)


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


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with a copy of every tensor."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), dict(inputs))  # type: ignore[no-any-return]


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
    check_told_apart(leaves, roles, dynamic)
    axes = {leaf.label: symbolic_axes(leaf, roles, leaves, dynamic) for leaf in leaves}
    for leaf in leaves:
        for axis, word in axes[leaf.label].items():
            check_example_size(leaf.label, word, leaf.tensor.shape[axis], dynamic[word])

    following = {leaf.label: following_axes(leaf, roles, leaves) for leaf in leaves}

    def dims(name: str, path: Any, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return None
        label, auto = ".".join((name, *map(_key, path))), torch.export.Dim.AUTO
        bounds = {axis: dynamic[word] for axis, word in axes[label].items()}
        named = {axis: auto(min=low, max=high) for axis, (low, high) in bounds.items()}
        return dict.fromkeys(following[label], auto) | named

    return {
        name: pytree.tree_map_with_path(lambda path, leaf, name=name: dims(name, path, leaf), value)
        for name, value in inputs.items()
    }


def check_told_apart(
    leaves: list[Leaf], roles: Mapping[str, Role], dynamic: Mapping[str, Any]
) -> None:
    """Refuse an example whose ids could be those of the latent's tokens and of the prompt's."""
    words = {"tokens", "length"}
    found = [
        {name: leaf.tensor.shape[axis]
         for axis, name in named_axes(leaf, roles, leaves).items() if name in words}
        for leaf in leaves
    ]  # fmt: skip
    sizes = [size for each in found for size in each.values()]
    both = words <= {name for each in found for name in each} and len(set(sizes)) == 1
    if words & dynamic.keys() and both and len(sizes) > 2:
        raise InputError(
            f"dynamic: 'tokens' and 'length' are both {sizes[0]} in the example, and position ids "
            "of one would be taken for the other's; give an example in which they differ"
        )


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
    """Axis -> name of the symbolic size, for one tensor, of those that are left open."""
    found = named_axes(leaf, roles, leaves)
    return {axis: name for axis, name in found.items() if name in dynamic}


def named_axes(leaf: Leaf, roles: Mapping[str, Role], leaves: list[Leaf]) -> dict[int, str]:
    """Axis -> name of the size.

    A latent is (batch, …, height, width), of a video with frames before or behind its channels,
    (batch, tokens, channels) or (batch, channels, width); a prompt is (batch, length, …). What else
    has one of their sizes, as position ids, masks and conditions do, has its name.
    """
    latent = next(other.tensor for other in leaves if roles[other.label] is Role.LATENT)
    shape, axes = leaf.tensor.shape, {}
    if shape and shape[0] == latent.shape[0]:
        axes[0] = "batch"
    if roles[leaf.label] is Role.LATENT:
        return axes | _latent_axes(leaf)
    if roles[leaf.label] is not Role.PROMPT:
        return axes
    if len(shape) >= 4 and len(shape) == latent.dim():
        own = _latent_axes(leaf).items()
        return axes | {axis: name for axis, name in own if shape[axis] == latent.shape[axis]}
    text = next((o.tensor for o in leaves if roles[o.label] is Role.PROMPT and o.tensor.dim() == 3),
                None)  # fmt: skip
    known = {latent.shape[1]: "tokens"} if latent.dim() == 3 else {}
    known |= {} if text is None else {text.shape[1]: "length"}
    rows = 0 if len(shape) == 2 and 0 not in axes else 1
    pooled = len(shape) == 2 and rows == 1 and "mask" not in leaf.label
    if len(shape) in (2, 3) and shape[rows] in known and not pooled:
        axes[rows] = known[shape[rows]]
    return axes


def _latent_axes(leaf: Leaf) -> dict[int, str]:
    """The named axes of a latent behind its first."""
    dims = leaf.tensor.dim()
    if dims == 3:
        return {1: "tokens", 2: "width"}
    axes = {dims - 2: "height", dims - 1: "width"} if dims >= 4 else {}
    return axes | ({leaf.frames: "frames"} if dims == 5 else {})


def named_sizes(leaves: list[Leaf], roles: Mapping[str, Role]) -> dict[str, int]:
    """The named sizes of the example inputs."""
    found: dict[str, int] = {}
    for leaf in leaves:
        for axis, name in named_axes(leaf, roles, leaves).items():
            found.setdefault(name, leaf.tensor.shape[axis])
    return found


def following_axes(leaf: Leaf, roles: Mapping[str, Role], leaves: list[Leaf]) -> list[int]:
    """The axes of an input none of whose sizes has a name: they may follow from those that have.

    Rotary tables do, with a row for each token of a picture.
    """
    if roles[leaf.label] is not Role.PROMPT or named_axes(leaf, roles, leaves):
        return []
    return [axis for axis, size in enumerate(leaf.tensor.shape) if size > 1]


def replaced(inputs: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments with other tensors at some labels."""

    def at(path: Any, value: Any) -> Any:
        return tensors.get(".".join(map(_key, path)), value)

    found: dict[str, Any] = pytree.tree_map_with_path(at, dict(inputs))
    return found


def dtype_name(tensor: torch.Tensor) -> str:
    """`float32` for torch.float32."""
    return str(tensor.dtype).removeprefix("torch.")


def on_meta(inputs: Mapping[str, Any]) -> bool:
    """Whether an example has no values."""
    leaves = pytree.tree_leaves(dict(inputs))
    return any(each.is_meta for each in leaves if isinstance(each, torch.Tensor))
