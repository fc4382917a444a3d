"""Codes of 4 bits and scales of 8 made numbers in registers, without tables: device functions.

    int4:  two's complement                                          -8 … 7
    e2m1:  sign, exponent (2 bits, bias 1), mantissa (1 bit)         0, .5, 1, 1.5, 2, 3, 4, 6
    e4m3:  sign, exponent (4 bits, bias 7), mantissa (3 bits)        scales, which are positive
    e8m0:  2^(b - 127)

A small float's bits, moved to where float32 keeps exponent and mantissa, are the number times a
power of two, also where it is subnormal: one exact product mends the bias. Each byte holds two
codes, the low half first (kernels/packing.py). Results are exact.
"""

from __future__ import annotations

from effuse.kernels.launch import IN_INTERPRETER, constant, jit, tl

E2M1_BIAS = constant(2.0**126)  # 2^(127 - 1)
FOUR_AT_ONCE = constant(
    "shl.b32 $0, $2, 4; and.b32 $0, $0, 0xf0f0f0f0; and.b32 $1, $2, 0xf0f0f0f0;"
)
E4M3_BIAS = constant(2.0**120)  # 2^(127 - 7)


@jit
def halves(packed):
    """packed (…, K / 2) uint8 -> the codes' bits (…, K), int32."""
    both = packed.to(tl.int32)
    return tl.interleave(both & 15, both >> 4)


@jit
def int4_in_high_bits(packed):
    """packed (…, K / 2) uint8 -> 16 times the int4 codes, int8 (…, K): no sign to extend."""
    if IN_INTERPRETER:
        low, high = packed << 4, packed & 0xF0
    else:
        low, high = tl.inline_asm_elementwise(
            FOUR_AT_ONCE, "=&r,=r,r", [packed], (tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    return tl.interleave(low.to(tl.int8, bitcast=True), high.to(tl.int8, bitcast=True))


@jit
def int4_to_float(bits):
    """int4 codes (int32, the low 4 bits) -> float32."""
    # in float32 the bits of 2^23 + u end in those of u, which is the code + 8
    return ((bits ^ 8) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@jit
def e2m1_to_float(bits):
    """e2m1 codes (int32, the low 4 bits) -> float32."""
    moved = ((bits & 8) << 28) | ((bits & 7) << 22)
    return moved.to(tl.float32, bitcast=True) * E2M1_BIAS


@jit
def scale_to_float(stored, KIND: tl.constexpr):
    """Scales as kernels/quantizers.py stores them -> float32."""
    if KIND == "e4m3":
        scale = (stored.to(tl.int32) << 20).to(tl.float32, bitcast=True) * E4M3_BIAS
    elif KIND == "e8m0":
        scale = (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    else:
        scale = stored
    return scale


@jit
def spread(scale, BN: tl.constexpr, GROUPS: tl.constexpr, BK: tl.constexpr):
    """scale (BN, GROUPS) -> (BN, BK), each for BK / GROUPS columns; (BN, 1) as it is."""
    if GROUPS > 1:
        each = tl.broadcast_to(scale[:, :, None], (BN, GROUPS, BK // GROUPS))
        scale = tl.reshape(each, (BN, BK))
    return scale
