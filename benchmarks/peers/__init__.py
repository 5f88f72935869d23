# SPDX-License-Identifier: Apache-2.0
"""Other KV-cache formats as `CacheCodec`s, re-implemented from their sources, for the fidelity table.

All quantize float32 inputs and keep their scales as their own cache does; where a server would round first
to its 16-bit model dtype, these do not, which favours them slightly.
"""

from __future__ import annotations

from benchmarks.peers.centred import CentredCodec
from benchmarks.peers.fp8 import Bf16Codec, Fp8Codec
from benchmarks.peers.int4 import Int4PerTokenHeadCodec
from benchmarks.peers.kivi import KiviCodec
from benchmarks.peers.nvfp4 import Nvfp4Codec
from benchmarks.peers.skip import SkipLayers, boundary_layers
from benchmarks.peers.turboquant import RotatedLloydMaxCodec, TurboQuantCodec

__all__ = [
    "Bf16Codec",
    "CentredCodec",
    "Fp8Codec",
    "Int4PerTokenHeadCodec",
    "KiviCodec",
    "Nvfp4Codec",
    "RotatedLloydMaxCodec",
    "SkipLayers",
    "TurboQuantCodec",
    "boundary_layers",
]
