# SPDX-License-Identifier: Apache-2.0
"""The meaning of store, dequantize and attend in plain PyTorch. Every kernel equals this; not meant to be fast.

Shapes: N tokens, H kv heads, Hq query heads (a multiple of H), d head_dim, R rank, S requests.
`pages` is the raw cache of one layer, [blocks, page_bytes] uint8 (docs/format.md, 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.codec import SINK_RATIO, LayerCodec, SideCodec
from vllm_kqsvd.layout import TILE
from vllm_kqsvd.ops.packing import codes_from_bytes, tile_index, token_bytes
from vllm_kqsvd.ops.rope_block import block_start, rotate
from vllm_kqsvd.ops.scale_byte import decode_scale, encode_scale


@dataclass(frozen=True)
class ExactWindow:
    """The sliding-window cache of exact keys and values.

    pages [blocks, H, block_size, 2 d] (K then V, model dtype, any strides), block_table [S, n] int32 by
    position // block_size; `length` W: every query sees at least its last W positions exactly.
    """

    pages: torch.Tensor
    block_table: torch.Tensor
    length: int


def window_start(first_query: torch.Tensor, length: int) -> torch.Tensor:
    """First exactly attended position for a step whose first query stands at `first_query` [...] int."""
    return ((first_query + 1 - length).clamp_min(0) // TILE) * TILE


def _means(side: SideCodec, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ordinary mean, sink prototype) at in-block offsets [N] -> each [N, H, d]."""
    basis = side.mean_basis[offset % side.mean_basis.shape[0]]
    mean, sink = (torch.einsum("nm,hmd->nhd", basis, x) for x in (side.mean, side.sink))
    return mean, sink


