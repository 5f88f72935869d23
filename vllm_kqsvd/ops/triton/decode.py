# SPDX-License-Identifier: Apache-2.0
"""Decode attention in the code domain: one split of a request's latent history.

A program serves one (request, KV head, split) and the head's query group. Its warps work alone, as the batch of every
matrix product: a warp takes a super-span, 16 query rows' worth of rope spans, turns the queries back to all of them and
multiplies them with the decode matrix at once. R of these rows, the columns of its products with codes, belong to S
spans; the warp reads the same offsets of all S spans together and keeps, of every span's scores, that span's columns,
so that one [offset, column] tile of scores holds no idle element. Operands come from memory in the order in which
threads need them (fragments.py); only the softmax weights change hands. docs/design.md has the instruction counts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.ops.triton.absorb import absorb, by_quads, code_middles, mean_logits, mean_operands, query_operand
from vllm_kqsvd.ops.triton.common import LOG2E, MEAN_RANK, ROPE_ROWS, SCALE_BIAS, power_above, soft_capped
from vllm_kqsvd.ops.triton.fragments import key_codes, plane_words, value_codes


@triton.jit
def latent_range(length, q_len, WINDOW: tl.constexpr, SLIDING: tl.constexpr):
    """[start, stop): positions that this step's queries may read from latent pages (WINDOW 0: no exact window)."""
    first = length - q_len
    stop = length
    if WINDOW > 0:
        stop = tl.maximum(first + 1 - WINDOW, 0) // 16 * 16
    start = 0
    if SLIDING > 0:
        start = tl.maximum(first + 1 - SLIDING, 0)
    return tl.minimum(start, stop), stop


@triton.jit
def split_range(start, stop, split, splits, SUPER: tl.constexpr, W: tl.constexpr):
    """[first, last) of the split's super-spans of SUPER tokens, and the number of splits that are not empty.

    Splits are multiples of W super-spans, so that all warps of a program have work but in the last one.
    """
    low = start // SUPER
    count = tl.cdiv(stop, SUPER) - low
    per = tl.maximum(tl.cdiv(count, splits * W), 1) * W
    first = low + split * per
    return first, tl.minimum(first + per, low + count), tl.cdiv(count, per)


@triton.jit
def visible(position, stop, q_position, SLIDING: tl.constexpr):
    """Visible (q_position [M], position [T]) pairs: causal, before `stop`, within the sliding window."""
    seen = (position < stop)[None, :] & (position[None, :] <= q_position[:, None])
    if SLIDING > 0:
        seen = seen & (position[None, :] > q_position[:, None] - SLIDING)
    return seen


@triton.jit
def own_span(parts, owner):
    """Of one tensor per span, in every column the one of its owner: tuple of [.., R], owner [.., R] int32."""
    out = parts[0]
    for s in tl.static_range(1, len(parts)):
        out = tl.where(owner == s, parts[s], out)
    return out


@triton.jit
def by_thread(x):
    """Sums of [W, 16 TILES, R] over what one thread holds: [W, 8, R]."""
    return tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 8, 8, x.shape[2])), 1)


