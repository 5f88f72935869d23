# SPDX-License-Identifier: Apache-2.0
"""KIVI (arXiv 2402.02750): keys per channel over groups of tokens, values per token over groups of channels."""

from __future__ import annotations

import torch

from benchmarks.peers.base import round_min_max


class KiviCodec:
    """Asymmetric min-max with float16 scale and zero per group of 32; a group of tokens is exact until complete."""

    def __init__(self, num_bits: int, group: int = 32) -> None:
        self.num_bits, self.group_tokens = num_bits, group
        self.name = f"kivi-{num_bits}-g{group}"

    def bits(self, head_dim: int) -> float:
        """Codes, scale and zero: 5 bits for 4-bit codes in groups of 32."""
        return self.num_bits + 32 / self.group_tokens

    def roundtrip(self, layer, key, value, positions):
        """See vllm_kqsvd.verify_harness.CacheCodec."""
        n, heads, dim = key.shape
        g = self.group_tokens
        whole = n // g * g
        k = round_min_max(key[:whole].float().view(-1, g, heads, dim), self.num_bits, 1).view(whole, heads, dim)
        v = round_min_max(value.float().reshape(n, heads, -1, min(g, dim)), self.num_bits, -1).view(n, heads, dim)
        return torch.cat((k.to(key.dtype), key[whole:])), v.to(value.dtype)
