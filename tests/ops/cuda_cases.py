# SPDX-License-Identifier: Apache-2.0
"""Shapes, plans and frames on which the CUDA kernels are compared with the reference, and how pages are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.helpers import random_codec, side_plan
from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.layout import TILE
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.packing import codes_from_bytes, tile_index
from vllm_kqsvd.ops.rope_block import block_start, rotate
from vllm_kqsvd.ops.scale_byte import decode_scale
from vllm_kqsvd.plan import LayerPlan


@dataclass(frozen=True)
class Case:
    """One layer shape. `bits_k`, `bits_v`: code width of each group."""

    bits_k: tuple[int, ...]
    bits_v: tuple[int, ...]
    dim: int = 64
    heads: int = 2
    dtype: torch.dtype = torch.bfloat16
    block_size: int = 32
    window_block_size: int = 16
    rope_block: int = 32
    rotary_dim: int | None = None
    interleaved: bool = False

    def codec(self, seed: int = 0) -> LayerCodec:
        """A random codec of this shape."""
        return random_codec(
            LayerPlan(side_plan(*self.bits_k), side_plan(*self.bits_v)),
            self.heads,
            self.dim,
            self.rope_block,
            seed,
            self.rotary_dim,
            self.interleaved,
        )

    @property
    def tolerance(self) -> float:
        """Relative error of 16-bit output rows against float64: output rounding and the fp16 decode matrix."""
        return 2.5e-3 if self.dtype == torch.bfloat16 else 6e-4

    def __str__(self) -> str:
        frame = f"T{self.rope_block}" + (f"r{self.rotary_dim}" if self.rotary_dim is not None else "")
        bits = "-".join("".join(map(str, b)) for b in (self.bits_k, self.bits_v))
        kind = "bf16" if self.dtype == torch.bfloat16 else "fp16"
        return f"d{self.dim}-{bits}-{frame}{'i' * self.interleaved}-{kind}-b{self.block_size}"


FP16 = torch.float16
CASES = [
    Case((8, 4, 4), (4, 4, 2, 2)),
    Case((8, 3, 3, 3, 3), (5, 5, 5, 5, 2, 2), dim=96, block_size=48, dtype=FP16),
    Case((8, 4, 4, 2, 2, 2, 2), (4, 4, 2, 2, 2, 2), dim=128, heads=1, block_size=64, rope_block=64),
    Case((4, 4), (2, 2), block_size=16, rotary_dim=32, interleaved=True, dtype=FP16),
    Case((6, 6, 2, 2), (1, 1, 1, 1), rope_block=0, block_size=128, window_block_size=32),
    Case((8, 6, 6), (4,), dim=80, heads=1, rope_block=1, rotary_dim=40),
    Case((8, 8, *[4] * 10), (4, 4, *[2] * 8), dim=256, heads=1, rope_block=16),
]


@dataclass
class Rows:
    """New rows in shuffled slots of a poisoned cache; some slots are -1."""

    key: torch.Tensor
    value: torch.Tensor
    pages: torch.Tensor
    window: torch.Tensor
    slots: torch.Tensor
    window_slots: torch.Tensor
    positions: torch.Tensor


def paged_rows(case: Case, tokens: int, seed: int, device: str = "cpu") -> Rows:
    """`tokens` rows of two runs of positions, one of them far out; every fifth slot and every third window slot -1."""
    gen = torch.Generator().manual_seed(seed)
    codec = case.codec()
    size, near = case.block_size, case.window_block_size
    blocks, near_blocks = -(-tokens // size) + 3, -(-tokens // near) + 2
    width = (8 + 2 + 2) * case.dim  # a fused projection's output: rows are strided
    qkv = (2 * torch.randn(tokens, width * case.heads, generator=gen)).to(case.dtype)
    part = case.heads * case.dim
    key = qkv[:, 8 * part : 9 * part].view(tokens, case.heads, case.dim)
    value = qkv[:, 10 * part : 11 * part].view(tokens, case.heads, case.dim)
    codec_v = codec.v
    value[::4] += (codec_v.sink[:, 0] * 1.02).to(case.dtype)  # some rows of the sink class
    run = tokens // 2
    positions = torch.cat((torch.arange(5, 5 + run), torch.arange(99_990, 99_990 + tokens - run)))
    start = torch.randperm(blocks, generator=gen)
    slots = (start[:, None] * size + torch.arange(size)).flatten()[3 : 3 + tokens].clone()
    near_slots = torch.randperm(near_blocks * near, generator=gen)[:tokens].clone()
    slots[::5], near_slots[1::3] = -1, -1
    pages = torch.randint(0, 256, (blocks, codec.layout.page_bytes(case.heads, size)), generator=gen).byte()
    window = torch.full((near_blocks, case.heads, near, 2 * case.dim), 7.0, dtype=case.dtype)
    rows = Rows(key, value, pages, window, slots, near_slots, positions)
    if device != "cpu":
        moved = qkv.to(device)
        rows.key = moved[:, 8 * part : 9 * part].view(tokens, case.heads, case.dim)
        rows.value = moved[:, 10 * part : 11 * part].view(tokens, case.heads, case.dim)
        for name in ("pages", "window", "slots", "window_slots", "positions"):
            setattr(rows, name, getattr(rows, name).to(device))
    return rows


def assert_pages_close(got: torch.Tensor, want: torch.Tensor, rows: Rows, exact64: LayerCodec, size: int) -> None:
    """Codes may differ only by one level where the exact latent is within 1e-2 of a rounding boundary; scale bytes
    only within 1e-4 of the middle between two; everything outside the stored rows is untouched."""
    keep = rows.slots >= 0
    slots, positions = rows.slots[keep], rows.positions[keep]
    tile = reference._byte_address(slots, exact64, size)
    touched = torch.zeros_like(want, dtype=torch.bool)
    for name, side, x in (("k", exact64.k, rows.key), ("v", exact64.v, rows.value)):
        x = x[keep].double()
        if name == "k" and exact64.rope_block:
            x = rotate(x, -block_start(positions, exact64.rope_block), exact64.rope)
        index = tile[1][..., None] + tile_index(exact64.layout, name, slots % TILE)[:, None]
        scale_at = tile[1] + exact64.layout.scale_offset[name] + (slots % TILE)[:, None]
        block = tile[0][:, None]
        touched[block[..., None], index] = True
        touched[block, scale_at] = True
        mine, theirs = (codes_from_bytes(p[block[..., None], index], exact64.layout, name) for p in (got, want))
        byte, want_byte = got[block, scale_at], want[block, scale_at]
        mean, sink = reference._means(side, positions)
        is_sink = decode_scale(want_byte)[1]
        latent = torch.einsum("nhd,hdr->nhr", x - torch.where(is_sink[..., None], sink, mean), side.encode)
        scale = torch.maximum(
            (side.scale_weight * latent.square()).sum(-1).sqrt(), (side.guard_weight * latent.abs()).amax(-1)
        )
        assert torch.equal(byte >> 7, want_byte >> 7), f"{name}: class bits differ"
        off = byte != want_byte
        middle = (decode_scale(byte)[0] + decode_scale(want_byte)[0]).double() / 2
        assert bool(((scale - middle).abs() < 1e-4 * scale)[off].all()), f"{name}: scale bytes differ"
        half = 2.0 ** (side.channel_bits() - 1).double()
        exact = latent / decode_scale(byte)[0].double()[..., None] + half
        near = (exact - exact.round()).abs() < 1e-2
        differs = (mine != theirs) & ~off[..., None]
        assert bool(near[differs].all()), f"{name}: {int((differs & ~near).sum())} codes differ off a boundary"
        assert float(torch.nan_to_num(differs.double().mean())) < 1e-3, (
            f"{name}: {float(differs.double().mean()):.1e} of the codes differ"
        )
    assert torch.equal(got[~touched], want[~touched]), "bytes outside the stored rows changed"
