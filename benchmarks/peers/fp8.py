# SPDX-License-Identifier: Apache-2.0
"""vLLM's `--kv-cache-dtype fp8`: e4m3 with scale 1.0, its default when a checkpoint brings no scales; and bf16."""

from __future__ import annotations

import torch

from benchmarks.peers.base import PerToken


class Fp8Codec(PerToken):
    """e4m3, saturating."""

    name = "fp8"

    def bits(self, head_dim: int) -> float:
        """8 bits, no scales."""
        return 8.0

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Nearest e4m3 value."""
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


class Bf16Codec(PerToken):
    """The uncompressed cache of a bf16 model: what rounding K and V alone costs."""

    name = "bf16"

    def bits(self, head_dim: int) -> float:
        """16 bits."""
        return 16.0

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Nearest bfloat16 value."""
        return x.bfloat16().to(x.dtype)
