# SPDX-License-Identifier: Apache-2.0
"""Latent pages -> exact-shaped keys (after RoPE) and values in a bounded float16 workspace, for prefill."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kqsvd.ops.triton.common import (
    MEAN_RANK,
    block_rotation,
    class_basis,
    dot_split,
    plane_fields,
    rope_partner,
    scale_and_class,
    to_half,
)


@triton.jit
def expand(
    tiles,
    token,
    scale,  # [T], quantizer unit included
    channel,  # [P] the columns of the decode matrix that are wanted
    decode,
    PLANES: tl.constexpr,
    IS_KEY: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decoded latents of tokens [T], mean not yet added -> [T, P] float32."""
    x = tl.zeros([TILE, PAD], tl.float32)
    for p in tl.static_range(len(PLANES)):
        fields = plane_fields(tiles, token, PLANES, p, IS_KEY)
        row = PLANES[p][4] + tl.arange(0, 16 * PLANES[p][1])
        matrix = tl.load(decode + row[:, None] * PAD + channel[None, :])
        high = matrix.to(tl.float16)
        x = tl.dot(fields, high, x)
        if not IS_KEY:  # float32 matrix: its remainder, so that decode and prefill read the same values
            x = tl.dot(fields, (matrix - high.to(tl.float32)).to(tl.float16), x)
    return x * scale[:, None]


@triton.jit
def dequantize_kernel(
    pages,
    block_table,
    work,  # [tiles, 3] int32: request, first position, end of its positions
    workspace,  # [H, slots, 2 d] float16
    rope,
    k_decode,
    k_unit,
    k_means,
    k_basis,
    v_decode,
    v_unit,
    v_centers,
    table_stride,
    page_stride,
    workspace_head_stride,
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
    """Expand tile `program_id(0)` of the work list for KV head `program_id(1)` into its TILE workspace slots."""
    index = tl.program_id(0)
    head = tl.program_id(1)
    request = tl.load(work + 3 * index).to(tl.int64)
    start = tl.load(work + 3 * index + 1)
    stop = tl.load(work + 3 * index + 2)
    position = start + tl.arange(0, TILE)
    table = block_table + request * table_stride
    # The work list starts pieces at any multiple of 16, so blocks are looked up token by token.
    block = tl.load(table + position // BLOCK_SIZE, position < stop, other=0).to(tl.int64)
    tiles = pages + block * page_stride + (head * (BLOCK_SIZE // 16) + position % BLOCK_SIZE // 16) * TILE_BYTES
    token = position % 16
    channel = tl.arange(0, PAD)
    slot = index * TILE + tl.arange(0, TILE)
    to = workspace + head.to(tl.int64) * workspace_head_stride + slot.to(tl.int64)[:, None] * (2 * DIM)
    mask = (position < stop)[:, None] & (channel < DIM)[None, :]

    scale, is_sink = scale_and_class(tiles, token, K_SCALE)
    scale = scale * tl.load(k_unit + head)
    decode = k_decode + head * K_COLUMNS * PAD
    means = k_means + head * 2 * MEAN_RANK * PAD
    line = tl.arange(0, 2 * MEAN_RANK)[:, None] * PAD
    rows = class_basis(k_basis, position % OFFSETS, is_sink)
    x = expand(tiles, token, scale, channel, decode, K_PLANES, True, PAD, TILE)
    x += dot_split(rows, tl.load(means + line + channel[None, :]))
    if ROPE_BLOCK > 0 and HALF_ROT > 0:
        partner = rope_partner(channel, HALF_ROT, INTERLEAVED)
        other = expand(tiles, token, scale, partner, decode, K_PLANES, True, PAD, TILE)
        other += dot_split(rows, tl.load(means + line + partner[None, :]))
        cos, sin = block_rotation(rope, position // ROPE_BLOCK, channel, HALF_ROT, INTERLEAVED)
        x = x * cos - other * sin
    tl.store(to + channel[None, :], to_half(x), mask)

    scale, is_sink = scale_and_class(tiles, token, V_SCALE)
    scale = scale * tl.load(v_unit + head)
    x = expand(tiles, token, scale, channel, v_decode + head * V_COLUMNS * PAD, V_PLANES, False, PAD, TILE)
    mean = tl.load(v_centers + 2 * head * PAD + channel)
    sink = tl.load(v_centers + (2 * head + 1) * PAD + channel)
    x += tl.where(is_sink[:, None], sink[None, :], mean[None, :])
    tl.store(to + DIM + channel[None, :], to_half(x), mask)
