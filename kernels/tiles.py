"""Tiles of matrix products: which part of a result (rows, columns) one program computes, and how.

Tiles are chosen from shapes alone, so that a build without a GPU launches what a GPU would. They
are outᵀ = weight · xᵀ: columns of the result go down, rows across, and a weight that was unpacked
is the left operand, which stays in registers on Hopper. Few rows get narrow tiles, so that enough
programs share the reading of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

from effuse.kernels.launch import cdiv, jit, tl

BAND = 8  # tiles down a band: neighbours share what they read through the cache
FILL = 96  # programs that are enough to fill a large GPU


class Tile(NamedTuple):
    """Sizes of a program: `rows` by `columns` of the result, `depth` of the sum at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


def programs(tile: Tile, rows: int, columns: int) -> int:
    """How many tiles cover a result."""
    return cdiv(rows, tile.rows) * cdiv(columns, tile.columns)


def pick(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tile:
    """The first tile, of ones from large to small, that wastes little and still fills a GPU."""
    fitting = [tile for tile in tiles if tile.rows < 2 * max(rows, 16)] or [tiles[-1]]
    filling = [tile for tile in fitting if programs(tile, rows, columns) >= FILL]
    return filling[0] if filling else fitting[-1]


@jit
def place(rows, columns, BM: tl.constexpr, BN: tl.constexpr, BAND: tl.constexpr):
    """This program's rows (BM,) and columns (BN,), some of which may be beyond the result."""
    down, across = tl.cdiv(columns, BN), tl.cdiv(rows, BM)
    band, inner = tl.program_id(0) // (BAND * across), tl.program_id(0) % (BAND * across)
    height = tl.minimum(down - band * BAND, BAND)
    m = inner // height * BM + tl.arange(0, BM)
    n = (band * BAND + inner % height) * BN + tl.arange(0, BN)
    return m, n


@jit
def clamped(index, size):
    """`index` as int64, the last one for those beyond `size`: loads by it need no mask."""
    return tl.minimum(index, size - 1).to(tl.int64)


@jit
def load(pointers, index, size, ALL: tl.constexpr):
    """What is at `pointers`; 0 where `index`, broadcast to them, is not under `size`."""
    return tl.load(pointers) if ALL else tl.load(pointers, mask=index < size, other=0.0)
