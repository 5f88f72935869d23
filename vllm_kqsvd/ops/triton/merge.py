# SPDX-License-Identifier: Apache-2.0
"""Decode attention, second kernel: the exact window, the splits of the latent history, the value basis.

One program per (request, KV head, tile of queries); the value basis is applied once per query.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.ops.triton.common import (
    LOG2E,
    dot_split,
    power_above,
    soft_capped,
    softmax_step,
    step_tile,
    window_tile,
)
from vllm_kqsvd.ops.triton.decode import latent_range, split_range, visible


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
    W: tl.constexpr,  # warps of the split kernel
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
    unused, none, used = split_range(low, stop, 0, splits, SUPER, W)
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
