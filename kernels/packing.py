"""Codes of 1 to 8 bits, packed without gaps along the rows.

Code j of a row is in its bits [j·b, (j+1)·b), the little end first: with 4 bits the lower half of a
byte is the even column. Eight codes are b bytes; each row starts on a byte of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from effuse.errors import ConfigError


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes that a row of `columns` codes takes."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(…, columns) integer codes, of which the low `bits` count -> uint8 (…, ⌈columns·bits / 8⌉).

    Raises:
        ConfigError: `bits` is not 1 to 8.
    """
    _check_bits(bits)
    columns = codes.shape[-1]
    units = _units(codes, -(-columns // 8), 8)
    word = torch.zeros(units.shape[:-1], dtype=torch.int64, device=codes.device)
    for place in range(8):
        word |= (units[..., place].long() & (1 << bits) - 1) << place * bits
    parts = [word >> 8 * place & 0xFF for place in range(bits)]
    filled = torch.stack(parts, -1).to(torch.uint8).flatten(-2)
    return filled[..., : packed_bytes(columns, bits)].contiguous()


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """What `pack` made, back: uint8 (…, columns), the codes' bit patterns.

    Raises:
        ConfigError: `bits` is not 1 to 8, or the rows are not as long as `columns` codes.
    """
    _check_bits(bits)
    if packed.shape[-1] != packed_bytes(columns, bits):
        raise ConfigError(
            f"packed: {columns} columns of {bits} bits take {packed_bytes(columns, bits)} bytes "
            f"a row, got {packed.shape[-1]}"
        )
    units = _units(packed, -(-columns // 8), bits)
    word = torch.zeros(units.shape[:-1], dtype=torch.int64, device=packed.device)
    for place in range(bits):
        word |= units[..., place].long() << 8 * place
    codes = [word >> place * bits & (1 << bits) - 1 for place in range(8)]
    return torch.stack(codes, -1).to(torch.uint8).flatten(-2)[..., :columns].contiguous()


def _units(rows: Tensor, count: int, size: int) -> Tensor:
    """Rows cut into `count` units of `size`, the last one filled up with zeros."""
    filled = pad(rows, (0, count * size - rows.shape[-1]))
    return filled.reshape(*rows.shape[:-1], count, size)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ConfigError(f"bits: expected 1 to 8, got {bits}")
