# SPDX-License-Identifier: Apache-2.0
"""Device functions shared by the Triton kernels: unpacking, scale bytes, rotations, means.

A plane is described by the constexpr tuple of `tables.PlaneSpec`. Tensors are named by their axes in
comments: [T] tokens, [M] rows of queries, [P] padded head_dim, [C] columns of a plane in stored order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.codec import MEAN_RANK as _MEAN_RANK
from vllm_kqsvd.ops.triton.tables import ROPE_ROWS as _ROPE_ROWS

MEAN_RANK = tl.constexpr(_MEAN_RANK)
ROPE_ROWS = tl.constexpr(_ROPE_ROWS)
SCALE_BIAS = tl.constexpr((127 - 8) << 23)  # float32 exponent of 2^-8, the smallest scale
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def byte_address(token, byte, HALF: tl.constexpr, IS_KEY: tl.constexpr):
    """Offset in its plane's tile of a token's byte: token [T] in the tile, byte [B] -> [T, B] (layout.py)."""
    r = token[:, None]
    i = byte[None, :]
    if IS_KEY:
        if HALF:
            at = 16 * (r % 8) + 2 * i + r // 8
        else:
            at = 16 * r + i
    else:
        if HALF:
            at = 32 * (r // 2 % 4) + 4 * i + 2 * (r % 2) + r // 8
        else:
            at = 32 * (r // 2) + 4 * (i // 2) + 2 * (r % 2) + i % 2
    return at


@triton.jit
def plane_fields(tiles, token, PLANES: tl.constexpr, INDEX: tl.constexpr, IS_KEY: tl.constexpr):
    """Centred codes of plane INDEX: tile addresses [T], token in tile [T] -> [T, C] float16, fields minus their middle.

    The bits of 256 + field are put together as a float16 and the integer part is subtracted: exact for up to
    8 bits, and cheaper than an integer conversion on every GPU.
    """
    BITS: tl.constexpr = PLANES[INDEX][0]
    FIELDS: tl.constexpr = PLANES[INDEX][1]
    HALF: tl.constexpr = PLANES[INDEX][2]
    MASK: tl.constexpr = ((1 << BITS) - 1) << 2
    MIDDLE: tl.constexpr = 256 + ((1 << BITS) - 1) / 2
    column = tl.arange(0, 16)
    field = tl.arange(0, FIELDS)
    if HALF:  # columns 8-15 are the second field of bytes 0-7
        at = byte_address(token, column % 8, HALF, IS_KEY)
        bit = (2 * field[:, None] + column[None, :] // 8) * BITS
    else:
        at = byte_address(token, column, HALF, IS_KEY)
        bit = (field[:, None] + 0 * column[None, :]) * BITS
    byte = tl.load(tiles[:, None] + PLANES[INDEX][3] + at).to(tl.int16) << 2
    word = ((byte[:, None, :] >> bit.to(tl.int16)[None]) & MASK) | 0x5C00
    return tl.reshape(word.to(tl.float16, bitcast=True) - MIDDLE, (token.shape[0], 16 * FIELDS))


@triton.jit
def scale_and_class(tiles, token, OFFSET: tl.constexpr):
    """Scale bytes of tokens [T] -> (scale [T] float32, is_sink [T] bool)."""
    byte = tl.load(tiles + OFFSET + token).to(tl.int32)
    scale = (((byte & 127) << 20) + SCALE_BIAS).to(tl.float32, bitcast=True)
    return scale, byte >= 128


@triton.jit
def tile_addresses(
    pages,
    block_table,  # row of the request
    start,
    position,  # [T] = start + 0..TILE-1
    stop,
    page_stride,
    head,
    BLOCK_SIZE: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Addresses of the tiles of positions [T]; positions >= stop read block 0 (finite, and to be ignored)."""
    if BLOCK_SIZE % TILE == 0:  # one block: a scalar load keeps addresses contiguous
        block = tl.load(block_table + start // BLOCK_SIZE).to(tl.int64) + 0 * position
    else:
        block = tl.load(block_table + position // BLOCK_SIZE, position < stop, other=0).to(tl.int64)
    tile = head * (BLOCK_SIZE // 16) + position % BLOCK_SIZE // 16
    return pages + block * page_stride + tile * TILE_BYTES


@triton.jit
def rope_partner(channel, HALF_ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel that is rotated together with `channel` [P] (itself where nothing is rotated)."""
    if INTERLEAVED:
        other = channel ^ 1
    else:
        other = tl.where(channel < HALF_ROT, channel + HALF_ROT, channel - HALF_ROT)
    return tl.where(channel < 2 * HALF_ROT, other, channel)


@triton.jit
def block_rotation(rope, block, channel, HALF_ROT: tl.constexpr, INTERLEAVED: tl.constexpr):
    """(cos, sin) [T, P] of the starts of rope blocks [T]: turning back is x * cos + partner * sin.

    The sign of the partner's term is in `sin`; rotating forward is x * cos - partner * sin.
    """
    if INTERLEAVED:
        plane = channel // 2
        sign = tl.where(channel % 2 == 0, 1.0, -1.0)
    else:
        plane = channel % HALF_ROT
        sign = tl.where(channel < HALF_ROT, 1.0, -1.0)
    turned = (channel < 2 * HALF_ROT)[None, :] & (block >= 0)[:, None]
    low = rope + ((block % ROPE_ROWS) * (2 * HALF_ROT))[:, None] + 2 * plane[None, :]
    high = rope + ((block // ROPE_ROWS + ROPE_ROWS) * (2 * HALF_ROT))[:, None] + 2 * plane[None, :]
    c0 = tl.load(low, turned, other=1.0)
    s0 = tl.load(low + 1, turned, other=0.0)
    c1 = tl.load(high, turned, other=1.0)
    s1 = tl.load(high + 1, turned, other=0.0)
    return c0 * c1 - s0 * s1, (s0 * c1 + c0 * s1) * sign[None, :]


@triton.jit
def class_basis(basis, offset, is_sink):
    """Mean basis row of each token, in the columns of its class: offset [T], is_sink [T] -> [T, 2 * MEAN_RANK]."""
    column = tl.arange(0, 2 * MEAN_RANK)
    mine = (column // MEAN_RANK)[None, :] == is_sink.to(tl.int32)[:, None]
    return tl.load(basis + offset[:, None] * MEAN_RANK + (column % MEAN_RANK)[None, :], mine, other=0.0)


@triton.jit
def dot_split(a, b):
    """Product of float32 matrices in three float16 products (22 bits of mantissa), for means, whose error counts."""
    ah = a.to(tl.float16)
    bh = b.to(tl.float16)
    al = (a - ah.to(tl.float32)).to(tl.float16)
    bl = (b - bh.to(tl.float32)).to(tl.float16)
    return tl.dot(ah, bh, tl.dot(ah, bl, tl.dot(al, bh)))


@triton.jit
def to_half(x):
    """float16 with values beyond its range held at the range's end, so that nothing becomes infinite."""
    return tl.clamp(x.to(tl.float32), -65504.0, 65504.0).to(tl.float16)


@triton.jit
def window_tile(
    position,  # [T]
    stop,
    head,
    window_pages,
    window_table,  # row of the request
    block_stride,
    head_stride,
    token_stride,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW_BLOCK_SIZE: tl.constexpr,
):
    """Keys and values of positions [T] from the exact pages, zero from `stop` on: each [T, P] float16."""
    channel = tl.arange(0, PAD)[None, :]
    here = position < stop
    block = tl.load(window_table + position // WINDOW_BLOCK_SIZE, here, other=0).to(tl.int64)
    base = block * block_stride + head * head_stride + position % WINDOW_BLOCK_SIZE * token_stride
    at = window_pages + base[:, None] + channel
    mask = here[:, None] & (channel < DIM)
    return to_half(tl.load(at, mask, other=0.0)), to_half(tl.load(at + DIM, mask, other=0.0))


@triton.jit
def step_tile(row, live, head, key, value, key_stride, value_stride, DIM: tl.constexpr, PAD: tl.constexpr):
    """Keys and values of the step's own rows [T], zero where not `live`: each [T, P] float16."""
    channel = tl.arange(0, PAD)[None, :]
    at = row.to(tl.int64)[:, None]
    mask = live[:, None] & (channel < DIM)
    k = tl.load(key + at * key_stride + head * DIM + channel, mask, other=0.0)
    v = tl.load(value + at * value_stride + head * DIM + channel, mask, other=0.0)
    return to_half(k), to_half(v)


@triton.jit
def power_above(x):
    """The power of two above |x| (float32 > 0): 2^(exponent + 1); scaling by it is exact."""
    bits = x.to(tl.int32, bitcast=True) & 0x7F800000
    return (bits + 0x00800000).to(tl.float32, bitcast=True)


@triton.jit
def soft_capped(score, CAP: tl.constexpr):
    """CAP * tanh(score / CAP); nothing for CAP = 0."""
    if CAP > 0:
        score = CAP * (2 * tl.sigmoid(2 * score / CAP) - 1)
    return score


@triton.jit
def softmax_step(score, m, total):
    """One online-softmax step in base 2: score [M, T], m and total [M] -> (p [M, T], rescale [M], m, total).

    Rows that have seen nothing yet keep m = -inf and get p = 0.
    """
    m_new = tl.maximum(m, tl.max(score, 1))
    base = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(score - base[:, None])
    rescale = tl.exp2(m - base)
    return p, rescale, m_new, total * rescale + tl.sum(p, 1)
