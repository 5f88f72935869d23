# SPDX-License-Identifier: Apache-2.0
"""Optimal scalar quantizer of the normal distribution (Lloyd 1957, Max 1960)."""

from __future__ import annotations

import math
from functools import lru_cache

import torch


def _density(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


@lru_cache(maxsize=16)
def gaussian_levels(num_bits: int) -> torch.Tensor:
    """The 2^num_bits reconstruction levels for N(0, 1), ascending, float32."""
    n = 2**num_bits
    levels = torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)
    infinity = torch.tensor([math.inf], dtype=torch.float64)
    for _ in range(2000):  # converges linearly; 6 bits need the most
        edges = torch.cat((-infinity, (levels[1:] + levels[:-1]) / 2, infinity))
        density, mass = _density(edges), torch.special.ndtr(edges)
        better = (density[:-1] - density[1:]) / (mass[1:] - mass[:-1])
        done = (better - levels).abs().max() < 1e-12
        levels = better
        if done:
            break
    return levels.float()
