# SPDX-License-Identifier: Apache-2.0
"""LayerOps for CPUs: the reference's results, several times faster.

Page bytes are looked up in a 256-row table per plane width (all fields of a byte at once) and multiplied by
a decode matrix whose rows are in stored order, so nothing is unpacked channel by channel. A request's
history is expanded to float32 SPAN tokens at a time and its attention merged by log-sum-exp, so what a layer
call takes for a while does not grow with the context; the cache itself stays coded.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from vllm_kqsvd.codec import LayerCodec, SideCodec
from vllm_kqsvd.layout import TILE, LatentLayout
from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.eager import ReferenceOps
from vllm_kqsvd.ops.interface import LayerShape, Step
from vllm_kqsvd.ops.rope_block import block_start, rotate
from vllm_kqsvd.ops.scale_byte import decode_scale

SPAN = 4096  # tokens of history that are expanded at once


@lru_cache(maxsize=8)
def _fields_of_byte(num_bits: int) -> torch.Tensor:
    """[256, 8 / num_bits] float32: the fields of every byte value, low bits first."""
    value = torch.arange(256)[:, None] >> torch.arange(0, 8, num_bits)
    return (value & ((1 << num_bits) - 1)).float()


class _SideReader:
    """Expands one side of a run of tiles: [H, tiles, tile_bytes] uint8 -> [H, tokens, d] float32."""

    def __init__(self, side: SideCodec, layout: LatentLayout, name: str) -> None:
        self.side = side
        self.order = torch.tensor(layout.byte_offset[name]).flatten()
        self.num_bytes = side.plan.bytes_per_token
        self.scales = layout.scale_offset[name]
        self.planes = [(p.num_bits, p.bytes_per_token) for p in side.plan.planes]
        fields = [f for byte in layout.byte_fields[name] for f in sorted(byte, key=lambda f: f.bit)]
        rows = torch.tensor([f.channel for f in fields])
        weight = torch.tensor([2.0**f.shift for f in fields])
        self.matrix = side.decode[:, rows] * weight[:, None]  # [H, fields, d]
        zero_point = 2.0 ** (side.channel_bits() - 1).to(side.decode.dtype) - 0.5
        self.zero = torch.einsum("r,hrd->hd", zero_point, side.decode)[:, None]

    def __call__(self, tiles: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        heads, num_tiles, _ = tiles.shape
        data = tiles.index_select(-1, self.order).view(heads, num_tiles * TILE, self.num_bytes).int()
        fields, at = [], 0
        for bits, count in self.planes:
            part = F.embedding(data[..., at : at + count], _fields_of_byte(bits))
            fields.append(part.flatten(-2))
            at += count
        x = torch.bmm(torch.cat(fields, -1), self.matrix) - self.zero
        byte = tiles[..., self.scales : self.scales + TILE].reshape(heads, -1)
        scale, is_sink = decode_scale(byte)
        x *= scale[..., None]
        basis = self.side.mean_basis[positions % self.side.mean_basis.shape[0]]
        x += basis @ self.side.mean
        if bool(is_sink.any()):
            x += (basis @ (self.side.sink - self.side.mean)) * is_sink[..., None]
        return x


def _merge(
    a: tuple[torch.Tensor, torch.Tensor] | None, b: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention on the keys of both parts, each (output [H, rows, d], log-sum-exp [H, rows])."""
    if a is None:
        return b
    total = torch.logaddexp(a[1], b[1])
    return a[0] * (a[1] - total).exp()[..., None] + b[0] * (b[1] - total).exp()[..., None], total


