# SPDX-License-Identifier: Apache-2.0
"""LayerOps that call the reference directly: the slowest implementation and the one nobody can doubt."""

from __future__ import annotations

import torch

from vllm_kqsvd.ops import reference
from vllm_kqsvd.ops.interface import LayerOps, Step


class ReferenceOps(LayerOps):
    """Plain PyTorch on any device; loops over requests on the host, so never under CUDA graphs."""

    name = "reference"

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
        """See LayerOps.store."""
        n = min(slot_mapping.numel(), positions.numel(), key.shape[0])
        reference.store_latent(
            key[:n], value[:n], pages, slot_mapping[:n], positions[:n], self.codec, self.shape.block_size
        )
        if window_pages is not None and window_slot_mapping is not None:
            store_exact(key, value, window_pages, window_slot_mapping[:n])

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        window_pages: torch.Tensor | None,
        step: Step,
        output: torch.Tensor,
    ) -> None:
        """See LayerOps.attend."""
        window = None
        if window_pages is not None and step.window_block_table is not None:
            window = reference.ExactWindow(window_pages, step.window_block_table, self.shape.window)
        out = reference.attend(
            query[: step.num_tokens],
            pages,
            step.block_table[: step.num_reqs],
            step.seq_lens[: step.num_reqs],
            step.query_start_loc[: step.num_reqs + 1],
            self.codec,
            self.shape.block_size,
            self.shape.scale,
            window,
            self.shape.soft_cap,
            self.shape.sliding_window,
            (key, value),
        )
        output[: step.num_tokens] = out.to(output.dtype)


def store_exact(key: torch.Tensor, value: torch.Tensor, window_pages: torch.Tensor, slots: torch.Tensor) -> None:
    """Copy key, value [N, H, d] into window pages [blocks, H, size, 2 d] at `slots` [N]; slot < 0 skips."""
    keep = slots >= 0
    at, size = slots[keep].long(), window_pages.shape[2]
    both = torch.cat((key[: keep.numel()][keep], value[: keep.numel()][keep]), -1)
    window_pages[at // size, :, at % size] = both.to(window_pages.dtype)
