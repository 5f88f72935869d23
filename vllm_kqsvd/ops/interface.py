# SPDX-License-Identifier: Apache-2.0
"""What the serving side asks of an implementation: one `LayerOps` per layer, one `Step` per engine step.

Implementations (reference, cpu, triton, cuda) live in modules of their own and never import vLLM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from vllm_kqsvd.codec import LayerCodec


@dataclass(frozen=True)
class LayerShape:
    """Constants of one attention layer on this rank. `window` W: positions kept exact (0: none)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int  # tokens per latent page
    window_block_size: int  # tokens per exact page
    scale: float
    dtype: torch.dtype
    window: int
    soft_cap: float = 0.0
    sliding_window: int = 0


@dataclass(frozen=True)
class Step:
    """One engine step, shared by all layers. Requests with at most `max_decode_len` query rows come first.

    Device tensors (persistent under CUDA graphs): query_start_loc [S+1] int32, seq_lens [S] int32 (new tokens
    included), block_table [S, n] int32, window_block_table [S, m] int32 (by position // window_block_size),
    positions [N] int64 (of each token). Host integers below; `*_cpu` are host copies (prefill rows exact).
    `plan` is whatever the implementation's `plan_step` returned for this step (device-side decode schedule).
    """

    num_tokens: int
    num_reqs: int
    num_decodes: int  # leading requests served by the decode kernel
    num_decode_tokens: int
    max_decode_len: int  # their largest q_len
    max_seq_len: int
    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens: torch.Tensor
    seq_lens_cpu: torch.Tensor | None
    block_table: torch.Tensor
    window_block_table: torch.Tensor | None
    positions: torch.Tensor
    plan: object = None


class LayerOps(ABC):
    """Store and attend of one layer with its codec's constants prepared on the device."""

    name: str = "abstract"
    graph_safe: bool = False  # decode runs from device tensors alone and may be captured in a CUDA graph
    max_decode_len: int = 1  # longest q_len its decode path takes
    needs_host_lengths: bool = False  # longer rows are planned from `Step.seq_lens_cpu`, an upper bound for drafts
    max_cache_bytes: int = 2**63 - 1  # from the start of a layer's first page to the end of its last one
    passed_over: list[str]  # faster implementations that could not serve this layer, and why

    def __init__(self, codec: LayerCodec, shape: LayerShape) -> None:
        self.codec, self.shape = codec, shape
        self.passed_over = []

    def reserve(self, max_requests: int, max_position: int) -> None:  # noqa: B027 (optional)
        """Allocate all that steps of up to this many requests and positions need, before graphs are captured."""

    def plan_step(self, step: Step) -> object:
        """Device-side preparation shared by all layers of a step; becomes `step.plan`. No host sync."""
        return None

    def forget_steps(self) -> None:  # noqa: B027 (optional)
        """Drop what earlier steps told: they were the start-up self-test's, on tensors that serving does not use."""

    @abstractmethod
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
        """Code key, value [N, H, d] into `pages` [blocks, page_bytes] uint8 and copy them exactly into
        `window_pages` [blocks, H, window_block_size, 2 d]. Slots < 0 are skipped; slot mappings may be
        longer than the live tokens."""

    @abstractmethod
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
        """Causal attention of the step's tokens, written to `output` [N, Hq, d] in place. key, value are the
        step's own rows (already stored)."""
