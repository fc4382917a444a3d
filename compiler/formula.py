"""Arithmetic with named sizes, from the text that a manifest holds (imports no torch)."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping

OPERATORS: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def evaluated(text: str, sizes: Mapping[str, int]) -> int | None:
    """The value of `frames * (height // 2)`; None where something else than sizes is in it."""
    try:
        return value_of(ast.parse(text, mode="eval").body, sizes)
    except (KeyError, TypeError, SyntaxError, ValueError, RecursionError, ZeroDivisionError):
        return None


def value_of(node: ast.expr, sizes: Mapping[str, int]) -> int:
    """The value of a part of it."""
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value_of(node.left, sizes), value_of(node.right, sizes))
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise TypeError(f"expected arithmetic with sizes, got {ast.unparse(node)}")
