"""FlexAttention, which torch.export keeps as one call with graphs of its own, as ordinary ops.

    softmax(where(mask(b, h, q, k), score(QKᵀ·scale, b, h, q, k), -inf)) V

in float32 or wider, with the functions of one score applied to all: what torch computes in eager
mode. Lists of blocks in a block mask, which only compiled kernels skip by, go; its function stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from effuse.capture_unwrap import forward_as

Tensor = torch.Tensor
LOG2 = math.log(2)  # torch's op gives logarithms to the base of 2


class FlexDense(TorchFunctionMode):
    """Computes every FlexAttention in ordinary ops."""

    def __enter__(self) -> Any:
        self._outer = modes()
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every call as it is, but for that."""
        if function is not torch.ops.higher_order.flex_attention:
            return function(*args, **(kwargs or {}))
        with ExitStack() as stack:  # torch takes one of torch.export's own modes away around it
            for mode in self._outer:
                if mode not in modes():
                    stack.enter_context(mode)
            return dense(*args, **(kwargs or {}))


def modes() -> list[Any]:
    """The modes that see torch's functions here."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


class Indexed(TorchFunctionMode):
    """Reads `table[b, h, q, k]` at the places of one score: with several at once they are lists."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Every call as it is, but for that."""
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        table, index = args
        places = index if isinstance(index, tuple) else (index,)
        if not all(isinstance(each, (int, Tensor)) for each in places):
            return function(*args)
        listed = [torch.full((), each, dtype=torch.long, device=table.device)
                  if isinstance(each, int) else each for each in places]  # fmt: skip
        return torch.ops.aten.index.Tensor(table, listed)


@contextmanager
def flex_dense(model: nn.Module) -> Iterator[None]:
    """Where FlexAttention is computed in ordinary ops in every call of a network.

    The mode is entered in the call itself: torch.export's own have to see what this computes.
    """
    forward = model.forward

    @wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        with FlexDense():
            return forward(*args, **kwargs)

    with forward_as(model, call):
        yield


def by_place(graph: fx.Graph) -> bool:
    """Whether a graph still holds functions of one place, to be applied to all."""
    return any(str(getattr(node.target, "__module__", "")).startswith("torch._functorch")
               for node in graph.nodes if node.op == "call_function")  # fmt: skip


def dense(
    query: Tensor, key: Tensor, value: Tensor, score: Callable[..., Tensor],
    blocks: tuple[Any, ...], scale: float, options: Any,
    score_buffers: tuple[Any, ...] = (), mask_buffers: tuple[Any, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The arguments of torch's op, the last of `blocks` the function of its mask."""
    return attention(query, key, value, scale, (score, blocks[-1]), (score_buffers, mask_buffers))


def attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, functions: tuple[Any, Any],
    buffers: tuple[tuple[Any, ...], tuple[Any, ...]],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the logarithms of the sums, and the greatest scores.

    Args:
        query: of shape (batch, heads, queries, width), as `key` and `value`, which may have fewer
            heads, and one batch for all.
        functions: of a score and its place, and of a place: the score, and whether it counts.
        buffers: what the two functions read besides.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    if key.shape[0] != query.shape[0]:
        key, value = (each.expand(query.shape[0], -1, -1, -1) for each in (key, value))
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query.to(wide) @ key.to(wide).transpose(-2, -1)) * scale
    places = [torch.arange(size, device=query.device) for size in scores.shape]
    with Indexed():
        scores = everywhere(functions[0], (0,), buffers[0])(scores, *places, *buffers[0])
        counts = everywhere(functions[1], (), buffers[1])(*places, *buffers[1])
    scores = torch.where(counts, scores, -math.inf)
    empty = (scores == -math.inf).all(dim=-1, keepdim=True)
    shares = torch.where(empty, 0.0, scores.softmax(dim=-1)).to(query.dtype)
    sums = torch.where(empty.squeeze(-1), -math.inf, scores.logsumexp(dim=-1))
    output = laid_out(shares @ value.to(query.dtype), query)
    return output, sums / LOG2, scores.amax(dim=-1) / LOG2


def everywhere(
    function: Callable[..., Any], first: tuple[int, ...], buffers: tuple[Any, ...]
) -> Callable[..., Any]:
    """A function of one batch, head, query and key, for all of them."""
    rest = (None,) * len(buffers)
    for axis in reversed(range(4)):
        places = tuple(0 if number == axis else None for number in range(4))
        function = torch.vmap(function, in_dims=(*first, *places, *rest))
    return function


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor with its axes in memory in the order of another's, its last axis innermost."""
    strides = like.stride()
    outer = sorted(range(tensor.dim() - 1), key=lambda axis: -strides[axis])
    order = [*outer, tensor.dim() - 1]
    back = [order.index(axis) for axis in range(tensor.dim())]
    return tensor.permute(order).contiguous().permute(back)