def encode(x: torch.Tensor, offset: torch.Tensor, side: SideCodec) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x [N, H, d] (already in its rope block's frame) -> codes [N, H, R] uint8, scale byte [N, H] uint8."""
    x = x.to(side.encode.dtype)
    mean, sink = _means(side, offset)
    d_mean, d_sink = (x - mean).square().sum(-1), (x - sink).square().sum(-1)
    is_sink = d_sink < SINK_RATIO * d_mean
    latent = torch.einsum("nhd,hdr->nhr", x - torch.where(is_sink[..., None], sink, mean), side.encode)
    scale = torch.maximum(
        (side.scale_weight * latent.square()).sum(-1).sqrt(),
        (side.guard_weight * latent.abs()).amax(-1),
    )
    byte = encode_scale(scale, is_sink)
    half_range = 2.0 ** (side.channel_bits() - 1).to(latent.dtype)
    level = torch.floor(latent / decode_scale(byte)[0].to(latent.dtype)[..., None] + half_range)
    return level.clamp_min(0).minimum(2 * half_range - 1).to(torch.uint8), byte


def decode(codes: torch.Tensor, byte: torch.Tensor, offset: torch.Tensor, side: SideCodec) -> torch.Tensor:
    """Inverse of `encode` up to quantization: [N, H, R], [N, H] -> [N, H, d] in the rope block's frame."""
    dtype = side.decode.dtype
    scale, is_sink = decode_scale(byte)
    zero_point = 2.0 ** (side.channel_bits() - 1).to(dtype) - 0.5
    latent = (codes.to(dtype) - zero_point) * scale.to(dtype)[..., None]
    mean, sink = _means(side, offset)
    return torch.einsum("nhr,hrd->nhd", latent, side.decode) + torch.where(is_sink[..., None], sink, mean)


def _turn_back(x: torch.Tensor, positions: torch.Tensor, codec: LayerCodec, sign: int) -> torch.Tensor:
    if codec.rope_block == 0:
        return x
    return rotate(x, sign * block_start(positions, codec.rope_block), codec.rope)


def _byte_address(slots: torch.Tensor, codec: LayerCodec, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(block [N], offset of the token's tile in the page [N, H])."""
    offset = slots % block_size
    head = torch.arange(codec.num_kv_heads, device=slots.device)
    tile = head * (block_size // TILE) + (offset // TILE)[:, None]
    return slots // block_size, tile * codec.layout.tile_bytes


def store_latent(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    positions: torch.Tensor,
    codec: LayerCodec,
    block_size: int,
) -> None:
    """Code key, value [N, H, d] (keys after RoPE) at `positions` [N] into `pages` at `slot_mapping` [N] (< 0: skip)."""
    keep = slot_mapping >= 0
    slots, positions = slot_mapping[keep].long(), positions[keep].long()
    key, value = key[: keep.numel()][keep], value[: keep.numel()][keep]
    dtype = codec.k.encode.dtype
    sides = {
        "k": encode(_turn_back(key.to(dtype), positions, codec, -1), positions, codec.k),
        "v": encode(value, positions, codec.v),
    }
    block, tile = _byte_address(slots, codec, block_size)
    token = slots % TILE
    for name, (codes, byte) in sides.items():
        index = tile[..., None] + tile_index(codec.layout, name, token)[:, None]
        pages[block[:, None, None], index] = token_bytes(codes, codec.layout, name)
        pages[block[:, None], tile + codec.layout.scale_offset[name] + token[:, None]] = byte


def dequantize(
    pages: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    codec: LayerCodec,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys (after RoPE) and values of the tokens at `slots` [N] standing at `positions` [N]: each [N, H, d]."""
    slots, positions = slots.long(), positions.long()
    block, tile = _byte_address(slots, codec, block_size)
    token = slots % TILE
    out = []
    for name, side in (("k", codec.k), ("v", codec.v)):
        index = tile[..., None] + tile_index(codec.layout, name, token)[:, None]
        codes = codes_from_bytes(pages[block[:, None, None], index], codec.layout, name)
        byte = pages[block[:, None], tile + codec.layout.scale_offset[name] + token[:, None]]
        out.append(decode(codes, byte, positions, side))
    return _turn_back(out[0], positions, codec, 1), out[1]


def attend(
    query: torch.Tensor,
    pages: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    codec: LayerCodec,
    block_size: int,
    scale: float,
    window: ExactWindow | None = None,
    soft_cap: float = 0.0,
    sliding_window: int = 0,
    fresh: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Causal attention of the last q_len positions of each request over its pages: decode and prefill alike.

    query [N, Hq, d] with rows query_start_loc[i] .. query_start_loc[i+1] of request i; seq_lens [S] include
    these rows; block_table [S, n]. Positions from `window_start` on are read from `window` (exact), earlier
    ones from the latent pages. `sliding_window` counts visible positions (0: all). Returns [N, Hq, d] in the
    codec's dtype; rows of empty requests are zero. `fresh`: the step's own keys and values [N, H, d]; if given,
    they stand for themselves and the window pages are read only before them.
    """
    dtype = codec.k.encode.dtype
    heads, dim = codec.num_kv_heads, codec.head_dim
    out = torch.zeros(query.shape, dtype=dtype, device=query.device)
    starts = query_start_loc.tolist()
    for i, length in enumerate(seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        q_len = starts[i + 1] - starts[i]
        if q_len <= 0 or length <= 0:
            continue
        pos = torch.arange(length, device=query.device)
        slots = block_table[i].long()[pos // block_size] * block_size + pos % block_size
        key, value = dequantize(pages, slots, pos, codec, block_size)
        if window is not None:
            start = int(window_start(torch.tensor(length - q_len), window.length))
            size = window.pages.shape[2]
            near = pos[start : length - q_len] if fresh is not None else pos[start:]
            exact = window.pages[window.block_table[i].long()[near // size], :, near % size].to(dtype)
            key[near], value[near] = exact[..., :dim], exact[..., dim:]
            if fresh is not None:
                key[length - q_len :], value[length - q_len :] = (x[rows].to(dtype) for x in fresh)
        q = query[rows].to(dtype).view(q_len, heads, -1, dim)
        score = torch.einsum("nhgd,khd->hgnk", q, key) * scale
        if soft_cap:
            score = soft_cap * torch.tanh(score / soft_cap)
        at = torch.arange(length - q_len, length, device=query.device)[:, None]
        hidden = pos > at if not sliding_window else (pos > at) | (pos <= at - sliding_window)
        p = score.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hgnk,khd->nhgd", p, value).reshape(q_len, -1, dim)
    return out
