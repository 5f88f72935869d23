# SPDX-License-Identifier: Apache-2.0
"""The per-token scale byte: bit 7 the class (ordinary or sink), bits 0-6 a positive minifloat.

`value = 2^(e - 8) * (1 + m / 8)` with e the upper four and m the lower three bits: 8 steps per octave over
2^-8 .. 240, decoded by one shift and one add on the bits of a float32 (no exponential in a kernel).
"""

from __future__ import annotations

import torch

_BIAS = (127 - 8) << 23  # float32 exponent of 2^-8
MIN_SCALE = 2.0**-8
MAX_SCALE = 2.0**7 * 1.875


def encode_scale(scale: torch.Tensor, is_sink: torch.Tensor) -> torch.Tensor:
    """Nearest scale byte (ties up) of `scale` [...] float32 > 0 with class bit `is_sink` [...] bool -> uint8."""
    bits = scale.float().clamp(MIN_SCALE, MAX_SCALE).contiguous().view(torch.int32)
    code = ((bits - _BIAS + (1 << 19)) >> 20).clamp(0, 127)
    return (code | (is_sink.to(torch.int32) << 7)).to(torch.uint8)


def decode_scale(byte: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale byte [...] uint8 -> (scale [...] float32, is_sink [...] bool)."""
    code = byte.to(torch.int32)
    return (((code & 127) << 20) + _BIAS).view(torch.float32), code >= 128
