# SPDX-License-Identifier: Apache-2.0
"""Scratch memory shared by all layers of a device: allocated early, kept for good.

A captured CUDA graph holds addresses, so a buffer that has to grow leaves the smaller one alive.
"""

from __future__ import annotations

import torch

_buffers: dict[tuple[str, torch.dtype, torch.device], list[torch.Tensor]] = {}


def scratch(name: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The first `numel` elements of the buffer `name`; contents are whatever the last user left."""
    kept = _buffers.setdefault((name, dtype, device), [])
    if not kept or kept[-1].numel() < numel:
        kept.append(torch.empty(numel, dtype=dtype, device=device))
    return kept[-1][:numel]
