# SPDX-License-Identifier: Apache-2.0
"""vLLM 0.33's `int4_per_token_head` (v1/attention/ops/int4_per_token_head.py): random signs, Hadamard, then
16 levels between the extremes of the token and head, with an integer zero point in 0..15."""

from __future__ import annotations

import torch

from benchmarks.peers.base import PerToken, hadamard

SIGN_SEED = 0x9E3779B9  # the seed vLLM draws its signs from


class Int4PerTokenHeadCodec(PerToken):
    """4 bits and one 32-bit scale (the zero point sits in its lowest mantissa bits) per token, head and side."""

    name = "int4_per_token_head"

    def bits(self, head_dim: int) -> float:
        """4.5 bits at head_dim 64, 4.25 at 128."""
        return 4 + 32 / head_dim

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate, round, rotate back."""
        block = x.shape[-1] & -x.shape[-1]
        generator = torch.Generator().manual_seed(SIGN_SEED)
        signs = 2.0 * torch.bernoulli(torch.full((block,), 0.5), generator=generator) - 1.0
        signs = signs.repeat(x.shape[-1] // block)
        rotation = (signs[:, None] * hadamard(x.shape[-1])).to(x.device)
        y = x.float() @ rotation
        low, high = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-6)
        zero_point = (-low / scale + 0.5).floor().clamp(0, 15)
        code = (y / scale + zero_point + 0.5).floor().clamp(0, 15)
        return (((code - zero_point) * scale) @ rotation.T).to(x.dtype)
