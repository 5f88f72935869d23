# SPDX-License-Identifier: Apache-2.0
"""TurboQuant as vLLM 0.33 ships it, and the stronger symmetric form the literature describes.

vLLM (layers/quantization/turboquant, v1/attention/ops/triton_turboquant_store.py): keys are normalised, turned
by a Hadamard matrix and rounded to Lloyd-Max levels of N(0, 1/d); the levels are normalised again on the way
out ("nc"); the norm is a float16. Values are *not* rotated: min-max levels with float16 scale and zero.
Its 2 + 2 boundary layers left in 16 bits are `SkipLayers`.
"""

from __future__ import annotations

import torch

from benchmarks.peers.base import PerToken, hadamard, round_min_max
from benchmarks.peers.lloyd_max import gaussian_levels


def rotated_lloyd_max(x: torch.Tensor, num_bits: int) -> torch.Tensor:
    """Normalise, Hadamard, Lloyd-Max levels, normalise the levels, turn back; float16 norm. x [N, H, d]."""
    dim = x.shape[-1]
    rotation = hadamard(dim).to(x.device)
    levels = gaussian_levels(num_bits).to(x.device) / dim**0.5
    norm = x.float().norm(dim=-1, keepdim=True)
    y = (x.float() / (norm + 1e-8)) @ rotation
    code = torch.bucketize(y, (levels[1:] + levels[:-1]) / 2, right=True)
    y = levels[code]
    y = y / y.norm(dim=-1, keepdim=True)
    return ((y @ rotation.T) * norm.half().float()).to(x.dtype)


class TurboQuantCodec(PerToken):
    """`turboquant_4bit_nc` and `turboquant_3bit_nc` of vLLM, before any boundary layers are skipped."""

    def __init__(self, num_bits: int) -> None:
        self.num_bits = num_bits
        self.name = f"turboquant_{num_bits}bit_nc"

    def bits(self, head_dim: int) -> float:
        """Keys carry a 16-bit norm, values a 16-bit scale and zero."""
        return self.num_bits + (16 + 32) / 2 / head_dim

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Rotated Lloyd-Max."""
        return rotated_lloyd_max(x, self.num_bits)

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Plain min-max."""
        return round_min_max(x.float(), self.num_bits, -1).to(x.dtype)


class RotatedLloydMaxCodec(PerToken):
    """TurboQuant-like: rotated Lloyd-Max on both sides, a 16-bit norm each (4.25 bits at head_dim 64)."""

    def __init__(self, num_bits: int) -> None:
        self.num_bits = num_bits
        self.name = f"turboquant-like-{num_bits}"

    def bits(self, head_dim: int) -> float:
        """Codes and one 16-bit norm per token, head and side."""
        return self.num_bits + 16 / head_dim

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Rotated Lloyd-Max."""
        return rotated_lloyd_max(x, self.num_bits)
