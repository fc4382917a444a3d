"""What each mode of a cache keeps, found in the graph's structure."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Protocol

from torch import fx

from effuse.errors import PassError, nearest
from effuse.passes.cut import Target
from effuse.program import Part, Program
from effuse.structure import Chain, Structure, module_outputs, modules


class Choice(Protocol):
    """The option that a mode reads."""

    @property
    def branch(self) -> int:
        """Which long skip, 0 the shallowest."""


def summary(targets: Sequence[Target], most: int = 3) -> list[str]:
    """The first few targets by name, and how many there are."""
    names = list(dict.fromkeys(target.name for target in targets))
    return names if len(names) <= most else [*names[:most], f"… {len(names)} in all"]


def named(full: Part, program: Program, paths: Sequence[str]) -> list[Target]:
    """The outputs of the modules that a person names; patterns may be used.

    Raises:
        PassError: the network has no such module, or nothing of it changes with the latent.
    """
    known, structure = modules(full), Structure(full, program)
    found = []
    for pattern in paths:
        matching = [path for path in known if fnmatch.fnmatch(path, pattern)]
        if not matching:
            raise PassError(f"cache: at={pattern!r} names no module{nearest(pattern, known)}")
        values = [node for path in matching for node in module_outputs(full, path)]
        fresh = [node for node in values if structure.fresh(node)]
        if not fresh:
            raise PassError(f"cache: at={pattern!r} gives nothing that changes with the latent")
        found += [Target(pattern, node) for node in fresh]
    return found


def _deep(options: Choice, full: Part, program: Program) -> list[Target]:
    skips = Structure(full, program).skips
    if skips and options.branch >= len(skips):
        raise PassError(
            f"cache: branch={options.branch}: this network has {len(skips)} long skips, "
            f"0 (the shallowest) to {len(skips) - 1}"
        )
    return [Target(_place(skip.join, options.branch), skip.deep)
            for skip in skips[options.branch : options.branch + 1]]  # fmt: skip


def _auto(options: Choice, full: Part, program: Program) -> list[Target]:
    return _deep(options, full, program) or _block(options, full, program)


def _place(join: fx.Node, branch: int) -> str:
    return f"long skip {branch}, {join.name}"


def _encoder(options: Choice, full: Part, program: Program) -> list[Target]:
    skips = Structure(full, program).skips
    found = [Target(_place(skip.join, n), skip.skip) for n, skip in enumerate(skips)]
    return [*found, Target("middle", skips[-1].deep)] if skips else []


def _unit(options: Choice, full: Part, program: Program) -> list[Target]:
    return [Target(span.name, span.inner) for span in Structure(full, program).units]


def _layer(options: Choice, full: Part, program: Program) -> list[Target]:
    return [Target(span.name, span.branch) for span in Structure(full, program).layers]


def _block(options: Choice, full: Part, program: Program) -> list[Target]:
    return [_added(block) for block in Structure(full, program).blocks]


def _added(chain: Chain) -> Target:
    """What a chain adds to its stream."""
    if len(chain.spans) == 1:
        return Target(chain.name, chain.spans[0].branch)
    return Target(chain.name, chain.exit, chain.spans[0].shortcut)


def _residual(options: Choice, full: Part, program: Program) -> list[Target]:
    stack = Structure(full, program).stack()
    return [Target(stack.name, stack.exit, stack.entry)] if stack else []


MODE_TARGETS = {
    "auto": _auto,
    "deep": _deep,
    "encoder": _encoder,
    "unit": _unit,
    "layer": _layer,
    "block": _block,
    "residual": _residual,
}
