# SPDX-License-Identifier: Apache-2.0
"""NVFP4: e2m1 elements with an e4m3 scale per 16 of them (global scale 1)."""

from __future__ import annotations

import torch

from benchmarks.peers.base import PerToken

LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of e2m1
GROUP = 16


class Nvfp4Codec(PerToken):
    """4.5 bits per element."""

    name = "nvfp4"

    def bits(self, head_dim: int) -> float:
        """4 bits and an 8-bit scale per 16 elements."""
        return 4 + 8 / GROUP

    def key(self, x: torch.Tensor) -> torch.Tensor:
        """Nearest e2m1 value under the group's scale."""
        y = x.float().unflatten(-1, (-1, GROUP))
        scale = (y.abs().amax(-1, keepdim=True) / 6).clamp(2.0**-9, 448).to(torch.float8_e4m3fn).float()
        levels = torch.tensor(LEVELS, device=x.device)
        magnitude = levels[torch.bucketize((y / scale).abs(), (levels[1:] + levels[:-1]) / 2)]
        return (magnitude * y.sign() * scale).flatten(-2).to(x.dtype)
