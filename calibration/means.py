# SPDX-License-Identifier: Apache-2.0
"""The means and sink prototypes of one side in the frame of the coder, as the low-rank factors of the file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kqsvd.calibration.frames import Frame, OffsetLaw, rotate_mean, uniform_offsets
from vllm_kqsvd.codec import MEAN_RANK
from vllm_kqsvd.ops.rope_block import RopeSpec


@dataclass(frozen=True)
class MeanFactors:
    """basis [T, M], mean and sink [H, M, d] of vllm_kqsvd.codec.SideCodec (float64), and the covariance
    [H, d, d] of what the truncation to M columns leaves in the data (zero where it is exact)."""

    basis: torch.Tensor
    mean: torch.Tensor
    sink: torch.Tensor
    residual: torch.Tensor

    def at(self, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(mean, sink) [N, H, d] at in-block offsets [N]."""
        rows = self.basis[offsets % self.basis.shape[0]]
        return torch.einsum("nm,hmd->nhd", rows, self.mean), torch.einsum("nm,hmd->nhd", rows, self.sink)


def fixed_means(mean: torch.Tensor, sink: torch.Tensor) -> MeanFactors:
    """Means that no rotation moves: values, and keys without RoPE. mean, sink [H, d]."""
    one = torch.ones(1, 1, dtype=mean.dtype)
    zero = mean.new_zeros(*mean.shape, mean.shape[-1])
    return MeanFactors(one, mean[:, None].clone(), sink[:, None].clone(), zero)


def key_means(mean: torch.Tensor, sink: torch.Tensor, frame: Frame) -> MeanFactors:
    """R_j mean and R_j sink for every offset j of the frame; mean, sink [H, d] float64 before RoPE.

    One rank-16 factorization serves all heads and both classes; it is exact for blocks of 32 (a sum of frequencies
    up to 1 radian per token spans about T / pi + a few columns). `post` has no blocks: what is removed is the average
    of the rotated mean over all positions, and sinks stand at the start, where they are not rotated.
    """
    if frame.mode == "none" or frame.rope_block == 1:
        return fixed_means(mean, sink)
    if frame.mode == "post":
        moved = rotate_mean(mean, frame.rope, uniform_offsets(frame.num_offsets))
        same = (mean == sink).all(-1, keepdim=True)
        return fixed_means(moved, torch.where(same, moved, sink))
    heads, dim = mean.shape
    both = torch.cat((mean, sink))
    offsets = torch.arange(frame.rope_block)
    rows = torch.stack([frame.apply(both[None], offsets[j : j + 1])[0] for j in range(frame.rope_block)])
    u, s, vh = torch.linalg.svd(rows.reshape(frame.rope_block, -1), full_matrices=False)
    rank = min(MEAN_RANK, frame.rope_block)
    factor = (s[:rank, None] * vh[:rank]).reshape(rank, 2 * heads, dim).transpose(0, 1).contiguous()
    left = rows[:, :heads] - torch.einsum("tm,hmd->thd", u[:, :rank], factor[:heads])
    residual = torch.einsum("thd,the->hde", left, left) / frame.rope_block
    return MeanFactors(u[:, :rank].contiguous(), factor[:heads], factor[heads:], residual)


def logit_mean_energy(mean: torch.Tensor, query_gram: torch.Tensor, rope: RopeSpec, law: OffsetLaw) -> torch.Tensor:
    """Energy of a query's mean logit over keys at distances of `law`: a constant the softmax does not see. [H]."""
    moved = rotate_mean(mean, rope, law, sign=-1)
    return torch.einsum("hd,hde,he->h", moved, query_gram, moved)