@triton.jit
def column_bytes(address, R: tl.constexpr):
    """Bytes at addresses [4, 8, W, TILES, 2, 2 or 1] -> [W, 16 TILES, R] int32."""
    W: tl.constexpr = address.shape[2]
    TILES: tl.constexpr = address.shape[3]
    byte = tl.broadcast_to(tl.load(address).to(tl.int32), (4, 8, W, TILES, 2, 2))
    byte = tl.reshape(tl.permute(byte, (2, 3, 4, 1, 0, 5)), (W, 16 * TILES, 1, 8))
    return tl.reshape(tl.broadcast_to(byte, (W, 16 * TILES, R // 8, 8)), (W, 16 * TILES, R))


@triton.jit
def basis_rows(basis, offset):
    """Mean basis of offsets [1, 8, W, TILES, 2]: high and low terms [W, 16 TILES, MEAN_RANK] float16."""
    W: tl.constexpr = offset.shape[2]
    TILES: tl.constexpr = offset.shape[3]
    at = (offset * 32)[:, :, :, :, :, None] + tl.arange(0, 4)[:, None, None, None, None, None] * 8
    rows = tl.load(basis + at + tl.arange(0, 8)[None, None, None, None, None, :])
    rows = tl.permute(tl.reshape(rows, (4, 8, W, TILES, 2, 2, 2, 2)), (2, 3, 4, 1, 6, 0, 7, 5))
    return tl.split(tl.reshape(rows, (W, 16 * TILES, MEAN_RANK, 2)))


@triton.jit
def tile_address(
    pages, table, position, stop, page_stride, head, TILES: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr
):
    """Addresses of TILES tiles (fourth axis) from positions on; those from `stop` on are read from block 0."""
    tiles = tl.arange(0, TILES)
    if len(position.shape) == 5:
        tiles = tiles[None, None, None, :, None]
    else:
        tiles = tiles[None, None, None, :, None, None]
    if BLOCK % (16 * TILES) == 0:
        block = tl.load(table + position // BLOCK, position < stop, other=0).to(tl.int64)
        base = pages + (block * page_stride + (head * (BLOCK // 16) + position % BLOCK // 16) * BYTES)
        out = base + tiles * BYTES
    else:
        every = position + 16 * tiles
        block = tl.load(table + every // BLOCK, every < stop, other=0).to(tl.int64)
        out = pages + (block * page_stride + (head * (BLOCK // 16) + every % BLOCK // 16) * BYTES)
    return out


@triton.jit
def split_kernel(
    query,
    pages,
    block_table,
    query_start,
    seq_lens,
    turns,
    k_decode,
    k_unit,
    k_means,
    k_basis,
    v_middle,
    partial,
    statistics,
    query_stride,
    table_stride,
    page_stride,
    splits,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SLIDING: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    K_PLANES: tl.constexpr,
    V_PLANES: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    K_SCALE: tl.constexpr,
    V_SCALE: tl.constexpr,
    ROPE_BLOCK: tl.constexpr,
    OFFSETS: tl.constexpr,
    HALF_ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    SPAN: tl.constexpr,  # tokens per rope span: a rope block, or 16 tokens of shorter ones
    SUB: tl.constexpr,  # rope blocks in a span
    COLS: tl.constexpr,  # queries
    COL_TILES: tl.constexpr,
    R: tl.constexpr,  # columns of a product: (span, rope block in it, query)
    SUPER: tl.constexpr,  # tokens of a super-span
    TILES: tl.constexpr,  # tiles of 16 tokens taken from each span at once
    W: tl.constexpr,
    HEADROOM: tl.constexpr,
    SUBNORMAL: tl.constexpr,
):
    """Attention of one split over the latent pages -> partial [.., COLS, V_COLUMNS], statistics [.., 3, COLS]."""
    S: tl.constexpr = R // (COLS * SUB)  # spans of a product
    HALVES: tl.constexpr = SUPER // (S * SPAN)
    E: tl.constexpr = 2 if COLS * SUB == 1 else 1  # whether neighbouring columns belong to different spans
    UNIT: tl.constexpr = 16777216.0 if SUBNORMAL else 1.0  # of a code as it enters the products
    request = tl.program_id(0)
    head = tl.program_id(1) // COL_TILES
    start = tl.load(query_start + request)
    q_len = tl.load(query_start + request + 1) - start
    length = tl.load(seq_lens + request)
    low, stop = latent_range(length, q_len, WINDOW, SLIDING)
    first, last, used = split_range(low, stop, tl.program_id(2), splits, SUPER, W)
    if (q_len <= 0) | (length <= 0) | (first >= last):
        return
    stop = tl.minimum(stop, last * SUPER)  # the warps of the last turn may find nothing to do
    # Zero, which the compiler does not know: a thread is to load one word although words lie side by side, and
    # constants again in every turn although they do not change, because they would fill the registers.
    zero = splits >> 31

    # Axes [t, g, warp, ..]: thread 4 g + t of a warp. Rows g + 8 x of the absorb product are (half, span, rope block,
    # query), columns of the products with codes (span, rope block, query). Idle ones repeat the last query.
    t = tl.arange(0, 4)[:, None, None, None, None]
    g = tl.arange(0, 8)[None, :, None, None, None]
    warp = tl.arange(0, W)[None, None, :, None, None]
    x = tl.arange(0, 2)[None, None, None, None, :]
    row = g + 8 * tl.arange(0, 2)[None, None, None, :, None] + 0 * warp
    if R == 8:
        query_row = g + 0 * warp
    else:
        query_row = row
    first_column = tl.program_id(1) % COL_TILES * COLS
    last_column = GROUP * q_len - 1
    column = tl.minimum(first_column + query_row % COLS, last_column)
    q_rows = query + (start + column // GROUP).to(tl.int64) * query_stride + (head * GROUP + column % GROUP) * DIM
    channel = t * (PAD // 4) + tl.arange(0, PAD // 4)[None, None, None, None, :]
    q = tl.load(q_rows + channel, channel < DIM, other=0.0).to(tl.float32)
    inverse = 1.0 / power_above(tl.sqrt(tl.sum(tl.sum(q * q, 4, keep_dims=True), 0, keep_dims=True)))

    n = tl.arange(0, R)[None, None, :]
    owner = n // (COLS * SUB)
    n_column = first_column + n % COLS
    clamped = tl.minimum(n_column, last_column)
    n_rows = query + (start + clamped // GROUP).to(tl.int64) * query_stride + (head * GROUP + clamped % GROUP) * DIM
    channel = tl.arange(0, PAD)[None, :, None]
    q = tl.load(n_rows + channel, channel < DIM, other=0.0).to(tl.float32)
    factor = power_above(tl.sqrt(tl.sum(q * q, 1, keep_dims=True))) * SCALE
    if CAP == 0:
        factor = factor * LOG2E
    q_position = length - q_len + n_column // GROUP
    limit = tl.where(n_column <= last_column, stop, 0)
    if WINDOW == 0:
        limit = tl.minimum(limit, q_position + 1)

    decode = k_decode + head * K_COLUMNS * PAD
    means = k_means + head * 4 * MEAN_RANK * PAD  # two classes, two terms
    unit = tl.load(k_unit + head) * (UNIT / (1 << HEADROOM))
    k_bias = unit.to(tl.int32, bitcast=True) - 0x3F800000 + SCALE_BIAS  # a scale's exponent, unit included
    table = block_table + request.to(tl.int64) * table_stride
    k_lane = (4 * g + t + zero) * 4
    v_lane = ((8 * t + g) ^ zero) * 4

    m = tl.full([W, 1, R], float("-inf"), tl.float32)
    total = tl.zeros([W, 8, R], tl.float32)
    sinks = tl.zeros([W, 8, R], tl.float32)
    weights = tl.zeros([W, 8, R], tl.float32)
    acc = ()
    for p in tl.static_range(len(V_PLANES)):
        acc = acc + (tl.zeros([W, 16 * V_PLANES[p][1], R], tl.float32),)
    if ROPE_BLOCK == 0:
        sums, ordinary, sink = absorb(
            q_rows, inverse, row, False, turns, decode, means, K_PLANES, K_COLUMNS, DIM, PAD, False, HALF_ROT,
            INTERLEAVED, 8,
        )  # fmt: skip
    for at in tl.range(first, last, W, num_stages=1):
        again = at * zero * 256
        if ROPE_BLOCK > 0:
            block = (at + warp) * (SUPER // ROPE_BLOCK) + row // COLS
            far = (at + W) * (SUPER // ROPE_BLOCK) > ROPE_ROWS
            sums, ordinary, sink = absorb(
                q_rows + again, inverse, block, far, turns, decode + again, means + again, K_PLANES, K_COLUMNS,
                DIM, PAD, HALF_ROT > 0, HALF_ROT, INTERLEAVED, 8,
            )  # fmt: skip
        operands = ()
        middles = ()
        lines = ()
        for half in tl.static_range(HALVES):
            absorbed = ()
            for p in tl.static_range(len(K_PLANES)):
                absorbed = absorbed + (by_quads(query_operand(sums[p].to(tl.float16), half, R)),)
            operands = operands + (absorbed,)
            middle = code_middles(absorbed, K_PLANES, SUBNORMAL)
            middles = middles + (tl.reshape(tl.broadcast_to(middle[:, None], (W, TILES, 16, R)), (W, 16 * TILES, R)),)
            lines = lines + (mean_operands(ordinary, half, R) + mean_operands(sink, half, R),)

        for piece in tl.range(0, SPAN, 16 * TILES, num_stages=1):
            # Scores: products with the codes of every span, of which each column keeps its own.
            begin = (at + warp) * SUPER + piece
            offset = piece + 16 * tl.arange(0, TILES)[None, None, None, :, None] + 8 * x + g + 0 * warp
            basis_high, basis_low = basis_rows(k_basis + again, offset % OFFSETS)
            scores = ()
            v_bytes = ()
            for half in tl.static_range(HALVES):
                parts = ()
                for s in tl.static_range(S):
                    base = tile_address(
                        pages,
                        table,
                        begin + (half * S + s) * SPAN,
                        stop,
                        page_stride,
                        head,
                        TILES,
                        BLOCK_SIZE,
                        TILE_BYTES,
                    )
                    score = middles[half]
                    for p in tl.static_range(len(K_PLANES)):
                        codes = key_codes(plane_words(base + k_lane, K_PLANES, p), K_PLANES, p, SUBNORMAL)
                        score = tl.dot(codes, operands[half][p], score)
                    parts = parts + (score,)
                score = own_span(parts, owner)

                # Scale and class of a column's own span: thread t holds columns 2 t and 2 t + 1.
                e = tl.arange(0, E)[None, None, None, None, None, :]
                span = (2 * t[:, :, :, :, :, None] + e) // (COLS * SUB) % S + half * S
                base = tile_address(
                    pages, table, begin[:, :, :, :, :, None] + span * SPAN, stop, page_stride, head, TILES, BLOCK_SIZE,
                    TILE_BYTES,
                )  # fmt: skip
                scales = base + (g + zero)[:, :, :, :, :, None] + 8 * x[:, :, :, :, :, None]
                k_byte = column_bytes(scales + K_SCALE, R)
                v_bytes = v_bytes + (column_bytes(scales + V_SCALE, R),)
                k_scale = (((k_byte & 127) << 20) + k_bias).to(tl.float32, bitcast=True)
                of_mean = mean_logits(basis_high, basis_low, lines[half][0], lines[half][1])
                of_sink = mean_logits(basis_high, basis_low, lines[half][2], lines[half][3])
                score = score * k_scale + tl.where(k_byte >= 128, of_sink, of_mean)
                if CAP > 0:
                    score = soft_capped(score * factor, CAP) * LOG2E

                j = tl.arange(0, 16 * TILES)[None, :, None]
                n_begin = (at + tl.arange(0, W)[:, None, None]) * SUPER + piece + (half * S + owner) * SPAN
                seen = j < limit - n_begin
                if SLIDING > 0:
                    seen = seen & (j > q_position - SLIDING - n_begin)
                if SUB > 1:
                    seen = seen & (j // ROPE_BLOCK == n // COLS % SUB)
                scores = scores + (tl.where(seen, score, float("-inf")),)

            # Softmax; of sums, every thread keeps its own tokens' part.
            highest = scores[0]
            for half in tl.static_range(1, HALVES):
                highest = tl.maximum(highest, scores[half])
            highest = tl.max(highest, 1, keep_dims=True)
            if CAP == 0:
                highest = highest * factor
            m_new = tl.maximum(m, highest)
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            rescale = tl.exp2(m - top)
            m = m_new
            total = total * rescale
            sinks = sinks * rescale
            weights = weights * rescale
            added = ()
            for p in tl.static_range(len(V_PLANES)):
                added = added + (acc[p] * rescale,)
            acc = added

            # Values: every span's codes with the weights of its own columns.
            for half in tl.static_range(HALVES):
                if CAP == 0:
                    p_ = tl.exp2(scores[half] * factor - top)
                else:
                    p_ = tl.exp2(scores[half] - top)
                v_byte = v_bytes[half]
                v_scale = (((v_byte & 127) << 20) + SCALE_BIAS).to(tl.float32, bitcast=True)
                weight = (p_ * v_scale).to(tl.float16)
                total += by_thread(p_)
                sinks += by_thread(tl.where(v_byte >= 128, p_, 0.0))
                weights += by_thread(weight.to(tl.float32))
                weight = tl.permute(tl.reshape(weight, (W, TILES, 2, 4, 2, R)), (0, 1, 3, 2, 4, 5))
                weight = tl.reshape(weight, (W, 16 * TILES, R))
                for s in tl.static_range(S):
                    base = tile_address(
                        pages,
                        table,
                        begin + (half * S + s) * SPAN,
                        stop,
                        page_stride,
                        head,
                        TILES,
                        BLOCK_SIZE,
                        TILE_BYTES,
                    )
                    own = weight
                    if S > 1:
                        own = tl.where(owner == s, weight, 0.0)
                    added = ()
                    for p in tl.static_range(len(V_PLANES)):
                        codes = value_codes(plane_words(base + v_lane, V_PLANES, p), V_PLANES, p, SUBNORMAL)
                        added = added + (tl.dot(codes, own, acc[p]),)
                    acc = added

    # Warps, spans and rope blocks are disjoint sets of tokens: fold them, so that the merge reads one row per query.
    FOLD: tl.constexpr = W * R // COLS
    m2 = tl.reshape(m, (FOLD, COLS))
    top = tl.max(m2, 0)
    fold = tl.exp2(m2 - tl.where(top == float("-inf"), 0.0, top)[None, :])
    part = (request * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * splits + tl.program_id(2)
    col = tl.arange(0, COLS)
    stats = statistics + part * (3 * COLS) + col
    total = tl.sum(total, 1, keep_dims=True)
    sinks = tl.sum(sinks, 1, keep_dims=True)
    weights = tl.sum(weights, 1, keep_dims=True)
    tl.store(stats, top)
    tl.store(stats + COLS, tl.sum(tl.reshape(total, (FOLD, COLS)) * fold, 0))
    tl.store(stats + 2 * COLS, tl.sum(tl.reshape(sinks, (FOLD, COLS)) * fold, 0))
    fold = tl.reshape(fold, (W, 1, R))
    weights = weights * fold
    for p in tl.static_range(len(V_PLANES)):
        to = V_PLANES[p][4] + tl.arange(0, 16 * V_PLANES[p][1])
        middle = tl.load(v_middle + to)[None, :, None]
        centred = tl.sum(acc[p] * (fold * UNIT) - weights * middle, 0)
        centred = tl.sum(tl.reshape(centred, (16 * V_PLANES[p][1], R // COLS, COLS)), 1)
        tl.store(partial + (part * COLS + col)[None, :] * V_COLUMNS + to[:, None], centred)
