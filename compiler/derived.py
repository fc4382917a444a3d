"""Sizes that torch found to equal others while it traced a network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sympy import Eq, Symbol
from torch import fx

from effuse.graph import fake_mode


def conditions(graph: fx.Graph) -> list[Any]:
    """What the traced path wants to hold of the open sizes, as sympy's expressions."""
    environment = fake_mode(graph).shape_env
    return [] if environment is None else [guard.expr for guard in environment.guards]


def equalities(graph: fx.Graph) -> Iterator[tuple[Any, Any]]:
    """Each symbol that has to equal an expression of others, with that."""
    for guard in conditions(graph):
        if guard.func is Eq:
            for symbol, size in (guard.args, guard.args[::-1]):
                if isinstance(symbol, Symbol) and symbol not in size.free_symbols:
                    yield symbol, size
