# SPDX-License-Identifier: Apache-2.0
"""What the peers share: a codec of one tensor at a time, Hadamard rotation, uniform rounding."""

from __future__ import annotations

import torch


class PerToken:
    """A format that codes every token, head and side alone: subclasses give `key` and `value` [N, H, d] -> same."""

    name = "identity"
    group_tokens = 1

    def bits(self, head_dim: int) -> float:
        """Stored bits per element of K and V, scales included."""
        raise NotImplementedError

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Keys after a round trip through the cache."""
        raise NotImplementedError

    def value(self, x: torch.Tensor) -> torch.Tensor:
        """Values after a round trip; by default the same format as keys."""
        return self.key(x)

    def roundtrip(self, layer, key, value, positions):
        """See vllm_kqsvd.verify_harness.CacheCodec."""
        return self.key(key), self.value(value)


def hadamard(dim: int) -> torch.Tensor:
    """Orthonormal Sylvester-Hadamard matrix [dim, dim]; block diagonal where dim is not a power of two."""
    block = dim & -dim
    h = torch.ones(1, 1)
    while h.shape[0] < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return torch.block_diag(*[h] * (dim // block)) / block**0.5


def round_min_max(x: torch.Tensor, num_bits: int, dim: int) -> torch.Tensor:
    """Asymmetric uniform quantization between the extremes along `dim`; scale and zero stored as float16."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = ((high - low) / (2**num_bits - 1)).clamp_min(1e-8)
    code = ((x - low) / scale + 0.5).floor().clamp(0, 2**num_bits - 1)
    return code * scale.half().float() + low.half().float()
