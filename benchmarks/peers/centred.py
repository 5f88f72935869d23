# SPDX-License-Identifier: Apache-2.0
"""The strongest simple rival: Hadamard and Lloyd-Max levels on keys without their rotated mean.

A key's mean before RoPE, R_p mu at position p, is most of its energy; taking it away helps any format. The
means are those of our own projection folder, so the two differ in nothing but the coder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from benchmarks.peers.base import PerToken
from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.ops.rope_block import block_start, rotate


class CentredCodec:
    """`codec` applied to K - R_p mu and V - mean."""

    def __init__(self, codec: PerToken, layers: Mapping[int, LayerCodec]) -> None:
        self.codec, self.layers = codec, layers
        self.group_tokens = codec.group_tokens
        self.name = f"centred-{codec.name}"

    def bits(self, head_dim: int) -> float:
        """As the codec inside: means cost nothing per token."""
        return self.codec.bits(head_dim)

    def roundtrip(self, layer, key, value, positions):
        """See vllm_kqsvd.verify_harness.CacheCodec."""
        ours = self.layers.get(layer)
        if ours is None:
            return None
        table = ours.k.mean_basis[positions % ours.k.mean_basis.shape[0]]
        k_mean = torch.einsum("nm,hmd->nhd", table, ours.k.mean)
        if ours.rope_block:
            k_mean = rotate(k_mean, block_start(positions, ours.rope_block), ours.rope)
        v_mean = ours.v.mean_basis[0] @ ours.v.mean  # [H, d]
        k_mean, v_mean = k_mean.to(key.dtype), v_mean.to(value.dtype)
        return self.codec.key(key - k_mean) + k_mean, self.codec.value(value - v_mean) + v_mean
