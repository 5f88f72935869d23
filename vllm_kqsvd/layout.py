# SPDX-License-Identifier: Apache-2.0
"""Byte layout of a latent page: pure arithmetic, the one truth for packers and kernels. No torch.

A page (one KV-cache block of one layer) is `[kv_head][tile][tile_bytes]`; a tile holds 16 tokens as

    K planes | V planes | 16 K scale bytes | 16 V scale bytes

and a plane holds 256 bytes (full) or 128 (half) per tile, i.e. 64 or 32 little-endian 32-bit words in
the order in which a warp's lanes (g = lane / 4, t = lane % 4) read them as the A operand of
`mma.m16n8k16`. Every byte belongs to exactly one token, so tokens are written without read-modify-write.

K, full  word 4*r + t:          half h = channels 2t+h (byte 0), 2t+8+h (byte 1) of token r
K, half  word 4*(r%8) + t:      half h, byte r/8 = channels 2t+h, then 2t+8+h, of token r
V, full  word 8*(r/2) + g:      half r%2 = rows g (byte 0), g+8 (byte 1) of token r
V, half  word 8*(r/2%4) + g:    half r%2, byte r/8 = rows g, then g+8, of token r

Inside a byte, full planes put group i of the plane at bit `i * num_bits`; half planes put (group i,
row half x) at bit `(2 * i + x) * num_bits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from vllm_kqsvd.errors import PlanError
from vllm_kqsvd.plan import GROUP, LayerPlan, Plane, SidePlan

TILE = 16  # tokens per tile
SCALE_BYTES = 2  # one for K, one for V, per token and KV head


@dataclass(frozen=True)
class Field:
    """`num_bits` bits of a code: bits [shift, shift + num_bits) of latent `channel` at `bit` of a byte."""

    channel: int
    shift: int
    num_bits: int
    bit: int


def _plane_bytes(plane: Plane, side: str) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Bytes of one token in a plane: (offset in the plane for each token of the tile, (channel, bit)s)."""
    out: list[tuple[list[int], list[tuple[int, int]]]] = []
    bits, n = plane.num_bits, len(plane.groups)
    for i in range(plane.bytes_per_token):
        if side == "k":  # bytes of a token: word t, half h, (full: byte = row half)
            t, h, x = (i // 4, i // 2 % 2, i % 2) if not plane.is_half else (i // 2, i % 2, -1)
            column = 2 * t + h
        else:  # words g, (full: byte = row half)
            column, x = (i // 2, i % 2) if not plane.is_half else (i, -1)
        offsets = []
        for r in range(TILE):
            if side == "k" and not plane.is_half:
                offsets.append(16 * r + 4 * t + 2 * h + x)
            elif side == "k":
                offsets.append(16 * (r % 8) + 4 * t + 2 * h + r // 8)
            elif not plane.is_half:
                offsets.append(32 * (r // 2) + 4 * column + 2 * (r % 2) + x)
            else:
                offsets.append(32 * (r // 2 % 4) + 4 * column + 2 * (r % 2) + r // 8)
        if x >= 0:
            fields = [(GROUP * plane.groups[j] + column + 8 * x, j * bits) for j in range(n)]
        else:
            fields = [(GROUP * plane.groups[j] + column + 8 * y, (2 * j + y) * bits) for j in range(n) for y in (0, 1)]
        out.append((offsets, fields))
    return out


@dataclass(frozen=True)
class LatentLayout:
    """Addresses inside the pages of one layer plan. Blocks hold `block_size` tokens of every KV head."""

    plan: LayerPlan

    @cached_property
    def plane_offsets(self) -> dict[str, tuple[int, ...]]:
        """Byte offset of each plane in a tile, per side."""
        out, at = {}, 0
        for side in ("k", "v"):
            offs = []
            for plane in self.side(side).planes:
                offs.append(at)
                at += TILE * plane.bytes_per_token
            out[side] = tuple(offs)
        return out

    def side(self, side: str) -> SidePlan:
        """The plan of "k" or "v"."""
        return self.plan.k if side == "k" else self.plan.v

    @cached_property
    def scale_offset(self) -> dict[str, int]:
        """Byte offset of token 0's scale byte in a tile, per side; token r's is r bytes further."""
        codes = TILE * (self.plan.k.bytes_per_token + self.plan.v.bytes_per_token)
        return {"k": codes, "v": codes + TILE}

    @property
    def tile_bytes(self) -> int:
        """Bytes of 16 tokens of one KV head; a multiple of 32."""
        return TILE * self.plan.bytes_per_token

    def page_bytes(self, num_kv_heads: int, block_size: int) -> int:
        """Bytes of one block of one layer. Raises PlanError unless block_size is a multiple of 16."""
        if block_size <= 0 or block_size % TILE:
            raise PlanError(f"block size {block_size} asked for; pages need a multiple of {TILE}")
        return num_kv_heads * (block_size // TILE) * self.tile_bytes

    @cached_property
    def byte_offset(self) -> dict[str, tuple[tuple[int, ...], ...]]:
        """`[token in tile][byte]` -> offset in the tile, for the code bytes of a side."""
        out = {}
        for side in ("k", "v"):
            rows: list[list[int]] = [[] for _ in range(TILE)]
            for plane, base in zip(self.side(side).planes, self.plane_offsets[side], strict=True):
                for offsets, _ in _plane_bytes(plane, side):
                    for r in range(TILE):
                        rows[r].append(base + offsets[r])
            out[side] = tuple(map(tuple, rows))
        return out

    @cached_property
    def byte_fields(self) -> dict[str, tuple[tuple[Field, ...], ...]]:
        """`[byte]` -> the fields it holds (the same for every token of the tile)."""
        out = {}
        for side in ("k", "v"):
            plan = self.side(side)
            rows = []
            for p, plane in enumerate(plan.planes):
                for _, fields in _plane_bytes(plane, side):
                    rows.append(tuple(Field(c, plan.shift(p, c // GROUP), plane.num_bits, bit) for c, bit in fields))
            out[side] = tuple(rows)
        return out


@lru_cache(maxsize=256)
def layout_of(plan: LayerPlan) -> LatentLayout:
    """The (cached) layout of a plan."""
    return LatentLayout(plan)
