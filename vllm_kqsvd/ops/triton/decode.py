# SPDX-License-Identifier: Apache-2.0
"""Decode attention in the code domain: splits of the latent history, then one kernel that merges them.

A program of `split_kernel` serves one (request, KV head, split) and the head's whole query group. Rows are
(repetition, query column): with page-relative RoPE every repetition carries the query turned back to another
of REPEAT consecutive rope spans, so that one read of the decode matrix absorbs all of them and no row of a
matrix product stays idle; a row sees only its own span's tokens, and repetitions are merged like splits.
`merge_kernel` attends to the exact window, adds the splits and applies the value basis once per query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.ops.triton.common import (
    LOG2E,
    MEAN_RANK,
    block_rotation,
    class_basis,
    dot_split,
    plane_fields,
    power_above,
    rope_partner,
    scale_and_class,
    soft_capped,
    softmax_step,
    step_tile,
    tile_addresses,
    window_tile,
)


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
def split_range(start, stop, split, splits, SUPER: tl.constexpr):
    """[first, last) of the split's super-spans of SUPER tokens, and the number of splits that are not empty."""
    low = start // SUPER
    count = tl.cdiv(stop, SUPER) - low
    per = tl.maximum(tl.cdiv(count, splits), 1)
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
def absorb(
    query,  # row addresses [M]
    live,
    norm,
    block,  # rope block of each row [M]
    rope,
    decode,
    means,
    PLANES: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    TURN: tl.constexpr,
    HALF_ROT: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Queries against the key codes: (per plane [M, C] float16, against the means [M, 2 * MEAN_RANK] float32)."""
    line = tl.arange(0, 2 * MEAN_RANK)
    against_means = tl.zeros([ROWS, 2 * MEAN_RANK], tl.float32)
    sums = ()
    for p in tl.static_range(len(PLANES)):
        sums = sums + (tl.zeros([ROWS, 16 * PLANES[p][1]], tl.float32),)
    for chunk in range(0, PAD, CHUNK):  # wide heads in chunks: the matrices of a chunk share the shared memory
        channel = chunk + tl.arange(0, CHUNK)
        mask = live[:, None] & (channel < DIM)[None, :]
        x = tl.load(query[:, None] + channel[None, :], mask, other=0.0).to(tl.float32) / norm[:, None]
        if TURN:
            partner = rope_partner(channel, HALF_ROT, INTERLEAVED)
            other = tl.load(query[:, None] + partner[None, :], mask, other=0.0).to(tl.float32) / norm[:, None]
            cos, sin = block_rotation(rope, block, channel, HALF_ROT, INTERLEAVED)
            x = x * cos + other * sin
        half = x.to(tl.float16)
        added = ()
        for p in tl.static_range(len(PLANES)):
            column = PLANES[p][4] + tl.arange(0, 16 * PLANES[p][1])
            matrix = tl.load(decode + column[None, :] * PAD + channel[:, None])
            added = added + (tl.dot(half, matrix, sums[p]),)
        sums = added
        against_means += dot_split(x, tl.load(means + line[None, :] * PAD + channel[:, None]))
    absorbed = ()
    for p in tl.static_range(len(PLANES)):
        absorbed = absorbed + (sums[p].to(tl.float16),)
    return absorbed, against_means


@triton.jit
def split_kernel(
    query,
    pages,
    block_table,
    query_start,
    seq_lens,
    rope,
    k_decode,
    k_unit,
    k_means,
    k_basis,
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
    SPAN: tl.constexpr,  # tokens per rope span (a rope block or a part of a long one)
    REPEAT: tl.constexpr,
    COLS: tl.constexpr,
    COL_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Attention of one split over the latent pages -> partial [.., COLS, V_COLUMNS], statistics [.., 3, COLS]."""
    request = tl.program_id(0)
    head = tl.program_id(1) // COL_TILES
    start = tl.load(query_start + request)
    q_len = tl.load(query_start + request + 1) - start
    length = tl.load(seq_lens + request)
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) % COL_TILES * COLS + row % COLS
    repetition = row // COLS
    live = (column < GROUP * q_len) & (repetition < REPEAT)
    low, stop = latent_range(length, q_len, WINDOW, SLIDING)
    first, last, used = split_range(low, stop, tl.program_id(2), splits, SPAN * REPEAT)
    if (q_len <= 0) | (length <= 0) | (first >= last):
        return

    q_position = length - q_len + column // GROUP
    token_row = (start + column // GROUP).to(tl.int64) * query_stride
    q_rows = query + token_row + (head * GROUP + column % GROUP) * DIM
    channel = tl.arange(0, PAD)
    q = tl.load(q_rows[:, None] + channel[None, :], live[:, None] & (channel < DIM)[None, :], other=0.0)
    norm = power_above(tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1)))
    decode = k_decode + head * K_COLUMNS * PAD
    means = k_means + head * 2 * MEAN_RANK * PAD
    unit = tl.load(k_unit + head)
    table = block_table + request.to(tl.int64) * table_stride

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sinks = tl.zeros([ROWS], tl.float32)
    acc = ()
    for p in tl.static_range(len(V_PLANES)):
        acc = acc + (tl.zeros([ROWS, 16 * V_PLANES[p][1]], tl.float32),)
    if ROPE_BLOCK == 0:
        absorbed, mean_query = absorb(
            q_rows, live, norm, row, rope, decode, means, K_PLANES, DIM, PAD, False, HALF_ROT, INTERLEAVED, ROWS, CHUNK
        )
    for span in range(first, last):
        if ROPE_BLOCK > 0:
            block = (span * REPEAT + repetition) * SPAN // ROPE_BLOCK
            absorbed, mean_query = absorb(
                q_rows, live, norm, block, rope, decode, means, K_PLANES, DIM, PAD, HALF_ROT > 0, HALF_ROT, INTERLEAVED,
                ROWS, CHUNK,
            )  # fmt: skip
        begin = span * (SPAN * REPEAT)
        for at in range(begin, tl.minimum(begin + SPAN * REPEAT, stop), TILE):
            position = at + tl.arange(0, TILE)
            tiles = tile_addresses(pages, table, at, position, stop, page_stride, head, BLOCK_SIZE, TILE_BYTES, TILE)
            token = position % 16
            k_scale, k_sink = scale_and_class(tiles, token, K_SCALE)
            score = tl.zeros([ROWS, TILE], tl.float32)
            for p in tl.static_range(len(K_PLANES)):
                fields = plane_fields(tiles, token, K_PLANES, p, True)
                score = tl.dot(absorbed[p], tl.trans(fields), score)
            means_part = dot_split(mean_query, tl.trans(class_basis(k_basis, position % OFFSETS, k_sink)))
            score = (score * (k_scale * unit)[None, :] + means_part) * (norm * SCALE)[:, None]
            score = soft_capped(score, CAP) * LOG2E
            seen = visible(position, stop, q_position, SLIDING) & live[:, None]
            if REPEAT > 1:
                seen = seen & ((position // SPAN % REPEAT)[None, :] == repetition[:, None])
            p_, rescale, m, total = softmax_step(tl.where(seen, score, float("-inf")), m, total)
            v_scale, v_sink = scale_and_class(tiles, token, V_SCALE)
            sinks = sinks * rescale + tl.sum(tl.where(v_sink[None, :], p_, 0.0), 1)
            weight = (p_ * v_scale[None, :]).to(tl.float16)
            added = ()
            for p in tl.static_range(len(V_PLANES)):
                fields = plane_fields(tiles, token, V_PLANES, p, False)
                added = added + (tl.dot(weight, fields, acc[p] * rescale[:, None]),)
            acc = added

    # Repetitions are disjoint sets of tokens: fold them, so that the merge reads one row per query.
    m2 = tl.reshape(m, (ROWS // COLS, COLS))
    top = tl.max(m2, 0)
    fold = tl.exp2(m2 - tl.where(top == float("-inf"), 0.0, top)[None, :])
    part = (request * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * splits + tl.program_id(2)
    col = tl.arange(0, COLS)
    stats = statistics + part * (3 * COLS) + col
    tl.store(stats, top)
    tl.store(stats + COLS, tl.sum(tl.reshape(total, (ROWS // COLS, COLS)) * fold, 0))
    tl.store(stats + 2 * COLS, tl.sum(tl.reshape(sinks, (ROWS // COLS, COLS)) * fold, 0))
    for p in tl.static_range(len(V_PLANES)):
        cube = tl.reshape(acc[p], (ROWS // COLS, COLS, 16 * V_PLANES[p][1]))
        to = V_PLANES[p][4] + tl.arange(0, 16 * V_PLANES[p][1])
        at = partial + (part * COLS + col)[:, None] * V_COLUMNS + to[None, :]
        tl.store(at, tl.sum(cube * fold[:, :, None], 0))


@triton.jit
def merge_kernel(
    query,
    key,
    value,
    window_pages,
    window_table,
    query_start,
    seq_lens,
    v_decode,
    v_unit,
    v_centers,
    partial,
    statistics,
    output,
    query_stride,
    key_stride,
    value_stride,
    window_table_stride,
    window_block_stride,
    window_head_stride,
    window_token_stride,
    output_stride,
    splits,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SLIDING: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW_BLOCK_SIZE: tl.constexpr,
    V_PLANES: tl.constexpr,
    V_COLUMNS: tl.constexpr,
    SUPER: tl.constexpr,
    COLS: tl.constexpr,
    COL_TILES: tl.constexpr,
    ROWS: tl.constexpr,  # at least 16: the rows beyond COLS take further splits
    WINDOW_TILE: tl.constexpr,
):
    """Exact window, splits and value basis of one (request, KV head, column tile) -> rows of output."""
    request = tl.program_id(0)
    head = tl.program_id(1) // COL_TILES
    start = tl.load(query_start + request)
    q_len = tl.load(query_start + request + 1) - start
    length = tl.load(seq_lens + request)
    row = tl.arange(0, ROWS)
    column = tl.program_id(1) % COL_TILES * COLS + row % COLS
    inside = column < GROUP * q_len
    channel = tl.arange(0, PAD)
    token_row = (start + column // GROUP).to(tl.int64)
    head_offset = (head * GROUP + column % GROUP) * DIM
    low, stop = latent_range(length, q_len, WINDOW, SLIDING)
    unused, none, used = split_range(low, stop, 0, splits, SUPER)
    if q_len <= 0:
        return
    if length <= 0:
        used = 0

    # Exact window, in the rows of the first repetition.
    m_near = tl.full([ROWS], float("-inf"), tl.float32)
    total_near = tl.zeros([ROWS], tl.float32)
    acc_near = tl.zeros([ROWS, PAD], tl.float32)
    if WINDOW > 0:
        live = inside & (row < COLS)
        q_position = length - q_len + column // GROUP
        q_at = query + (token_row * query_stride + head_offset)[:, None] + channel[None, :]
        q = tl.load(q_at, live[:, None] & (channel < DIM)[None, :], other=0.0).to(tl.float32)
        norm = power_above(tl.max(tl.abs(q), 1))
        q_half = (q / norm[:, None]).to(tl.float16)
        table = window_table + request.to(tl.int64) * window_table_stride
        first = length - q_len  # window pages hold what is before the step, its own rows the rest
        for at in tl.range(stop, length, WINDOW_TILE, num_stages=1):
            position = at + tl.arange(0, WINDOW_TILE)
            old_key, old_value = window_tile(
                position, first, head, window_pages, table, window_block_stride, window_head_stride,
                window_token_stride, DIM, PAD, WINDOW_BLOCK_SIZE,
            )  # fmt: skip
            own = (position >= first) & (position < length)
            own_key, own_value = step_tile(
                start + position - first, own, head, key, value, key_stride, value_stride, DIM, PAD
            )
            score = tl.dot(q_half, tl.trans(old_key + own_key)) * (norm * SCALE)[:, None]
            score = soft_capped(score, CAP) * LOG2E
            seen = visible(position, length, q_position, SLIDING) & live[:, None]
            p_, rescale, m_near, total_near = softmax_step(tl.where(seen, score, float("-inf")), m_near, total_near)
            acc_near = tl.dot(p_.to(tl.float16), old_value + own_value, acc_near * rescale[:, None])

    # Splits: ROWS // COLS at a time.
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sinks = tl.zeros([ROWS], tl.float32)
    acc = ()
    for p in tl.static_range(len(V_PLANES)):
        acc = acc + (tl.zeros([ROWS, 16 * V_PLANES[p][1]], tl.float32),)
    part = (request * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * splits
    for s in range(0, used, ROWS // COLS):
        split = s + row // COLS
        full = split < used
        stats = statistics + (part + split) * (3 * COLS) + row % COLS
        m_part = tl.load(stats, full, other=float("-inf"))
        m_new = tl.maximum(m, m_part)
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        keep = tl.exp2(m - base)
        gain = tl.exp2(m_part - base)
        total = total * keep + tl.load(stats + COLS, full, other=0.0) * gain
        sinks = sinks * keep + tl.load(stats + 2 * COLS, full, other=0.0) * gain
        rows_at = partial + ((part + split) * COLS + row % COLS) * V_COLUMNS
        added = ()
        for p in tl.static_range(len(V_PLANES)):
            to = V_PLANES[p][4] + tl.arange(0, 16 * V_PLANES[p][1])
            piece = tl.load(rows_at[:, None] + to[None, :], full[:, None], other=0.0)
            added = added + (acc[p] * keep[:, None] + piece * gain[:, None],)
        acc = added
        m = m_new

    # Weights of every row, with the sum over repetitions and window as the common denominator.
    top = tl.max(tl.reshape(tl.maximum(m, m_near), (ROWS // COLS, COLS)), 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    top = tl.reshape(tl.broadcast_to(top[None, :], (ROWS // COLS, COLS)), (ROWS,))
    far = tl.exp2(m - top)
    near = tl.exp2(m_near - top)
    denominator = tl.sum(tl.reshape(total * far + total_near * near, (ROWS // COLS, COLS)), 0)
    denominator = tl.where(denominator > 0, denominator, 1.0)
    denominator = tl.reshape(tl.broadcast_to(denominator[None, :], (ROWS // COLS, COLS)), (ROWS,))
    far = far / denominator
    near = near / denominator

    result = tl.zeros([ROWS, PAD], tl.float32)
    for p in tl.static_range(len(V_PLANES)):
        line = V_PLANES[p][4] + tl.arange(0, 16 * V_PLANES[p][1])
        matrix = tl.load(v_decode + (head * V_COLUMNS + line)[:, None] * PAD + channel[None, :])
        result += dot_split(acc[p] * far[:, None], matrix)
    mean = tl.load(v_centers + 2 * head * PAD + channel)
    sink = tl.load(v_centers + (2 * head + 1) * PAD + channel)
    result = result * tl.load(v_unit + head) + acc_near * near[:, None]
    result += (total * far)[:, None] * mean[None, :] + (sinks * far)[:, None] * (sink - mean)[None, :]
    folded = tl.sum(tl.reshape(result, (ROWS // COLS, COLS, PAD)), 0)

    col = tl.program_id(1) % COL_TILES * COLS + tl.arange(0, COLS)
    out_row = (start + col // GROUP).to(tl.int64) * output_stride + (head * GROUP + col % GROUP) * DIM
    mask = (col < GROUP * q_len)[:, None] & (channel < DIM)[None, :]
    tl.store(output + out_row[:, None] + channel[None, :], folded.to(output.dtype.element_ty), mask)