class CpuOps(ReferenceOps):
    """Store as the reference does; attend through table look-ups and float32 matrix products."""

    name = "cpu"

    def __init__(self, codec: LayerCodec, shape: LayerShape) -> None:
        super().__init__(codec.to("cpu"), shape)
        self._read = {n: _SideReader(getattr(self.codec, n), codec.layout, n) for n in ("k", "v")}

    def expand(
        self, pages: torch.Tensor, blocks: torch.Tensor, length: int, start: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (after RoPE) and values [H, length, d] float32 of positions from `start`, where `blocks` begin."""
        heads, size = self.shape.num_kv_heads, self.shape.block_size
        num_tiles = -(-length // TILE)
        tiles = pages[blocks.long()].view(blocks.numel(), heads, size // TILE, -1).transpose(0, 1)
        tiles = tiles.reshape(heads, -1, tiles.shape[-1])[:, :num_tiles]
        positions = torch.arange(start, start + num_tiles * TILE)
        key, value = self._read["k"](tiles, positions), self._read["v"](tiles, positions)
        if t := self.codec.rope_block:
            turned = rotate(key.transpose(0, 1), block_start(positions, t), self.codec.rope)
            key = turned.transpose(0, 1)
        return key[:, :length], value[:, :length]

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        window_pages: torch.Tensor | None,
        step: Step,
        output: torch.Tensor,
    ) -> None:
        """See LayerOps.attend."""
        s, starts = self.shape, step.query_start_loc_cpu.tolist()
        lengths = step.seq_lens.tolist()
        for i in range(step.num_reqs):
            rows, length = slice(starts[i], starts[i + 1]), lengths[i]
            q_len = starts[i + 1] - starts[i]
            if q_len <= 0 or length <= 0:
                continue
            first = length
            if window_pages is not None and step.window_block_table is not None:
                first = int(reference.window_start(torch.tensor(length - q_len), s.window))
            table, parts = step.block_table[i, : -(-first // s.block_size)], []
            # history that no row is forbidden to see is read in spans; else in one piece, under a mask
            spans = first <= length - q_len + 1 and not (s.soft_cap or s.sliding_window)
            if first and not spans:
                parts.append(self.expand(pages, table, first))
            if first < length:
                own = length - q_len
                if first < own and window_pages is not None and step.window_block_table is not None:
                    parts.append(self._exact(window_pages, step.window_block_table[i], first, own))
                parts.append((key[rows].transpose(0, 1).float(), value[rows].transpose(0, 1).float()))
            recent = [torch.cat(x, 1) for x in zip(*parts, strict=True)]
            if spans:
                out = self._in_spans(query[rows], pages, table, first, recent)
            else:
                out = self._softmax(query[rows], recent[0], recent[1], length, q_len)
            output[rows] = out.to(output.dtype)

    def _in_spans(
        self, q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, first: int, recent: list[torch.Tensor]
    ) -> torch.Tensor:
        """q [q_len, Hq, d] on latents [0, first), which all rows see, and `recent` keys and values from there.

        `recent`: two tensors [H, n, d] that end with the rows' own positions, or none. Returns [q_len, Hq, d] float32.
        """
        s, q_len = self.shape, q.shape[0]
        grouped = q.float().view(q_len, s.num_kv_heads, -1, s.head_dim).permute(1, 2, 0, 3)
        grouped = grouped.reshape(s.num_kv_heads, -1, s.head_dim)  # [H, g q_len, d]
        step = max(SPAN // s.block_size, 1) * s.block_size
        merged = None
        for start in range(0, first, step):
            length = min(step, first - start)
            blocks = table[start // s.block_size : -(-(start + length) // s.block_size)]
            merged = _merge(merged, self._part(grouped, *self.expand(pages, blocks, length, start)))
        if recent:
            mask = None
            if q_len > 1:
                n = recent[0].shape[1]
                ahead = torch.full((q_len, n), float("-inf")).triu(n - q_len + 1)
                mask = ahead.repeat(grouped.shape[1] // q_len, 1)[None, None]
            merged = _merge(merged, self._part(grouped, recent[0], recent[1], mask))
        assert merged is not None
        out = merged[0].view(s.num_kv_heads, -1, q_len, s.head_dim)
        return out.permute(2, 0, 1, 3).reshape(q_len, -1, s.head_dim)

    def _part(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention [H, rows, d] of q on some of its keys [H, n, d], and log-sum-exp of its scores [H, rows]."""
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out, total = flash(q[None], k[None], v[None], attn_mask=mask, scale=self.shape.scale)
        return out[0], total[0]

    def _exact(
        self, window_pages: torch.Tensor, table: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [start, stop) from the window pages: each [H, stop - start, d] float32."""
        size, near = window_pages.shape[2], torch.arange(start, stop)
        both = window_pages[table.long()[near // size], :, near % size].transpose(0, 1).float()
        return both[..., : self.shape.head_dim], both[..., self.shape.head_dim :]

    def _softmax(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: int, q_len: int) -> torch.Tensor:
        """q [q_len, Hq, d], k and v [H, length, d] -> [q_len, Hq, d] float32, causal."""
        s = self.shape
        hidden = None
        if q_len > 1 or s.sliding_window:
            at, pos = torch.arange(length - q_len, length)[:, None], torch.arange(length)
            hidden = pos > at
            if s.sliding_window:
                hidden |= pos <= at - s.sliding_window
        if not s.soft_cap:  # in tiles, without the matrix of scores: a third of the time and less for long contexts
            seen = None if hidden is None else ~hidden
            rows = q.float().transpose(0, 1)[None]
            out = F.scaled_dot_product_attention(rows, k[None], v[None], attn_mask=seen, scale=s.scale, enable_gqa=True)
            return out[0].transpose(0, 1)
        grouped = q.float().view(q_len, s.num_kv_heads, -1, s.head_dim).permute(1, 2, 0, 3)  # [H, g, q, d]
        score = torch.matmul(grouped, k[:, None].transpose(-1, -2)) * s.scale
        score = s.soft_cap * torch.tanh(score / s.soft_cap)
        if hidden is not None:
            score = score.masked_fill(hidden, float("-inf"))
        out = torch.matmul(score.softmax(-1), v[:, None])
        return out.permute(2, 0, 1, 3).reshape(q_len, -1, s.head_dim)
