# SPDX-License-Identifier: Apache-2.0
"""Prefill attention: query tiles over expanded context in the workspace, then over the exact tokens.

A program serves a tile of a request's new tokens for one KV head and its whole query group. Long contexts
come in several rounds (schedule.py); the running softmax state rests in `state` between them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.ops.triton.common import LOG2E, power_above, soft_capped, softmax_step, step_tile, window_tile
from vllm_kqsvd.ops.triton.decode import visible
from vllm_kqsvd.ops.triton.schedule import FIRST as _FIRST
from vllm_kqsvd.ops.triton.schedule import LAST as _LAST

FIRST = tl.constexpr(_FIRST)
LAST = tl.constexpr(_LAST)


@triton.jit
def flash_step(q, key, value, seen, factor, m, total, acc, CAP: tl.constexpr):
    """One tile of flash attention: q [M, P], key and value [T, P] float16, seen [M, T], factor [M]."""
    score = soft_capped(tl.dot(q, tl.trans(key)) * factor[:, None], CAP) * LOG2E
    p, rescale, m, total = softmax_step(tl.where(seen, score, float("-inf")), m, total)
    return m, total, tl.dot(p.to(tl.float16), value, acc * rescale[:, None])


@triton.jit
def prefill_kernel(
    query,
    key,
    value,
    workspace,
    window_pages,
    window_table,
    query_start,
    seq_lens,
    work,  # [tiles, 8] int32, see schedule.Round
    state,  # [H, rows, GROUP, PAD + 2] float32
    output,
    query_stride,
    key_stride,
    value_stride,
    workspace_head_stride,
    window_table_stride,
    window_block_stride,
    window_head_stride,
    window_token_stride,
    state_head_stride,
    output_stride,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    SLIDING: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW_BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Attention of query tile `program_id(0)` and KV head `program_id(1)`; output rows if it is the last round."""
    item = work + 8 * tl.program_id(0)
    head = tl.program_id(1)
    request = tl.load(item)
    first_row = tl.load(item + 1)
    stop_row = tl.load(item + 2)
    low = tl.load(item + 3)
    high = tl.load(item + 4)
    slot = tl.load(item + 5)
    flags = tl.load(item + 6)
    state_row = tl.load(item + 7)
    start = tl.load(query_start + request)
    q_len = tl.load(query_start + request + 1) - start
    length = tl.load(seq_lens + request)

    row = tl.arange(0, ROWS)
    token = first_row + row // GROUP
    live = token < stop_row
    q_position = length - q_len + token
    channel = tl.arange(0, PAD)
    wide = (channel < DIM)[None, :]
    head_offset = (head * GROUP + row % GROUP) * DIM
    q_at = query + ((start + token).to(tl.int64) * query_stride + head_offset)[:, None] + channel[None, :]
    q = tl.load(q_at, live[:, None] & wide, other=0.0).to(tl.float32)
    norm = power_above(tl.max(tl.abs(q), 1))
    q_half = (q / norm[:, None]).to(tl.float16)
    factor = norm * SCALE

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PAD], tl.float32)
    kept = state + head.to(tl.int64) * state_head_stride
    kept += ((state_row + row // GROUP) * GROUP + row % GROUP).to(tl.int64) * (PAD + 2)
    if flags & FIRST == 0:
        m = tl.load(kept + PAD, live, other=float("-inf"))
        total = tl.load(kept + PAD + 1, live, other=0.0)
        acc = tl.load(kept[:, None] + channel[None, :], live[:, None], other=0.0)

    space = workspace + head.to(tl.int64) * workspace_head_stride
    last_position = length - q_len + stop_row
    piece_stop = tl.minimum(high, last_position)
    begin = low
    if SLIDING > 0:
        begin = tl.maximum(low, (length - q_len + first_row + 1 - SLIDING) // TILE * TILE)
    for at in range(begin, piece_stop, TILE):
        position = at + tl.arange(0, TILE)
        base = space + (slot + position - low).to(tl.int64)[:, None] * (2 * DIM) + channel[None, :]
        mask = (position < high)[:, None] & wide
        far_key = tl.load(base, mask, other=0.0)
        far_value = tl.load(base + DIM, mask, other=0.0)
        seen = visible(position, piece_stop, q_position, SLIDING) & live[:, None]
        m, total, acc = flash_step(q_half, far_key, far_value, seen, factor, m, total, acc, CAP)

    if flags & LAST == 0:
        tl.store(kept + PAD, m, live)
        tl.store(kept + PAD + 1, total, live)
        tl.store(kept[:, None] + channel[None, :], acc, live[:, None])
    else:
        if WINDOW > 0:
            first = length - q_len  # window pages hold what is before the step, its own rows the rest
            near = tl.maximum(first + 1 - WINDOW, 0) // 16 * 16
            if SLIDING > 0:
                near = tl.maximum(near, (first + first_row + 1 - SLIDING) // TILE * TILE)
            table = window_table + request.to(tl.int64) * window_table_stride
            for at in tl.range(near, first, TILE, num_stages=1):
                position = at + tl.arange(0, TILE)
                old_key, old_value = window_tile(
                    position, first, head, window_pages, table, window_block_stride, window_head_stride,
                    window_token_stride, DIM, PAD, WINDOW_BLOCK_SIZE,
                )  # fmt: skip
                seen = visible(position, first, q_position, SLIDING) & live[:, None]
                m, total, acc = flash_step(q_half, old_key, old_value, seen, factor, m, total, acc, CAP)
            for at in range(tl.maximum(near, first), last_position, TILE):
                position = at + tl.arange(0, TILE)
                own_row = start + position - first
                own_key, own_value = step_tile(
                    own_row, position < last_position, head, key, value, key_stride, value_stride, DIM, PAD
                )
                seen = visible(position, last_position, q_position, SLIDING) & live[:, None]
                m, total, acc = flash_step(q_half, own_key, own_value, seen, factor, m, total, acc, CAP)
        result = acc / tl.where(total > 0, total, 1.0)[:, None]
        out_at = output + ((start + token).to(tl.int64) * output_stride + head_offset)[:, None] + channel[None, :]
        tl.store(out_at, result.to(output.dtype.element_ty), live[:, None] & wide)
