# SPDX-License-Identifier: Apache-2.0
"""vLLM's FlashAttention for the exact part of prefill, where the ops have a place for it."""

from __future__ import annotations

import torch

from vllm_kqsvd.ops.interface import LayerOps


def use_flash_attention(ops: LayerOps) -> None:
    """Give the ops' prefill vLLM's own FlashAttention build; without one they keep PyTorch's."""
    prefill = getattr(ops, "prefill", None)
    if prefill is None:
        return
    try:
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version
    except ImportError:
        return
    version = get_flash_attn_version()
    if version is None:
        return

    def varlen(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        max_q: int,
        max_k: int,
        scale: float,
        causal: bool,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See ops.cuda_prefill.Varlen."""
        return flash_attn_varlen_func(
            q, k, v, max_q, cu_q, max_k, cu_k,
            softmax_scale=scale, causal=causal, out=out, return_softmax_lse=True, fa_version=version,
        )  # fmt: skip

    prefill.varlen = varlen
