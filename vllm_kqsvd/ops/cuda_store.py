# SPDX-License-Identifier: Apache-2.0
"""Launches of the store and dequantize kernels of one layer."""

from __future__ import annotations

import torch

from vllm_kqsvd.codec import LayerCodec
from vllm_kqsvd.ops.cuda_tables import layer_tables


class LatentStore:
    """Codes rows into latent pages and expands them again. Constants live on the codec's device."""

    def __init__(self, codec: LayerCodec, block_size: int) -> None:
        t = layer_tables(codec)
        frame = (t.rope_table, t.rope_block, t.interleaved, block_size, t.tile_bytes)
        self._store = (*t.k.encoder, *t.v.encoder, *frame)
        self._dequantize = (*t.k.decoder, *t.v.decoder, *frame)

    def store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        window_pages: torch.Tensor | None,
        slot_mapping: torch.Tensor,
        window_slot_mapping: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> None:
        """See LayerOps.store: one launch, nothing allocated, no host sync."""
        if window_pages is None or window_slot_mapping is None:
            window_pages = window_slot_mapping = None
        torch.ops.kqsvd.store_latent(
            key, value, pages, window_pages, slot_mapping, window_slot_mapping, positions, *self._store
        )

    def dequantize(
        self,
        pages: torch.Tensor,
        block_table: torch.Tensor,
        window_pages: torch.Tensor | None,
        window_block_table: torch.Tensor | None,
        ranges: torch.Tensor,
        num_tiles: int,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> None:
        """Fill key, value [rows, H, d] with the positions of `ranges` [5, S + 1] int32 (see `cuda_prefill.Segment`)."""
        torch.ops.kqsvd.dequantize(
            pages, block_table, window_pages, window_block_table, ranges, num_tiles, key, value, *self._dequantize
        )
