"""The section of gpu.py that tries other tiles for the products (--tune).

It writes the best tile for each kernel and layer into the JSON, with what it gains over the tile
that the launcher picks; it never edits the kernels' tables. Tiles that a GPU cannot hold fail, and
are counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from gpu_args import Work, launch_of, launches, random_linear
from gpu_rows import FORMATS, JUDGED, TRIED, TUNED, Format, Layer
from gpu_time import Bench, Call, Figures, Make

from effuse.kernels import linear_packed, linear_scaled
from effuse.kernels.launch import Launch, run_jit
from effuse.kernels.tiles import Tile

OWN = "the launcher's"
FEW = 3  # runs of a turn: there are many tiles


@contextlib.contextmanager
def only(module: Any, tile: Tile) -> Iterator[None]:
    """Let the launcher of a module know this one tile."""
    before = module.TILES
    few = (tile,)
    module.TILES = dict.fromkeys(before, few) if isinstance(before, Mapping) else few
    try:
        yield
    finally:
        module.TILES = before


def module_of(format: Format) -> Any:
    """Whose kernel multiplies a format."""
    return linear_scaled if format.name in ("int8", "fp8") else linear_packed


def tiled(format: Format, work: Work, tile: Tile | None) -> Launch:
    """The launch of a layer with a tile, or with the launcher's own."""
    with contextlib.nullcontext() if tile is None else only(module_of(format), tile):
        launch = launch_of(work)
    assert launch is not None
    return launch


def tune(
    bench: Bench, layers: Iterable[Layer] = TUNED, m: int = JUDGED, tried: Any = TRIED
) -> list[Figures]:
    """The best tile of each format at each layer."""
    cases = [(format, layer) for layer in layers for format in FORMATS]
    tiles = [Tile(*each) for each in tried]
    found: list[Launch] = []
    for tile in tiles:
        for format, layer in cases:
            with only(module_of(format), tile):
                size = (m, layer.columns, layer.depth, "cpu")
                found += launches([lambda f=format, s=size: [random_linear(f, *s)]])
    bench.compile(found)
    return [tuned(bench, *case, m, tiles) for case in bench.within(cases, "tune")]


def tuned(bench: Bench, format: Format, layer: Layer, m: int, tiles: Iterable[Tile]) -> Figures:
    """One format at one layer."""
    work = random_linear(format, m, layer.columns, layer.depth, bench.device)
    makes: dict[str, Make] = {OWN: partial(_ran, format, work, None)}
    by_name = {"x".join(map(str, tile)): tile for tile in tiles}
    makes |= {name: partial(_ran, format, work, tile) for name, tile in by_name.items()}
    found = bench.measure(makes)
    ran = {name: each["ms"] for name, each in found.items() if "ms" in each}
    told = {"name": f"{layer.name} M={m} {format.name}", "tried": len(makes),
            "failed": len(makes) - len(ran)}  # fmt: skip
    if OWN not in ran:
        return told | found[OWN]
    best = min(ran, key=lambda name: ran[name])
    tile = by_name.get(best)
    return told | {"ms": ran[OWN], "best_ms": ran[best], "gain": ran[OWN] / ran[best],
                   "best": None if tile is None else tile._asdict()}  # fmt: skip


def _ran(format: Format, work: Work, tile: Tile | None) -> Call:
    launch = tiled(format, work, tile)
    return lambda: run_jit(launch)
