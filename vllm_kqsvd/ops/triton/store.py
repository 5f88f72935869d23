# SPDX-License-Identifier: Apache-2.0
"""Store: turn keys back, subtract the mean of the class, project, quantize, pack, scatter; and the exact copy.

One program per (TILE tokens, KV head, side). Matrix products carry 22 bits (`common.dot_split`), because a
rounded latent can fall into the neighbouring code.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.codec import SINK_RATIO as _SINK_RATIO
from vllm_kqsvd.ops.triton.common import (
    MEAN_RANK,
    SCALE_BIAS,
    block_rotation,
    byte_address,
    class_basis,
    dot_split,
    power_above,
    rope_partner,
)

SINK_RATIO = tl.constexpr(_SINK_RATIO)


@triton.jit
def store_side(
    x,  # [T, P] float32 in the coding frame
    offset,  # [T] row of the mean basis
    slot,  # [T] int64, < 0: skip
    head,
    pages,
    page_stride,
    encode,
    units,
    weights,
    guards,
    shifts,
    half_ranges,
    means,
    basis,
    PLANES: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE_OFFSET: tl.constexpr,
    IS_KEY: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Code one side of a tile of tokens and write its bytes."""
    channel = tl.arange(0, PAD)
    line = tl.arange(0, 2 * MEAN_RANK)
    mean_rows = tl.load(means + (head * 2 * MEAN_RANK + line)[:, None] * PAD + channel[None, :])
    mean = dot_split(class_basis(basis, offset, offset < 0), mean_rows)
    sink = dot_split(class_basis(basis, offset, offset >= 0), mean_rows)
    to_mean = tl.sum((x - mean) * (x - mean), 1)
    to_sink = tl.sum((x - sink) * (x - sink), 1)
    is_sink = to_sink < to_mean * SINK_RATIO
    x = x - tl.where(is_sink[:, None], sink, mean)

    norm = power_above(tl.max(tl.abs(x), 1))
    x = x / norm[:, None]

    energy = tl.zeros([TILE], tl.float32)
    guard = tl.zeros([TILE], tl.float32)
    latents = ()
    for p in tl.static_range(len(PLANES)):
        column = PLANES[p][4] + tl.arange(0, 16 * PLANES[p][1])
        matrix = tl.load(encode + (head * PAD + channel)[:, None] * COLUMNS + column[None, :])
        u = dot_split(x, matrix) * norm[:, None] * tl.load(units + head * COLUMNS + column)[None, :]
        energy += tl.sum(u * u * tl.load(weights + head * COLUMNS + column)[None, :], 1)
        guard = tl.maximum(guard, tl.max(tl.abs(u) * tl.load(guards + head * COLUMNS + column)[None, :], 1))
        latents = latents + (u,)

    scale = tl.clamp(tl.maximum(tl.sqrt(energy), guard), 0.00390625, 240.0)
    bits = scale.to(tl.int32, bitcast=True) - SCALE_BIAS
    code = tl.minimum(tl.maximum((bits + (1 << 19)) >> 20, 0), 127)
    inverse = 1.0 / ((code << 20) + SCALE_BIAS).to(tl.float32, bitcast=True)

    keep = slot >= 0
    within = slot % BLOCK_SIZE
    token = (slot % 16).to(tl.int32)
    tile = pages + slot // BLOCK_SIZE * page_stride + (head * (BLOCK_SIZE // 16) + within // 16) * TILE_BYTES
    tl.store(tile + SCALE_OFFSET + token, (code | (is_sink.to(tl.int32) << 7)).to(tl.uint8), keep)
    for p in tl.static_range(len(PLANES)):
        column = PLANES[p][4] + tl.arange(0, 16 * PLANES[p][1])
        half_range = tl.load(half_ranges + column)[None, :]
        level = tl.floor(latents[p] * inverse[:, None] + half_range)
        level = tl.minimum(tl.maximum(level, 0.0), 2 * half_range - 1).to(tl.int32)
        level = (level >> tl.load(shifts + column)[None, :]) & ((1 << PLANES[p][0]) - 1)
        field = tl.arange(0, 16 * PLANES[p][1]) // 16
        if PLANES[p][2]:  # half plane: columns 8-15 of a field are the upper field of the same bytes
            bit = (2 * field + tl.arange(0, 16 * PLANES[p][1]) % 16 // 8) * PLANES[p][0]
            byte = tl.sum(tl.reshape(level << bit[None, :], (TILE, 2 * PLANES[p][1], 8)), 1)
            at = byte_address(token, tl.arange(0, 8), True, IS_KEY)
        else:
            bit = field * PLANES[p][0]
            byte = tl.sum(tl.reshape(level << bit[None, :], (TILE, PLANES[p][1], 16)), 1)
            at = byte_address(token, tl.arange(0, 16), False, IS_KEY)
        tl.store(tile[:, None] + PLANES[p][3] + at, byte.to(tl.uint8), keep[:, None])


@triton.jit
def store_kernel(
    key,
    value,
    pages,
    slots,
    positions,
    rope,
    k_encode,
    k_encode_unit,
    k_weight,
    k_guard,
    k_shift,
    k_half_range,
    k_means,
    k_basis,
    v_encode,
    v_encode_unit,
    v_weight,
    v_guard,
    v_shift,
    v_half_range,
    v_means,
    v_basis,
    num_tokens,
    key_stride,
    value_stride,
    page_stride,
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
    TILE: tl.constexpr,
):
    """Code key and value [N, H, d] into pages at slots [N] (int64; < 0: skip)."""
    head = tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + row, row < num_tokens, other=-1).to(tl.int64)
    keep = slot >= 0
    position = tl.load(positions + row, keep, other=0).to(tl.int32)
    channel = tl.arange(0, PAD)
    mask = keep[:, None] & (channel < DIM)[None, :]
    if tl.program_id(2) == 0:
        source = key + row.to(tl.int64)[:, None] * key_stride + head * DIM
        x = tl.load(source + channel[None, :], mask, other=0.0).to(tl.float32)
        if ROPE_BLOCK > 0 and HALF_ROT > 0:
            partner = rope_partner(channel, HALF_ROT, INTERLEAVED)
            other = tl.load(source + partner[None, :], mask, other=0.0).to(tl.float32)
            cos, sin = block_rotation(rope, position // ROPE_BLOCK, channel, HALF_ROT, INTERLEAVED)
            x = x * cos + other * sin
        store_side(
            x,
            position % OFFSETS,
            slot,
            head,
            pages,
            page_stride,
            k_encode,
            k_encode_unit,
            k_weight,
            k_guard,
            k_shift,
            k_half_range,
            k_means,
            k_basis,
            K_PLANES,
            K_COLUMNS,
            K_SCALE,
            True,
            PAD,
            BLOCK_SIZE,
            TILE_BYTES,
            TILE,
        )
    else:
        source = value + row.to(tl.int64)[:, None] * value_stride + head * DIM
        x = tl.load(source + channel[None, :], mask, other=0.0).to(tl.float32)
        store_side(
            x,
            position * 0,
            slot,
            head,
            pages,
            page_stride,
            v_encode,
            v_encode_unit,
            v_weight,
            v_guard,
            v_shift,
            v_half_range,
            v_means,
            v_basis,
            V_PLANES,
            V_COLUMNS,
            V_SCALE,
            False,
            PAD,
            BLOCK_SIZE,
            TILE_BYTES,
            TILE,
        )


@triton.jit
def store_exact_kernel(
    key,
    value,
    window_pages,
    slots,
    num_tokens,
    key_stride,
    value_stride,
    block_stride,
    head_stride,
    token_stride,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
    WINDOW_BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy key and value [N, H, d] into window pages [blocks, H, size, 2 d] at slots [N] (int64; < 0: skip)."""
    head = tl.program_id(1)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    slot = tl.load(slots + row, row < num_tokens, other=-1).to(tl.int64)
    channel = tl.arange(0, PAD)
    mask = (slot >= 0)[:, None] & (channel < DIM)[None, :]
    to = slot // WINDOW_BLOCK_SIZE * block_stride + head * head_stride + slot % WINDOW_BLOCK_SIZE * token_stride
    at = row.to(tl.int64)[:, None]
    k = tl.load(key + at * key_stride + head * DIM + channel[None, :], mask)
    v = tl.load(value + at * value_stride + head * DIM + channel[None, :], mask)
    kind = window_pages.dtype.element_ty
    tl.store(window_pages + to[:, None] + channel[None, :], k.to(kind), mask)
    tl.store(window_pages + to[:, None] + DIM + channel[None, :], v.to(kind), mask)
