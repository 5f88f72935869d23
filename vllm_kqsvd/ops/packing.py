# SPDX-License-Identifier: Apache-2.0
"""Codes <-> page bytes in PyTorch, driven by the tables of `layout.LatentLayout`."""

from __future__ import annotations

from functools import lru_cache

import torch

from vllm_kqsvd.layout import TILE, LatentLayout


@lru_cache(maxsize=512)
def _tables(layout: LatentLayout, side: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """(offset [16, bytes], channel [bytes, slots] int64; shift, mask, bit [bytes, slots] uint8)."""
    fields = layout.byte_fields[side]
    slots = max(map(len, fields))
    rows = [
        [(f.channel, f.shift, (1 << f.num_bits) - 1, f.bit) for f in byte]
        + [(0, 0, 0, 0)] * (slots - len(byte))  # mask 0: an empty slot
        for byte in fields
    ]
    table = torch.tensor(rows, dtype=torch.int64, device=device)
    offset = torch.tensor(layout.byte_offset[side], dtype=torch.int64, device=device)
    channel, *rest = table.unbind(-1)
    return (offset, channel, *(x.to(torch.uint8) for x in rest))


def token_bytes(codes: torch.Tensor, layout: LatentLayout, side: str) -> torch.Tensor:
    """Codes [..., rank] (integer) -> the code bytes of a token [..., bytes] uint8, in `byte_offset` order."""
    _, channel, shift, mask, bit = _tables(layout, side, codes.device)
    fields = (codes.to(torch.uint8)[..., channel] >> shift) & mask
    return (fields << bit).sum(-1, dtype=torch.uint8)


def codes_from_bytes(data: torch.Tensor, layout: LatentLayout, side: str) -> torch.Tensor:
    """Inverse of `token_bytes`: [..., bytes] uint8 -> codes [..., rank] uint8."""
    _, channel, shift, mask, bit = _tables(layout, side, data.device)
    values = ((data[..., None] >> bit) & mask) << shift
    codes = torch.zeros(*data.shape[:-1], layout.side(side).rank, dtype=torch.uint8, device=data.device)
    return codes.index_add_(-1, channel.flatten(), values.flatten(-2))


def tile_index(layout: LatentLayout, side: str, token: torch.Tensor) -> torch.Tensor:
    """Offsets in a tile of the code bytes of `token` [...] (0..15) -> [..., bytes] int64."""
    return _tables(layout, side, token.device)[0][token.to(torch.int64) % TILE]
