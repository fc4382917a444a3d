"""Names of candidates, told apart where several share one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from torch import fx

from effuse.graph import module_path


def distinct(names: Sequence[str], members: Sequence[Sequence[str]]) -> list[str]:
    """The names, those that several share with the beginnings of their members' paths behind.

    As few words of the paths as tell them apart; numbers where none do.

    Args:
        names: module paths.
        members: of each, the paths of what it holds.

    >>> distinct(["up", "up", "mid"], [["up.a.0.x", "up.b.0"], ["up.a.1.x"], ["mid.a"]])
    ['up.a.0+b.0', 'up.a.1', 'mid']
    >>> distinct(["net", "net"], [["net"], ["net"]])
    ['net#1', 'net#2']
    """
    found = list(names)
    for name, places in _shared(names).items():
        paths = [[_words(path, name) for path in members[place]] for place in places]
        for place, ending in zip(places, _endings(paths), strict=True):
            found[place] = name + ending
    return found


def _shared(names: Sequence[str]) -> dict[str, list[int]]:
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        places[name].append(place)
    return {name: each for name, each in places.items() if len(each) > 1}


def _words(path: str, name: str) -> list[str]:
    """What a path has behind the name, by words."""
    return [word for word in path.removeprefix(name).split(".") if word]


def _endings(paths: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """An ending for each list of paths: so many words of each that no two lists share one."""
    deepest = max((len(path) for each in paths for path in each), default=0)
    for depth in range(1, deepest + 1):
        cuts = [dict.fromkeys(".".join(path[:depth]) for path in each) for each in paths]
        apart = len({cut for each in cuts for cut in each}) == sum(map(len, cuts))
        if apart and all(map(all, cuts)):
            return [f".{'+'.join(each)}" for each in cuts]
    return [f"#{number}" for number in range(1, len(paths) + 1)]


def branch_path(join: fx.Node, shortcut: int) -> str:
    """Where a join's branch ends in the user's network: inside the module that adds, if it can."""
    ends = (join, join.args[1 - shortcut])
    return max((module_path(each) for each in ends if isinstance(each, fx.Node)), key=len)
