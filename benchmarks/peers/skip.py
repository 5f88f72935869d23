# SPDX-License-Identifier: Apache-2.0
"""Some layers left in 16 bits, as vLLM does for TurboQuant's first and last two."""

from __future__ import annotations

from collections.abc import Collection


def boundary_layers(num_layers: int, n: int = 2) -> frozenset[int]:
    """The first and last `n` layers, at most half of them each."""
    n = min(n, num_layers // 2)
    return frozenset(range(n)) | frozenset(range(num_layers - n, num_layers))


class SkipLayers:
    """`codec` on every layer but `layers`."""

    def __init__(self, codec, layers: Collection[int], num_layers: int, name: str = "") -> None:
        self.codec, self.layers, self.num_layers = codec, frozenset(layers), num_layers
        self.name, self.group_tokens = name or codec.name, codec.group_tokens

    def bits(self, head_dim: int) -> float:
        """Average over the layers, 16 bits for the skipped ones."""
        skipped = len(self.layers) / self.num_layers
        return 16 * skipped + self.codec.bits(head_dim) * (1 - skipped)

    def roundtrip(self, layer, key, value, positions):
        """See vllm_kqsvd.verify_harness.CacheCodec."""
        return None if layer in self.layers else self.codec.roundtrip(layer, key, value, positions)
