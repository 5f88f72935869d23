# SPDX-License-Identifier: Apache-2.0
"""Codes as operands of matrix products, without moving them between threads.

Pages hold 32-bit words in the order in which lane 4 g + t of a warp wants its operand of `mma.m16n8k16`
(docs/format.md). So words are loaded as tensors whose first axes are [t, g, warp], one word per thread, and everything
after that is masks and renamed axes. A word holds two codes in every pair of fields; with their bits taken as float16
subnormals they need no conversion, and a field that lies at bit b of its half counts 2^b times, by which
`fragment_tables.py` divides. Inner axes of products end in [t, four values]: Triton's operands hold them that way here.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def field_tree(
    word,
    shifted,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    STRIDE: tl.constexpr,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Fields FIRST, FIRST + STRIDE, .. (COUNT of them) of int32 words: [.., 2, 2, ..], the highest bit of a field's
    number first. Fields from LOW on are taken from `shifted` = word >> SHIFT, so that all lie in the low ten bits."""
    if COUNT == 1:
        if FIRST < LOW:
            fields = word & ((((1 << BITS) - 1) << (FIRST * BITS)) * 0x00010001)
        else:
            fields = shifted & ((((1 << BITS) - 1) << (FIRST * BITS - SHIFT)) * 0x00010001)
    else:
        even = field_tree(word, shifted, FIRST, COUNT // 2, 2 * STRIDE, BITS, LOW, SHIFT)
        odd = field_tree(word, shifted, FIRST + STRIDE, COUNT // 2, 2 * STRIDE, BITS, LOW, SHIFT)
        fields = tl.join(even, odd)
    return fields


@triton.jit
def unpack(word, BITS: tl.constexpr, HALF: tl.constexpr, SUBNORMAL: tl.constexpr):
    """All fields of int32 words [4, 8, W, I, X] -> [4, 8, W, I, X, 16 / BITS, 2] float16, the word's halves last."""
    LOW: tl.constexpr = 8 // BITS if HALF or BITS > 2 else 10 // BITS
    SHIFT: tl.constexpr = LOW * BITS
    fields = field_tree(word, word >> SHIFT, 0, 16 // BITS, 1, BITS, LOW, SHIFT)
    low = (fields & 0xFFFF).to(tl.int16)
    high = (fields >> 16).to(tl.int16)
    if SUBNORMAL:
        codes = tl.join(low.to(tl.float16, bitcast=True), high.to(tl.float16, bitcast=True))
    else:
        codes = tl.join(low.to(tl.float16), high.to(tl.float16))
    return tl.reshape(codes, (4, 8, word.shape[2], word.shape[3], word.shape[4], 16 // BITS, 2))


@triton.jit
def plane_words(base, PLANES: tl.constexpr, INDEX: tl.constexpr):
    """Words of plane INDEX: addresses [4, 8, W, I, 1] of lanes' first words in tiles -> [4, 8, W, I, 2 (half: 1)]."""
    at = base + PLANES[INDEX][3]
    if not PLANES[INDEX][2]:
        at = at + (128 * tl.arange(0, 2))[None, None, None, None, :]
    return tl.load(at.to(tl.pointer_type(tl.int32)))


@triton.jit
def key_codes(words, PLANES: tl.constexpr, INDEX: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Codes of K plane INDEX: words [4, 8, W, TILES, 2 or 1] -> [W, 16 TILES, C] float16."""
    W: tl.constexpr = words.shape[2]
    TILES: tl.constexpr = words.shape[3]
    BITS: tl.constexpr = PLANES[INDEX][0]
    codes = unpack(words, BITS, PLANES[INDEX][2], SUBNORMAL)
    if PLANES[INDEX][2]:  # bytes of a half are rows g and g + 8
        codes = tl.reshape(codes, (4, 8, W, TILES, 2, 4 // BITS, 2, 2))
    else:
        codes = tl.reshape(codes, (4, 8, W, TILES, 2, 8 // BITS, 2, 2))
    codes = tl.permute(codes, (2, 3, 4, 1, 5, 0, 6, 7))
    return tl.reshape(codes, (W, 16 * TILES, 16 * PLANES[INDEX][1]))


@triton.jit
def value_codes(words, PLANES: tl.constexpr, INDEX: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Codes of V plane INDEX: words [4, 8, W, TILES, 2 or 1] -> [W, C, 16 TILES] float16."""
    W: tl.constexpr = words.shape[2]
    TILES: tl.constexpr = words.shape[3]
    BITS: tl.constexpr = PLANES[INDEX][0]
    codes = unpack(words, BITS, PLANES[INDEX][2], SUBNORMAL)
    if PLANES[INDEX][2]:  # bytes of a half are tokens 2 t and 2 t + 8
        codes = tl.reshape(codes, (4, 8, W, TILES, 2, 8 // BITS, 2))
    codes = tl.permute(codes, (2, 5, 1, 3, 0, 4, 6))
    return tl.reshape(codes, (W, 16 * PLANES[INDEX][1], 16 * TILES))
