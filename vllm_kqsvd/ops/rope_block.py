# SPDX-License-Identifier: Apache-2.0
"""Rotations by the start of a rope block: the frame in which keys are coded (page-relative RoPE).

A rope block is `rope_block` consecutive positions aligned to position 0. Keys arrive rotated by their
position; turning them back by their block's start leaves R_j k with j the offset in the block, whatever
the position. Turning the query back by the same start leaves every logit unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RopeSpec:
    """Frequencies of a layer's RoPE: `inv_freq` [rotary_dim / 2] float64; the rest of head_dim is not rotated."""

    inv_freq: torch.Tensor
    interleaved: bool = False  # pairs (2i, 2i+1) as in GPT-J; otherwise (i, i + rotary_dim/2) as in NeoX

    @property
    def rotary_dim(self) -> int:
        """Rotated leading part of head_dim."""
        return 2 * self.inv_freq.numel()


def rotate(x: torch.Tensor, positions: torch.Tensor, rope: RopeSpec) -> torch.Tensor:
    """R_p x for x [tokens, heads, head_dim] and integer positions p [tokens] (negative turns back)."""
    half = rope.inv_freq.numel()
    if half == 0:
        return x
    angle = positions.to(torch.float64)[:, None] * rope.inv_freq.to(x.device, torch.float64)
    cos, sin = angle.cos().to(x.dtype)[:, None], angle.sin().to(x.dtype)[:, None]
    rot, rest = x[..., : 2 * half], x[..., 2 * half :]
    if rope.interleaved:
        re, im = rot[..., 0::2], rot[..., 1::2]
        turned = torch.stack((re * cos - im * sin, im * cos + re * sin), -1).flatten(-2)
    else:
        re, im = rot[..., :half], rot[..., half:]
        turned = torch.cat((re * cos - im * sin, im * cos + re * sin), -1)
    return torch.cat((turned, rest), -1)


def block_start(positions: torch.Tensor, rope_block: int) -> torch.Tensor:
    """First position of each position's rope block, int64 like `positions`."""
    return positions // rope_block * rope_block


def block_start_table(rope: RopeSpec, rope_block: int, num_blocks: int) -> torch.Tensor:
    """(cos, sin) of the block starts: [num_blocks, rotary_dim / 2, 2] float32."""
    starts = torch.arange(num_blocks, dtype=torch.float64) * rope_block
    angle = starts[:, None] * rope.inv_freq.to("cpu", torch.float64)
    return torch.stack((angle.cos(), angle.sin()), -1).float()
