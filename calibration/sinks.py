# SPDX-License-Identifier: Apache-2.0
"""Finds attention sinks: tokens whose key or value is a constant vector of the layer and head, whatever the token.

They stand mostly at position 0, but not always, and chat templates make several. The coder gives each token a class
(docs/format.md 1.2) by the rule used here, |x - sink|^2 < 0.3 |x - mean|^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.codec import SINK_RATIO

FIRST_ORDINARY = 4  # earlier positions never enter the moments, whatever their class
_MIN_SHARE_AT_START = 0.5  # of first tokens that must be sinks for a head to have sinks
_MAX_SHARE_ELSEWHERE = 0.1  # of later tokens that may be


@dataclass(frozen=True)
class Prototypes:
    """Ordinary mean and sink prototype of one side of one layer, [H, d] each; equal where a head has no sinks."""

    mean: torch.Tensor
    sink: torch.Tensor

    def is_sink(self, x: torch.Tensor) -> torch.Tensor:
        """Class of x [..., H, d] -> [..., H] bool."""
        near = (x - self.sink).square().sum(-1)
        return near < SINK_RATIO * (x - self.mean).square().sum(-1)

    def to(self, device: torch.device | str) -> Prototypes:
        """A float32 copy on `device`."""
        return Prototypes(self.mean.to(device, torch.float32), self.sink.to(device, torch.float32))


def find_prototypes(x: torch.Tensor, rounds: int = 3) -> Prototypes:
    """Prototypes from pilot texts x [texts, positions, H, d] (keys before RoPE, or values), float64.

    Starts from the median over texts of the first token and alternates classes and means a few times.
    """
    sink = x[:, 0].median(0).values
    mean = x[:, FIRST_ORDINARY:].mean((0, 1))
    for _ in range(rounds):
        found = Prototypes(mean, sink)
        mask = found.is_sink(x)
        ordinary = ~mask
        ordinary[:, :FIRST_ORDINARY] = False
        sink = _masked_mean(x, mask, sink)
        mean = _masked_mean(x, ordinary, mean)
    mask = Prototypes(mean, sink).is_sink(x)
    at_start = mask[:, 0].double().mean(0)
    elsewhere = mask[:, FIRST_ORDINARY:].double().mean((0, 1))
    has = (at_start >= _MIN_SHARE_AT_START) & (elsewhere <= _MAX_SHARE_ELSEWHERE)
    return Prototypes(mean, torch.where(has[:, None], sink, mean))


def _masked_mean(x: torch.Tensor, mask: torch.Tensor, default: torch.Tensor) -> torch.Tensor:
    """Mean of x [..., H, d] over the leading dimensions where mask [..., H]; `default` [H, d] where nothing is."""
    dims = tuple(range(mask.ndim - 1))
    count = mask.sum(dims)[:, None]
    total = (x * mask[..., None]).sum(dims)
    return torch.where(count > 0, total / count.clamp_min(1), default)
