# SPDX-License-Identifier: Apache-2.0
"""Queries in the code domain: turned back to a rope block, then multiplied with the decode matrix and the means.

Rows of the product are 16 (rope block, query) pairs of a warp. Its inner axis is ordered so that both channels of a
rotated pair lie in one thread, next to each other (`fragment_tables.absorbed_channels`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.ops.triton.common import MEAN_RANK, ROPE_ROWS
from vllm_kqsvd.ops.triton.fragments import key_codes


@triton.jit
def turned_queries(
    query,  # row addresses [1, 8, W, 2 (1 if both rows of a thread are of one query), 1]
    inverse,  # of powers of two above the queries, as `query` float32
    block,  # rope block of every row [1, 8, W, 2, 1]
    far,  # whether a block may have a second digit
    turns,
    START: tl.constexpr,
    PAIRS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TURN: tl.constexpr,
    HALF_ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Members of pairs START, .. of every thread's PAD / 8 pairs, turned back: [4, 8, W, 2, PAIRS] float32 twice."""
    t = tl.arange(0, 4)[:, None, None, None, None]
    pair = t * (PAD // 8) + START + tl.arange(0, PAIRS)[None, None, None, None, :]
    if INTERLEAVED:
        first = 2 * pair
        second = first + 1
    elif 2 * HALF_ROT == PAD:
        first = pair
        second = pair + HALF_ROT
    else:
        first = tl.where(pair < HALF_ROT, pair, pair + HALF_ROT)
        second = first + tl.where(pair < HALF_ROT, HALF_ROT, PAD // 2 - HALF_ROT)
    if DIM == PAD:
        a = tl.load(query + first).to(tl.float32) * inverse
        b = tl.load(query + second).to(tl.float32) * inverse
    else:
        a = tl.load(query + first, first < DIM, other=0.0).to(tl.float32) * inverse
        b = tl.load(query + second, second < DIM, other=0.0).to(tl.float32) * inverse
    W: tl.constexpr = block.shape[2]
    a = tl.broadcast_to(a, (4, 8, W, 2, PAIRS))
    b = tl.broadcast_to(b, (4, 8, W, 2, PAIRS))
    if TURN:
        # The last axis is what a thread loads at once.
        at = 4 * tl.arange(0, PAIRS // 2)[:, None] + tl.arange(0, 4)[None, :]
        at = (t * (PAD // 4) + 2 * START)[:, :, :, :, :, None] + at[None, None, None, None]
        low = tl.load(turns + ((block % ROPE_ROWS) * PAD)[:, :, :, :, :, None] + at)
        cos, sin = tl.split(tl.reshape(low, (4, 8, W, 2, PAIRS, 2)))
        if far:
            high = tl.load(turns + ((block // ROPE_ROWS + ROPE_ROWS) * PAD)[:, :, :, :, :, None] + at)
            c1, s1 = tl.split(tl.reshape(high, (4, 8, W, 2, PAIRS, 2)))
            c0 = cos
            cos = c0 * c1 - sin * s1
            sin = sin * c1 + c0 * s1
        turned = a * cos + b * sin
        b = b * cos - a * sin
        a = turned
    return a, b


@triton.jit
def operand(x, y, PAIRS: tl.constexpr):
    """Members of pairs [4, 8, W, 2, PAIRS] -> first operand [W, 16, 8 * PAIRS]."""
    W: tl.constexpr = x.shape[2]
    both = tl.reshape(tl.join(x, y), (4, 8, W, 2, PAIRS // 2, 2, 2))
    return tl.reshape(tl.permute(both, (2, 3, 1, 4, 0, 5, 6)), (W, 16, 8 * PAIRS))


@triton.jit
def table_tiles(address, STEPS: tl.constexpr, TILES: tl.constexpr, STRIDE: tl.constexpr, W: tl.constexpr):
    """STEPS x TILES tiles of `fragment_tables.operand_tiles`, rows of tiles STRIDE apart -> [W, 32 STEPS, 8 TILES]."""
    lane = tl.arange(0, 4)[:, None, None, None, None, None] * 8 + tl.arange(0, 8)[None, :, None, None, None, None] * 32
    tile = tl.arange(0, STEPS)[None, None, None, :, None, None] * STRIDE
    tile += tl.arange(0, TILES)[None, None, None, None, :, None] * 256
    warp = tl.zeros([W], tl.int32)[None, None, :, None, None, None]
    values = tl.load(address + lane + tile + warp + tl.arange(0, 8)[None, None, None, None, None, :])
    values = tl.reshape(values, (4, 8, W, STEPS, TILES, 2, 2, 2))  # [t, g, W, k32, n8, p, hi, member]
    return tl.reshape(tl.permute(values, (2, 3, 6, 0, 5, 7, 4, 1)), (W, 32 * STEPS, 8 * TILES))


@triton.jit
def dot_terms(high, low, tiles, STEPS: tl.constexpr, W: tl.constexpr, acc):
    """acc + (high + low) @ means, whose high terms are at `tiles` and whose low terms are four tiles further."""
    means = table_tiles(tiles, STEPS, 2, 2048, W)
    acc = tl.dot(high, table_tiles(tiles + 1024, STEPS, 2, 2048, W), acc)
    return tl.dot(high, means, tl.dot(low, means, acc))


@triton.jit
def absorb(
    query,
    inverse,
    block,
    far,
    turns,
    decode,  # tiles of the head
    means,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TURN: tl.constexpr,
    HALF_ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Products with every plane's codes [W, 16, C], with ordinary and with sink means [W, 16, MEAN_RANK]: float32."""
    W: tl.constexpr = block.shape[2]
    sums = ()
    for p in tl.static_range(len(PLANES)):
        sums = sums + (tl.zeros([W, 16, 16 * PLANES[p][1]], tl.float32),)
    ordinary = tl.zeros([W, 16, MEAN_RANK], tl.float32)
    sink = tl.zeros([W, 16, MEAN_RANK], tl.float32)
    STEPS: tl.constexpr = PAIRS // 4
    for chunk in tl.static_range(PAD // (8 * PAIRS)):
        x, y = turned_queries(
            query, inverse, block, far, turns, chunk * PAIRS, PAIRS, DIM, PAD, TURN, HALF_ROT, INTERLEAVED
        )
        xh = x.to(tl.float16)
        yh = y.to(tl.float16)
        high = operand(xh, yh, PAIRS)
        low = operand((x - xh.to(tl.float32)).to(tl.float16), (y - yh.to(tl.float32)).to(tl.float16), PAIRS)
        added = ()
        for p in tl.static_range(len(PLANES)):
            at = decode + chunk * STEPS * 32 * COLUMNS + PLANES[p][4] * 32
            added = added + (tl.dot(high, table_tiles(at, STEPS, 2 * PLANES[p][1], 32 * COLUMNS, W), sums[p]),)
        sums = added
        at = means + chunk * STEPS * 2048
        ordinary = dot_terms(high, low, at, STEPS, W, ordinary)
        sink = dot_terms(high, low, at + 512, STEPS, W, sink)
    return sums, ordinary, sink


@triton.jit
def query_operand(x, HALF: tl.constexpr, R: tl.constexpr):
    """Rows of product HALF of [W, 16, C] as a second operand: [W, C, R], columns in the order of `key_codes`."""
    W: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[2]
    if R == 8:
        below, above = tl.split(tl.permute(tl.reshape(x, (W, 2, 8, C)), (0, 2, 3, 1)))
        if HALF == 0:
            x = below
        else:
            x = above
    return tl.permute(x, (0, 2, 1))


@triton.jit
def by_quads(x):
    """Columns [.., (k8, t, e)] of [W, C, R] as [.., (t, k8, e)], the order in which a thread's codes lie."""
    W: tl.constexpr = x.shape[0]
    C: tl.constexpr = x.shape[1]
    R: tl.constexpr = x.shape[2]
    return tl.reshape(tl.permute(tl.reshape(x, (W, C // 16, 2, 4, 2, R)), (0, 1, 3, 2, 4, 5)), (W, C, R))


@triton.jit
def mean_operands(x, HALF: tl.constexpr, R: tl.constexpr):
    """Products with means as second operands in a high and a low term: [W, MEAN_RANK, R] float16 twice."""
    x = query_operand(x, HALF, R)
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def mean_logits(basis_high, basis_low, high, low):
    """Products of mean basis rows with `mean_operands`: [W, T, R] float32."""
    return tl.dot(basis_high, high, tl.dot(basis_high, low, tl.dot(basis_low, high)))


@triton.jit
def code_middles(absorbed, PLANES: tl.constexpr, SUBNORMAL: tl.constexpr):
    """Minus the products of absorbed queries with the middles of the codes: [W, 16, R] float32, all rows alike."""
    W: tl.constexpr = absorbed[0].shape[0]
    R: tl.constexpr = absorbed[0].shape[2]
    total = tl.zeros([W, 16, R], tl.float32)
    for p in tl.static_range(len(PLANES)):
        ones = tl.full([4, 8, W, 1, 1 if PLANES[p][2] else 2], -1, tl.int32)
        total = tl.dot(key_codes(ones, PLANES, p, SUBNORMAL), absorbed[p], total)
    return total * -0.5
